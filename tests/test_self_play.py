"""Answers made elsewhere, several to a prompt, judged ones: each as a plain run and a plain loop have it."""

import dataclasses
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (FEW_ROWS, TEMPORARY, TINY_RUN, losses_of, make_trainer, numbers, obvious_logp,
                      read_lines, same_weights, save_random_judge, write_lines)
from transformers import AutoTokenizer

import engine.config
import engine.objectives
import losses
import train
import trainers
from engine import InputError
from engine.checkpoints import RunFolder
from engine.toy import toy, toy_scores
from losses import Objective, dpo_loss

ROWS = toy("train", True)[:24]
FEW = write_lines(os.path.join(TEMPORARY.name, "few to answer.jsonl"), ROWS)
SPIN = ["loss=spin", f"data={FEW}", f"eval_data={FEW_ROWS}", "num_samples=0", "max_steps=null",
        "num_epochs=0.34", "spin.max_tokens=8", "eval_every=0", "layout=separate"]  # 3 steps an iteration
ONLINE = ["loss=spin", f"data={FEW}", "eval_data=toy", "num_samples=0", "max_steps=null", "num_epochs=1",
          "spin.max_tokens=24", "spin.iterations=3", "spin.num_prompts=8", "spin.num_answers=4",
          "lr_schedule=constant", "layout=separate", "save_every=1"]  # 2 steps in each iteration


# ---------------------------------------------------------------- answers from elsewhere


@pytest.fixture
def spin(sft_run):
    return [*TINY_RUN, *SPIN, f"model={sft_run}/LATEST"]


def by_row(path):
    return [line["ids"] for line in sorted(read_lines(path), key=lambda line: line["row"])]


def give(folder, number, answers):
    write_lines(f"{folder}/generated-0{number}.jsonl", [
        {"row": row, "ids": ids} for row, ids in reversed(list(enumerate(answers)))])


def test_answers_from_elsewhere_give_the_weights_of_a_plain_run(spin, run, capsys):
    """With others' log-probabilities checked and the sampling left out, to the last bit."""
    plain = run(*spin, "run_dir=plain", "spin.temperature=0.9")
    assert len(losses_of(plain)) == 6
    folder = run(*spin, "run_dir=part", "spin.temperature=0.9", "spin.answers=wait", status=75)
    printed = capsys.readouterr().out
    assert "has 24 prompts to be answered: put {row, ids} of each answer into generated-00.jsonl" in printed
    assert "Stopped by spin.answers=wait after step 0 of 6; all is saved" in printed
    tokenizer = AutoTokenizer.from_pretrained("part/LATEST")
    asked = read_lines("part/prompts-00.jsonl")
    assert [line["row"] for line in asked] == list(range(24))
    for line, row in zip(asked, ROWS):
        assert line["prompt"] == row["prompt"] and line["ids"] == tokenizer(row["prompt"])["input_ids"]
        assert (line["max_tokens"], line["temperature"], line["top_p"], line["top_k"]) == (8, 0.9, 1.0, 0)
    assert len({line["key"] for line in asked}) == 1 and len({line["seed"] for line in asked}) == 24

    again = run("resume=true", "run_dir=part", status=75)  # nothing has come
    assert again == folder and read_lines("part/prompts-00.jsonl") == asked
    give("part", 0, by_row("plain/generated-00.jsonl"))
    run("resume=true", "run_dir=part", status=75)
    assert losses_of("part") == losses_of(plain)[:3]
    assert read_lines("part/prompts-01.jsonl")[0]["key"] != asked[0]["key"]
    give("part", 1, by_row("plain/generated-01.jsonl"))
    run("resume=true", "run_dir=part")
    assert same_weights("part", plain) and losses_of("part") == losses_of(plain)


