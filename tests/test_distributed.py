"""Runs on 1, 2 and 4 ranks are the same run; what befalls one rank befalls all; what is saved stays whole.

Runs to compare are in float64, where a curve that is another shows from the first step on.
"""

import contextlib
import functools
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (FORTY, HERE, ROOT, TEMPORARY, TINY_RUN, latest, losses_of, num_lines, numbers,
                      read_lines, tiny_of, wait_for, write_lines)
from on_ranks import ENVIRONMENT, answers, begin, on_ranks
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import engine.distributed
import train
from engine import InputError
from engine.distributed import MAX_HOURS, Stopped, StopRequest, compile_layers, max_over_ranks
from engine.sampling import Sampler
from engine.toy import toy

pytestmark = pytest.mark.xdist_group("ranks")  # one worker has the process that forks, and the runs
PROMPTS = ["a", "Review of The", "Review of The Winter Harbor:" * 9, "b c d", "Review" * 30, "x", "The plot"]
ANSWERS = {"chosen": " Yes.", "rejected": " No."}
SEVEN, THREE = (write_lines(os.path.join(TEMPORARY.name, f"{count}.jsonl"), [
    {"prompt": prompt, **ANSWERS} for prompt in PROMPTS[:count]]) for count in (7, 3))
EXACT = ["dtype=float64", "compute_dtype=float64"]
RUN = [f"data={FORTY}", f"eval_data={FORTY}", "num_eval_examples=9", "batch_size=5", "max_steps=8",
       "num_epochs=9", "lr=1e-3", "warmup_steps=2", "sample_max_tokens=6", "num_samples=2", "eval_every=8",
       "max_tokens_per_microbatch=120", "eval_batch_size=400", *EXACT]
LOSSES = {
    "sft": ["max_tokens_per_microbatch=30"], "rm": [], "rpo": [],  # one example in a microbatch
    "dpo": ["dpo.sft_weight=0.1", "max_tokens_per_microbatch=60"],
    "ipo": ["ipo.average_logps=true", "reference_cache=false"],
    "kd": ["kd.sft_weight=0.5"], "spin": ["num_epochs=0.6", "spin.max_tokens=12", "spin.mix_previous=true"]}
CONSTANT = [*RUN, "eval_every=4", "lr_schedule=constant", "loss=dpo", "optimizer=AdamW"]
SAMPLED = [*RUN, "loss=dpo", "max_steps=0", "num_samples=7", "sample_max_tokens=9", "eval_batch_size=3"]
RUNS = {name: [*RUN, f"loss={name}", *more] for name, more in LOSSES.items()} | {
    "whole": CONSTANT,
    "half": [*CONSTANT, "max_steps=4"],
    "background": [*CONSTANT, "max_steps=4", "async_save=true", "save_every=1"],
    "hybrid": [*CONSTANT, "fsdp.replicas=2", "fsdp.reshard_after_forward=false", "fsdp.reduce_once=false",
               "activation_checkpointing=true"],
    "float32": [*RUN, "loss=dpo", "max_steps=1", "dtype=float32", "compute_dtype=float32"],
    "bfloat16": [*RUN, "loss=dpo", "max_steps=1", "dtype=float32", "compute_dtype=bfloat16"],
    "seven": [*SAMPLED, f"eval_data={SEVEN}"],
    "three": [*SAMPLED, f"eval_data={THREE}"],
    "stopped": [f"data={FORTY}", "batch_size=4", "max_steps=8", "eval_every=0", "save_every=2", *EXACT,
                "lr_schedule=constant"]}
STOPPED = [*RUNS["stopped"], "run_dir=stopped"]


@pytest.fixture(scope="session")
def made(sft_run, tmp_path_factory):
    """made("dpo", 2) is the folder of that run on so many ranks, which the first test that asks begins."""
    base = tmp_path_factory.mktemp("made")
    model = f"{sft_run}/LATEST"

    @functools.cache
    def make(name, num_ranks, trouble=None):
        folder = f"{base}/{name}{num_ranks}{trouble or ''}"
        models = {"kd": [f"reference={model}", f"tokenizer={model}"], "stopped": []}
        models = models.get(name, [f"model={model}"])
        on_ranks(num_ranks, f"reference_cache={folder}-cache", *RUNS[name], *models, f"run_dir={folder}",
                 trouble=trouble)
        return folder
    return make


