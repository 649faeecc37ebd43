"""From sources and rows of every kind to what a run trains on, scores and says: nothing is lost unsaid."""

import copy
import datetime
import gzip
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (DATA, config_of, hash_again, keep_gradients, last_gradient, latest, numbers,
                      obvious_logp, read_lines, same_weights, tiny_of, write_lines)
from on_ranks import on_ranks
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, LlamaForSequenceClassification)

import data
import train
from engine import Dropped, InputError
from engine.files import short_names, strip_html
from engine.forward import response_scores
from losses import OBJECTIVES

U, A, S, TOOL = (lambda text, role=role: {"role": role, "content": text}
                 for role in ("user", "assistant", "system", "tool"))
CHAT = ("{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
        "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}")
CHATS = [{"messages": [U(f"Hi {i}"), A("yes " * (i % 4 + 1)), U("And?"), A(f"no {i}")]} for i in range(12)]
QUICK = ["batch_size=4", "max_steps=2", "eval_every=0", "num_samples=0", "lr_schedule=constant"]


def make_model(folder="m", template=CHAT, scores=False, seed=0, pad="<unk>", num_labels=1, **sizes):
    """A small random Llama in a folder, with the tokenizer of stories260K and a chat template."""
    config = tiny_of("llama", **{"vocab_size": 512, "max_position_embeddings": 512} | sizes).config
    torch.manual_seed(seed)
    config.num_labels = num_labels
    model = (LlamaForSequenceClassification if scores else AutoModelForCausalLM.from_config)(config)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(DATA, "stories260K"))
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model={folder}"


def build(*arguments):
    trainer = train.build_trainer(config_of(*QUICK, *arguments))
    trainer.optimizer.register_step_post_hook(keep_gradients)
    return trainer


def began(*settings):
    """A run of two steps over chats, in r."""
    write_lines("c.jsonl", CHATS)
    assert train.main([*QUICK, "data=c.jsonl", make_model(), "run_dir=r", *settings]) == 0


def summary(capsys):
    """The summary that was printed as {name: its lines}."""
    parts = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.match(r"(eval data|\w+) +(.*)", line):
            name = match[1]
            parts.setdefault(name, []).append(match[2])
        elif line.startswith(" " * 11):
            parts[name].append(line[11:])
        else:
            break
    return parts


def read(name, loss="sft", split="train", **options):
    return data.load_rows(name, split, OBJECTIVES[loss], **options)


ENDINGS = "files ending in .jsonl, .jsonl.gz, .json, .parquet, .csv"
ROWS = [{"prompt": f"p{i}", "response": f"é {i}"} for i in range(5)]


def check_rows(name, places, split="train"):
    rows, report = read(name, split=split)
    assert [row.where for row in rows] == places and report.rows == len(places)
    assert [(row.prompt, *row.responses) for row in rows] == [(*x.values(),) for x in ROWS[:len(places)]]


@pytest.mark.parametrize("kind", [
    "folder of jsonl", "folder of parquet", "folder of jsonl.gz", "glob of jsonl", "file of jsonl.gz"])
def test_files_and_shards_give_the_rows(kind):
    what, _, ending = kind.split()
    os.mkdir("d")
    Path("d/README.md").write_text("what these are")
    for path, rows in ((f"d/x-1.{ending}", ROWS[3:]), (f"d/x-0.{ending}", ROWS[:3])):
        if ending == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            content = Path(write_lines("lines", rows)).read_bytes()
            Path(path).write_bytes(gzip.compress(content) if ending == "jsonl.gz" else content)
    word = "row" if ending == "parquet" else "line"
    places = [f"x-{i // 3}.{ending} {word} {i % 3 + 1}" for i in range(3 if what == "file" else 5)]
    check_rows({"folder": "d", "glob": "d/x-*.jsonl", "file": f"d/x-0.{ending}"}[what], places)


