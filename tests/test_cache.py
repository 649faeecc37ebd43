"""What is computed once: the reference's log-probabilities, kept under all that decides them; rewards."""

import dataclasses
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (FEW_ROWS, TEMPORARY, TINY_RUN, config_of, losses_of, make_trainer, numbers,
                      obvious_logp, read_lines, same_weights, start, write_bare_pairs, write_lines)

import trainers
from engine.batches import CACHED, Batcher, Example, collate
from engine.cache import fill_in_rewards, read_checked, score_or_read, write_checked
from engine.checkpoints import RunFolder
from engine.distributed import device
from engine.forward import response_scores
from engine.models import fingerprint
from engine.toy import toy

SIXTY = write_lines(os.path.join(TEMPORARY.name, "sixty.jsonl"), toy("train", True)[:60])
EXACT = ["dtype=float64", "compute_dtype=float64", "layout=separate"]


@pytest.fixture
def dpo(sft_run):
    """A DPO run whose steps see all 60 rows, so that their reference is cached; 8 are held out."""
    return ["loss=dpo", f"model={sft_run}/LATEST", *TINY_RUN, f"data={SIXTY}", f"eval_data={FEW_ROWS}",
            "num_samples=0", "batch_size=20"]


def reference_rows(printed):
    """(rows read, rows computed) as a run printed them."""
    (found,) = re.findall(r"log-probabilities of ([\d,]+) rows read from \S+, of ([\d,]+) computed", printed)
    return tuple(int(number.replace(",", "")) for number in found)


# ---------------------------------------------------------------- the reference


def test_the_reference_is_computed_once_for_all_runs(run, dpo, capsys):
    first = run(*dpo, *EXACT)
    assert reference_rows(capsys.readouterr().out) == (0, 68)
    second = run(*dpo, *EXACT, "exp_name=again")
    assert reference_rows(capsys.readouterr().out) == (68, 0)
    uncached = run(*dpo, *EXACT, "exp_name=uncached", "reference_cache=false")
    assert "log-probabilities of" not in capsys.readouterr().out
    assert numbers(first) == numbers(second)
    for line, expected in zip(numbers(first), numbers(uncached), strict=True):
        assert line == pytest.approx(expected, rel=1e-6, abs=1e-6)  # RMSNorm computes in float32
    for settings, rows in (
            ([], (0, 68)),  # float32
            (["loss=ipo", "lr=1e-3", "max_tokens_per_microbatch=300"], (60, 8)),  # evaluation in other parts
            (["reference_cache=elsewhere"], (0, 68)), (["attention=eager"], (0, 68)),
            (["compute_dtype=bfloat16"], (0, 68)), (["max_length=20", "max_prompt_length=8"], (0, 68)),
            ([f"reference={first}/LATEST"], (0, 68)), ([], (68, 0))):
        trainer = make_trainer(*dpo, *settings, "exp_name=tried")
        capsys.readouterr()
        trainer.fill_in_reference()
        assert reference_rows(capsys.readouterr().out) == rows


def test_reference_log_probabilities_are_the_reference_models(dpo):
    trainer = make_trainer(*dpo, *EXACT, "loss=rpo")
    examples = [*trainer.data.train_examples[:4], *trainer.data.eval_examples[:4]]
    with torch.no_grad():
        expected = [[obvious_logp(trainer.reference, example, ids).item() for ids in example.responses]
                    for example in examples]
    trainer.fill_in_reference()
    for example, values in zip(examples, expected):
        assert example.columns[CACHED] == pytest.approx(values, rel=1e-6)
        assert {"chosen_reward", "rejected_reward"} <= example.columns.keys()


