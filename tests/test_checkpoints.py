"""A run's folder is whole whenever it is looked at, and a run that goes on is the run that never stopped."""

import base64
import datetime
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import types

import pytest
import torch
from conftest import (FORTY, ROOT, copy_model, hash_again, latest, losses_of, made_once, make_trainer,
                      needed, num_lines, numbers, read_lines, same_weights, tiny_of, wait_for,
                      write_bare_pairs, write_lines)
from on_ranks import answers, begin, kill, on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import data
import engine.checkpoints
import engine.models
import train
from engine import InputError
from engine.checkpoints import Checkpoints, RunFolder, load_config, lock_folder, read_state
from engine.config import read_arguments
from engine.folder import files_in
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
    copy_model(f"{sft_run}/LATEST", "model")
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
    saved = base64.b64decode(read_state(os.path.realpath(f"{r}/LATEST"))["random"][0])
    torch.manual_seed(12345)
    given = read_arguments(["resume=true", f"run_dir={r}"])
    train.build_trainer(*load_config(given, OBJECTIVES, data.DATASETS))
    assert torch.get_rng_state().numpy().tobytes() == saved


def test_an_optimizers_state_is_made_one_weight_at_a_time(r, monkeypatch):
    """A second set of all weights and gradients would not fit where the run did."""
    made, make = [], engine.models.make_optimizer

    def counting(parameters, config):
        made.append(len(parameters))
        return make(parameters, config)
    monkeypatch.setattr(engine.models, "make_optimizer", counting)
    given = read_arguments(["resume=true", f"run_dir={r}"])
    trainer = train.build_trainer(*load_config(given, OBJECTIVES, data.DATASETS))
    weights = [*trainer.policy.parameters()]
    assert set(made) == {1} and len(made) >= len(weights)
    assert all(trainer.optimizer.state[x]["step"] > 0 for x in weights)


def test_a_checkpoint_says_what_it_holds(r):
    """Each file and each record with its hash, where the run stands, and its settings; nothing is pickled."""
    path = f"{r}/LATEST/trainer_state/state.json"
    text = open(path).read()
    state = json.loads(text)
    own = text[:text.index(', "sha256": "', -90)] + "}"
    assert hashlib.sha256(own.encode()).hexdigest() == state["sha256"]
    assert [state[name] for name in ("format", "step", "examples", "iteration", "reference", "base")] == [
        2, 3, 12, 0, None, None]
    assert len(state["tokens"]) == 64 and datetime.date.fromisoformat(state["began"])
    assert state["config"]["sft.average"] == "tokens" and state["config"]["max_steps"] == 3
    found = {path.removeprefix(f"{r}/LATEST/") for path in read_all(f"{r}/LATEST/")}
    found = {name.lstrip("/") for name in found}
    assert found == {*state["files"], "trainer_state/state.json"}
    assert {name.rpartition(".")[2] for name in found} == {"json", "safetensors"}
    assert state["records"].keys() == {"metrics.jsonl"}
    for folder, known in ((f"{r}/LATEST", state["files"]), (r, state["records"])):
        for name, digest in known.items():
            content = open(f"{folder}/{name}", "rb").read()
            assert digest == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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