def test_answers_that_are_none_of_this_model_are_refused(spin, run, refused):
    plain = run(*spin, "run_dir=plain", "spin.iterations=1")
    run(*spin, "run_dir=part", "spin.iterations=1", "spin.answers=wait", status=75)
    good, path = by_row(f"{plain}/generated-00.jsonl"), "part/generated-00.jsonl"
    size = make_trainer(*spin, "exp_name=other").policy.config.vocab_size
    rows = [{"row": row, "ids": ids} for row, ids in enumerate(good)]
    for lines in (rows[1:], [*rows, rows[3]], [*rows[:-1], rows[3]], [*rows, {"row": 24, "ids": [5]}],
                  [*rows[1:], {"row": 0, "ids": [5, size]}], [*rows[1:], {"row": 0, "ids": [-1]}],
                  [*rows[1:], {"row": 0, "ids": []}], [*rows[1:], {"row": 0, "ids": "text"}],
                  [*rows[1:], {"row": 0, "ids": [1.0]}], [*rows[1:], {"row": 0}], [*rows[1:], [0, [5]]],
                  [*rows[1:], rows[0] | {"key": "of others"}], []):
        write_lines(path, lines)
        assert "part/generated-00.jsonl has not one whole line for each of the 24 answers" in refused(
            "resume=true", "run_dir=part")
    with open(path, "w") as file:
        file.write("{row: 0}\n")
    assert "has not one whole line" in refused("resume=true", "run_dir=part")

    other = make_trainer(*spin, "exp_name=other")  # the same model with noise on its weights
    with torch.no_grad():
        for p in other.policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    prompts = [np.array(line["ids"]) for line in read_lines("part/prompts-00.jsonl")]
    drawn = {i: ids for rows, answers in other.sampler.batches(
        other.policy, prompts, [8] * 24, range(24), {"temperature": 1.0, "top_p": 1.0})
        for i, ids in zip(rows, answers)}
    give("part", 0, [drawn[i] for i in range(24)])
    said = refused("resume=true", "run_dir=part")
    assert "the answers in generated-00.jsonl have a mean log-probability of -" in said and "LATEST" in said
    give("part", 0, good)
    run("resume=true", "run_dir=part")
    assert same_weights("part", plain)


@pytest.fixture(scope="module")
def waiting(sft_run, tmp_path_factory):
    """The folder of a run that waits for its first answers."""
    folder = str(tmp_path_factory.mktemp("waiting") / "run")
    assert train.main([*TINY_RUN, *SPIN, f"model={sft_run}/LATEST", "spin.answers=wait",
                       f"run_dir={folder}"]) == 75
    return folder


