"""The benchmarks measure what they say, and their commands in README.md and docs/ run."""

import argparse
import contextlib
import dataclasses
import glob
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FEW_ROWS, ROOT, config_of, losses_of, make_trainer, read_lines, write_lines
from transformers import AutoConfig, AutoTokenizer

from engine import batches
from engine.gpu import flops_by_part, necessary_flops

PAGES = "".join(open(path, encoding="utf-8").read() for path in (
    os.path.join(ROOT, "README.md"), *glob.glob(os.path.join(ROOT, "docs", "*.md"))))
COMMANDS = re.findall(r"^.*(python tests/benchmarks/.*)$", PAGES, re.M)


def load(name):
    path = os.path.join(ROOT, "tests", "benchmarks", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments_on_the_pages(name):
    """Of each command of this benchmark."""
    commands = [shlex.split(command) for command in COMMANDS]
    return [command[2:] for command in commands if command[1] == f"tests/benchmarks/{name}.py"]


def test_the_pages_have_a_command_of_every_benchmark():
    for path in glob.glob(os.path.join(ROOT, "tests", "benchmarks", "*.py")):
        assert arguments_on_the_pages(os.path.basename(path)[:-3]), path


# ---------------------------------------------------------------- throughput


def test_necessary_arithmetic_by_hand():
    """tiny: 2 layers of 4 * 128 * 128 weights in attention and 3 * 128 * 256 behind it; forward and backward
    are 6 operations for each weight and token; a score and a value are 2 * 2 * 128 for each token that is
    seen, thrice."""
    trainer = make_trainer("loss=dpo", "eval_data=null")
    pair = dataclasses.replace(trainer.train_examples[0], prompt=np.ones(3),
                               responses=(np.ones(2), np.ones(1)))
    weights, vocabulary = 2 * (4 * 128 * 128 + 3 * 128 * 256), trainer.policy.config.vocab_size
    seen = (1 + 2 + 3) + (4 + 5) + 4
    assert flops_by_part(trainer.policy, [pair]) == {
        "prompt": 6 * weights * 3, "response": 6 * weights * 3, "head": 6 * 128 * vocabulary * 3,
        "attention": 3 * 2 * 2 * 2 * 128 * seen}
    flops = 6 * weights * 6 + 6 * 128 * vocabulary * 3 + 3 * 2 * 2 * 2 * 128 * seen
    assert necessary_flops(trainer.policy, [pair], with_reference=False) == flops
    assert necessary_flops(trainer.policy, [pair, pair], with_reference=True) == 2 * flops * 4 / 3


def test_who_takes_turns(sft_run, monkeypatch):
    """By the commands on the pages; the default's model is made from its config."""
    throughput, asked = load("throughput"), []

    def compare(arguments, contenders, folder):
        path = contenders["here"][1][-1].removeprefix("model=")
        asked.append((arguments, contenders, AutoConfig.from_pretrained(path) if path == folder else path))
    monkeypatch.setattr(throughput, "compare", compare)
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "runs/sft/LATEST")
    for words in arguments_on_the_pages("throughput"):
        monkeypatch.setattr(sys, "argv", ["throughput.py", *words, "--set", "num_hidden_layers=1"])
        throughput.main()
    (_, first, made), (_, second, given) = asked
    assert list(first) == ["matrix products", "here", "here, layout=separate"]
    assert list(second) == ["matrix products", "here", "here, compute_dtype=bfloat16", "TRL"]
    assert [kind for kind, _ in second.values()] == ["matmul", "here", "here", "trl"]
    assert first["here, layout=separate"][1] == [*first["here"][1], "layout=separate"]
    assert (made.num_hidden_layers, made.hidden_size, made.vocab_size) == (1, 384, 8192)
    assert given == "Qwen/Qwen2.5-0.5B"
    assert f"data={os.path.abspath('pairs.jsonl')}" in first["here"][1]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--data", FEW_ROWS])
    with pytest.raises(SystemExit, match="llama17m.json is a config without a tokenizer"):
        throughput.main()