def test_what_decides_the_reference_is_in_its_key(dpo, sft_run):
    """One weight, one setting of the model (no weight shows it), one token of one row."""
    def file_of(change):
        trainer = make_trainer(*dpo, f"reference={sft_run}/LATEST")
        trainer.data.eval_sources = {}
        change(trainer)
        trainer.fingerprints["reference"] = fingerprint(trainer.reference)
        before = set(os.listdir("runs/reference_cache")) if os.path.isdir("runs/reference_cache") else set()
        trainer.fill_in_reference()
        return set(os.listdir("runs/reference_cache")) - before

    def change_weight(trainer):
        with torch.no_grad():
            trainer.reference.lm_head.weight[3, 4] += 1e-3

    def change_setting(trainer):
        trainer.reference.config.rms_norm_eps = 1e-3

    def change_token(trainer):
        trainer.data.train_examples[7].responses[1][0] += 1

    def move_token(trainer):  # from the prompt to the response
        example = trainer.data.train_examples[7]
        trainer.data.train_examples[7] = dataclasses.replace(example, prompt=example.prompt[:-1], responses=(
            np.append(example.prompt[-1:], example.responses[0]), example.responses[1]))

    assert len(file_of(lambda trainer: None)) == 1 and not file_of(lambda trainer: None)
    for change in (change_weight, change_setting, change_token, move_token):
        assert len(file_of(change)) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cache_file_is_computed_again(damage, dpo, capsys):
    values = []
    for round in range(3):
        trainer = make_trainer(*dpo)
        trainer.data.eval_sources = {}
        capsys.readouterr()
        trainer.fill_in_reference()
        printed = capsys.readouterr().out
        assert reference_rows(printed) == ((60, 0) if round == 2 else (0, 60))
        assert ("is damaged and computed again" in printed) is (round == 1)
        rows = trainer.data.train_examples
        values.append([example.columns[CACHED] for example in rows])
        (name,) = os.listdir("runs/reference_cache")
        with open(f"runs/reference_cache/{name}", "rb") as file:
            content = file.read()
        changed = {"cut": content[:-100], "flip": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
                   "empty": b"", "other": b"x" * 1000}[damage]
        if round == 0:
            with open(f"runs/reference_cache/{name}", "wb") as file:
                file.write(changed)
    assert values[0] == values[1] == values[2]


def test_whoever_writes_a_cache_file_it_is_whole(capsys):
    """Four write the same at once while others read: what is read is all there, and nothing else stays."""
    values, seen = torch.arange(2000, dtype=torch.float64).view(1000, 2), []
    path = os.path.abspath("cache.safetensors")
    assert read_checked(path, (1000, 2)) is None
    write_checked(path, values)

    def write():
        for _ in range(20):
            write_checked(path, values)

    def read():
        seen.extend(read_checked(path, (1000, 2)) for _ in range(100))
    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(job) for job in (write, write, write, write, read, read)]
    assert all(job.exception() is None for job in jobs)
    assert len(seen) == 200 and all(x is not None and torch.equal(x, values) for x in seen)
    assert os.listdir() == ["cache.safetensors"] and not capsys.readouterr().out
    assert read_checked(path, (1000, 1)) is None  # of other rows


@pytest.mark.slow
def test_two_runs_at_once_leave_one_good_cache(dpo, run, capsys):
    settings = [*dpo, "reference_cache=cache"]
    both = [start(*settings, f"exp_name=run{i}") for i in (1, 2)]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    names = os.listdir("cache")
    assert len(names) == 2 and all(name.endswith(".safetensors") for name in names)
    assert losses_of("runs/run1") == losses_of("runs/run2")
    capsys.readouterr()
    run(*settings, "exp_name=third")
    assert reference_rows(capsys.readouterr().out) == (68, 0)


@pytest.mark.parametrize("settings, seen", [
    (["max_steps=3"], True), (["max_steps=3", "batch_size=19"], False), (["num_epochs=0.9"], False),
    (["max_steps=0"], False)])
def test_a_run_that_does_not_see_every_row_computes_no_more_than_it_sees(settings, seen, dpo, capsys):
    """57 or 54 of 60: the reference runs in the steps, and stays; of none at all: evaluation's alone."""
    trainer = make_trainer(*dpo, "max_steps=null", *settings)
    capsys.readouterr()
    trainer.fill_in_reference()
    assert reference_rows(capsys.readouterr().out) == (0, 68 if seen else 8)
    assert all((CACHED in example.columns) is seen for example in trainer.data.train_examples)
    assert all(CACHED in example.columns for example in trainer.data.eval_examples)
    assert (trainer.reference is None) is (seen or settings == ["max_steps=0"])  # nothing is left to do