def test_saved_folders_and_json_give_the_rows(refused):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk("one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk("several")
    Path("o.json").write_text(json.dumps({"version": "1.0", "size": 5, "data": ROWS}, indent=1))
    write_lines("l.json", ROWS)
    for name, word in (("one", "row"), ("several", "row"), ("o.json", "row"), ("l.json", "line")):
        check_rows(name, [f"{name} {word} {i}" for i in range(1, 6)])
    check_rows("several", ["several row 1"], "test")
    datasets.DatasetDict({"held_out": table}).save_to_disk("other")
    assert "held_out" in refused("data=other").partition("split train cannot be loaded")[2]  # which there is


def test_a_run_over_folder_and_glob_can_be_resumed_from_elsewhere(run):
    os.makedirs("a/shards")
    for i, row in enumerate(ROWS):
        write_lines(f"a/shards/{i}.jsonl", [row])
    folder = run("data=[a/shards,a/shards/*.jsonl]", "batch_size=5", "lr_schedule=constant", "num_epochs=1")
    os.chdir("a")
    run("resume=true", f"run_dir={folder}", "num_epochs=1.5")
    assert numbers(folder)[-1]["examples"] == 15


def test_names_with_brackets_are_names_before_they_are_patterns():
    os.mkdir("b[1]")
    for name, rows in (("a[1].jsonl", ROWS[:1]), ("a1.jsonl", ROWS[1:]), ("b[1]/x.jsonl", ROWS[:2])):
        write_lines(name, rows)
    assert [row.where for row in read("a[1].jsonl")[0]] == ["a[1].jsonl line 1"]
    assert len(read("b[1]")[0]) == 2


@pytest.mark.parametrize("more", [
    {"tags": ["x", "y"]}, {"scores": [1, 2]}, {"tools": [{"name": "f"}]}, {"tags": []}, {"prompt": [U("p")]},
    {"messages": [U("p"), A("r")], "response": None}])
def test_one_object_that_is_a_row_is_a_row(more):
    Path("x.json").write_text(json.dumps({"prompt": "p", "response": "r"} | more))
    assert [x.where for x in read("x.json")[0]] == ["x.json line 1"]


@pytest.mark.parametrize("name, file, content, words", [
    ("d/*.parquet", "", b"", ["d/*.parquet", "no such file", ENDINGS]), ("d", "", b"", ["/d'", ENDINGS]),
    ("d/x.jsonl.zst", "x.jsonl.zst", b"(", ["x.jsonl.zst", ENDINGS]), ("d", "x.jsonl.zst", b"(", [ENDINGS]),
    ("d/x.jsonl.gz", "x.jsonl.gz", b"text", ["x.jsonl.gz is no .jsonl.gz file"]),
    ("d/x.jsonl.gz", "x.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n', mtime=0)[:-9], [".jsonl.gz file"]),
    ("d", "1.parquet", b"nothing", ["1.parquet is no .parquet file"]),
    ("d/x.json", "x.json", b'{"data": []}', ["data"]), ("d/x.json", "x.json", b"3", ["x.json"]),
    ("d/x.json", "x.json", b'{"data": [1, 2]}', ["x.json"]),
    ("d/x.json", "x.json", b'{"train": [{"prompt": "p"}],\n "test": [{"prompt": "p"}]}', ["x.json"])])
def test_a_source_that_cannot_be_read_gets_one_sentence(name, file, content, words, refused):
    os.mkdir("d")
    if file:
        Path("d", file).write_bytes(content)
    message = refused(f"data={name}")
    assert all(word in message for word in words), message


SOURCES = {"a": "x/a.jsonl", "a-2": "y/a.jsonl", "b": "b.jsonl"}


def write_pairs(path, count, word="r"):
    Path(path).parent.mkdir(exist_ok=True)
    write_lines(path, [{"prompt": f"{word} {i}:", "chosen": f" yes {word} {i}", "rejected": " no" * (i % 3)}
                       for i in range(count)])


def test_so_many_rows_of_each_source_are_used(capsys):
    for path, count in (("a.jsonl", 9), ("b.jsonl", 4), ("x/a.jsonl", 7)):
        write_pairs(path, count, path[0])
    settings = ["data=[a.jsonl,b.jsonl]", "eval_data=[b.jsonl,a.jsonl,x/a.jsonl]", "num_samples=5",
                "num_train_examples=3", "num_eval_examples=2", make_model()]
    got = build("loss=dpo", *settings).data
    assert [x.where for x in got.train_examples] == [
        "a.jsonl line 2", "a.jsonl line 3", "a.jsonl line 5", "b.jsonl line 2", "b.jsonl line 3"]
    assert {name: [x.where[-1] for x in part] for name, part in got.eval_sources.items()} == {
        "b": ["2", "3"], "a": ["2", "3"], "a-2": ["2", "3"]}
    said = summary(capsys)  # rows for the loss and prompts for samples apart
    assert said["data"] == ["5 of 13 rows used, 5 dropped, 0 cut to fit, 3 beyond what was asked for",
                            "  dropped 5: rejected is white space only (a.jsonl line 1, a.jsonl line 4, "
                            "a.jsonl line 7, b.jsonl line 1, b.jsonl line 4)"]
    assert said["eval data"][0] == "6 of 20 rows used, 8 dropped, 0 cut to fit, 6 beyond what was asked for"
    assert said["samples"] == ["5 of 12 prompts used, 0 dropped, 0 cut to fit, 7 beyond what was asked for"]
    assert build("loss=rm", *settings).data.sample_examples == []  # it writes nothing


def test_rows_beyond_the_number_are_not_noted():
    write_lines("r.jsonl", [{"prompt": "<|endoftext|>", "response": str(i)} for i in range(3500)])
    got = data.load_data(config_of("data=r.jsonl", "num_train_examples=2"), OBJECTIVES["sft"])
    assert len(got.train_examples) == 2 and max(got.reports["data"].notes.values()) <= 1000


@pytest.mark.parametrize("sources, names", [
    (["/x/a.jsonl", "/y/b.jsonl.gz", "/y/a.json", "/z/a"], ["a", "b", "a-2", "a-3"]),
    (["a.csv", "a-3.csv", "b/a.csv"], ["a", "a-3", "a-2"]),
    (["a.csv", "a-x.csv", "b/a.csv"], ["a", "a-x", "a-2"]),
    (["/x/eval-0.5.jsonl", "/x/eval-0.9.jsonl", "org/name.v2"], ["eval-0.5", "eval-0.9", "name.v2"])])
def test_names_of_sources(sources, names):
    """The last part without its ending; of one that is taken the first number that is free."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it goes on for ever"))
    signal.alarm(2)
    found = short_names(sources)
    signal.alarm(0)
    assert found == names


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("loss", ["sft", "dpo", "rm"])
def test_each_eval_source_has_the_numbers_of_a_run_of_its_own(loss, run):
    for number, (name, path) in enumerate(SOURCES.items()):
        write_pairs(path, 6 + 3 * number, f"word {name} " * (number + 1))
    settings = [*QUICK, f"loss={loss}", "data=b.jsonl", "num_eval_examples=5", "eval_batch_size=2",
                "max_steps=0", make_model(scores=loss == "rm")]
    everything = [*settings, f"eval_data=[{','.join(SOURCES.values())}]"]
    objective, sums = OBJECTIVES[loss].bound({"average": "tokens"} if loss == "sft" else {}), {}
    together, = numbers(run(*everything, "run_dir=all"))
    for name, path in SOURCES.items():
        own, = numbers(run(*settings, f"eval_data={path}", f"run_dir=only-{name}"))
        config = config_of(*settings, f"eval_data={path}", "run_dir=none")
        examples = data.load_data(config, objective).eval_examples
        for metric in own.keys() - {"step", "examples", "epoch", "rewards/std"}:
            assert together[f"{metric}/{name}"] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
            count = objective.denominator(examples) if metric == "loss" else len(examples)
            total, number = sums.get(metric, (0, 0))
            sums[metric] = total + own[metric] * count, number + count
        assert not any(metric.endswith(f"/{name}") for metric in own)
    for metric, (total, number) in sums.items():
        assert together[metric] == pytest.approx(total / number, rel=1e-5, abs=1e-6), metric
    if loss == "dpo":
        on_ranks(2, *everything, "run_dir=two")
        assert numbers("two") == [{x: pytest.approx(y, rel=1e-4, abs=1e-5) for x, y in together.items()}]


def test_a_source_that_is_left_with_nothing_is_named(refused):
    write_pairs("a.jsonl", 9)
    write_lines("bad.jsonl", [{"prompt": "p", "chosen": "c", "rejected": " "}])
    assert "bad" in refused("loss=dpo", "data=a.jsonl", "eval_data=[a.jsonl,bad.jsonl]").partition(":")[0]


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:"
P, SAID = [U("a"), A("b"), U("q")], [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}]
PAIRS = [  # row, prompt, responses
    ({"prompt": "q", "chosen": "c", "rejected": "r"}, "q", "c", "r"),
    ({"prompt": P, "chosen": [A("c")], "rejected": [A("r")]}, P, A("c"), A("r")),
    ({"prompt": "q", "chosen": [A("c")], "rejected": [A("r")]}, [U("q")], A("c"), A("r")),
    ({"prompt": " a", "chosen": [S("s"), *P, A("c")], "rejected": [S("s"), *P, A("r")]},
     [S("s"), *P], A("c"), A("r")),  # the whole conversation
    ({"prompt": [S("s")], "chosen": [*P, A("c")], "rejected": [*P, A("r")]}, [S("s"), *P], A("c"), A("r")),
    ({"prompt": P[:1], "chosen": [*P[1:], A("c")], "rejected": [*P[1:], A("r")]}, P, A("c"), A("r")),
    ({"chosen": HH + " c", "rejected": HH + " r"}, HH, " c", " r"),
    ({"chosen": [*P, A("c")], "rejected": [*P, A("r")]}, P, A("c"), A("r")),
    ({"prompt": P, "chosen": [A("c")], "rejected": [A("r")], "system": "s"}, [S("s"), *P], A("c"), A("r")),
    ({"prompt": "q", "chosen_response": "c", "rejected_response": "r"}, "q", "c", "r"),
    ({"prompt": P, "chosen_response": [A("c")], "rejected_response": [A("r")]}, P, A("c"), A("r"))]
SINGLE = [
    *((row, prompt, chosen) for row, prompt, chosen, _ in PAIRS[:9]),
    ({"messages": [*P, A("c")]}, P, A("c")), ({"conversations": SAID}, [U("q")], A("c")),
    ({"messages": [*P, A("c"), U("thanks")]}, P, A("c")),
    ({"messages": [U("q"), {"role": "model", "content": [{"type": "text", "text": "c"}]}], "system": "s"},
     [S("s"), U("q")], A("c")),
    ({"prompt": "q", "response": "c"}, "q", "c"), ({"prompt": P, "response": [A("c")]}, P, A("c")),
    ({"prompt": "q", "completion": "c"}, "q", "c"), ({"prompt": P, "completion": "c"}, P, A("c")),
    ({"instruction": "do", "input": "x", "output": "c"}, "do\n\nx\n\n", "c"),
    ({"instruction": "do", "output": "c", "input": None}, "do\n\n", "c"),
    ({"instruction": P, "output": [A("c")]}, P, A("c")), ({"input": "q", "output": "c"}, "q", "c"),
    ({"input": "q", "output": [A("c")]}, [U("q")], A("c"))]


@pytest.mark.parametrize("row, prompt, responses", [
    (row, prompt, answers) for shapes in (PAIRS, SINGLE) for row, prompt, *answers in shapes])
def test_every_shape_of_row(row, prompt, responses):
    got = data.read_row(copy.deepcopy(row), "x", len(responses) == 2)
    assert (got.prompt, got.responses) == (prompt, tuple(responses))


REFUSED = [  # row, whether for a pair, words of the sentence
    ({"question": "q", "chosen": "c", "rejected": "r"}, True, "column prompt stands beside it in question, "),
    ({"question": "q", "chosen": [A("c")], "rejected": [A("r")]}, True, "nothing before its answer"),
    ({"prompt": "q", "chosen": [U("x"), A("c")], "rejected": [U("x"), A("r")]}, True,
     "chosen neither continues its prompt nor begins with it"),
    ({"prompt": P, "chosen": [U("a"), A("c")], "rejected": [U("a"), A("r")]}, True, "chosen neither"),
    ({"prompt": "q", "chosen": [A("c"), U("x")], "rejected": [A("r"), U("x")]}, True, "chosen is by user"),
    ({"messages": [U("q"), TOOL("4")]}, False, "the last message of messages is by tool"),
    ({"prompt": "q", "completion": [A("c"), U("x")]}, False, "the last message of completion is by user"),
    ({"chosen": [U("a"), A("c")], "rejected": [U("b"), A("r")]}, True, "rejected does not start with"),
    ({"messages": json.dumps([U("q"), A("c")])}, False, "messages "),  # a text, and no transcript
    ({"conversations": "no marker"}, False, "conversations "), ({"messages": [A("c")]}, False, "nothing bef"),
    ({"messages": [U("q"), A(" ")]}, False, "messages is white space only"),
    ({"messages": [U("q"), A("c") | {"weight": 0}]}, False, " "),
    ({"messages": [U([{"type": "image"}]), A("c")]}, False, "that is no text: image"),
    ({"prompt": "q", "completion": "c", "label": False}, False, "its label is false"),
    ({"prompt": "q", "completion": "c", "label": "False"}, False, "its label is false"),
    ({"prompt": "q", "chosen": "c", "rejected": "c"}, True, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "c", "rejected": "\n"}, True, "rejected is white space only"),
    ({"text": "t"}, False, "columns text; this objective needs"), ({"prompt": "q"}, False, "columns prompt;"),
    *(({"messages": x}, False, "column messages") for x in (
        [{"role": "user"}], ["q"], [U(5), A("c")], [U([5]), A("c")], 5, [A("c") | {"weight": 0.5}])),
    ({"prompt": 3, "response": "r"}, False, "column prompt is 3"), ([1], False, "is list, not an object"),
    ({"messages": [U("q"), A("c")], "tools": "{"}, False, "column tools"),
    ({"instruction": "i", "input": [U("q")], "output": "c"}, False, "column input")]


@pytest.mark.parametrize("row, pairs, words", REFUSED)
def test_a_row_is_dropped_or_refused_by_one_true_sentence(row, pairs, words):
    is_malformed = row in [row for row, *_ in REFUSED[-12:]]
    with pytest.raises(InputError if is_malformed else Dropped, match=re.escape(words)) as refusal:
        data.read_row(row, "f.jsonl line 3", pairs)
    message = str(refusal.value)
    assert "\n" not in message and ("f.jsonl line 3" in message) == is_malformed
    assert is_malformed or "chosen" not in message or "chosen" in row
    assert "input" not in row or "list of messages" not in message  # it was given one


THIRTY = [  # shapes, and what becomes of each
    *((row, None) for row, *_ in [*SINGLE[:8], *SINGLE[9:19]]),
    ({"prompt": "q", "completion": "c", "label": True}, None),
    ({"prompt": "q", "completion": "c", "label": False}, "its label is false"),
    ({"prompt": "q", "response": "c", "history": ["x"]}, None),
    ({"prompt": "q </s>", "response": "c", "context": "x", "images": []}, None),
    ({"prompt": "q", "response": " \n"}, "response is white space only"),
    ({"messages": [U("q"), A("c"), TOOL("4")]}, None),
    ({"messages": [U("q") | {"role": "critic"}, A("c")]}, "the chat template refuses it: no critics"),
    ({"prompt": "q" * 400, "response": "c"}, "longer than max_length=100 tokens"),
    ({"question": "q", "chosen": "c", "rejected": "r"}, "chosen has no"),
    ({"prompt": "q", "chosen": [U("x"), A("c")], "rejected": None}, "chosen neither continues"),
    ({"messages": [U("q"), U("q")]}, "the last message of messages is by user"),
    ({"prompt": "", "response": "c"}, "the prompt is empty")]


def test_a_run_over_thirty_shapes_mixed_accounts_for_every_row(run, capsys):
    rows, fates = zip(*(THIRTY * 34)[:1000])
    reasons, last = {*fates} - {None}, [row.get("messages", [U("")])[-1]["content"] for row in rows]
    write_lines("mixed.jsonl", rows)
    folder = run(*QUICK, "data=mixed.jsonl", make_model(), "max_length=100", "truncation=drop",
                 "eval_data=mixed.jsonl", "num_eval_examples=300")
    said = summary(capsys)
    for name in ("eval data", "data"):
        first, *rest = (line.replace(",", "") for line in said[name])
        used, total, dropped, cut, beyond = map(int, re.fullmatch(
            r"(\d+) of (\d+) rows used (\d+) dropped (\d+) cut to fit(?: (\d+) b.*)?", first).groups("0"))
        assert (total, cut, used + dropped + beyond) == (1000, 0, 1000) and latest(folder) == 2
        counts = re.findall(r"^  dropped (\d+): (.*) \(m", "\n".join(rest), re.M)
        assert sum(int(number) for number, _ in counts) == dropped and len(THIRTY) == 30
        if name == "eval data":
            assert used == 300 and beyond > 100
            continue
        assert used == fates.count(None) and len(counts) == len(reasons)
        for number, reason in counts:
            assert [fates.count(x) for x in reasons if reason.startswith(x)] == [int(number)], reason
        notes = re.findall(r"^  (\d+) (?:rows )?(.*)", "\n".join(rest), re.M)
        assert {what: int(number) for number, what in notes} == {
            **{f"have a column {x} which is not read": str(rows).count(x) for x in ("history", "context")},
            "have turns after the last answer which are not read": last.count("thanks") + last.count("4"),
            "hold special tokens in plain text which are read as tokens": str(rows).count("</s>")}


def set_day(monkeypatch, day):
    today = datetime.date.fromisoformat(day)
    date = SimpleNamespace(today=lambda: today, fromisoformat=datetime.date.fromisoformat)
    monkeypatch.setattr(data, "datetime", SimpleNamespace(date=date))


@pytest.mark.parametrize("form, loss", [("%d %b %Y", "sft"), ("%Y-%m-%d", "dpo"), ("%A, %x", "sft")])
def test_a_run_that_goes_on_after_midnight_is_the_run_that_never_stopped(form, loss, run, monkeypatch):
    template = f"{{% set today = strftime_now('{form}') %}}Today is {{{{ today }}}}.{CHAT}"
    pairs = [{"chosen": x["messages"], "rejected": [*x["messages"][:-1], A("maybe")]} for x in CHATS]
    write_lines("c.jsonl", CHATS if loss == "sft" else pairs)
    settings = [*QUICK, "data=c.jsonl", "eval_data=c.jsonl", "eval_every=2", make_model("m", template),
                f"loss={loss}", "num_samples=2", "sample_max_tokens=4", "seed=3"]
    set_day(monkeypatch, "2026-12-31")
    run(*settings, "max_steps=5", "run_dir=whole")
    run(*settings, "max_steps=2", "run_dir=part")
    for day, steps in (("2027-01-01", 4), ("2027-01-02", 5)):
        set_day(monkeypatch, day)
        run("resume=true", "run_dir=part", f"max_steps={steps}")
    assert same_weights("whole", "part") and numbers("whole") == numbers("part")
    samples, written = read_lines("part/samples.jsonl"), datetime.date(2026, 12, 31).strftime(form)
    assert samples == read_lines("whole/samples.jsonl") and len(samples) == 2 * 4
    assert all(f"Today is {written}." in sample["prompt"] for sample in samples)
    assert not same_weights("whole", run(*settings, "max_steps=5", "run_dir=later"))  # of another day


@pytest.mark.parametrize("name, old, new", [
    ("tokenizer.json", "", ""), ("chat_template.jinja", "</s>\n", "\n</s>"),
    ("chat_template.jinja", "{{ m.role }}\n", "{{ m.role }} -\n")])
def test_a_resume_refuses_other_token_ids_of_the_same_texts(name, old, new, run, refused):
    began()
    path = Path("r/LATEST", name)
    before = path.read_text()
    content = json.loads(before) if name == "tokenizer.json" else {"model": {}}
    content["model"]["merges"] = content["model"].get("merges", [])[:20]
    path.write_text(before.replace(old, new) if old else json.dumps(content))
    hash_again("r/LATEST")
    message = refused("resume=true", "run_dir=r", "max_steps=3")
    assert "token" in message and "not what this run began with" in message and "tokens is" not in message
    path.write_text(before)
    hash_again("r/LATEST")
    run("resume=true", "run_dir=r", "max_steps=3")


TURNS = [S("Be kind."), U("Hi"), A("Hello there."), U("And?")]
TALK = [{"prompt": TURNS, "chosen": [A("Yes, a tree.")], "rejected": [A("No")]},
        {"prompt": "One day,", "chosen": " a girl", "rejected": " the dog ran"}]


def ids_of(folder, given):
    """The ids that everybody has of messages, or of a text with the end token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if isinstance(given, list):
        return tokenizer.apply_chat_template(given, tokenize=True, return_dict=False)
    return tokenizer(given, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def score_of(folder, ids):
    """The score that everybody gets of a reward model in a folder."""
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = None  # with one text at a time nothing is padding
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        return pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)


def scores_of_talk(folder):
    return [[score_of(folder, ids_of(folder, [*TURNS, A(text)])) for text in ("Yes, a tree.", "No")],
            [score_of(folder, ids_of(folder, text)) for text in ("One day, a girl", "One day, the dog ran")]]


@pytest.mark.parametrize("pad", ["<unk>", "</s>"])
@pytest.mark.parametrize("after", ["\n", "", "\n<s>\n"])
def test_a_reward_model_is_read_where_everybody_reads_it(after, pad):
    write_lines("c.jsonl", TALK)
    model = make_model("m", CHAT.replace("</s>\n", "</s>" + after), scores=True, pad=pad)
    trainer = build("loss=rm", model, "data=c.jsonl")
    assert trainer.batcher.values(lambda batch: response_scores(trainer.policy.eval(), batch),
                                  trainer.data.train_examples, "") == scores_of_talk("m")


def test_rewards_that_are_missing_and_of_samples_are_those_of_everybody(run):
    make_model("judge", scores=True, seed=1)
    write_lines("c.jsonl", TALK)
    settings = ["loss=rpo", make_model(), "reward_model=judge", "data=c.jsonl", "eval_data=c.jsonl"]
    lines = {line["where"]: line for line in read_lines(f"{run(*QUICK, *settings)}/rewards.jsonl")}
    assert [[lines[f"c.jsonl line {i}"][name] for name in ("chosen_reward", "rejected_reward")]
            for i in (1, 2)] == scores_of_talk("judge")
    trainer = build(*settings, "num_samples=1", "run_dir=other")
    words, whole = ids_of("m", " hello"), ids_of("m", [*TURNS, A("x")])
    (ended,), (broken,) = (trainer.sampler.scores([ids]) for ids in (words, words[:-1]))
    prompt = trainer.data.sample_examples[0].prompt.tolist()
    newline = whole[len(whole) - whole[::-1].index(2):]
    assert len(newline) > 0 and ended["reward"] == score_of("judge", [*prompt, *words, *newline])
    assert broken["reward"] == score_of("judge", [*prompt, *words[:-1]])


def test_what_follows_the_answer_stays_within_the_judges_positions(run):
    make_model()  # a response that just fits has no room for the newline of the template
    ids = ids_of("m", [U("q"), A("a b c d")])
    fits = len(ids) - ids[::-1].index(2)
    shutil.copytree("m", "judge")
    config = AutoConfig.for_model("gpt2", vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=fits,
                                  num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("judge")
    write_lines("c.jsonl", [{"prompt": "q", "chosen": [A("a b c d")], "rejected": [A("b")]}])
    run(*QUICK, "loss=rpo", "model=m", "reward_model=judge", "data=c.jsonl", f"max_length={fits}",
        "max_prompt_length=9")


def test_a_classifier_of_two_labels_is_told_so(refused):
    make_model("judge", scores=True, num_labels=2)
    write_lines("c.jsonl", CHATS)
    message = refused(*QUICK, "data=c.jsonl", make_model(), "reward_model=judge")
    assert all(word in message for word in ("judge", "classifier", "labels", "one score")), message


def test_the_end_tokens_embedding_learns_where_it_also_pads():
    """The gradient of a plain forward, in which nothing is padding."""
    write_lines("c.jsonl", CHATS[:4])
    settings = ["data=c.jsonl", "max_grad_norm=null", "sft.train_on=last_answer"]
    trainer = build(make_model(pad="</s>", pad_token_id=2), *settings)
    trainer.train_step()
    plain, examples = AutoModelForCausalLM.from_pretrained("m"), trainer.data.train_examples
    plain.get_input_embeddings().padding_idx = None
    assert all((example.prompt == 2).sum() == 3 for example in examples)
    total = -sum(obvious_logp(plain, example, example.responses[0]) for example in examples)
    (total / sum(len(example.responses[0]) for example in examples)).backward()
    expected, got = (last_gradient(x.get_input_embeddings().weight)[2] for x in (plain, trainer.policy))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("student, teacher", [(520, 512), (512, 520), (512, 512)])
def test_the_weight_of_kd_is_the_students_own_log_probability(student, teacher, run):
    make_model("teacher", vocab_size=teacher, seed=1)
    write_lines("c.jsonl", [*CHATS, {"prompt": "One day,", "response": " a girl"}])
    settings = [*QUICK, "loss=kd", make_model(vocab_size=student), "reference=teacher", "data=c.jsonl",
                "eval_data=c.jsonl"]
    line, = numbers(run(*settings, "max_steps=0", "kd.sft_weight=0.5"))
    plain = AutoModelForCausalLM.from_pretrained("m").requires_grad_(False)
    examples = data.load_data(config_of(*settings, "run_dir=none"), OBJECTIVES["kd"]).eval_examples
    total = -sum(obvious_logp(plain, example, example.responses[0]).item() for example in examples)
    assert line["sft_loss"] == pytest.approx(total / sum(len(x.responses[0]) for x in examples), rel=1e-5)
    assert line["loss"] == pytest.approx(line["kd_loss"] + 0.5 * line["sft_loss"], rel=1e-5)


@pytest.mark.parametrize("html, text", [
    ("one<br>two", "one\ntwo"), ("one<br/>two<BR />three", "one\ntwo\nthree"), ("<h1>T</h1>x", "T\n\nx"),
    ("<h3>A <b>b</b></h3>d", "A b\n\nd"), ("<p>x</p><h2>T</h2><p>y</p>", "x\n\nT\n\ny"),
    ("text<h2>T</h2>", "text\n\nT")])
def test_html_at_breaks_and_headings(html, text):
    assert strip_html(html) == text


@pytest.mark.parametrize("given", [
    ["--config", "mine.yaml"], ["attribute_template={prompt} {quality}"], ["resume=true", "run_dir=r"]])
def test_the_former_key_is_answered_with_the_new_one(given, run, refused):
    Path("mine.yaml").write_text("attribute_template: '{prompt}'\n")
    began()  # with an old run's config.yaml
    settings = Path("r/config.yaml").read_text()
    run("resume=true", "run_dir=r", "max_steps=3", "attribute_template=null")
    Path("r/config.yaml").write_text(settings.replace("prompt_template: null", "attribute_template: x"))
    message = refused(*given)
    assert "attribute_template" in message and " prompt_template" in message


@pytest.mark.parametrize("before, now, is_told", [
    ("Q: {prompt}", "Q: {prompt}", False), ("Q: {prompt}", "A: {prompt}", True),
    ("Q: {prompt}", "null", True), ("null", "Q: {prompt}", True), ("null", "null", False)])
def test_a_next_stage_with_another_prompt_template_is_told(before, now, is_told, capsys):
    began(f"prompt_template={before}")
    capsys.readouterr()
    build("data=c.jsonl", "model=r/LATEST", f"prompt_template={now}", "run_dir=next")
    notes = [line for line in summary(capsys).get("note", []) if "prompt_template" in line]
    assert len(notes) == is_told and all(before.replace("null", "None") in note for note in notes)


def test_prompt_template_takes_columns_and_attributes_and_puts_them_in_once():
    write_lines("p.jsonl", [{"prompt": "p {topic} {prompt}", "response": "r", "topic": "{prompt}", "n": 3,
                             "attributes": {"n": 4, "tone": "{n} dry", "unrated": None}, "context": "c"}])
    for n, more in ((4, {}), (5, {"n": 5})):
        (row,), report = read("p.jsonl", template="{topic}|{n}|{tone}|{prompt}|{attributes}|{context}",
                              attributes=more)
        assert row.prompt == f"{{prompt}}|{n}|{{n}} dry|p {{topic}} {{prompt}}|n:{n},tone:{{n}} dry|c"
        assert row.responses == ("r",)
        assert report.notes == {}  # they are read
    _, report = read("p.jsonl", template="Q: {prompt}")
    assert report.notes == {f"have a column {x}, which is not read": 1 for x in ("context", "attributes")}

    # In chats it goes around the last user message.
    turns = [S("s {x}"), U("a"), A("b"), U("q {x}"), A("d"), TOOL("t"), A("c")]
    write_lines("c.jsonl", [{"messages": turns, "x": "X"}])
    (row,), _ = read("c.jsonl", template="<{prompt}> {x}")
    assert row.prompt == [*turns[:3], U("<q {x}> X"), *turns[4:6]]
    assert (row.responses, row.answers) == ((A("c"),), [2, 4])


@pytest.mark.parametrize("train_on, marked", [
    ("answers", ["yes</s>", "no 0</s>"]), ("last_answer", ["no 0</s>"]), ("everything", None)])
def test_lengths_and_the_first_example_with_what_counts_in_brackets(train_on, marked, capsys):
    write_lines("c.jsonl", [{"messages": [U("Hi"), A("yes"), U("And?"), A("no 0")]}, *CHATS])
    examples = build(make_model(), "data=c.jsonl", f"sft.train_on={train_on}").data.train_examples
    said = summary(capsys)
    counted = [x.num_tokens for x in examples], [np.count_nonzero(x.weights(0)) for x in examples]
    assert re.findall(r"\d+", said["lengths"][0].partition("(")[0]) == [
        f"{np.quantile(lengths, q):.0f}" for lengths in counted for q in (0.5, 0.95, 1)]
    line, = said["first"]
    found = re.findall(r"\[\[(.*?)\]\]", line)
    assert "user\\nHi" in line
    assert found == marked if marked else len(found) == 1 and found[0].count("</s>") == 4
    write_lines("p.jsonl", [{"prompt": "One" + " day" * 400, "response": " a [girl]"}])
    build("model=m", "data=p.jsonl")
    line, = summary(capsys)["first"]
    assert re.fullmatch(r"One day.{90,100} \.\.\. .{90,100}\[\[ ?a \[girl\]</s>\]\]", line)


@pytest.mark.parametrize("row, template, more, is_noted", [
    (ROWS[0], CHAT, [], True), (ROWS[0], CHAT, ["add_bos=true"], False), (ROWS[0], None, [], False),
    (CHATS[0], CHAT, [], False), (CHATS[0], CHAT.replace("<s>", ""), [], True)])
def test_the_note_on_a_begin_token_is_true(row, template, more, is_noted, capsys):
    write_lines("r.jsonl", [row])
    build("data=r.jsonl", "warmup_steps=0", *([make_model("m", template)] if template else []), *more)
    notes = summary(capsys).get("note", [])
    assert ["begins texts with <s>" in note and "add_bos=true" in note for note in notes] == [True] * is_noted


def test_characters_of_private_use_are_characters_and_noncharacters_are_none(run, refused):
    private = "".join(map(chr, range(0xe000, 0xf900)))
    make_model()
    write_lines("p.jsonl", [{"messages": [U(private), A(private)]}] * 4)
    run(*QUICK, "data=p.jsonl", "model=m")
    write_lines("n.jsonl", [{"messages": [U("\ufdd0\ufdd1\ufdd2\ufdd3"), A("a")]}])
    assert refused(*QUICK, "data=n.jsonl", "model=m", "run_dir=n").endswith(
        "/n.jsonl leaves no row to work with: 0 of 1 rows used, 1 dropped, 0 cut to fit;   dropped 1: it "
        "holds one of U+FDD0 to U+FDD3, which are no characters (n.jsonl line 1)")
