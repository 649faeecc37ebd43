"""What the person sees: the rows' report, the summary, evaluations, samples and the closing table."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import DATA, FEW_ROWS, ROOT, TINY_RUN, make_trainer, read_lines, write_lines

import engine.report
from engine.report import (EVAL_NAMES, Progress, Report, describe, notes_of, print_results, print_samples,
                           progress)
from losses import OBJECTIVES


def test_what_the_person_sees(run, capsys, sft_run):
    run(*TINY_RUN, f"eval_data={FEW_ROWS}", "loss=dpo", f"model={sft_run}/LATEST", "eval_every=1")
    output = capsys.readouterr().out
    assert "at step 1\n" not in output and len(read_lines("runs/dpo/samples.jsonl")) == 8
    for said in (f"run        {os.path.abspath('runs/dpo')}\n", "llama, 440,704 parameters in float32 on ",
                 "reference  the model's starting weights", "loss       dpo beta=0.1 label_smoothing=0.0",
                 "data       400 of 400 rows used, 0 dropped, 0 cut to fit\n",
                 "eval data  8 of 400 rows used, 0 dropped, 0 cut to fit, 392 beyond what was asked for\n",
                 "steps      3 of 4 examples; ",
                 "\nstep 0  eval  loss 0.693  accuracy 0  margin 0  KL 0\n",
                 "\nsample 2 of 2 at step 0\n", "\nsample 2 of 2 at step 3\n", "\nstep 2  eval  loss",
                 "evaluation                            step 0        step 3\n"
                 "loss                                  0.6931        ",
                 "checkpoint  runs/dpo/LATEST -> step-000003\n"):
        assert said in output, said
    assert output.endswith("use it by   model=runs/dpo/LATEST\n")


def test_lines_of_training_where_nobody_watches(monkeypatch, capsys):
    """One every 30 seconds, by a clock of which a step takes 20; the evaluation before it took 400."""
    now = iter([0, 400, 420, 440, 4040, 4060])
    monkeypatch.setattr(engine.report.time, "monotonic", lambda: next(now))
    metrics = {"loss": 0.89312, "rewards/accuracies": 0.7124, "grad_norm": 0.4149, "lr": 1.7e-3}
    with Progress(768, 118) as bar:
        for step, more in ((119, {}), (120, {"tokens_per_second": 10400.4}), (121, {}), (122, {"lr": 5e-7}),
                           (123, {"loss": math.nan})):
            bar.advance(step, 768, metrics | more)
    said = "loss 0.893  accuracy 0.71  grad_norm 0.41"
    assert describe({"loss": 0.0123, "rewards/margins": -0.00051, "samples/kl": 0.0}, EVAL_NAMES) == [
        "loss 0.012", "margin -0.00051", "KL 0"]
    assert capsys.readouterr().out.splitlines() == [
        f"step 119/768  {said}  lr 1.7e-03  6:40 gone",
        f"step 121/768  {said}  lr 1.7e-03  10,400 tokens/s  7:20 gone, 3:35:40 left",
        f"step 122/768  {said}  lr 5.0e-07  10,400 tokens/s  1:07:20 gone, 217:43:33 left"]


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    """Every 30 seconds, here at once; nothing of what is shorter."""
    assert [*progress("ab", "evaluating")] == ["a", "b"] and capsys.readouterr() == ("", "")
    monkeypatch.setattr(engine.report, "SECONDS_PER_LINE", 0)
    assert [*progress("ab", "evaluating")] == ["a", "b"] and [*progress("ab", "")] == ["a", "b"]
    said, errors = capsys.readouterr()
    assert said.splitlines() == [f"evaluating  {n}/2  00:00 gone" for n in (0, 1, 2)] and not errors


def test_a_file_without_evaluation_says_so(run, capsys):
    write_lines("r.jsonl", [{"prompt": "p", "response": "r"}] * 3)
    run("data=r.jsonl", "batch_size=2")
    output = capsys.readouterr().out
    assert "eval data  none, so no evaluation; eval_data= names one\n" in output
    assert "training                              step 1        step 3\n" in output
    assert "  eval  " not in output and "sample 1" not in output


def test_a_reports_lines_by_hand():
    report = Report(rows=10, used=1, cut=1)
    for n in range(1, 8):
        report.drop("it is empty", f"row {n}")
    report.drop(ValueError("it is odd"), "row 8")
    for _ in range(2):
        report.note_unread({"prompt": "p", "history": ["h"], "images": [], "attributes": None}, {"prompt"})
    report.note("are odd")
    assert list(report.lines()) == [
        "1 of 10 rows used, 8 dropped, 1 cut to fit, 1 beyond what was asked for",
        "  dropped 7: it is empty (row 1, row 2, row 3, row 4, row 5 and 2 more)",
        "  dropped 1: it is odd (row 8)",
        "  2 rows have a column history, which is not read",
        "  1 rows are odd"]
    assert list(Report(rows=12345, used=12345).lines()) == [
        "12,345 of 12,345 rows used, 0 dropped, 0 cut to fit"]


def test_the_summary_notes_a_begin_token_that_prompts_lack(capsys):
    settings = [f"tokenizer={os.path.join(DATA, 'stories260K')}", f"eval_data={FEW_ROWS}",
                "warmup_steps=0"]
    make_trainer(*settings)
    assert ("note       the tokenizer begins texts with <s>, but this run's prompts do not; if the model was "
            "trained so, set add_bos=true\n") in capsys.readouterr().out
    trainer = make_trainer(*settings, "add_bos=true")
    assert "note " not in capsys.readouterr().out
    assert trainer.train_examples[0].prompt[0] == trainer.data.tokenizer.bos_token_id


def test_float32_on_a_gpu_is_noted(monkeypatch):
    trainer = make_trainer(f"eval_data={FEW_ROWS}")
    for device, dtype, noted in (("cuda", "float32", True), ("cuda", "bfloat16", False),
                                 ("cpu", "float32", False)):
        trainer.config.compute_dtype = dtype
        monkeypatch.setattr(engine.report, "device", lambda device=device: torch.device(device))
        notes = [*notes_of(trainer.config, trainer.data, 99)]
        assert any("compute_dtype=bfloat16 is much faster" in note for note in notes) is noted


def test_a_warmup_that_is_longer_than_the_run_is_noted():
    trainer = make_trainer("warmup_steps=7")
    for num_steps, noted in ((7, True), (8, False)):
        notes = [*notes_of(trainer.config, trainer.data, num_steps)]
        assert any("ends within its warmup of 7 steps" in note for note in notes) is noted


def test_samples_are_cut_to_what_a_terminal_shows(capsys):
    print_samples(7, [{"prompt": "a" + "b" * 300, "policy": "c" * 300 + "d", "reward": 1.5},
                      {"prompt": "one\n two", "policy": "\x1b[2Jx"}])
    assert capsys.readouterr().out == (
        f"\nsample 1 of 2 at step 7\nprompt{'':<16}... {'b' * 300}\npolicy{'':<16}{'c' * 300} ...\n"
        f"reward{'':<16}1.5\n\nsample 2 of 2 at step 7\nprompt{'':<16}one two\npolicy{'':<16}\ufffd[2Jx\n\n")


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_screen_that_cannot_print_a_sample_ends_no_run(encoding):
    write_lines("é.jsonl", [{"prompt": "é\U0001f600", "response": "字"}] * 4)
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "train.py"), *TINY_RUN, "data=é.jsonl", "eval_data=é.jsonl",
         "max_steps=1"], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0, done.stderr
    output = done.stdout.decode(encoding)
    assert "\\U0001f600" in output and "[[\\u5b57" in output and "sample 1 of" in output


@pytest.mark.parametrize("saved, loss, key", [
    (3, "dpo", "model"), (3, "rm", "reward_model"), (None, "dpo", "")])
def test_the_closing_table_by_hand(saved, loss, key, capsys):
    def line(step, split="eval", **metrics):
        return {"step": step, "examples": 4 * step, "split": split, "time": 1.0, **metrics}
    print_results([line(0, loss=0.5), line(1, "train", loss=9.0), line(2, loss=9.0),
                   line(3, loss=0.25, gain=None, small=-0.00004, zero=0.0)],
                  os.path.abspath("runs/a run"), saved, OBJECTIVES[loss])
    table = ["",
             "evaluation                            step 0        step 3",
             "loss                                  0.5000        0.2500",
             "gain                                       -             -",
             "small                                      -      -4.0e-05",
             "zero                                       -        0.0000"]
    end = ["",
           "checkpoint  runs/a run/LATEST -> step-000003",
           f"use it by   {key}='runs/a run/LATEST'"]
    assert capsys.readouterr().out.splitlines() == table + (end if saved else [])