@pytest.mark.parametrize("settings, waits", [
    (["num_samples=2"], True), (["num_samples=0"], False), (["num_samples=2", "eval_every=0"], False),
    (["reference_cache=false"], True)])
def test_where_the_reference_waits(settings, waits, dpo):
    """Once its numbers are known only samples need it, for which it is there at the end as at the start."""
    trainer = make_trainer(*dpo, *settings)
    weights = {name: weight.clone() for name, weight in trainer.reference.state_dict().items()}
    assert trainer.train() == 0
    assert (trainer.reference is not None) is waits
    for name, weight in weights.items() if waits else ():
        assert torch.equal(trainer.reference.state_dict()[name], weight)
    assert any(not torch.equal(trainer.policy.state_dict()[name], weight) for name, weight in weights.items())


def test_the_reference_waits_on_the_host_between_evaluations(dpo, monkeypatch):
    """It comes to its device to be sampled from, and goes when that is done; one on the host stays."""
    trainer, moves = make_trainer(*dpo, "num_samples=2"), []
    monkeypatch.setattr(trainer.reference, "to", lambda place: moves.append(str(place)))
    monkeypatch.setattr(trainer.sampler, "kl", lambda *_: moves.append("kl") or 0.0)
    trainer.fill_in_reference()
    trainer.sample()
    assert trainer.reference.device.type != "cpu" or moves == ["kl"]
    moves.clear()
    trainer.reference_waits = True  # as on a GPU
    trainer.sample()
    trainer.sample()
    assert moves == [str(device()), "kl", "cpu"] * 2


def test_a_reference_whose_folder_goes_meanwhile(dpo, run, sft_run, monkeypatch):
    """A run reads it once, at its start: it ends as if nothing had been, with the same KL."""
    evaluate = trainers.Trainer.evaluate

    def vanish(trainer):
        if trainer.step == 2:
            shutil.rmtree("ref")
        evaluate(trainer)
    settings = [*dpo, "reference=ref", "num_samples=2", "eval_every=1", "lr=0.01", "warmup_steps=0"]
    folders = []
    for change in (evaluate, vanish):
        if not os.path.exists("ref"):
            shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "ref")
        monkeypatch.setattr(trainers.Trainer, "evaluate", change)
        folders.append(run(*settings, f"exp_name={change.__name__}"))
    assert not os.path.exists("ref")
    assert numbers(folders[0]) == numbers(folders[1]) and same_weights(*folders)
    kls = [line["samples/kl"] for line in numbers(folders[1]) if "samples/kl" in line]
    assert len(kls) == 4 and kls[0] == 0 < kls[3]


def test_a_cache_that_cannot_be_written_is_refused(dpo, refused):
    cache = f"{FEW_ROWS}/cache"
    said = refused(*dpo, f"reference_cache={cache}")
    assert said == (f"reference_cache={cache} cannot be written, {FEW_ROWS} is in its way: name another "
                    "folder, or set it to false")
    os.mkdir("runs")
    write_lines("runs/reference_cache", [])
    said = refused(*dpo, "run_dir=r", "reference_cache=true")
    path = os.path.abspath("runs/reference_cache")
    assert said == (f"reference_cache=runs/reference_cache cannot be written, {path} is in its way: name "
                    "another folder, or set it to false")
    assert os.listdir() == ["runs"] and os.listdir("runs") == ["reference_cache"]  # and no run
    config_of("loss=sft", "reference_cache=true")  # which needs none


# ---------------------------------------------------------------- rewards