def test_the_report_by_hand(capsys):
    rest = "other arithmetic"
    seconds = {"matrix products": [1, 2, 4], "here": [2, 4, 8], "here, x=1": [1, 2, 16]}
    here = {"pairs": 48, "tokens": 4800, "parameters": 1234567, "losses": [0.5, 0.25], "memory": 700.4,
            "necessary": {"prompt": 4.8e11, "head": 1.2e11}}
    lines = {"matrix products": {"flop": 2e11}, "here": here,
             "here, x=1": here | {"losses": [0.5, 0.25003], "memory": 350}}
    parts = {"here": {"seconds": {"prompt": 3.0, "head": 0.5, rest: 0.5}, "reference": 12.34, "cache": 0.051}}
    load("throughput").report(argparse.Namespace(rounds=3, steps=2), seconds, lines, parts)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == ("48 pairs of 100 tokens on average, 1,234,567 parameters; "
                       "plain matrix products: 100 GFLOP/s")
    assert said[5:7] == ["| here | 4.00 | 1.000 | 400 | 700 | 0.0e+00 | 50.0% |",
                         "| here, x=1 | 8.00 | 2.000 | 800 | 350 | 3.0e-05 | 100.0% |"]
    assert said[8] == "here: the parts of a step, 2000 ms"
    assert said[12:] == ["| prompt | 75.0% | 80.00 | 53 |", "| head | 12.5% | 20.00 | 80 |",
                         f"| {rest} | 12.5% | 0.00 |  |",
                         "reference: computed in 12.3 s, read from the cache in 0.05 s"]


def test_parent_and_contender_talk(monkeypatch):
    """What a contender prints besides its answers does not reach the parent."""
    throughput, output = load("throughput"), io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\nparts\n"))
    monkeypatch.setattr(sys, "stdout", output)
    throughput.serve(lambda: print("loading"), lambda: {"seconds": 1.5}, lambda: {"parts": 2})
    assert "loading" not in output.getvalue()
    worker = argparse.Namespace(stdin=io.StringIO(), stdout=io.StringIO("a warning\n" + output.getvalue()),
                                wait=lambda: 3)
    answers = [throughput.ask(worker, word) for word in ("", "go", "parts")]
    assert answers == [{}, {"seconds": 1.5}, {"parts": 2}]
    assert worker.stdin.getvalue() == "go\nparts\n"
    with pytest.raises(SystemExit, match="left with status 3"):
        throughput.ask(worker, "go")


def contender(throughput, monkeypatch, *settings):
    """prepare, go and parts of a contender, of 3 rounds of a step with 4 pairs, in this process."""
    served = []
    monkeypatch.setattr(throughput, "serve", lambda *functions: served.extend(functions))
    throughput.run_here(argparse.Namespace(lengths=None, steps=1, rounds=3), [
        *throughput.DEFAULTS, *settings, f"reference_cache=cache-{len(settings)}"])
    return served


def test_contenders_take_the_same_steps_as_a_run(run, monkeypatch, capsys):
    """In float64, where six steps of any layout agree; four warm up, two are measured, and those again."""
    throughput, seen, plain_collate = load("throughput"), [], batches.collate

    def collate(examples, *arguments):
        seen.append(sorted(int(example.where.split()[-1]) for example in examples))
        return plain_collate(examples, *arguments)
    settings = ["loss=dpo", f"data={FEW_ROWS}", "batch_size=4", "lr=1e-3", "dtype=float64",
                "compute_dtype=float64"]
    run(*throughput.DEFAULTS, *settings, "max_steps=6")
    expected = losses_of("runs/dpo")
    for more in ([], ["layout=separate"]):
        prepare, go, parts = contender(throughput, monkeypatch, *settings, "run_dir=none", *more)
        prepare()
        assert "of 28 computed" in (output := capsys.readouterr().out) and "of 28 rows read" in output
        first, second = go(), go()
        assert second["losses"] == pytest.approx(expected[4:], abs=1e-9)
    assert abs(expected[4] - expected[5]) > 1e-3  # wrong rows would show
    monkeypatch.setattr(batches, "collate", collate)
    shares = parts()["seconds"]
    assert seen == [[17, 18, 19, 20], [21, 22, 23, 24], [25, 26, 27, 28]]  # the last one ahead
    assert list(shares) == ["prompt", "response", "head", "attention",
                            "other arithmetic of the model and its backward", "optimizer", "batch making"]
    assert all(value > 0 for value in shares.values())
    tokenizer = AutoTokenizer.from_pretrained("runs/dpo/LATEST")
    texts = [row[name] for row in read_lines(FEW_ROWS)[16:24] for name in ("prompt", "chosen", "rejected")]
    assert second["pairs"] == 8 and first["pairs"] == 4
    assert second["tokens"] == sum(map(len, tokenizer(texts)["input_ids"])) + 16  # end tokens
    assert second["memory"] > 10 and second["seconds"] > 0