class Mark:
    """Unpickled, it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("mark",)


def flip(content, other):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


FAULTS = {"flipped": flip, "cut": lambda content, other: content[:len(content) // 2],
          "emptied": lambda content, other: b"", "deleted": None, "exchanged": lambda content, other: other,
          "a pickle": lambda content, other: pickle.dumps(Mark())}


@pytest.fixture(scope="session")
def saved_twice(tmp_path_factory):
    """The folder of a run with samples, and two checkpoints."""
    return made_once(tmp_path_factory, "saved_twice", lambda folder: train.main(
        [*RUN, "loss=dpo", "max_steps=4", "save_every=2", "eval_every=2", f"run_dir={folder}"]))


@pytest.mark.parametrize("fault", FAULTS)
def test_no_damaged_file_is_used(fault, saved_twice, refused):
    """Each of a checkpoint, of what the run keeps beside it and of the records up to it: a sentence names it,
    nothing is written, no code runs; from the older checkpoint, which is named if all else is whole, the run
    goes on."""
    shutil.copytree(saved_twice, "r", symlinks=True)
    names = [name for name in files_in("r") if not name.startswith((".lock", "LATEST/", "step-000002/"))]
    assert len(names) > 15 and {"config.yaml", "reference/trainer_state/state.json"} < {*names}
    for name in names:
        content, path = open(f"r/{name}", "rb").read(), f"r/{name}"
        if not put_fault(fault, name, content):
            continue
        before = read_all("r")
        said = refused("resume=true", "run_dir=r", "max_steps=5")
        assert name.split("/", 1)[-1] in said and ("damaged" in said or name == "config.yaml"), said
        assert ("resume=step-000002 goes on" in said) == ("000004" in name), said
        if "/" in name and "trainer_state" not in name:
            said = refused(*RUN, f"model={os.path.dirname(path)}", "exp_name=next")
            assert os.path.basename(name) in said and "damaged" in said, said
        assert read_all("r") == before and not os.path.exists("mark")
        with open(path, "wb") as file:
            file.write(content)
    assert refused("resume=true", "run_dir=r", "seed=1")  # whole again, it is read


def put_fault(fault, name, content):
    """Damages r/name, which holds this content; says whether that is another one."""
    twin = {"step-000004": "step-000002", "step-000002": "step-000004"}.get(name.split("/")[0])
    twin = open(f"r/{twin}/{name.split('/', 1)[1]}", "rb").read() if twin else b'{"x": 1}\n'
    damaged = FAULTS[fault] and FAULTS[fault](content, twin)
    if name == "config.yaml" and fault == "flipped":  # not in one of the settings that may change
        damaged = content.replace(b"\nbatch_size: 4\n", b"\nbatch_size: 5\n")
    os.remove(f"r/{name}")
    if damaged is not None:
        with open(f"r/{name}", "wb") as file:
            file.write(damaged)
    return damaged != content


@pytest.mark.slow
@pytest.mark.parametrize("kept, settings", [
    ("generated-00.jsonl", ["loss=spin", "spin.max_tokens=8"]),
    ("base/config.json", ["loss=dpo", "lora.rank=2"]),
    ("rewards.jsonl", ["loss=rpo", "data=bare.jsonl", "eval_data=bare.jsonl", "reward_model=rm/LATEST",
                       "tokenizer=rm/LATEST"])])
def test_no_damaged_file_is_used_by_any_run(kept, settings, rm_run, run):
    """Of all in the folder: a sentence names it, or the run goes on as an undisturbed one."""
    pytest.importorskip("peft")
    write_bare_pairs(40)
    os.symlink(rm_run, "rm")
    run(*RUN, *settings, "max_steps=4", "save_every=2", "eval_every=2", "run_dir=whole")
    shutil.copytree("whole", "saved", symlinks=True)
    run("resume=true", "run_dir=whole", "max_steps=6")
    expected, weights = numbers("whole"), weights_of("whole")
    used = set()
    names = [name for name in files_in("saved") if not re.match("LATEST/|merged/|.*lock", name)]
    assert kept in names
    for fault, name in itertools.product(FAULTS, names):
        content = open(f"saved/{name}", "rb").read()
        shutil.rmtree("r", ignore_errors=True)
        shutil.copytree("saved", "r", symlinks=True)
        if not put_fault(fault, name, content):
            continue
        before = read_all("r")
        try:
            run("resume=true", "run_dir=r", "max_steps=6")
        except InputError as refusal:
            assert os.path.basename(name) in str(refusal) and read_all("r") == before, (name, refusal)
        else:
            assert numbers("r") == expected and weights_of("r") == weights, (fault, name)
            used.add(name.split("/")[0])
        assert not os.path.exists("mark")
    assert used <= {"step-000000", "step-000002", "merged-000004"}  # of which no run has need


def weights_of(folder):
    """Bytes of its last checkpoint's, adapters or a model."""
    return [open(path, "rb").read() for path in glob.glob(f"{folder}/LATEST/*.safetensors")]


