"""A run's folder is whole whenever it is looked at, and a run that goes on is the run that never stopped."""

import datetime
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import types

import pytest
import torch
from conftest import (FORTY, latest, losses_of, made_once, make_trainer, needed, num_lines, numbers,
                      read_lines, same_weights, tiny_of, wait_for, write_bare_pairs, write_lines)
from on_ranks import answers, begin, kill, on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import data
import engine.checkpoints
import train
from engine import InputError
from engine.checkpoints import load_config, lock_folder, read_state
from engine.config import read_arguments
from engine.sampling import Sampler
from losses import OBJECTIVES

RUN = [f"data={FORTY}", f"eval_data={FORTY}", "num_eval_examples=8", "batch_size=4", "lr_schedule=constant",
       "sample_max_tokens=8", "num_samples=2", "eval_every=0"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of three steps."""
    def make(folder):
        assert train.main([*RUN, "max_steps=3", f"run_dir={folder}"]) == 0
    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture
def r(finished):
    """A copy of it, in r."""
    shutil.copytree(finished, "r", symlinks=True)
    return "r"


# ---------------------------------------------------------------- what a checkpoint holds


def test_a_checkpoint_is_a_whole_hugging_face_folder(sft_run):
    model = AutoModelForCausalLM.from_pretrained(f"{sft_run}/LATEST")
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    ids = tokenizer("Review of The Silent Garden:", return_tensors="pt")
    assert " The " in tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    trainer = make_trainer("loss=dpo", f"model={sft_run}/LATEST")
    for mine in (trainer.policy, trainer.reference):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), model.parameters(), strict=True))
    assert trainer.policy is not trainer.reference


def test_a_checkpoint_keeps_the_models_own_generation_config(sft_run, run):
    """Which sampling leaves aside, as its repetition penalty would change log-probabilities."""
    shutil.copytree(f"{sft_run}/LATEST/", "model")
    GenerationConfig(repetition_penalty=1.5, eos_token_id=[0, 1]).save_pretrained("model")
    folder = run(*RUN, "model=model", "max_steps=2", "eval_every=1")
    assert len(read_lines(f"{folder}/samples.jsonl")) == 6
    kept = GenerationConfig.from_pretrained(f"{folder}/LATEST")
    assert kept.repetition_penalty == 1.5 and kept.eos_token_id == [0, 1]


def test_keep_checkpoints(run):
    folder = run(*RUN, "max_steps=5", "save_every=1", "keep_checkpoints=2")
    assert sorted(name for name in os.listdir(folder) if "step" in name) == ["step-000004", "step-000005"]
    assert os.readlink(f"{folder}/LATEST") == "step-000005"


def test_random_state_is_restored(r):
    saved = torch.load(f"{r}/LATEST/trainer_state/rng.pt")["cpu"]
    torch.manual_seed(12345)
    given = read_arguments(["resume=true", f"run_dir={r}"])
    train.build_trainer(*load_config(given, OBJECTIVES, data.DATASETS))
    assert torch.equal(torch.get_rng_state(), saved)


def test_an_optimizers_state_is_made_one_weight_at_a_time(r, monkeypatch):
    """A second set of all weights and gradients would not fit where the run did."""
    made, make = [], engine.checkpoints.make_optimizer

    def counting(parameters, config):
        made.append(len(parameters))
        return make(parameters, config)
    monkeypatch.setattr(engine.checkpoints, "make_optimizer", counting)
    given = read_arguments(["resume=true", f"run_dir={r}"])
    trainer = train.build_trainer(*load_config(given, OBJECTIVES, data.DATASETS))
    weights = [*trainer.policy.parameters()]
    assert made == [1] * len(weights) and all(trainer.optimizer.state[x]["step"] > 0 for x in weights)


def test_what_state_json_may_lack(r, run):
    """Fields that came later, as of self-play: a folder from before them goes on."""
    path = f"{r}/LATEST/trainer_state/state.json"
    state = json.load(open(path))
    assert state == {"step": 3, "examples": 12, "iteration": 0, "first_step": 0, "first_examples": 0,
                     "data": state["data"], "tokens": state["tokens"], "reference": None,
                     "reward_model": None, "began": state["began"], "prompt_template": None,
                     "opponent": None, "state": {}, "measured": {}, "base": None,
                     "base_dtype": "torch.float32"}
    assert len(state["tokens"]) == 64 and datetime.date.fromisoformat(state["began"])
    old = {name: state[name] for name in ("step", "examples", "data", "reference")}
    json.dump(old, open(path, "w"))
    run("resume=true", f"run_dir={r}", "max_steps=4")
    assert latest(r) == 4 and [line["examples"] for line in numbers(r)] == [4, 8, 12, 16]


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_resuming_matches_not_stopping(loss, run, sft_run):
    """From step 3, which for self-play is an iteration's last."""
    settings = [f"loss={loss}", *RUN, *needed(loss, sft_run), "save_every=2", "eval_every=3"]
    settings += {"spin": ["num_epochs=0.25"], "kd": [f"tokenizer={sft_run}/LATEST"]}.get(loss, [])
    whole = run(*settings, "max_steps=5", "run_dir=whole")
    run(*settings, "max_steps=3", "run_dir=part")
    part = run("resume=true", "max_steps=5", "run_dir=part")
    assert same_weights(whole, part)
    assert numbers(whole) == numbers(part) and sum("lr" in line for line in numbers(part)) == 5


def test_resuming_a_partial_last_batch_skips_nothing(run):
    write_lines("r.jsonl", [{"prompt": "p", "response": f"r {i}"} for i in range(10)])
    folder = run("data=r.jsonl", "batch_size=4", "lr_schedule=constant")
    run("resume=true", f"run_dir={folder}", "num_epochs=2.5")
    assert [line["examples"] for line in numbers(folder)] == [4, 8, 12, 15, 19, 23, 25]


def test_a_finished_run_says_so(r, run, capsys):
    before = open(f"{r}/metrics.jsonl").read()
    run("resume=true", f"run_dir={r}")
    assert "This run is finished: its last step, 3, is in" in capsys.readouterr().out
    assert open(f"{r}/metrics.jsonl").read() == before


def test_a_checkpoint_that_a_crash_left_ahead_of_latest(r, run):
    """Killed between the rename of step-000003 and that of LATEST, with only one checkpoint to be kept."""
    shutil.copytree(r, "whole", symlinks=True)
    run("resume=true", "run_dir=whole", "max_steps=5")
    run(*RUN, "max_steps=4", "save_every=1", "run_dir=crashed")
    os.remove("crashed/LATEST")
    os.symlink("step-000002", "crashed/LATEST")
    run("resume=true", "run_dir=crashed", "max_steps=3", "keep_checkpoints=1")
    assert latest("crashed") == 3
    assert sorted(name for name in os.listdir("crashed") if "step" in name) == ["step-000003", "step-000004"]
    run("resume=true", "run_dir=crashed", "max_steps=5")
    assert same_weights("whole", "crashed")


def test_a_line_torn_within_a_character(r, run):
    before = numbers(r)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(f"{r}/{name}", "ab") as file:
            file.write(b'3\n{"step": 1, "x": "' + "é".encode()[:1])
    run("resume=true", f"run_dir={r}", "max_steps=4")
    assert numbers(r)[:3] == before and len(numbers(r)) == 4 and read_lines(f"{r}/samples.jsonl") == []


def test_run_names_that_look_like_patterns_or_numbers(run, refused):
    for name in ("a[1]", "1e-5", "2024"):
        folder = run(*RUN, "max_steps=1", f"exp_name={name}")
        assert folder == os.path.abspath(f"runs/{name}")
        assert "holds a run already" in refused(*RUN, f"exp_name={name}")
        run("resume=true", f"exp_name={name}", "max_steps=2")
        assert latest(folder) == 2


def test_resume_auto_starts_over_where_nothing_was_saved(run):
    os.makedirs("r")
    write_lines("r/metrics.jsonl", [{"step": 1, "split": "train", "loss": 7.0}])
    with open("r/config.yaml", "w") as file:
        file.write("loss: sft\nprovenance: {run_id: abc}\n")
    run(*RUN, "max_steps=3", "resume=auto", "run_dir=r")
    assert [line["step"] for line in numbers("r")] == [1, 2, 3] and 7.0 not in losses_of("r")


# ---------------------------------------------------------------- what may not go on


@pytest.mark.parametrize("name, content", [
    ("rng.pt", b""), ("rng.pt", b"PK"), ("optimizer/.metadata", b""), ("optimizer/__0_0.distcp", b"PK"),
    ("state.json", b"{}"), ("state.json", b"[]"), ("state.json", b'{"st')])
def test_damaged_checkpoints_are_refused(name, content, r, refused):
    with open(f"{r}/LATEST/trainer_state/{name}", "wb") as file:
        file.write(content)
    assert "is damaged" in refused("resume=true", f"run_dir={r}")


def test_resume_needs_a_whole_checkpoint(r, refused):
    assert "has no complete checkpoint to resume" in refused("resume=true", "exp_name=nothing")
    os.remove(f"{r}/LATEST/trainer_state/rng.pt")
    assert "is incomplete, it lacks trainer_state/rng.pt" in refused("resume=auto", f"run_dir={r}")


def test_what_a_resumed_run_may_not_change(run, sft_run, refused):
    folder = run(*RUN, "loss=dpo", f"model={sft_run}/LATEST", "max_steps=1", "lr_schedule=linear")
    for given, old in (("lr=0.5", "lr was 0.002"), ("dpo.beta=0.2", "dpo.beta was 0.1"),
                       ("seed=1", "seed was 0"), ("loss=ipo", "loss was dpo"),
                       ("batch_size=8", "batch_size was 4"), ("max_steps=9", "max_steps was 1")):
        message = refused("resume=true", f"run_dir={folder}", given)
        assert old in message and "cannot become" in message
    run("resume=true", f"run_dir={folder}", "lr=0.002", "save_every=7", "eval_batch_size=8", "log_every=3")


def test_changed_data_or_reference_are_refused(run, sft_run, refused):
    def write(rejected):
        return write_lines("r.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": f"{rejected} {i}"}
                                       for i in range(6)])
    shutil.copytree(f"{sft_run}/LATEST/", "base")
    folder = run("loss=dpo", "model=base", f"data={write('b')}", "batch_size=2", "max_steps=2",
                 "lr_schedule=constant")
    resume = ["resume=true", f"run_dir={folder}", "max_steps=3"]
    write("c")
    assert "the data is not what this run began with" in refused(*resume)
    write("b")
    weights = load_file("base/model.safetensors")
    save_file({name: w + (name == "lm_head.weight") for name, w in weights.items()}, "base/model.safetensors",
              metadata={"format": "pt"})
    assert "the reference is not what this run began with" in refused(*resume)
    save_file(weights, "base/model.safetensors", metadata={"format": "pt"})
    run(*resume)
    assert latest(folder) == 3