def test_rewards_are_scored_once_and_kept(capsys):
    """Under a key of judge and ids: scored again is only what was not written whole, or by another judge."""
    scored = []
    examples = [Example(f"line {i}", np.array([i]), (np.array([i, 1]), np.array([2])), {})
                for i in range(1500)]

    def score(part):
        assert all(not example.columns for example in part)
        scored.append(len(part))
        return [[example.prompt[0] + 0.5, -1.0] for example in part]

    def fill_in(judge):
        scored.clear()
        assert score_or_read(examples, RunFolder("."), judge, score) == [[i + 0.5, -1.0] for i in range(1500)]
        return list(scored)
    assert fill_in("judge") == [1000, 500]  # a thousand at a time, so that little is lost with a run
    assert fill_in("judge") == []
    lines = read_lines("rewards.jsonl")
    assert [line["where"] for line in lines] == [example.where for example in examples]
    write_lines("rewards.jsonl", lines[:1200])
    with open("rewards.jsonl", "a") as file:
        file.write('{"key": "torn')
    assert fill_in("judge") == [500]
    examples[3].responses[1][0] = 9
    assert fill_in("judge") == [1000]
    assert fill_in("another") == [1000, 500]


def test_pairs_without_rewards_get_a_reward_models(run, rm_run, sft_run, monkeypatch):
    write_bare_pairs(40)
    settings = [*TINY_RUN, "loss=rpo", "data=bare.jsonl", f"eval_data={FEW_ROWS}", "num_samples=0",
                f"reward_model={rm_run}/LATEST", f"model={sft_run}/LATEST", "num_epochs=1", "max_steps=null",
                "save_every=2", "lr_schedule=constant", "eval_every=0"]
    whole = run(*settings, "run_dir=whole")
    lines = read_lines(f"{whole}/rewards.jsonl")
    assert [line["where"] for line in lines] == [f"bare.jsonl line {i + 1}" for i in range(40)]
    trainer = make_trainer("loss=rm", f"model={rm_run}/LATEST", "data=bare.jsonl", f"eval_data={FEW_ROWS}")
    examples = trainer.train_examples[::9]
    scores = [response_scores(trainer.policy, collate([example])).flatten().tolist() for example in examples]
    for line, (chosen, rejected) in zip(lines[::9], scores, strict=True):
        assert [line["chosen_reward"], line["rejected_reward"]] == pytest.approx(
            [chosen, rejected], rel=1e-4, abs=1e-4)
    assert max(scores)[0] - min(scores)[0] > 0.1  # they tell one pair from another
    run(*settings, "max_steps=6", "run_dir=part")
    monkeypatch.setattr(Batcher, "values", lambda *_, title: pytest.fail(f"{title} again"))
    run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights("whole", "part") and len(read_lines("part/rewards.jsonl")) == 40


def test_rewards_in_the_data_stay(sft_run, rm_run):
    rows = toy("train", True)[:6]
    for row in rows[3:]:
        del row["chosen_reward"], row["rejected_reward"]
    write_lines("some.jsonl", rows)
    trainer = make_trainer("loss=rpo", "data=some.jsonl", f"eval_data={FEW_ROWS}", f"model={sft_run}/LATEST",
                           f"reward_model={rm_run}/LATEST")
    fill_in_rewards([*trainer.data.train_examples, *trainer.data.eval_examples], None, trainer.score)
    for row, example in zip(rows[:3], trainer.data.train_examples):
        assert example.columns == {name: row[name] for name in ("chosen_reward", "rejected_reward")}
    for example in trainer.data.train_examples[3:]:
        scores = response_scores(trainer.reward_model, collate([dataclasses.replace(example, columns={})]))
        assert list(example.columns.values()) == pytest.approx(scores.flatten().tolist(), rel=1e-4, abs=1e-4)
        assert list(example.columns) == ["chosen_reward", "rejected_reward"]


def test_a_pair_lacks_rewards_whatever_lists_would_read(sft_run, rm_run):
    """A column `scores`, which is a list's rewards, gives a pair none."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in toy("train", True)[:6]]
    write_lines("some.jsonl", [row | {"scores": [1, 2]} for row in rows])
    trainer = make_trainer("loss=rpo", "data=some.jsonl", f"eval_data={FEW_ROWS}", f"model={sft_run}/LATEST",
                           f"reward_model={rm_run}/LATEST")
    assert {None} == {x for example in trainer.data.train_examples for x in example.columns.values()}
    fill_in_rewards([*trainer.data.train_examples, *trainer.data.eval_examples], None, trainer.score)
    assert None not in {x for example in trainer.data.train_examples for x in example.columns.values()}