def assert_same_curve(folder, other, num_steps, **options):
    ours, theirs = numbers(folder), numbers(other)
    assert sum("grad_norm" in line for line in ours) == num_steps
    assert_same_lines(ours, theirs, **options)


def assert_same_lines(ours, theirs, tolerance=1e-6):
    """In float64, but norms compute in float32, where a last bit that falls otherwise is 6e-8 of a number."""
    for line, expected in zip(ours, theirs, strict=True):
        if abs(expected.get("rewards/margins", 1)) < 1e-6:  # all are 0, and rounding says which is larger
            del line["rewards/accuracies"], expected["rewards/accuracies"]
        assert line == pytest.approx(expected, rel=tolerance, abs=tolerance)


# ---------------------------------------------------------------- the same run on any number of ranks


@pytest.mark.parametrize("name, num_ranks", [
    *((name, 2) for name in LOSSES), ("dpo", 4),
    *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("sft", "kd", "spin"))])
def test_a_curve_is_the_same_on_any_number_of_ranks(name, num_ranks, made):
    """Of 5 examples a step: shares are unequal, and where they are microbatches some ranks have idle ones."""
    assert_same_curve(made(name, 1), made(name, num_ranks), 8)
    evaluated = [line["loss"] for line in numbers(made(name, 1)) if "lr" not in line]
    assert abs(evaluated[-1] - evaluated[0]) > 1e-5  # the weights have moved


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_answers_of_self_play_are_the_same_on_any_number_of_ranks(num_ranks, made):
    """Iteration 0's file byte by byte; of the next, whose opponents differ in the last bits, the answers."""
    one, more = ([open(f"{made('spin', n)}/generated-0{i}.jsonl").read() for i in (0, 1)]
                 for n in (1, num_ranks))
    assert one[0] == more[0]
    answered = [[json.loads(line)["ids"] for line in text.splitlines()] for text in (one[1], more[1])]
    assert len(answered[0]) == 40 and answered[0] == answered[1]


@pytest.mark.parametrize("trouble", [None, "keep_in_step"])
@pytest.mark.parametrize("name, count", [pytest.param("seven", 7, marks=pytest.mark.slow), ("three", 3)])
def test_each_prompt_is_answered_once(name, count, trouble, made):
    """Prompts of very different lengths on 4 ranks, each of which has all weights, or in step on shards."""
    ours, theirs = (read_lines(f"{made(name, *ranks)}/samples.jsonl") for ranks in ([1], [4, trouble]))
    assert ours == theirs and len(ours) == count and len({line["policy"] for line in ours}) > 1


def test_resumed_on_another_number_of_ranks(made):
    """Saved on 2 and gone on with on 1 and 4, saved on 1 and gone on with on 2."""
    for before, after in ((2, 1), (2, 4), (1, 2)):
        folder = f"from{before}to{after}"
        shutil.copytree(made("half", before), folder, symlinks=True)
        on_ranks(after, "resume=true", f"run_dir={folder}", "max_steps=8")
        assert_same_curve(folder, made("whole", 1), 8)


