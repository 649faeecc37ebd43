"""The same run on 1, 2 and 4 processes, with gloo; several runs share a torchrun, whose start is what takes long."""

import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import FEW_ROWS, HERE, ROOT, read_lines, write_lines
from safetensors.torch import load_file
from test_trainers import make_trainer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import data
import train

UNREPEATABLE = ("time", "examples_per_second", "tokens_per_second")
RUN = [f"data={FEW_ROWS}", f"eval_data={FEW_ROWS}", "num_eval_examples=9", "batch_size=5", "max_steps=20", "lr=1e-5",
       "sample_max_tokens=6", "num_samples=2", "max_tokens_per_microbatch=120", "eval_every=20", "eval_batch_size=400"]
LOSSES = {
    "sft": [], "dpo": ["dpo.sft_weight=0.1"], "ipo": ["ipo.average_logps=true"], "rpo": [], "rm": [],
    "kd": ["kd.sft_weight=0.5"], "spin": ["num_epochs=0.12", "spin.max_tokens=12", "spin.mix_previous=true"]}
CONSTANT = [*RUN, "eval_every=10", "lr_schedule=constant", "loss=dpo", "optimizer=AdamW", "num_epochs=9"]


def on_ranks(num_ranks, jobs, status=0, options=(), timeout=240):
    """Runs jobs as on_ranks.py has them; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", *options,
               os.path.join(HERE, "on_ranks.py"), json.dumps(jobs)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=timeout)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert (done.returncode == 0) == (status == 0), "\n".join([done.stdout[-2000:], *said])
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def runs(sft_run, tmp_path_factory):
    """A folder with each loss on 1, 2 and 4 processes, and what else these can do in the same torchruns."""
    folder, before = tmp_path_factory.mktemp("ranks"), os.getcwd()
    os.chdir(folder)
    model = [f"model={sft_run}/LATEST"]
    prompts = ["a", "Review of The", "Review of The Winter Harbor:" * 9, "b c d", "Review" * 30, "x", "The plot was"]
    for count in (3, 7):
        write_lines(f"prompts{count}.jsonl", [{"prompt": p, "chosen": " Yes.", "rejected": " No."}
                                              for p in prompts[:count]])

    def settings(name, count):
        own = [f"reference={sft_run}/LATEST", "model=tiny", f"tokenizer={sft_run}/LATEST"] if name == "kd" else model
        return {"run": [*RUN, *own, f"loss={name}", *LOSSES[name], f"run_dir={name}{count}"]}

    def sampled(count, *more, name):
        return {"run": [*RUN, *model, "loss=dpo", f"eval_data=prompts{count}.jsonl", "max_steps=2", "num_samples=7",
                        "sample_max_tokens=9", "eval_batch_size=3", "eval_every=1", f"run_dir={name}", *more]}

    def variants(count):
        return [sampled(7, name=f"seven{count}"), sampled(3, name=f"three{count}"),
                sampled(7, name=f"sevenstep{count}") | {"trouble": "keep_in_step"},
                sampled(3, name=f"threestep{count}") | {"trouble": "keep_in_step"}]
    first = {"run": [*CONSTANT, *model, "max_steps=10", "run_dir=saved1"]}
    jobs = {1: [*(settings(name, 1) for name in LOSSES), sampled(7, name="seven1"), sampled(3, name="three1"), first,
                {"run": [*CONSTANT, *model, "run_dir=whole"]}]}
    jobs[2] = [*(settings(name, 2) for name in LOSSES), first | {"run": [*first["run"][:-1], "run_dir=saved2"]},
               {"run": ["resume=true", "run_dir=saved1to2", "max_steps=20"]},
               {"run": [*CONSTANT, *model, "async_save=true", "save_every=3", "max_steps=10", "run_dir=async2"]},
               {"run": [*CONSTANT, *model, "reference_cache=cache2", "run_dir=cache2run", "max_steps=100"]},
               {"run": [*RUN, *model, "loss=dpo", "compute_dtype=bfloat16", "run_dir=bf16"]},
               {"run": [*RUN, "loss=dpo", "max_steps=1", "run_dir=measured"], "trouble": "measured"}]
    jobs[4] = [*(settings(name, 4) for name in LOSSES), *variants(4),
               {"run": ["resume=true", "run_dir=saved2to4", "max_steps=20"]},
               {"run": [*CONSTANT, *model, "fsdp.replicas=2", "fsdp.reshard_after_forward=false",
                        "fsdp.reduce_once=false", "activation_checkpointing=true", "run_dir=hybrid"]}]
    try:
        for count, todo in jobs.items():
            if count == 2:
                shutil.copytree("saved1", "saved1to2", symlinks=True)
            if count == 4:
                shutil.copytree("saved2", "saved2to4", symlinks=True)
            if count == 1:
                for job in todo:
                    assert train.main(job["run"]) == 0
            else:
                on_ranks(count, todo)
    finally:
        os.chdir(before)
    return folder


def curve(folder):
    return [{k: v for k, v in line.items() if k not in UNREPEATABLE} for line in read_lines(f"{folder}/metrics.jsonl")]


def assert_same_curve(folder, other, num_steps):
    """Losses within 1e-5 of each other; what else there is, differences of like numbers, within 1e-4."""
    ours, theirs = curve(folder), curve(other)
    assert sum(line["split"] == "train" for line in ours) == num_steps
    assert_same_lines(ours, theirs)


def assert_same_lines(ours, theirs):
    for line, expected in zip(ours, theirs, strict=True):
        assert line.pop("split") == expected.pop("split") and line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [2, 4])
def test_a_curve_is_the_same_on_any_number_of_ranks(name, count, runs):
    assert_same_curve(runs / f"{name}1", runs / f"{name}{count}", 20)


@pytest.mark.parametrize("count", [2, 4])
def test_answers_of_self_play_are_the_same_on_any_number_of_ranks(count, runs):
    """Iteration 0's file byte by byte; of the next, whose opponents differ in the last bits, the answers."""
    one, more = ([(runs / f"spin{n}" / f"generated-0{i}.jsonl").read_bytes() for i in (0, 1)] for n in (1, count))
    assert one[0] == more[0]
    answers = [[json.loads(line)["ids"] for line in text.splitlines()] for text in (one[1], more[1])]
    assert len(answers[0]) == 400 and np.mean([a == b for a, b in zip(*answers)]) > 0.99