def test_examples_are_as_many_as_the_steps_need():
    """Read again from a small file, or of random tokens, and each with columns of its own to fill."""
    throughput = load("throughput")
    write_lines("three.jsonl", read_lines(FEW_ROWS)[:3])
    settings = [*throughput.DEFAULTS, "data=three.jsonl", "batch_size=2"]
    for lengths in (None, "5,3,2"):
        _, tokenizer, examples = throughput.load_examples(
            argparse.Namespace(lengths=lengths, steps=2, rounds=1), settings)
        assert len(examples) == 2 * (4 + 2)
        assert len({id(example.columns) for example in examples}) == 12
        sizes = [(len(example.prompt), *map(len, example.responses)) for example in examples]
        ids = np.concatenate([example.responses[0] for example in examples])
        if lengths:
            assert set(sizes) == {(5, 3, 2)} and 2 < ids.min() and ids.max() < len(tokenizer)
        else:
            assert sizes == sizes[:3] * 4
            assert tokenizer.decode(examples[4].responses[0][:-1]) == read_lines(FEW_ROWS)[1]["chosen"]


# ---------------------------------------------------------------- generation


def test_both_ways_to_answer():
    """Each answer ends with its first end token, a twentieth of all; of the others, nearly as likely as each
    other, come more than the 50 likeliest, to which `generate` may keep by itself."""
    generation = load("generation")
    trainer = make_trainer("loss=spin", "spin.max_tokens=40", "eval_batch_size=4", "eval_data=null")
    examples, end_ids = trainer.data.train_examples[:6], trainer.data.end_ids
    head = trainer.policy.lm_head = torch.nn.Linear(128, trainer.policy.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.linspace(0, 0.01, len(head.bias))
    head.bias.data[end_ids[0]] = 4
    for answer in (generation.plainly, generation.sorted_and_seeded):
        drawn = [answer(trainer, examples, round) for round in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert any(len(ids) < 40 for ids in drawn[0])
        for ids in sum(drawn, []):
            assert len(ids) == 40 or ids[-1] in end_ids
            assert not set(end_ids) & set(ids[:-1])
        assert len(drawn[0]) == 6
        assert len(set(sum(drawn[0] + drawn[2], []))) > 60  # some 190 are expected
    head.bias.data[end_ids[0]] = 100
    for answer in (generation.plainly, generation.sorted_and_seeded):
        assert answer(trainer, examples, 0) == [end_ids[:1]] * 6


def test_the_line_of_generation(run, monkeypatch, capsys):
    generation = load("generation")
    words, = arguments_on_the_pages("generation")
    shutil.copy(FEW_ROWS, "pairs.jsonl")
    few = ["--model", "tiny", "--prompts", "6", "--rounds", "1", "spin.max_tokens=4"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *words, *few])
    generation.main()
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"6 prompts of \d+ to \d+ tokens, median \d+: [\d,]+ tokens/s here, [\d,]+ by "
                        r"generate on unsorted batches of 64; \d+\.\d\d times as many", said)


# ---------------------------------------------------------------- gpu


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, "tests", "benchmarks"))
    return load("gpu")


def rows_of(page):
    """{title: {row: its cells}} of the page's tables."""
    tables = {}
    for part in page.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        cells = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
        tables[title] = {name: values for name, *values in cells[2:]}
    return tables


def check_page(page, gpu):
    """Every row is there; what has run has finite numbers, and nearly the same losses as the first."""
    (_, table), *others = rows_of(page).items()
    others_in_table = ["sampling 4 answers of 8 tokens, bfloat16", "TRL's DPOTrainer, reference cached"]
    assert list(table) == [*gpu.ATTENTION, *gpu.ADDED, *others_in_table]
    assert [title.split(",")[0] for title, _ in others] == list(gpu.MODELS)
    assert "no backward on a CPU" in table["shared, flex_attention"][0]
    assert number(table[others_in_table[0]][2]) > 0
    trained = [cells for rows in (table, *(rows for _, rows in others)) for cells in rows.values()
               if cells[0] != "-" and not cells[0].startswith("not run: ")]
    assert len(trained) >= 5 + 4 and "Published marks: prefix sharing" in page
    for pairs, times, tokens, share, memory, estimate, gap in trained:
        assert all(0 < number(cell) < math.inf for cell in (pairs, times, tokens))
        assert share == "-" and float(gap) < 0.01 and float(estimate) < float(memory)
    return table