def read_all(folder):
    paths = [f"{at}/{name}" for at, _, names in os.walk(folder) for name in names]
    return {path: open(path, "rb").read() for path in paths}


def test_an_older_checkpoint_goes_on(saved_twice, run, capsys):
    """What stood after it is put aside or cut off, and all comes again."""
    shutil.copytree(saved_twice, "r", symlinks=True)
    os.truncate("r/LATEST/model.safetensors", 100)
    with open("r/metrics.jsonl", "ab") as file:
        file.write(b'{"x": 1}\n{"step": "three"}\n{"st')  # no records
    run("resume=step-000002", "run_dir=r")
    assert "from step-000002, which is LATEST from here on" in capsys.readouterr().out
    assert same_weights("r", saved_twice) and numbers("r") == numbers(saved_twice)
    assert read_lines("r/samples.jsonl") == read_lines(f"{saved_twice}/samples.jsonl")
    assert os.path.getsize("r/step-000004.1/model.safetensors") == 100


@pytest.mark.parametrize("resume, said", [
    ("step-000003", "has no such checkpoint, it has step-000004, step-000002"),
    ("step-2", "has no such checkpoint"), ("true", None), ("auto", None)])
def test_which_checkpoint_goes_on(resume, said, saved_twice, run, refused):
    """Without LATEST, a real folder in its place, or a link elsewhere: never from the start."""
    shutil.copytree(saved_twice, "r", symlinks=True)
    if said:
        assert said in refused(f"resume={resume}", "run_dir=r")
        return
    settings = [f"resume={resume}", "run_dir=r", "max_steps=5"]
    os.remove("r/LATEST")
    os.symlink("..", "r/LATEST")
    assert "LATEST points to .., which is no checkpoint of this run: remove it" in refused(*settings)
    os.remove("r/LATEST")
    shutil.copytree("r/step-000004", "r/LATEST")
    assert "LATEST is a folder and no link, as in a copy without links: remove it" in refused(*settings)
    shutil.rmtree("r/LATEST")
    if resume == "true":
        assert "has no LATEST: resume=auto goes on from the newest checkpoint" in refused(*settings)
        return
    assert "go on with it by resume=auto" in refused("run_dir=r")
    os.truncate("r/step-000004/config.json", 5)  # the newest that is whole
    run("resume=auto", "run_dir=r")
    assert same_weights("r", saved_twice) and numbers("r") == numbers(saved_twice)
    for step in (2, 4):
        os.truncate(f"r/step-00000{step}/config.json", 5)
    os.remove("r/LATEST")
    assert "has checkpoints, but none is whole, checkpoint" in refused("resume=auto", "run_dir=r")


def test_data_that_moved_behind_a_link(run):
    """A run goes on with them, and goes on again."""
    os.mkdir("d1")
    shutil.copy(FORTY, "d1/x.jsonl")
    settings = [*RUN, "data=d1/x.jsonl", "eval_data=d1/x.jsonl", "run_dir=r"]
    run(*settings, "max_steps=2")
    os.rename("d1", "d2")
    os.symlink("d2", "d1")
    assert run("resume=true", "run_dir=r", "max_steps=3") and "d2/x.jsonl" in open("r/config.yaml").read()
    os.remove("r/LATEST")
    shutil.rmtree("r/step-000003")
    os.symlink("step-000002", "r/LATEST")
    run("resume=true", "run_dir=r", "max_steps=3")
    assert latest("r") == 3


def test_what_an_opponent_needs_is_kept_and_looked_at(run, refused, monkeypatch):
    """The checkpoint with which each iteration that is kept began."""
    run(*RUN, "loss=spin", "spin.max_tokens=8", "num_epochs=0.5", "save_every=2", "keep_checkpoints=2",
        "run_dir=r")
    steps = sorted(int(name[5:]) for name in os.listdir("r") if name.startswith("step-"))
    needed = [read_state(f"r/step-{step:06d}")["needs"] for step in steps[-2:]]
    assert len(steps) == 3 and set(needed) <= set(steps) and min(needed) == steps[0] > 0
    os.truncate(f"r/step-{steps[0]:06d}/config.json", 9)
    said = refused("resume=true", "run_dir=r")
    assert re.search(f"needs another one, and checkpoint .*{steps[0]:06d} is damaged, config.json", said)