def test_a_folder_from_two_ranks_is_that_from_one(made):
    folders = [made("half", count) + "/LATEST" for count in (1, 2)]
    one, two = (load_file(f"{folder}/model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape, name
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    config = [json.load(open(f"{folder}/config.json")) for folder in folders]
    assert config[0] == config[1] and config[0]["architectures"] == ["LlamaForCausalLM"]
    model, info = AutoModelForCausalLM.from_pretrained(folders[1], output_loading_info=True)
    assert not any(info.values()) and model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_saved_in_the_background_is_what_is_saved_at_once(made):
    """Four checkpoints on two ranks while training goes on: the last is that of a run without."""
    at_once, background = made("half", 2), made("background", 2)
    assert sorted(os.listdir(f"{background}/LATEST")) == sorted(os.listdir(f"{at_once}/LATEST"))
    assert len(glob.glob(f"{background}/step-*")) == 4 and not glob.glob(f"{background}/.step*")
    saved, later = (load_file(f"{folder}/LATEST/model.safetensors") for folder in (at_once, background))
    assert all(torch.allclose(saved[name], later[name], rtol=0, atol=1e-6) for name in saved)


def test_the_reference_cache_is_the_same_on_any_number_of_ranks(made, sft_run):
    """Files of the same names with the same numbers, and what one computed two can read."""
    one, two = (f"{made('dpo', count)}-cache" for count in (1, 2))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two)) and len(os.listdir(one)) == 2
    for name in os.listdir(one):
        ours, theirs = (load_file(f"{folder}/{name}")["values"] for folder in (one, two))
        assert torch.allclose(ours, theirs, rtol=1e-9)
    out = on_ranks(2, *RUNS["dpo"], f"model={sft_run}/LATEST", f"reference_cache={one}", "max_steps=0")
    assert "log-probabilities of 9 rows read" in out and "of 0 computed" in out