def test_another_reward_model_is_refused_on_resume(run, sft_run, refused):
    settings = [*RUN, f"model={sft_run}/LATEST", "max_steps=1"]
    run(*settings, "loss=rm", "run_dir=rm")
    shutil.copytree("rm/LATEST/", "judge")
    folder = run(*settings, "loss=rpo", f"data={write_bare_pairs(12)}", "reward_model=judge")
    weights = load_file("judge/model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, "judge/model.safetensors", metadata={"format": "pt"})
    assert "the reward_model is not what this run began with" in refused(
        "resume=true", f"run_dir={folder}", "max_steps=2")


def test_a_run_that_another_process_began_meanwhile(run):
    settings = [*RUN, "max_steps=1", "exp_name=race"]
    config, checkpoint = load_config(read_arguments(settings), OBJECTIVES, data.DATASETS)
    run(*settings)
    with pytest.raises(InputError, match="holds a run already"):
        lock_folder(config.run_dir, config.resume, checkpoint)
    run("resume=true", "exp_name=race", "max_steps=2")
    with pytest.raises(InputError, match="has written to .*race meanwhile"):
        lock_folder(config.run_dir, "auto", checkpoint)


def test_two_processes_cannot_write_one_run(refused):
    os.makedirs("runs/busy")
    with open("runs/busy/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process" in refused(*RUN, "exp_name=busy")


# ---------------------------------------------------------------- killed


def kill_at_random(loss, num_kills, max_steps, model):
    """kill -9, each followed by resume=true: the weights and records of a run that was left alone."""
    settings = [*RUN, f"loss={loss}", f"model={model}", "save_every=3", "eval_every=15", "num_epochs=99",
                f"max_steps={max_steps}"]
    on_ranks(1, *settings, "run_dir=undisturbed")
    rng, arguments = random.Random(loss), [*settings, "run_dir=killed"]
    for number in range(num_kills):
        step = rng.randrange(3, max_steps // num_kills // 2) + number * max_steps // num_kills
        job = begin(1, *arguments)
        assert kill(job, lambda step=step: latest("killed") >= step, rng.uniform(0, 0.05)) == -9
        read_state(os.path.realpath("killed/LATEST"))
        AutoModelForCausalLM.from_pretrained("killed/LATEST")
        arguments = ["resume=true", "run_dir=killed"]
    on_ranks(1, *arguments)
    assert same_weights("killed", "undisturbed")
    assert numbers("killed") == numbers("undisturbed")
    assert read_lines("killed/samples.jsonl") == read_lines("undisturbed/samples.jsonl")
    assert [name for name in os.listdir("killed") if name.endswith(".partial")] == []


@pytest.mark.xdist_group("ranks")
def test_killed_at_two_random_moments(sft_run):
    kill_at_random("dpo", 2, 80, f"{sft_run}/LATEST")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_killed_at_ten_random_moments(loss, sft_run):
    kill_at_random(loss, 10, 400, f"{sft_run}/LATEST")


@pytest.mark.xdist_group("ranks")
def test_self_play_killed_in_every_phase(sft_run, refused):
    """kill -9 while iteration 0 samples, trains, while iteration 1 samples, trains; resumed each time."""
    settings = [*RUN, "loss=spin", f"model={sft_run}/LATEST", "spin.max_tokens=12", "num_epochs=0.5",
                "save_every=2", "eval_every=4", "keep_checkpoints=1", "eval_batch_size=8"]
    # An iteration draws 5 batches and takes 5 steps. The checkpoint of its start stays, however few are kept.
    on_ranks(1, *settings, "run_dir=undisturbed")
    command = [*settings, "run_dir=killed"]
    for name, trouble, step, num_answers in (
            ("generated-00.jsonl", "killed_writing generated-00.jsonl 2", 0, 12),
            ("generated-00.jsonl", "killed 4", 2, 40),
            ("generated-01.jsonl", "killed_writing generated-01.jsonl 3", 5, 20),
            ("generated-01.jsonl", "killed 9", 8, 40)):
        on_ranks(1, *command, trouble=trouble, answer=-9)
        assert latest("killed") == step and num_lines(f"killed/{name}") == num_answers
        command = ["resume=true", "run_dir=killed"]
    name = "killed/generated-01.jsonl"
    with open(name, "a") as file:
        file.write('{"row": 1, "id')  # a torn line that no crash could leave now, but a copy could
    assert name in refused("resume=true", "run_dir=killed")
    with open(name) as file:
        whole = file.read().rpartition("\n")[0] + "\n"
    with open(name, "w") as file:
        file.write(whole)
    on_ranks(1, "resume=true", "run_dir=killed")
    assert same_weights("killed", "undisturbed") and latest("killed") == 10
    assert numbers("killed") == numbers("undisturbed")
    for name in ("samples.jsonl", "generated-00.jsonl", "generated-01.jsonl"):
        assert open(f"killed/{name}").read() == open(f"undisturbed/{name}").read()


# ---------------------------------------------------------------- asked to stop


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(number, status, run):
    job = begin(1, *RUN, "max_steps=100000", "num_epochs=99999", "run_dir=r", function="script")
    assert kill(job, lambda: num_lines("r/metrics.jsonl") > 3, number=number) == status
    out, step = answers(job)[1], latest("r")
    assert f"Stopped by {number.name} after step {step} of 100000; all is saved." in out
    assert "python train.py resume=true run_dir=r" in out and numbers("r")[-1]["step"] == step > 3
    run("resume=true", "run_dir=r", f"max_steps={step + 1}")
    assert latest("r") == step + 1


def test_a_signal_stops_an_evaluation_which_is_made_up_for(run, monkeypatch):
    """At the second batch of samples it leaves, with nothing recorded; the resumed run evaluates first."""
    generate, calls = Sampler.generate, []

    def signalled(self, *arguments):
        calls.append(len(calls))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return generate(self, *arguments)
    monkeypatch.setattr(Sampler, "generate", signalled)
    settings = ["num_samples=8", "eval_batch_size=1", "eval_every=5"]
    run(*RUN, *settings, "max_steps=2", "run_dir=r", status=143)
    assert len(calls) == 2 and num_lines("r/metrics.jsonl") == 0 and latest("r") == 0
    run("resume=true", "run_dir=r", "eval_batch_size=8")
    assert [line["step"] for line in numbers("r")] == [0, 1, 2, 2]
    assert [line["split"] for line in read_lines("r/metrics.jsonl")] == ["eval", "train", "train", "eval"]


def test_max_hours(run, capsys):
    folder = run(*RUN, "max_steps=3", "max_hours=1e-9")
    assert "Stopped by max_hours after step 0 of 3; all is saved." in capsys.readouterr().out
    run("resume=true", f"run_dir={folder}", "max_hours=null")
    assert latest(folder) == 3


# ---------------------------------------------------------------- written whole, at once or in the background


def fail(*arguments, **options):
    raise OSError("disk full")


def test_latest_moves_only_to_a_whole_folder(monkeypatch):
    trainer = make_trainer(*RUN)
    trainer.save()
    trainer.train_step()
    monkeypatch.setattr(trainer.data.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    run_dir = trainer.config.run_dir
    assert latest(run_dir) == 0 and not os.path.exists(f"{run_dir}/step-000001")
    assert AutoModelForCausalLM.from_pretrained(f"{run_dir}/LATEST")


def test_what_is_on_the_disk_before_latest_moves(monkeypatch):
    """Records and files are synced before the folder takes its name, and that before LATEST moves."""
    trainer, steps = make_trainer(*RUN), []
    trainer.log("train", trainer.train_step())
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append(os.path.basename(b)), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(os.path.basename(b)), replace(a, b)))
    trainer.save()
    run_dir = trainer.config.run_dir
    renamed, moved = steps.index("step-000001"), steps.index("LATEST")
    for name in ("metrics.jsonl", "LATEST/", "LATEST/model.safetensors", "LATEST/trainer_state",
                 "LATEST/trainer_state/rng.pt", "LATEST/trainer_state/state.json",
                 "LATEST/trainer_state/optimizer", "LATEST/trainer_state/optimizer/.metadata",
                 "LATEST/trainer_state/optimizer/__0_0.distcp"):
        assert os.stat(f"{run_dir}/{name}").st_ino in steps[:renamed], name
    assert os.stat(run_dir).st_ino in steps[renamed:moved]
    assert steps[moved:] == ["LATEST", os.stat(run_dir).st_ino]


def all_saved(folder):
    """A checkpoint's weights and its optimizer's memory."""
    dcp_to_torch_save(f"{folder}/trainer_state/optimizer", "memory.pt")
    return load_file(f"{folder}/model.safetensors") | torch.load("memory.pt")


def test_saves_in_the_background_never_run_at_once(monkeypatch):
    """A slow write: training goes on meanwhile, the next save waits for it; what is written is what was."""
    settings = [*RUN, "save_every=1", "max_steps=3"]
    make_trainer(*settings, "run_dir=at_once").train()
    trainer = make_trainer(*settings, "run_dir=r", "async_save=true")
    write, busy, saved = trainer.checkpoints.write, threading.Lock(), []

    def slowly(state, *more):
        assert busy.acquire(blocking=False)
        following = min(state["step"] + 1, 3)
        wait_for(lambda: trainer.step == following)
        time.sleep(0.1)
        write(state, *more)
        assert trainer.step == following
        saved.append(state["step"])
        busy.release()
    monkeypatch.setattr(trainer.checkpoints, "write", slowly)
    trainer.train()
    assert saved == [1, 2, 3] and latest("r") == 3
    for step in saved:
        ours, theirs = (all_saved(f"{folder}/step-00000{step}") for folder in ("r", "at_once"))
        assert ours.pop("step") == theirs.pop("step") == step and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tied_weights_are_saved_once_in_the_background_too(run, sft_run):
    tokenizer = AutoTokenizer.from_pretrained(f"{sft_run}/LATEST")
    tokenizer.save_pretrained("model")
    tiny_of("gpt2", vocab_size=len(tokenizer), n_positions=64, bos_token_id=None).save_pretrained("model")
    for word in ("true", "false"):
        run(*RUN, "model=model", "max_steps=1", "max_length=64", "max_prompt_length=32", f"async_save={word}",
            f"run_dir={word}")
    background, at_once = (load_file(f"{word}/LATEST/model.safetensors") for word in ("true", "false"))
    assert background.keys() == at_once.keys() and "lm_head.weight" not in at_once
    assert same_weights("true", "false")


def test_a_failed_save_in_the_background_stops_the_run(monkeypatch):
    trainer = make_trainer(*RUN, "async_save=true", "save_every=1", "max_steps=3")
    monkeypatch.setattr(trainer.data.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert trainer.step <= 2 and latest(trainer.config.run_dir) == -1


# ---------------------------------------------------------------- wandb


def test_wandb_offline(run):
    folder = run(*RUN, "loss=dpo", "max_steps=1", "eval_every=1", "wandb=offline")
    assert any(name.startswith("offline-run") for name in os.listdir(f"{folder}/wandb"))


@pytest.fixture
def recorder(monkeypatch):
    """A stand-in for wandb: the calls that it got, as (name, arguments)."""
    calls = []

    def record(name):
        return lambda *arguments, **options: calls.append((name, *arguments, options)) or module
    module = types.SimpleNamespace(
        errors=types.SimpleNamespace(Error=RuntimeError), init=record("init"), log=record("log"),
        define_metric=record("define_metric"), finish=record("finish"),
        Table=lambda columns, data: ("table", columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_what_wandb_gets(run, recorder):
    """The numbers of metrics.jsonl by step, tables of samples, and the same id when the run is resumed."""
    folder = run(*RUN, "loss=dpo", "max_steps=3", "wandb=online", "eval_every=2")
    logged = [call[1] for call in recorder if call[0] == "log"]
    lines = read_lines(f"{folder}/metrics.jsonl")
    for line in lines:
        prefix = "eval/" if line["split"] == "eval" else ""
        expected = {prefix + name: value for name, value in line.items()
                    if name not in ("step", "examples", "split", "time")}
        assert {"step": line["step"], **expected} in logged
    tables = [(call["step"], call["eval/samples"]) for call in logged if "eval/samples" in call]
    assert [step for step, _ in tables] == [0, 2, 3] and len(logged) == len(lines) + 3
    name, columns, rows = tables[0][1]
    assert columns[:2] == ["prompt", "policy"] and len(rows) == 2
    assert rows[0] == [read_lines(f"{folder}/samples.jsonl")[0][name] for name in columns]
    run("resume=true", f"run_dir={folder}", "max_steps=4")
    names = [call[0] for call in recorder]
    assert (names[0], names[-1]) == ("init", "finish") and names.count("init") == names.count("finish") == 2
    ids = [call[-1]["id"] for call in recorder if call[0] == "init"]
    assert ids[0] == ids[1] and ("define_metric", "*", {"step_metric": "step"}) in recorder


def test_a_failed_wandb_leaves_no_run_behind(run, refused, recorder, monkeypatch):
    def fail_to_start(**options):
        raise RuntimeError("no key")
    monkeypatch.setattr(sys.modules["wandb"], "init", fail_to_start)
    assert "wandb=online does not start: no key" in refused(*RUN, "max_steps=1", "wandb=online")
    run(*RUN, "max_steps=1", "wandb=disabled")


@pytest.mark.xdist_group("ranks")
def test_wandb_is_not_imported_when_disabled():
    on_ranks(1, "wandb", *RUN, "max_steps=1", "eval_every=1", function="imported", answer=False)