def test_files_beside_a_checkpoint_are_looked_at(saved_twice, run, refused):
    """The settings of a reference that the run keeps; and what was added to a model."""
    shutil.copytree(saved_twice, "r", symlinks=True)
    path = "r/reference/config.json"
    settings = json.load(open(path))
    json.dump(settings | {"rms_norm_eps": 0.5}, open(path, "w"))
    said = refused("resume=true", "run_dir=r", "max_steps=5")
    assert re.search("step-000004 needs another one, and .*r/reference is damaged, config.json has", said)
    with open("r/LATEST/chat_template.jinja", "w") as file:
        file.write("{{ messages }}")
    assert "chat_template.jinja was not saved with it" in refused(*RUN, "model=r/LATEST")


def test_a_damaged_older_checkpoint_ends_no_run(run):
    """That is kept beside the newest: what it would need is not known."""
    run(*RUN, "max_steps=2", "save_every=1", "keep_checkpoints=2", "run_dir=r")
    os.truncate("r/step-000001/trainer_state/state.json", 9)
    run("resume=true", "run_dir=r", "max_steps=3", "keep_checkpoints=3")
    assert {"step-000001", "step-000002", "step-000003"} < {*os.listdir("r")} and latest("r") == 3


def test_an_evaluation_after_the_last_checkpoint_stays(saved_twice, run, capsys):
    """As of a finished run that is evaluated once more; half an evaluation is made again."""
    shutil.copytree(saved_twice, "r", symlinks=True)
    state = json.load(open("r/LATEST/trainer_state/state.json"))
    for name in ("metrics.jsonl", "samples.jsonl"):  # as if it had been saved before it was evaluated
        lines = [line for line in open(f"r/{name}") if json.loads(line)["step"] < 4 or "train" in line]
        content = "".join(lines).encode()
        state["records"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    hash_again("r/LATEST", state)
    before = open("r/metrics.jsonl").read(), open("r/samples.jsonl").read()
    with open("r/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "split": "train"}\n{"step": 5, "split": "eval"}\n{"step": 4, "spl')
    capsys.readouterr()
    run("resume=true", "run_dir=r")
    assert "This run is finished" in capsys.readouterr().out
    assert (open("r/metrics.jsonl").read(), open("r/samples.jsonl").read()) == before
    os.truncate("r/metrics.jsonl", state["records"]["metrics.jsonl"]["size"])  # its samples alone
    run("resume=true", "run_dir=r")
    assert numbers("r") == numbers(saved_twice)
    assert read_lines("r/samples.jsonl") == read_lines(f"{saved_twice}/samples.jsonl")


def test_counters_that_cannot_be(r, refused):
    """By somebody who hashed them again."""
    path = f"{r}/LATEST/trainer_state/state.json"
    state = json.load(open(path))
    for change in ({"step": 4}, {"step": "3"}, {"examples": 13}, {"examples": 2}, {"step": 3.0},
                   {"iteration": None}):
        hash_again(f"{r}/LATEST", state | change)
        assert "state.json is another step's" in refused("resume=true", f"run_dir={r}"), change
    with open(path, "w") as file:
        json.dump({"step": 3, "examples": 12}, file)
    assert "is of code before 2026-11-27" in refused("resume=true", f"run_dir={r}")


def test_a_config_that_was_edited(r, run, refused):
    """What may not change is held to what the run was saved with; the rest is free."""
    path = f"{r}/config.yaml"
    text = open(path).read()
    for old, new, said in (("seed: 0", "seed: 1", "seed is 1 in it and was 0"),
                           ("  beta: 0.1", "  beta: 0.2", "dpo.beta is 0.2 in it and was 0.1"),
                           ("batch_size: 4\n", "", "batch_size is missing in it and was 4")):
        with open(path, "w") as file:
            file.write(text.replace(old, new, 1))
        assert said in refused("resume=true", f"run_dir={r}")
    with open(path, "w") as file:
        file.write(text.replace("log_every: 1", "log_every: 2") + "trust_remote_code: true\n" * 0)
    run("resume=true", f"run_dir={r}", "max_steps=5")
    kept = open(path).read()
    assert "resume: false" in kept and "trust_remote_code: false" in kept and "log_every: 2" in kept


def test_code_is_run_by_nobodys_leave_but_the_callers(r):
    """A run's config.yaml cannot give it; the command line and a file of one's own can."""
    with open(f"{r}/config.yaml") as file:
        text = file.read().replace("trust_remote_code: false", "trust_remote_code: true")
    for content in (text, text[:text.index("provenance:")]):
        with open(f"{r}/config.yaml", "w") as file:
            file.write(content)
        for more, leave in (([], False), (["trust_remote_code=true"], True)):
            given = read_arguments(["resume=true", f"run_dir={r}", *more])
            assert load_config(given, OBJECTIVES, data.DATASETS)[0].trust_remote_code is leave


def test_links_are_not_written_through(r, refused):
    """Nor is anything else written to that is no file."""
    shutil.copy(f"{r}/metrics.jsonl", "elsewhere.jsonl")
    os.remove(f"{r}/metrics.jsonl")
    os.symlink(os.path.abspath("elsewhere.jsonl"), f"{r}/metrics.jsonl")
    before = open("elsewhere.jsonl").read()
    assert "metrics.jsonl is a link, and a run writes to its own folder alone" in refused(
        "resume=true", f"run_dir={r}", "max_steps=4")
    assert open("elsewhere.jsonl").read() == before
    os.remove(f"{r}/metrics.jsonl")
    shutil.copy("elsewhere.jsonl", f"{r}/metrics.jsonl")
    os.mkfifo(f"{r}/samples.jsonl")
    assert "samples.jsonl is no file" in refused("resume=true", f"run_dir={r}", "max_steps=4")


def test_resume_needs_a_checkpoint(refused):
    assert "has no complete checkpoint to resume" in refused("resume=true", "exp_name=nothing")


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW", "SGD"])
def test_a_weight_that_never_had_a_gradient(optimizer, run, monkeypatch):
    """As a router's bias, or a vision tower: the optimizer knows nothing of it, and the run goes on."""
    make = LlamaForCausalLM.__init__

    def with_unused(self, config):
        make(self, config)
        self.unused = torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_unused)
    settings = [*RUN, f"optimizer={optimizer}", "lr=1e-3"]
    run(*settings, "max_steps=4", "run_dir=whole")
    run(*settings, "max_steps=2", "run_dir=part")
    run("resume=true", "max_steps=4", "run_dir=part")
    assert same_weights("whole", "part")
    assert load_file("part/LATEST/model.safetensors")["unused"].tolist() == [1, 1, 1]


FULL = {"events": [], "from": math.inf, "folder": None}  # of an audit hook, which no test can take away


def refuse_to_write(event, arguments):
    """From an event on the disk under a folder is full: nothing is made, opened to write or renamed there."""
    if FULL["folder"] and event in ("open", "os.mkdir", "os.rename", "os.symlink", "os.truncate"):
        path = arguments[1] if event == "os.rename" else arguments[0]
        writes = event != "open" or isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(path, str) and os.path.abspath(path).startswith(FULL["folder"]):
            FULL["events"].append((event, os.path.basename(path)))
            if len(FULL["events"]) > FULL["from"]:
                raise OSError(errno.ENOSPC, "No space left on device", path)


@pytest.fixture
def disk():
    """disk(folder, n) has room for n more events of writing; disk(None) for all."""
    if refuse_to_write not in HOOKS:
        sys.addaudithook(refuse_to_write)
        HOOKS.append(refuse_to_write)

    def make(folder, number=math.inf):
        FULL.update(events=[], folder=folder and os.path.abspath(folder))
        FULL["from"] = number
    yield make
    make(None)


HOOKS = []
SHORT = [*RUN, "loss=dpo", "max_steps=3", "save_every=2", "eval_every=2"]


def test_a_full_disk_is_a_sentence(run, refused, disk):
    check_full_disk(run, refused, disk, 7)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_at_every_write(run, refused, disk):
    check_full_disk(run, refused, disk, 1)


def check_full_disk(run, refused, disk, every):
    """At each write in turn; after space is made the run ends as one that was never stopped."""
    disk("whole")
    whole = run(*SHORT, "run_dir=whole")
    num_events = len(FULL["events"])
    assert num_events > 40
    for number in range(0, num_events, every):
        disk(f"r{number}", number)
        said = refused(*SHORT, f"run_dir=r{number}")
        assert "cannot be written, no space left on device: " in said and "make room there" in said, said
        saved = os.path.islink(f"r{number}/LATEST")
        assert ("step-00000" in said.rpartition("device")[2]) == saved, said
        disk(None)
        run(*SHORT, "resume=auto", f"run_dir=r{number}")
        assert same_weights(f"r{number}", whole) and numbers(f"r{number}") == numbers(whole), number
        shutil.rmtree(f"r{number}")


def test_a_small_disk(run, refused):
    """The real thing: it holds one checkpoint and no second."""
    os.mkdir("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "small"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        said = refused(*SHORT, "run_dir=small/r")
        assert "cannot be written, no space left on device: step-000002 is saved; make room there" in said
        subprocess.run(["mount", "-o", "remount,size=20m", "small"], check=True)
        run(*SHORT, "resume=true", "run_dir=small/r")
        run(*SHORT, "run_dir=whole")
        assert same_weights("small/r", "whole") and numbers("small/r") == numbers("whole")
    finally:
        subprocess.run(["umount", "small"], check=True)


@pytest.mark.parametrize("make, settings, said", [
    (lambda: open("f", "w"), ["run_dir=f/r"], "f is in its place"),
    (lambda: None, ["run_dir=" + "x" * 300], "cannot be written, file name too long: nothing is saved yet"),
    (lambda: None, ["run_dir=/proc/nobody/r"], "/proc/nobody cannot be written, no such file"),
    (lambda: os.mkfifo("p"), ["run_dir=p"], "p is in its place")])
def test_folders_that_cannot_be(make, settings, said, refused):
    make()
    assert said in refused(*SHORT, *settings)


def test_what_a_resumed_run_may_not_change(run, sft_run, refused):
    folder = run(*RUN, "loss=dpo", f"model={sft_run}/LATEST", "max_steps=1", "lr_schedule=linear")
    for given, old in (("lr=0.5", "lr was 0.002"), ("dpo.beta=0.2", "dpo.beta was 0.1"),
                       ("seed=1", "seed was 0"), ("loss=ipo", "loss was dpo"),
                       ("batch_size=8", "batch_size was 4"), ("max_steps=9", "max_steps was 1")):
        message = refused("resume=true", f"run_dir={folder}", given)
        assert old in message and "cannot become" in message
        assert f"model={folder}/LATEST, and reference={sft_run}/" in message
    folder = run(*RUN, "max_steps=1", "warmup_steps=0.5", "run_dir=fraction")  # of steps that are given
    message = refused("resume=true", f"run_dir={folder}", "max_steps=9")
    assert "max_steps was 1" in message and message.endswith(f"model={folder}/LATEST")
    folder = "runs/dpo"
    run("resume=true", f"run_dir={folder}", "lr=0.002", "save_every=7", "eval_batch_size=8", "log_every=3")


def test_changed_data_or_reference_are_refused(run, sft_run, refused):
    def write(rejected):
        return write_lines("r.jsonl", [{"prompt": "p", "chosen": f"a {i}", "rejected": f"{rejected} {i}"}
                                       for i in range(6)])
    copy_model(f"{sft_run}/LATEST", "base")
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
    copy_model("rm/LATEST", "judge")
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
        lock_folder(config.run_dir, config.resume, checkpoint).__enter__()
    run("resume=true", "exp_name=race", "max_steps=2")
    with pytest.raises(InputError, match="has written to .*race meanwhile"):
        lock_folder(config.run_dir, "auto", checkpoint).__enter__()


def test_two_processes_cannot_write_one_run(refused):
    os.makedirs("runs/busy")
    with open("runs/busy/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process" in refused(*RUN, "exp_name=busy")


# ---------------------------------------------------------------- killed


def kill_at_random(loss, num_kills, max_steps, model):
    """kill -9, each followed by resume=true: the weights and records of a run that was left alone."""
    settings = [*RUN, f"loss={loss}", f"model={model}", "save_every=3", "eval_every=14", "num_epochs=99",
                "keep_best=loss", f"max_steps={max_steps}"]
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
    assert steps_of("killed") == steps_of("undisturbed")
    assert os.readlink("killed/BEST") == os.readlink("undisturbed/BEST")


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
@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129),
    (signal.SIGUSR1, 128 + signal.SIGUSR1)])  # which is another number on macOS