def number(cell):
    return float(cell.replace(",", ""))


def test_the_page_of_a_gpu_on_a_cpu(gpu, monkeypatch, capsys):
    """The whole way, in this process and uncompiled; settings add up, and what does not run is left out."""
    trained = []

    def run(*task):
        answers = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
            patch.setattr(sys, "stdout", answers)
            gpu.work()
        answer = json.loads(answers.getvalue().removeprefix("\x00"))
        if task[0] == "train":
            trained.append((task[1][len(gpu.SETTINGS) + 4:], answer))
        return answer
    monkeypatch.setattr(gpu, "Contenders", lambda folder, minutes: contextlib.nullcontext(
        argparse.Namespace(run=run)))
    monkeypatch.setattr(gpu, "PACKAGES", dict.fromkeys(gpu.PACKAGES, "nonesuch"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", "page.md"])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # takes minutes
    gpu.main()
    page = capsys.readouterr().out
    assert open("page.md", encoding="utf-8").read() == page
    table = check_page(page, gpu)
    for name in ("separate, flash_attention_2", "TRL's DPOTrainer, reference cached"):
        assert table[name][0] == "not run: nonesuch is not installed"
    attention, added = trained[:-7], trained[-7:-4]
    fastest, _ = min(attention, key=lambda pair: pair[1].get("seconds", math.inf))
    for settings, answer in added:
        assert settings[:-1] == fastest and "seconds" in answer
        fastest = settings
    assert fastest[-3:] == ["compile=true", "reference_cache=true", "dtype=bfloat16"]
    assert added[0][1]["flops"] == pytest.approx(added[1][1]["flops"] * 4 / 3)  # without the reference
    best, _ = min(trained[:-4], key=lambda pair: pair[1].get("seconds", math.inf))
    assert [settings for settings, _ in trained[-4:]] == [attention[0][0], best] * 2


def test_the_page_of_a_gpu_wants_one(gpu, monkeypatch, capsys):
    """A model of 1B would be trained on a CPU until the time is up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "page.md"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no NVIDIA card here; --tiny tries" in capsys.readouterr().err and os.listdir() == []


def test_the_page_of_a_gpu_by_hand(gpu):
    first = {"pairs": 64, "tokens": 12800, "flops": 98.9e12, "seconds": 0.5, "losses": [0.5, 0.25],
             "memory": 40.0, "estimate": 44.444, "machine": "NVIDIA H100 80GB HBM3, torch 9"}
    faster = first | {"seconds": 0.25, "losses": [0.5, 0.2503], "estimate": None}
    page = gpu.render({"one": {"first": first, "faster": faster, "torn": {"reason": "a | b"},
                               "sampling": {"tokens": 5, "seconds": 2, "memory": 1}}, "two": {"x": faster}})
    assert page.startswith("NVIDIA H100 80GB HBM3, torch 9; peak: 989 TFLOP/s\n\n## one\n")
    assert rows_of(page) == {
        "one": {"first": ["128.00", "1.00", "25,600", "20.0%", "40.00", "44.44", "0.0e+00"],
                "faster": ["256.00", "2.00", "51,200", "40.0%", "40.00", "-", "3.0e-04"],
                "torn": ["not run: a / b", *[""] * 6],
                "sampling": ["-", "-", "2", "-", "1.00", "-", "-"]},
        "two": {"x": ["256.00", "1.00", "51,200", "40.0%", "40.00", "-", "0.0e+00"]}}


def test_a_contender_answers_or_says_why_not(gpu, monkeypatch):
    """One that crashes or hangs costs its own row; after the last minute none begins."""
    scripts = iter(["print('loading'); print(chr(0) + input())", "import os; os._exit(3)",
                    "import time; time.sleep(60)", "", ""])
    monkeypatch.setattr(gpu.Contenders, "start", lambda self: subprocess.Popen(
        [sys.executable, "-c", next(scripts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    with gpu.Contenders(".", minutes=1) as contenders:
        assert contenders.run("train", {"a": 1}) == ["train", {"a": 1}]
        assert contenders.run("train") == {"reason": "it left with status 3"}
        monkeypatch.setattr(gpu, "LIMIT", 1)
        assert contenders.run("train") == {"reason": "not finished within 1 s"}
        contenders.deadline = time.monotonic()
        assert contenders.run("train") == {"reason": "out of time"}


# ---------------------------------------------------------------- frontier


def test_the_table_of_the_frontier_by_hand():
    point = {"samples/reward": 1.234, "samples/well_formed": 0.9996, "samples/kl": 0.456,
             "samples/optimal_reward": 1.987, "samples/efficiency": 0.6214}
    worse = point | {"samples/reward": -0.5, "samples/efficiency": None}
    lines = load("frontier").table([{"method": "DPO", "beta": 0.5, **point},
                                    {"method": "IPO", "beta": 4, **worse}]).splitlines()
    assert lines[2:] == ["| DPO | 0.5 | 1.000 | 1.23 | 0.46 | 1.99 | 0.621 |",
                         "| IPO | 4 | 1.000 | -0.50 | 0.46 | 1.99 | - |"]


@pytest.fixture
def frontier_of_made_up_runs(monkeypatch):
    """frontier.main with runs that only write an evaluation: the module, and the configs that it has run."""
    frontier, configs = load("frontier"), {}

    def run(command, **options):
        config = config_of(*command[2:])  # which refuses what train.py would
        configs[os.path.basename(config.run_dir)] = config
        os.makedirs(f"{config.run_dir}/LATEST")
        shutil.copy(os.path.join(ROOT, "tests", "benchmarks", "llama17m.json"),
                    f"{config.run_dir}/LATEST/config.json")
        beta = getattr(config, config.loss).get("beta")
        write_lines(f"{config.run_dir}/metrics.jsonl", [{"split": "train"}, {
            "split": "eval", "samples/reward": 7 if config.reference else beta, "samples/kl": 2.0,
            "samples/well_formed": 1, "samples/optimal_reward": 3.5, "samples/efficiency": None}])
        return subprocess.CompletedProcess(command, 1 if config.seed == 13 else 0, "so far", "and no further")
    monkeypatch.setattr(frontier, "subprocess", argparse.Namespace(run=run))
    return frontier, configs


def test_the_runs_of_the_frontier(frontier_of_made_up_runs, monkeypatch, capsys):
    frontier, configs = frontier_of_made_up_runs
    assert arguments_on_the_pages("frontier") == [[]]
    words = ["frontier.py", "--methods", "IPO", "SPIN", "--steps", "256", "--sft_steps", "9", "--runs", "f"]
    monkeypatch.setattr(sys, "argv", [*words, "--picture", "f/picture.png"])
    frontier.main()
    folder = os.path.realpath("f/seed-0-9-256")
    spin = [f"SPIN-on-chosen-{beta}" for beta in (0.5, 1, 2, 4)]
    ipo = [f"IPO-{beta}" for beta in (0.1, 0.2, 0.4, 0.8)]
    assert set(configs) == {"sft", *ipo, *spin, *(f"{name}-measured" for name in spin)}
    assert configs["sft"].loss == "sft" and configs["sft"].max_steps == 9
    for name in ipo + spin:
        config = configs[name]
        assert config.model == f"{folder}/sft/LATEST" and config.lr == 2e-4 and not config.eval_first
        assert f"{getattr(config, config.loss)['beta']}" == name.split("-")[-1]
        assert config.num_epochs * 16384 / 32 * (1 if name in ipo else 2) == 256
    for name in spin:
        measured = configs[f"{name}-measured"]
        assert configs[name].data == f"{folder}/pairs.jsonl" and configs[name].eval_data == "toy"
        assert (measured.model, measured.reference) == (f"{folder}/{name}/LATEST", f"{folder}/sft/LATEST")
        assert measured.max_steps == 0 and measured.reference_cache
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| IPO", "| SPIN"))]
    assert [row[1] for row in rows] == ["0.1", "0.2", "0.4", "0.8", "0.5", "1", "2", "4"]
    assert [row[3] for row in rows] == ["0.10", "0.20", "0.40", "0.80"] + ["7.00"] * 4
    assert os.path.getsize("f/picture.png") > 10_000
    configs.clear()
    frontier.main()
    assert not configs  # what is there is not repeated
    monkeypatch.setattr(sys, "argv", [*words, "--seed", "13"])
    with pytest.raises(SystemExit, match="(?s)train.py .*so far.*and no further"):
        frontier.main()


def test_what_is_drawn(monkeypatch):
    frontier = load("frontier")
    points = [{"method": method, "samples/kl": kl, "samples/reward": reward}
              for method, kl, reward in (("DPO", 2.0, 3.0), ("IPO", 0.5, 1.5), ("DPO", 1.0, 2.0))]
    arguments = argparse.Namespace(picture="a/b.png", seed=0, steps=1)
    frontier.draw(points, arguments)
    from matplotlib import pyplot
    best, *lines = pyplot.gcf().axes[0].lines
    pyplot.close("all")
    assert [(line.get_label(), line.get_xydata().tolist()) for line in lines] == [
        ("DPO", [[2.0, 3.0], [1.0, 2.0]]), ("IPO", [[0.5, 1.5]])]
    p = 0.8  # of praise in each of four sentences: reward 2p - 1 and KL from 1/2, each
    kl = 4 * (math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p))
    assert np.interp(kl, *best.get_xydata().T) == pytest.approx(4 * (2 * p - 1), abs=0.01)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="for the picture: pip install matplotlib"):
        frontier.draw(points, arguments)


# ---------------------------------------------------------------- the commands, in processes of their own


@pytest.mark.slow
def test_the_frontier_command():
    """On few steps: the table has a line for each beta, with the efficiency that the run recorded."""
    script = os.path.join(ROOT, "tests", "benchmarks", "frontier.py")
    done = subprocess.run([sys.executable, script, "--methods", "IPO", "--steps", "2", "--sft_steps", "150",
                           "--runs", "f", "--picture", "f/picture.png"], capture_output=True, text=True)
    assert done.returncode == 0 and os.path.getsize("f/picture.png") > 10_000, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| IPO")]
    assert len(table) == 4
    last = read_lines("f/seed-0-150-2/IPO-0.1/metrics.jsonl")[-1]
    assert f"| {last['samples/reward']:.2f} | {last['samples/kl']:.2f} |" in table[0]


@pytest.mark.slow
def test_the_throughput_command(sft_run):
    """On few steps: contenders agree in their losses, and every part of a step is there."""
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "runs/sft/LATEST")
    shutil.copy(FEW_ROWS, "pairs.jsonl")
    script = os.path.join(ROOT, "tests", "benchmarks", "throughput.py")
    words = arguments_on_the_pages("throughput")[0]
    done = subprocess.run([sys.executable, script, *words, "--rounds", "2", "--steps", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, apart = (line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| here"))
    assert here[2] == "1.000" and apart[0] == "| here, layout=separate"
    assert float(apart[5]) < 1e-4 and float(here[6].rstrip("% |")) > 0
    names = "prompt|response|head|attention|optimizer|batch making"
    parts = re.findall(rf"\n\| ({names}) \| ([\d.]+)%", done.stdout)
    assert len(parts) == 12 and all(float(share) > 0 for name, share in parts if name != "batch making")


@pytest.mark.slow
def test_the_generation_command(sft_run):
    shutil.copytree(os.path.realpath(f"{sft_run}/LATEST"), "runs/sft/LATEST")
    shutil.copy(FEW_ROWS, "pairs.jsonl")
    script = os.path.join(ROOT, "tests", "benchmarks", "generation.py")
    words, = arguments_on_the_pages("generation")
    done = subprocess.run([sys.executable, script, *words, "--prompts", "8", "--rounds", "1",
                           "spin.max_tokens=8"], capture_output=True, text=True)
    assert re.search(r"8 prompts .* [\d,]+ tokens/s here, .* times as many", done.stdout), done.stderr


@pytest.mark.slow
def test_the_gpu_command(gpu):
    script = os.path.join(ROOT, "tests", "benchmarks", "gpu.py")
    done = subprocess.run([sys.executable, script, "--tiny", "--out", "page.md"], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert open("page.md", encoding="utf-8").read() == done.stdout
    check_page(done.stdout, gpu)