@pytest.mark.parametrize("kind", ["", "step"])
@pytest.mark.parametrize("number", ["seven", "three"])
def test_each_prompt_is_answered_once(number, kind, runs):
    """7 and 3 prompts of very different lengths on 4 ranks, each with all weights, or in step on shards."""
    ours, theirs = (read_lines(runs / name / "samples.jsonl") for name in (f"{number}1", f"{number}{kind}4"))
    assert ours == theirs and len(ours) == 3 * {"seven": 7, "three": 3}[number]
    assert len({line["policy"] for line in ours}) > 2


def test_resumed_on_another_number_of_ranks(runs, run):
    """Saved on 2 and gone on with on 1 and 4, saved on 1 and gone on with on 2."""
    shutil.copytree(runs / "saved2", "saved2to1", symlinks=True)
    run("resume=true", "run_dir=saved2to1", "max_steps=20")
    for folder in ("saved2to1", runs / "saved2to4", runs / "saved1to2"):
        assert_same_curve(folder, runs / "whole", 20)


def test_a_folder_from_two_ranks_is_that_from_one(runs):
    one, two = (load_file(runs / name / "LATEST" / "model.safetensors") for name in ("saved1", "saved2"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape and torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name
    assert sorted(os.listdir(runs / "saved1" / "LATEST")) == sorted(os.listdir(runs / "saved2" / "LATEST"))
    config = [json.load(open(runs / name / "LATEST" / "config.json")) for name in ("saved1", "saved2")]
    assert config[0] == config[1] and config[0]["architectures"] == ["LlamaForCausalLM"]
    model, info = AutoModelForCausalLM.from_pretrained(runs / "saved2" / "LATEST", output_loading_info=True)
    assert not any(info.values()) and model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_saved_in_the_background_is_what_is_saved_at_once(runs):
    """Four checkpoints on two ranks while training goes on: the last is that of a run without."""
    assert sorted(os.listdir(runs / "async2" / "LATEST")) == sorted(os.listdir(runs / "saved2" / "LATEST"))
    assert len(glob.glob(str(runs / "async2" / "step-*"))) == 4 and not glob.glob(str(runs / "async2" / ".step*"))
    saved, background = (load_file(runs / name / "LATEST" / "model.safetensors") for name in ("saved2", "async2"))
    assert all(torch.equal(saved[name], background[name]) for name in saved)


def test_the_reference_cache_is_the_same_on_any_number_of_ranks(runs, run):
    """A file filled by two is read by one, and holds what one would have computed."""
    model = train.read_yaml(str(runs / "cache2run" / "config.yaml"))["model"]
    run(*CONSTANT, f"model={model}", "reference_cache=cache1", "run_dir=cached", "max_steps=100")
    assert sorted(os.listdir("cache1")) == sorted(os.listdir(runs / "cache2")) and len(os.listdir("cache1")) == 2
    for name in os.listdir("cache1"):
        ours, theirs = (load_file(os.path.join(folder, name))["values"] for folder in ("cache1", runs / "cache2"))
        assert torch.equal(ours, theirs)


def test_other_ways_to_shard_give_the_same_curve(runs):
    """Two copies of two shards, no resharding after the forward, gradients reduced in each microbatch."""
    assert_same_curve(runs / "whole", runs / "hybrid", 20)


def test_bfloat16_on_ranks(runs):
    """Step 0's evaluation has rewards of exactly 0, log-probabilities are near float32's, weights stay float32."""
    lines, exact = curve(runs / "bf16"), curve(runs / "dpo1")
    assert lines[0]["rewards/chosen"] == 0 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    ours, theirs = ([line[f"logps/{kind}"] for line in part if "grad_norm" in line for kind in ("chosen", "rejected")]
                    for part in (lines, exact))
    assert ours == pytest.approx(theirs, rel=0.01) and ours != theirs
    assert {x.dtype for x in load_file(runs / "bf16" / "LATEST" / "model.safetensors").values()} == {torch.float32}


def test_dry_run_says_what_a_rank_holds(runs, capsys):
    """Weights, gradients and optimizer state of one of two ranks, within 5%."""
    held = json.load(open(runs / "held.json"))
    assert train.main([*RUN, "loss=dpo", "dry_run=true", "world_size=2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = {" ".join(words[2:]): float(words[0]) for words in lines if words[1:2] == ["MiB"]}
    for name, size in held.items():
        assert said[name] == pytest.approx(size / 2**20, rel=0.05), name
    assert train.main(["resume=true", f"run_dir={runs / 'whole'}", "dry_run=true", "world_size=2"]) == 0
    state = re.search(r"([\d.]+) MiB  optimizer state", capsys.readouterr().out).group(1)  # that run's is AdamW
    assert float(state) == pytest.approx(2 * held["weights"] / 2**20, rel=0.05) and not os.path.exists("runs")


def test_dry_run_counts_tokens_steps_and_bytes(capsys, refused):
    """By hand: 440,704 weights in float32, RMSprop's average of each, and 400 pairs."""
    assert train.main([f"data={FEW_ROWS}", "loss=dpo", "dry_run=true", "world_size=8", "batch_size=64"]) == 0
    out = capsys.readouterr().out
    tokens = sum(len(x.prompt) + sum(map(len, x.responses)) for x in make_trainer("loss=dpo").data_examples)
    assert f"400 rows and {tokens:,} tokens, 7 steps an epoch" in out
    assert f"{440704 * 4 / 8 / 2**20:.1f} MiB  weights" in out and f"checkpoint {440704 * 8 / 2**20:.1f} MiB" in out
    assert "is for dry_run=true" in refused("world_size=2")
    assert "fsdp.replicas=3 does not divide the 8 devices" in refused("dry_run=true", "world_size=8", "fsdp.replicas=3")


def save_model(architecture, sft_run):
    """A small model of the architecture, with the tiny model's tokenizer, in `model`."""
    options = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": None},
               "gemma2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
               "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}}
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **options[architecture]))
    for weight in model.parameters():  # so that mistakes show
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")


@pytest.mark.parametrize("optimizer, per_weight", [("Adam", 2), ("ASGD", 1), ("SGD", 0)])
def test_dry_run_counts_any_optimizers_state(optimizer, per_weight, capsys):
    assert train.main([f"data={FEW_ROWS}", "dry_run=true", "world_size=2", f"optimizer={optimizer}"]) == 0
    size = float(re.search(r"([\d.]+) MiB  optimizer state", capsys.readouterr().out).group(1))
    assert size == pytest.approx(440704 * 4 / 2 / 2**20 * per_weight, abs=0.06)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2"])
def test_weights_and_buffers_are_right_on_every_rank(architecture, run, sft_run):
    """Tied and untied, learned positions and rotary ones: the curve is that of one process."""
    save_model(architecture, sft_run)
    settings = [*RUN, "model=model", "loss=dpo", "max_steps=3", "max_length=64", "max_prompt_length=32"]
    run(*settings, "run_dir=one")
    on_ranks(2, [{"run": [*settings, "run_dir=two"]}])
    assert_same_curve("one", "two", 3)


def test_ranks_in_step_stay_within_the_models_positions(run, sft_run):
    """Learned positions, 64 of them: a rank that has its answer goes on while another, with a short prompt, has not."""
    save_model("gpt2", sft_run)
    write_lines("prompts.jsonl", [{"prompt": prompt, "chosen": " Yes.", "rejected": " No."}
                                  for prompt in ("x" * 48, "a", "b", "y" * 35)])
    settings = [*RUN, "model=model", "loss=dpo", "max_steps=0", "max_length=64", "max_prompt_length=60",
                "eval_data=prompts.jsonl", "num_samples=4", "sample_max_tokens=60", "eval_batch_size=2"]
    run(*settings, "run_dir=one")
    on_ranks(2, [{"run": [*settings, "run_dir=two"], "trouble": "keep_in_step"}])
    assert read_lines("one/samples.jsonl") == read_lines("two/samples.jsonl")


def test_what_one_rank_refuses_all_refuse(sft_run):
    """Weights that are not there, an optimizer that cannot step shards: the sentence, from both, at once."""
    os.makedirs("reference")
    shutil.copy(f"{sft_run}/LATEST/config.json", "reference")
    started = time.time()
    for settings, message in ((["loss=dpo", "reference=reference"], "the model .*reference cannot be loaded"),
                              (["optimizer=Adafactor"], "Adafactor with {} is refused on sharded weights")):
        out = on_ranks(2, [{"run": [*STOPPED, *settings]}], status=1)
        assert len(re.findall(f"InputError: {message}", out)) == 2
    assert time.time() - started < 60 and not os.path.exists("stopped/metrics.jsonl")


def test_a_reference_that_goes_away_stops_all_ranks_with_all_saved(sft_run):
    shutil.copytree(f"{sft_run}/LATEST/", "reference")
    job = {"run": [*STOPPED, "loss=dpo", "reference=reference", "tokenizer=reference", f"eval_data={FEW_ROWS}",
                   "eval_every=1", "eval_first=false", "num_eval_examples=4", "sample_max_tokens=4",
                   "batch_size=100", "save_every=0"],
           "trouble": "reference_gone", "rank": 0}
    out = on_ranks(2, [job], status=1)
    assert len(re.findall("InputError: the model .*reference cannot be loaded", out)) == 2
    assert os.readlink("stopped/LATEST") == "step-000003"


# ---------------------------------------------------------------- stops


STOPPED = [f"data={FEW_ROWS}", "batch_size=4", "max_steps=8", "lr=1e-5", "eval_every=0", "save_every=2",
           "lr_schedule=constant", "run_dir=stopped"]


@pytest.fixture
def whole(run):
    return curve(run(*STOPPED[:-1], "run_dir=whole"))


@pytest.mark.parametrize("trouble, status, message", [("terminated", 143, "SIGTERM after step 3 of 8"),
                                                      ("out_of_time", 0, "max_hours after step 0 of 8")])
def test_asked_to_stop_at_one_rank_all_stop_at_the_same_step(trouble, status, message, run, whole):
    settings = [*STOPPED, "max_hours=1"]
    out = on_ranks(2, [{"run": settings, "trouble": trouble, "rank": 1}])
    assert [json.load(open(f"status{rank}")) for rank in (0, 1)] == [status] * 2
    assert out.count("Stopped by") == 1 and message in out
    step = 3 if status else 0
    assert os.readlink("stopped/LATEST") == f"step-{step:06d}"
    assert step == 0 or len(curve("stopped")) == step
    run("resume=true", "run_dir=stopped")
    assert_same_lines(curve("stopped"), whole)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_weights_are_touched():
    out = on_ranks(2, [{"run": STOPPED, "trouble": "no_number", "rank": 1}], status=1)
    messages = {line[line.index("step 3"):] for line in out.splitlines() if "FloatingPointError: step 3" in line}
    assert len(messages) == 1 and "loss nan" in messages.pop()
    assert out.count("FloatingPointError: step 3") == 2
    assert os.readlink("stopped/LATEST") == "step-000002" and len(curve("stopped")) == 2


def test_sigterm_to_torchrun(run, whole):
    """One checkpoint, one message, and a resumed run that ends as the undisturbed one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", os.path.join(ROOT, "train.py"),
               *STOPPED, "max_steps=100000", "num_epochs=9999", "save_every=0"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not (os.path.exists("stopped/metrics.jsonl") and len(open("stopped/metrics.jsonl").readlines()) > 2):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    step = int(os.readlink("stopped/LATEST")[5:])
    assert process.returncode != 0 and out.count("Stopped by SIGTERM") == 1, out
    assert len(glob.glob("stopped/step-*")) == 1 and curve("stopped")[-1]["step"] == step >= 2
    run("resume=true", "run_dir=stopped", f"max_steps={step + 1}")
    assert_same_lines(curve("stopped")[:2], whole[:2])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_killed_within_a_save(asynchronous, run, whole):
    """The other ends in bounded time, LATEST is whole, and the run goes on as if nothing had been."""
    job = {"run": [*STOPPED, f"async_save={asynchronous}".lower()], "trouble": "die_in_save", "rank": 1}
    started = time.time()
    on_ranks(2, [job], status=1)
    assert time.time() - started < 100 and os.path.exists("died")
    assert os.readlink("stopped/LATEST") == "step-000002"
    assert AutoModelForCausalLM.from_pretrained("stopped/LATEST")
    run("resume=true", "run_dir=stopped")
    assert_same_lines(curve("stopped"), whole)


def test_torchrun_starts_the_ranks_again(whole):
    """With --max-restarts and resume=auto a rank that dies costs the steps since the last checkpoint."""
    job = {"run": [*STOPPED, "resume=auto"], "trouble": "die_in_save", "rank": 1}
    on_ranks(2, [job], options=["--max-restarts=1"])
    assert os.path.exists("died") and os.readlink("stopped/LATEST") == "step-000008"
    assert_same_lines(curve("stopped"), whole)


# ---------------------------------------------------------------- on one process


def test_deal():
    """By hand: 9, 8, 7; 5 to the 7, 4 to the 8, 3 to the 9, which make 12 each; 2 to the first."""
    examples = [data.Example("", np.zeros(n - 1, np.int32), (np.zeros(1, np.int32),), {}) for n in (4, 9, 2, 7, 5, 8, 3)]
    hands = [[x.num_tokens for x in hand] for hand in data.deal(examples, 3)]
    assert hands == [[9, 2, 3], [4, 8], [7, 5]]
    assert data.deal(examples, 1) == [examples] and list(map(len, data.deal(examples[:2], 4))) == [1, 1, 0, 0]


def test_saves_in_the_background_never_run_at_once(monkeypatch):
    """A slow write: training goes on meanwhile, the next save waits for it, and what is written is what was."""
    trainer = make_trainer("async_save=true", "eval_every=0", "save_every=1", "max_steps=3")
    os.makedirs(trainer.config.run_dir)
    write, busy, seen = trainer.write_checkpoint, threading.Lock(), []

    def slowly(counters, *state):
        assert busy.acquire(blocking=False)
        time.sleep(0.5)
        write(counters, *state)
        seen.append((counters["step"], trainer.step))
        busy.release()
    monkeypatch.setattr(trainer, "write_checkpoint", slowly)
    trainer.train()
    assert seen == [(1, 2), (2, 3), (3, 3)] and os.readlink(trainer.path("LATEST")) == "step-000003"
    saved = load_file(trainer.path("step-000001/model.safetensors"))
    last = load_file(trainer.path("LATEST/model.safetensors"))
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_tied_weights_are_saved_once_in_the_background_too(run, sft_run):
    save_model("gpt2", sft_run)
    settings = ["model=model", f"data={FEW_ROWS}", "max_steps=1", "max_length=64", "max_prompt_length=32"]
    for word in ("true", "false"):
        run(*settings, f"async_save={word}", f"run_dir={word}")
    background, at_once = (load_file(f"{word}/LATEST/model.safetensors") for word in ("true", "false"))
    assert background.keys() == at_once.keys() and "lm_head.weight" not in at_once
    assert all(torch.equal(background[name], at_once[name]) for name in at_once)


def test_a_failed_save_in_the_background_stops_the_run(monkeypatch):
    trainer = make_trainer("async_save=true", "eval_every=0", "save_every=1", "max_steps=3")
    os.makedirs(trainer.config.run_dir)
    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert trainer.step <= 2 and not os.path.lexists(trainer.path("LATEST"))


def test_ranks_need_devices(refused, monkeypatch):
    assert "this run has none" in refused("fsdp.cpu_offload=true")
    assert "does not divide the 1 devices" in refused("fsdp.replicas=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "start the run by torchrun" in refused()