def test_other_ways_to_shard_give_the_same_curve(made):
    """Two copies of two shards, no resharding after the forward, gradients reduced in each microbatch."""
    assert_same_curve(made("whole", 1), made("hybrid", 4), 8)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_narrower_numbers_on_ranks(dtype, tolerance, made):
    """Rewards are exactly 0 before the first step, log-probabilities near float64's, weights stay float32."""
    lines, exact = numbers(made(dtype, 2)), numbers(made("dpo", 1))
    assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0
    names = ("logps/chosen", "logps/rejected")
    ours, theirs = ([line[name] for line in part[:2] for name in names] for part in (lines, exact))
    assert ours == pytest.approx(theirs, rel=tolerance) and ours != theirs
    saved = load_file(f"{made(dtype, 2)}/LATEST/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}


def test_dry_run_says_what_a_rank_holds(made, capsys):
    """Weights, gradients and optimizer state of one of two ranks, within 5%."""
    settings = [f"data={FORTY}", "loss=dpo", "eval_every=0"]
    on_ranks(2, *settings, "max_steps=1", trouble="measured", rank=1)
    held = json.load(open("held.json"))
    assert train.main([*settings, "exp_name=new", "dry_run=true", "world_size=2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = {" ".join(words[2:]): float(words[0]) for words in lines if words[1:2] == ["MiB"]}
    assert held.keys() == {"weights", "gradients", "optimizer state"}
    for name, size in held.items():
        assert said[name] == pytest.approx(size / 2**20, rel=0.05), name
    assert train.main(["resume=true", f"run_dir={made('whole', 1)}", "dry_run=true", "world_size=2"]) == 0
    state = re.search(r"([\d.]+) MiB  optimizer state", capsys.readouterr().out)[1]  # of AdamW, in float64
    assert float(state) == pytest.approx(2 * 2 * held["weights"] / 2**20, rel=0.05)
    assert not os.path.exists("runs/new")


def save_model(architecture, sft_run, **options):
    """A small model of an architecture, large random weights and the tiny model's tokenizer, in `model`."""
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    model = tiny_of(architecture, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id, **options)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")


@pytest.mark.parametrize("architecture, options", [
    ("gpt2", {"n_positions": 64, "bos_token_id": None}),
    ("gemma2", {"max_position_embeddings": 64}),
    ("qwen2", {"max_position_embeddings": 64, "tie_word_embeddings": False})])
def test_weights_and_buffers_are_right_on_every_rank(architecture, options, sft_run):
    """Tied and untied, learned positions and rotary ones: the curve is that of one process."""
    save_model(architecture, sft_run, **options)
    settings = [*RUN, "model=model", "loss=dpo", "max_steps=2", "max_length=64", "max_prompt_length=32"]
    for count in (1, 2):
        on_ranks(count, *settings, f"run_dir={count}")
    assert_same_curve("1", "2", 2, tolerance=1e-4)  # Gemma's attention is in float32, its weights are large


def test_ranks_in_step_stay_within_the_models_positions(sft_run):
    """Learned ones, 64: a rank that has its answer goes on while another, with a short prompt, has not."""
    save_model("gpt2", sft_run, n_positions=64, bos_token_id=None)
    rows = write_lines("rows.jsonl", [{"prompt": x, **ANSWERS} for x in ("x" * 48, "a", "b", "y" * 35)])
    settings = [*SAMPLED, "model=model", "max_length=64", "max_prompt_length=60", f"eval_data={rows}",
                "sample_max_tokens=60", "eval_batch_size=2"]
    on_ranks(1, *settings, "run_dir=one")
    on_ranks(2, *settings, "run_dir=two", trouble="keep_in_step")
    assert read_lines("one/samples.jsonl") == read_lines("two/samples.jsonl")


def test_a_reference_that_goes_away_once_its_numbers_are_known(sft_run):
    """Its folder is deleted at step 3: samples and their KL are those of a run that was left alone."""
    rows = write_lines("rows.jsonl", toy("train", True)[:8])
    settings = [*RUN, "loss=dpo", f"model={sft_run}/LATEST", f"data={rows}", f"eval_data={rows}",
                "reference=reference", "max_steps=4", "eval_every=2", "num_samples=8"]
    shutil.copytree(f"{sft_run}/LATEST/", "reference")
    on_ranks(1, *settings, "run_dir=alone")
    on_ranks(2, *settings, "run_dir=gone", trouble="reference_gone", rank=0)
    assert not os.path.exists("reference")
    assert_same_curve("alone", "gone", 4)
    divergences = [line["samples/kl"] for line in numbers("gone") if "samples/kl" in line]
    assert len(divergences) == 3 and max(divergences) > 0
    assert read_lines("alone/samples.jsonl") == read_lines("gone/samples.jsonl")


# ---------------------------------------------------------------- what befalls one rank


def test_numbers_that_ranks_say():
    """Ranks 0 and 1 say 0 and 10; 7 and 6; 1 and 2**24, whose sum float32 does not have; 0 and -1."""
    given, _ = answers(begin(2, function="talk"))
    assert given == [{"num_ranks": 2, "from_all": [0, 10], "from_first": 7,
                      "sum_over_ranks": [2.0**24 + 1, 1.0], "max_over_ranks": 0}] * 2


def test_what_one_rank_refuses_all_refuse(sft_run):
    """Weights that are not there, an optimizer that cannot step shards: the sentence, from both, at once."""
    os.makedirs("reference")
    shutil.copy(f"{sft_run}/LATEST/config.json", "reference")
    for settings, message in (
            (["loss=dpo", "reference=reference"], "the model .*/reference cannot be loaded"),
            (["optimizer=Adafactor"], "Adafactor with {} is refused on sharded weights")):
        given, _ = answers(begin(2, *STOPPED, *settings))
        assert re.match(f"InputError: {message}", given[0]) and given == [given[0]] * 2
    given, _ = answers(begin(2, *STOPPED, trouble="cannot_read", rank=1))
    assert given == ["InputError: f.jsonl is not here"] * 2
    assert not os.path.exists("stopped")


def test_a_model_without_marked_layers_is_refused_on_ranks(sft_run):
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    config = CONFIG_MAPPING["ctrl"](vocab_size=len(tokenizer), n_embd=16, dff=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    message = "ctrl marks no layers to shard: run it on one device"
    settings = [f"data={FORTY}", "model=model", "max_length=64", "max_prompt_length=32"]
    on_ranks(2, *settings, answer=f"InputError: {message}")
    out = on_ranks(2, *settings, function="script", answer=2)
    assert out.count(f"error: {message}\n") == 1 and not os.path.exists("runs")


@pytest.mark.parametrize("trouble, answer, message", [("terminated", 143, "SIGTERM after step 3 of 8"),
                                                      ("out_of_time", 75, "max_hours after step 0 of 8")])
def test_asked_to_stop_at_one_rank_all_stop_at_the_same_step(trouble, answer, message, made):
    out = on_ranks(2, *STOPPED, "max_hours=1", trouble=trouble, rank=1, answer=answer)
    assert out.count("Stopped by") == 1 and message in out
    assert latest("stopped") == num_lines("stopped/metrics.jsonl") == (3 if answer == 143 else 0)
    on_ranks(1, "resume=true", "run_dir=stopped")
    assert_same_curve("stopped", made("stopped", 1), 8)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_weights_are_touched():
    given, _ = answers(begin(2, *STOPPED, trouble="no_number", rank=1))
    assert given[0].startswith("FloatingPointError: step 3: loss nan") and given == [given[0]] * 2
    assert latest("stopped") == 2 and num_lines("stopped/metrics.jsonl") == 2


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_rank_killed_within_a_save(asynchronous, made):
    """The other ends by itself, LATEST is whole, and with resume=auto the same command goes on from there."""
    command = [*STOPPED, f"async_save={asynchronous}", "resume=auto"]
    given, _ = answers(begin(2, *command, trouble="die_in_save", rank=1))
    assert given[1] == -9 and isinstance(given[0], str) and latest("stopped") == 2
    assert AutoModelForCausalLM.from_pretrained("stopped/LATEST")
    on_ranks(2, *command)
    assert_same_curve("stopped", made("stopped", 1), 8)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *arguments]
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def test_sigterm_to_torchrun(made):
    """One checkpoint, one message, and a resumed run that goes on from there."""
    process = torchrun(f"{ROOT}/train.py", *STOPPED, "max_steps=100000", "num_epochs=99999", "save_every=0")
    wait_for(lambda: num_lines("stopped/metrics.jsonl") > 2, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=100)[0]
    step = latest("stopped")
    assert process.returncode != 0 and out.count("Stopped by SIGTERM") == 1, out
    assert len(glob.glob("stopped/step-*")) == 1 and numbers("stopped")[-1]["step"] == step >= 2
    on_ranks(1, "resume=true", "run_dir=stopped", f"max_steps={step + 1}")
    ours, theirs = numbers("stopped"), numbers(made("stopped", 1))
    assert ours[-1]["step"] == step + 1
    assert_same_lines(ours[:3], theirs[:3])


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again(made):
    """With --max-restarts and resume=auto a rank that dies costs the steps since the last checkpoint."""
    process = torchrun("--max-restarts=1", f"{HERE}/on_ranks.py", "die_in_save", "1", *STOPPED, "resume=auto")
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and os.path.exists("died"), out
    assert latest("stopped") == 8
    assert_same_curve("stopped", made("stopped", 1), 8)


# ---------------------------------------------------------------- on one process


def test_a_rank_leaves_without_taking_python_down():
    """A thread of gloo's that then lets go of a tensor aborts; what is registered for the end still runs."""
    code = """
import atexit, os, torch.distributed as dist
from engine.distributed import leave_ranks
class Kept:
    def __del__(self):
        print("taken down")
kept = Kept()
atexit.register(print, "at exit")
os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
assert [leave_ranks(status) for status in (5, 75)] == [5, 0]  # one process, which goes on
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("to the end", end=" ")
leave_ranks(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (3, "to the end at exit\n")


def test_a_request_to_stop():
    """The first signal is the reason, a second SIGINT stops at once, and handlers are put back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopRequest(None)
    stop.check()
    assert stop.reason == 0
    with stop.catch_signals():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            with pytest.raises(Stopped):
                stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.reason == signal.SIGINT and max_over_ranks(7) == 7
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number, ignored", [
    (signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGUSR1, False)])
def test_a_hangup_asks_for_a_stop_unless_it_is_ignored(number, ignored):
    before = signal.signal(number, signal.SIG_IGN if ignored else lambda *_: None)
    stop = StopRequest(None)
    try:
        with stop.catch_signals():
            signal.raise_signal(number)
        assert stop.reason == (0 if ignored else number)
    finally:
        signal.signal(number, before)


def test_a_signal_while_ranks_agree_is_not_lost(monkeypatch):
    """It comes when this rank has said that it has none, and counts at the next step."""
    stop = StopRequest(None)

    def signalled(number):
        signal.raise_signal(signal.SIGTERM)
        return number
    with stop.catch_signals():
        with monkeypatch.context() as patch:
            patch.setattr(engine.distributed, "max_over_ranks", signalled)
            stop.check()
        with pytest.raises(Stopped):
            stop.check()
    assert stop.reason == signal.SIGTERM


def test_hours_count_from_the_start(monkeypatch):
    stop = StopRequest(2.0)
    for seconds, reason in ((7199, 0), (7201, MAX_HOURS)):
        now = engine.distributed.START + seconds
        monkeypatch.setattr(engine.distributed.time, "monotonic", lambda now=now: now)
        with pytest.raises(Stopped) if reason else contextlib.nullcontext():
            stop.check()
        assert stop.reason == reason


NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch compiles with g++")


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers(sft_run, run):
    """Training, evaluation and sampling; the checkpoint has the usual names."""
    plain, compiled = (run("loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, "lr=1e-5", f"compile={word}",
                           f"run_dir={word}") for word in ("false", "true"))
    torch._dynamo.reset()
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-5) and len(losses_of(plain)) == 3
    names = [load_file(f"{folder}/LATEST/model.safetensors").keys() for folder in (plain, compiled)]
    assert names[0] == names[1]