def test_signals_save_and_leave(number, status, run):
    job = begin(1, *RUN, "max_steps=100000", "num_epochs=99999", "run_dir=r", function="script")
    assert kill(job, lambda: num_lines("r/metrics.jsonl") > 3, number=number) == status
    out, step = answers(job)[1], latest("r")
    assert f"Stopped by {number.name} after step {step} of 100000; all is saved." in out
    assert "python train.py resume=true run_dir=r" in out and numbers("r")[-1]["step"] == step > 3
    run("resume=true", "run_dir=r", f"max_steps={step + 1}")
    assert latest("r") == step + 1


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_closed_terminal_saves_and_leaves():
    """Nothing can be printed then."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        termios.tcsetwinsize(1, (24, 80))  # without any no bar is drawn, and nothing is there to read
        os.execv(sys.executable, [sys.executable, f"{ROOT}/train.py", *RUN, "max_steps=100000",
                                  "num_epochs=99999", "run_dir=r"])
    while num_lines("r/metrics.jsonl") < 4:
        os.read(terminal, 2**16)  # fails if it has ended
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert latest("r") == numbers("r")[-1]["step"] > 3


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
    folder = run(*RUN, "max_steps=3", "max_hours=1e-9", status=75)
    assert "Stopped by max_hours after step 0 of 3; all is saved." in capsys.readouterr().out
    run("resume=true", f"run_dir={folder}", "max_hours=null")
    assert latest(folder) == 3


# ---------------------------------------------------------------- the best one


def with_values(monkeypatch, values, metric="loss"):
    """Evaluations that give these values, by step."""
    original = Checkpoints.update_best

    def update_best(self, step, metrics):
        metrics[metric] = values[step]
        original(self, step, metrics)
    monkeypatch.setattr(Checkpoints, "update_best", update_best)
    log = RunFolder.log
    monkeypatch.setattr(RunFolder, "log", lambda self, place, metrics: log(
        self, place, metrics | ({metric: values[place["step"]]} if place["split"] == "eval" else {})))


def steps_of(folder):
    return sorted(int(name[5:]) for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name))


BEST = [*RUN[:-1], "eval_every=2", "max_steps=10", "num_epochs=9", "run_dir=r"]


@pytest.mark.parametrize("metric, values, settings, best, steps", [
    # of a loss that falls and rises again; step 0 does not count, nor does what is not finite
    ("loss", {0: 0.1, 2: 3.0, 4: 2.0, 6: math.nan, 8: 2.5, 10: 2.0}, [], 4, [4, 10]),
    # a former best that save_every asked for stays, as does the best beyond the newest
    ("loss", {0: 9, 2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.0}, ["save_every=2"], 4, [2, 4, 6, 8, 10]),
    ("loss", {0: 9, 2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.0}, ["save_every=2", "keep_checkpoints=1"], 4,
     [4, 10]),
    # higher is better for what is neither a loss nor a KL
    ("samples/reward", {0: 9, 2: 1.0, 4: 0.5, 6: 2.0, 8: 0.0, 10: 1.0}, ["keep_checkpoints=1"], 6, [6, 10]),
    ("sft_loss/ea", {0: 9, 2: 3.0, 4: 0.5, 6: 2.0, 8: 0.7, 10: 1.0}, ["keep_checkpoints=1"], 4, [4, 10]),
    ("samples/kl", {0: 0, 2: 1.0, 4: 0.5, 6: 2.0, 8: 0.7, 10: None}, ["async_save=true"], 4, [4, 10]),
    ("loss", {0: 9, 2: 3.0, 4: 2.0, 6: 1.5, 8: 1.2, 10: 1.0}, ["keep_checkpoints=3"], 10, [10])])
def test_keep_best(metric, values, settings, best, steps, run, monkeypatch, capsys):
    with_values(monkeypatch, values, metric)
    run(*BEST, f"keep_best={metric}", *settings)
    assert os.readlink("r/BEST") == f"step-{best:06d}" and steps_of("r") == steps and latest("r") == 10
    assert (f"best        r/BEST -> step-{best:06d}\nuse it by   model=r/BEST\n") in capsys.readouterr().out


def test_keep_best_is_remembered(run, monkeypatch, capsys):
    """Stopped and gone on with, a former best gives way only to a better one; from an older checkpoint what
    came later is forgotten; where it is no longer asked for there is none."""
    values = {0: 9, 2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 2.0}
    with_values(monkeypatch, values)
    run(*BEST, "keep_best=loss", "max_steps=6")
    assert os.readlink("r/BEST") == "step-000004" and steps_of("r") == [4, 6]
    run("resume=true", "run_dir=r", "max_steps=8")
    assert os.readlink("r/BEST") == "step-000004" and steps_of("r") == [4, 6, 8]
    values[10] = 0.5
    run("resume=true", "run_dir=r", "max_steps=10")
    assert os.readlink("r/BEST") == "step-000010" and steps_of("r") == [6, 8, 10]
    values[10] = 2.0
    run("resume=step-000008", "run_dir=r")
    assert os.readlink("r/BEST") == "step-000008" and latest("r") == 10
    assert re.search(r"evaluation +step 0 +step 8 +step 10\n", capsys.readouterr().out)
    os.remove("r/BEST")
    shutil.copytree("r/step-000008", "r/BEST")  # as a copy without links has one
    run("resume=true", "run_dir=r", "max_steps=12", "keep_best=null", "eval_every=0")
    assert not os.path.lexists("r/BEST") and os.path.isdir("r/BEST.1")


def test_a_metric_that_no_evaluation_gives(refused, run):
    said = refused(*BEST, "keep_best=accuracy")
    assert said.startswith("keep_best=accuracy is no metric of an evaluation, which has loss, logps/chosen,")
    assert not os.path.exists("r/LATEST")
    assert "needs evaluations, which eval_every=0 has not" in refused(
        *BEST, "keep_best=loss", "eval_every=0", "run_dir=s")
    assert refused(*BEST, "keep_best=loss", "eval_data=null", "run_dir=s") == (
        "keep_best=loss needs held-out rows: name some by eval_data=")


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
                 "LATEST/trainer_state/state.json", "LATEST/trainer_state/optimizer",
                 "LATEST/trainer_state/optimizer/shard-00001.safetensors"):
        assert os.stat(f"{run_dir}/{name}").st_ino in steps[:renamed], name
    assert os.stat(run_dir).st_ino in steps[renamed:moved]
    assert steps[moved:] == ["LATEST", os.stat(run_dir).st_ino]


def all_saved(folder):
    """A checkpoint's weights and its optimizer's memory."""
    (memory,) = glob.glob(f"{folder}/trainer_state/optimizer/*")
    return load_file(f"{folder}/model.safetensors") | load_file(memory)


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
        assert ours.keys() == theirs.keys()
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
        __spec__=types.SimpleNamespace(origin="here"),
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