@pytest.fixture(scope="module")
def spin_trainer(waiting, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trainer"))
        return make_trainer(*SPIN, f"model={os.path.realpath(f'{waiting}/LATEST')}")


DAMAGES = {  # what becomes of the lines of 24 answers, or what is written behind them
    "whole": lambda lines: lines, "missing": lambda lines: lines[1:],
    "twice": lambda lines: [*lines, lines[0]], "one for another": lambda lines: [lines[1], *lines[1:]],
    "a row more": lambda lines: [*lines, lines[0] | {"row": 24}],
    "another key": lambda lines: [line | {"key": "0"} for line in lines],
    **{f"ids {ids!r}": lambda lines, ids=ids: [lines[0] | {"ids": ids}, *lines[1:]]
       for ids in ([], [10**6], [-1], "abc", None, [1.5], [True], 5)},
    "no JSON": "x\n", "no object": "5\n", "no ids": '{"row": 24}\n', "torn": '{"row": 2'}


@pytest.mark.parametrize("damage", DAMAGES)
def test_answers_that_are_not_whole(damage, waiting, spin_trainer, monkeypatch):
    """One line for each, of ids of the vocabulary, and nothing else; without damage they are taken."""
    os.makedirs("run")
    asked, path = read_lines(f"{waiting}/prompts-00.jsonl"), "run/generated-00.jsonl"
    lines, damaged = [{"row": line["row"], "ids": line["ids"][-8:]} for line in asked], DAMAGES[damage]
    write_lines(path, lines if isinstance(damaged, str) else damaged(lines))
    with open(path, "a") as file:
        file.write(damaged if isinstance(damaged, str) else "")
    monkeypatch.setattr(spin_trainer.self_play, "folder", RunFolder("run"))
    if damage == "whole":
        answers = spin_trainer.self_play.answers_of("generated-00.jsonl", 24, asked[0]["key"])
        assert answers == {line["row"]: line["ids"] for line in lines}
        return
    with pytest.raises(InputError, match="generated-00.jsonl has not one whole line for each of the 24"):
        spin_trainer.self_play.answers_of("generated-00.jsonl", 24, asked[0]["key"])


def test_answers_of_a_trained_models_beginning_are_refused(waiting, refused):
    """Samples, drawn as asked, of a model that has been trained less: its weights are smaller."""
    shutil.copytree(waiting, "wait", symlinks=True)
    asked = read_lines("wait/prompts-00.jsonl")
    trainer = make_trainer(*SPIN, "run_dir=other", f"model={os.path.realpath('wait/LATEST')}")
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p.mul_(0.7)
    trainer.policy.eval()
    drawn = trainer.sampler.batches(trainer.policy, [np.array(line["ids"]) for line in asked], [8] * 24,
                                    [line["seed"] for line in asked], {"temperature": 1.0, "top_p": 1.0})
    answers = {row: ids for rows, batch in drawn for row, ids in zip(rows, batch)}
    give("wait", 0, [answers[row] for row in range(24)])
    assert "have a mean log-probability of" in refused("resume=true", "run_dir=wait")


# ---------------------------------------------------------------- several answers, judged


def best_and_worst(example, answers, scores):
    """Online DPO: the answer that is judged best, and the worst, unless all are equally good."""
    if min(scores) == max(scores):
        return None
    return example.with_responses(answers[scores.index(max(scores))], answers[scores.index(min(scores))])


@pytest.fixture
def online(monkeypatch, sft_run):
    """Puts online DPO in spin's place, with num_prompts and num_answers in its block; gives its settings."""
    with open(engine.config.SCHEMA, encoding="utf-8") as file:
        text = file.read()
    assert text.count("\nspin:\n") == 1
    with open("schema.yaml", "w", encoding="utf-8") as file:
        file.write(text.replace("\nspin:\n", "\nspin:\n  num_prompts: null  # int >= 1 or null. Prompts\n"
                                "  num_answers: 1  # int >= 1. Answers\n"))
    monkeypatch.setattr(engine.config, "SCHEMA", os.path.abspath("schema.yaml"))
    monkeypatch.setitem(losses.OBJECTIVES, "spin", Objective(
        dpo_loss, needs_pairs=True, needs_reference=True, self_play=best_and_worst, evaluated_as="sft"))
    engine.config.read_schema.cache_clear()
    yield [*TINY_RUN, *ONLINE, f"model={sft_run}/LATEST"]
    engine.config.read_schema.cache_clear()


def test_each_iteration_answers_its_prompts_several_times(online):
    """The next num_prompts of the stream, num_answers after one another; pairs are of best and worst."""
    trainer = make_trainer(*online)
    asked = [trainer.self_play.prompted(number) for number in range(4)]
    for examples in asked:
        assert len(examples) == 32 and all(examples[i] is examples[i - i % 4] for i in range(32))
    wheres = [x.where for examples in asked[:3] for x in examples[::4]]
    assert sorted(wheres) == sorted(x.where for x in trainer.data.train_examples)  # an epoch of 24 rows
    assert wheres != [x.where for x in trainer.data.train_examples]
    trainer.next_iteration()
    lines = sorted(read_lines("runs/spin/generated-00.jsonl"), key=lambda line: line["row"])
    assert [line["where"] for line in lines] == [x.where for x in asked[0]]
    expected = []
    for start in range(0, 32, 4):
        group = lines[start:start + 4]
        assert len({line["response"] for line in group}) > 1
        scores = [toy_scores(x["prompt"], x["response"], x["finished"])["reward"] for x in group]
        if len(set(scores)) > 1:
            expected.append([group[scores.index(x(scores))]["ids"] for x in (max, min)])
    made = [[ids.tolist() for ids in x.responses] for x in trainer.train_examples]
    assert made == expected and len(made) > 2


def test_online_dpo_stopped_and_resumed(online, run):
    whole = run(*online, "run_dir=whole", "lr=2e-5", "warmup_steps=0", "eval_every=0.1")
    lines = read_lines(f"{whole}/metrics.jsonl")
    trained = [line for line in lines if line["split"] == "train"]
    assert trained[0]["loss"] == pytest.approx(math.log(2)) and {x["iteration"] for x in trained} == {0, 1, 2}
    second = next(line for line in trained if line["iteration"] == 1)
    assert abs(second["loss"] - math.log(2)) > 1e-4  # the reference stays
    stop = second["step"]  # the first step of the second iteration
    run(*online, "run_dir=part", "lr=2e-5", "warmup_steps=0", "eval_every=0.1", f"max_steps={stop}")
    part = run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights(whole, part) and losses_of(whole) == losses_of(part)
    for number in range(3):
        answers = [by_row(f"{folder}/generated-0{number}.jsonl") for folder in (whole, part)]
        assert answers[0] == answers[1]

    trainer = make_trainer(*online, "exp_name=again")  # held-out rows: SFT's mean over tokens
    with torch.no_grad():
        examples = trainer.data.eval_examples
        total = -sum(obvious_logp(trainer.policy, x, x.responses[0]).item() for x in examples)
    assert lines[0]["split"] == "eval" and lines[0]["loss"] == pytest.approx(
        total / sum(len(x.responses[0]) for x in examples), rel=1e-4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("more", [[], pytest.param(["spin.mix_previous=true"], marks=pytest.mark.slow)])
def test_a_killed_run_of_online_dpo(more, online, run, monkeypatch):
    """Killed at a step, and within a file of answers: it ends with the whole run's numbers and weights."""
    settings = [*online, "spin.iterations=2", "batch_size=3", "num_eval_examples=4", "eval_every=4",
                "lr=1e-5", "warmup_steps=0", *more]
    run(*settings, "run_dir=whole")
    whole, step, write = numbers("whole"), trainers.Trainer.train_step, RunFolder.write

    def dying_step(self):
        if self.iteration == 1 and self.num_used > 0:
            raise Killed
        return step(self)

    def dying_write(self, name, records):
        if name == "generated-01.jsonl":
            write(self, name, records[:len(records) // 2])
            raise Killed
        write(self, name, records)
    for point, owner, name, dying in (("step", trainers.Trainer, "train_step", dying_step),
                                      ("answers", RunFolder, "write", dying_write)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(Killed):
                run(*settings, f"run_dir={point}")
        run("resume=true", f"run_dir={point}")
        assert numbers(point) == whole and same_weights(point, "whole")
        for number in range(2):
            answers = [by_row(f"{folder}/generated-0{number}.jsonl") for folder in (point, "whole")]
            assert answers[0] == answers[1]
    assert whole[-1]["samples/kl"] != 0  # from the fixed reference


def test_nobody_judges(online, refused):
    assert refused(*online, f"eval_data={FEW_ROWS}") == (
        "loss=spin judges its answers: name a reward_model, or train and evaluate on data that know the "
        "rewards, as toy")


def test_scores_of_a_reward_model_are_kept(online, run, sft_run, monkeypatch):
    judge, tokenizer = save_random_judge(sft_run)
    settings = [*online, "reward_model=judge", "spin.iterations=1", f"eval_data={FEW_ROWS}", "eval_every=0"]
    whole = run(*settings, "run_dir=whole")
    run(*settings, "run_dir=part", "max_steps=1")
    kept = read_lines("part/rewards.jsonl")
    assert len(kept) == 8 and all(len(line["rewards"]) == 4 for line in kept)

    answers = {line["row"]: line["ids"] for line in read_lines("part/generated-00.jsonl")}
    trainer = make_trainer(*settings, "exp_name=again")
    prompts = [x.prompt.tolist() for x in trainer.self_play.prompted(0)]
    with torch.no_grad():
        scores = [judge(torch.tensor([prompts[i] + answers[i]])).logits.item() for i in range(32)]
    assert [x for line in kept for x in line["rewards"]] == pytest.approx(scores, rel=1e-4, abs=1e-5)

    def fail(*arguments, **options):
        raise AssertionError("the reward model is asked again")
    monkeypatch.setattr(trainers, "response_scores", fail)
    part = run("resume=true", "run_dir=part", "max_steps=null")
    assert same_weights(whole, part) and read_lines("part/rewards.jsonl") == kept


def with_advantages(example, answers, scores):
    mean = sum(scores) / len(scores)
    return example.with_responses(*answers, advantages=[score - mean for score in scores])


def advantage_loss(policy_logps, *, advantages, beta):
    """A plain policy gradient over the answers to a prompt."""
    return -(beta * advantages * policy_logps).mean(1), {"best": advantages.amax(1)}


def test_answers_bring_columns_of_their_own(online, run, refused, monkeypatch):
    """One number for each answer, made with them: no row of the data has to bring it."""
    row = Objective(advantage_loss, needs_pairs=False, needs_lists=True, needs_reference=False,
                    columns=("advantages",), self_play=with_advantages, evaluated_as="sft")
    monkeypatch.setattr(engine.objectives, "problems", lambda *_: [])  # spin's block has a key more
    monkeypatch.setitem(losses.OBJECTIVES, "spin", row)
    folder = run(*online, "spin.beta=0.5", "run_dir=run", "max_steps=1", "batch_size=8")
    expected, (line, *_) = [], [x for x in read_lines(f"{folder}/metrics.jsonl") if x["split"] == "train"]
    drawn = sorted(read_lines(f"{folder}/generated-00.jsonl"), key=lambda x: x["row"])
    for start in range(0, 32, 4):
        rewards = [toy_scores(x["prompt"], x["response"], x["finished"])["reward"]
                   for x in drawn[start:start + 4]]
        expected.append(max(rewards) - sum(rewards) / 4)
    assert line["best"] == pytest.approx(sum(expected) / 8) and line["best"] > 0.1
    monkeypatch.setitem(losses.OBJECTIVES, "spin", dataclasses.replace(row, self_play=best_and_worst))
    said = refused(*online, "run_dir=none")
    assert "has no column advantages, which advantage_loss takes: example.with_responses" in said