@NEEDS_COMPILER
def test_every_layer_is_compiled(sft_run, run, monkeypatch):
    """The same with a compiler that takes no time; sampling, whose cache grows, is not compiled."""
    compile_module, generate = torch.nn.Module.compile, Sampler.generate
    modules, graphs, while_sampling = [], [], []

    def compile_eagerly(self, **options):
        modules.append((type(self).__name__, options))
        compile_module(self, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, **options)

    def watched(self, *arguments):
        before = len(graphs)
        answers = generate(self, *arguments)
        while_sampling.append(len(graphs) - before)
        return answers

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    monkeypatch.setattr(Sampler, "generate", watched)
    plain, compiled = (run(*RUNS["dpo"], f"model={sft_run}/LATEST", "max_steps=2", f"compile={word}",
                           f"run_dir={word}") for word in ("false", "true"))
    torch._dynamo.reset()
    assert modules == [("LlamaDecoderLayer", {"dynamic": True})] * 4  # the policy's two, the reference's two
    assert graphs and while_sampling and not any(while_sampling)
    assert_same_curve(compiled, plain, 2)
    assert read_lines(f"{compiled}/samples.jsonl") == read_lines(f"{plain}/samples.jsonl")
    names = [load_file(f"{folder}/LATEST/model.safetensors").keys() for folder in (plain, compiled)]
    assert names[0] == names[1]


@NEEDS_COMPILER
def test_compiled_layers_in_shards(made, sft_run):
    on_ranks(2, *RUNS["sft"], f"model={sft_run}/LATEST", "max_steps=2", "eval_every=0", "compile=true",
             "run_dir=r", trouble="compiled")
    steps = [line for line in numbers(made("sft", 1)) if "grad_norm" in line]
    assert_same_lines(numbers("r"), steps[:2])


def test_what_cannot_be_compiled_is_refused(monkeypatch, refused):
    config = CONFIG_MAPPING["ctrl"](vocab_size=50, n_embd=16, dff=16, n_layer=1, n_head=2)
    with pytest.raises(InputError, match="compile=true: ctrl marks no layers to compile"):
        compile_layers(AutoModelForCausalLM.from_config(config))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if not torch.cuda.is_available():
        assert "there is no g++" in refused("compile=true")


def test_ranks_need_devices(refused, monkeypatch):
    assert "needs several GPUs: leave it out" in refused("fsdp.cpu_offload=true")
    assert "fsdp.replicas=2 does not divide the 1 devices" in refused("fsdp.replicas=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "start the run by torchrun" in refused()
