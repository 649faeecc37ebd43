"""Rows of every shape to exact tokens and tensors; every source, in the hub's own schema."""

import json
import math
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import shared, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import Dropped, Example, InputError, Report, TextRow, read_row
from losses import OBJECTIVES

U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})


def texts(row, pairs=True, columns=()):
    result = read_row(row, "x row 1", pairs, columns)
    return result.prompt, result.responses


# ---------------------------------------------------------------- row shapes

PAIR_ROWS = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", ("c", "r"))),
    ({"prompt": "p", "chosen_response": "c", "rejected_response": "r"}, ("p", ("c", "r"))),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: c",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: r"},
     ("\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant:", (" c", " r"))),
    ({"prompt": [U("q")], "chosen": [A("c")], "rejected": [A("r")]}, ([U("q")], (A("c"), A("r")))),
    # a list with earlier turns is the whole conversation, the prompt column is ignored
    ({"prompt": "else", "chosen": [U("q"), A("c")], "rejected": [U("q"), A("r")]}, ([U("q")], (A("c"), A("r")))),
    ({"chosen": [U("q"), A("b"), U("x"), A("c")], "rejected": [U("q"), A("b"), U("x"), A("r")]},
     ([U("q"), A("b"), U("x")], (A("c"), A("r")))),
    ({"prompt": "q", "chosen": [A("c")], "rejected": [A("r")]}, ([U("q")], (A("c"), A("r")))),
    # several shapes fit: the first wins
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_response": "x", "rejected_response": "y"},
     ("p", ("c", "r"))),
]
SINGLE_ROWS = [
    ({"prompt": "p", "response": "r"}, ("p", ("r",))),
    ({"prompt": "p", "completion": "r"}, ("p", ("r",))),
    ({"input": "p", "output": "r"}, ("p", ("r",))),
    ({"instruction": "do", "input": "this", "output": "r"}, ("do\n\nthis\n\n", ("r",))),
    ({"instruction": "do", "input": "", "output": "r"}, ("do\n\n", ("r",))),
    ({"instruction": "do", "output": "r"}, ("do\n\n", ("r",))),
    ({"messages": [U("q"), A("b"), U("x"), A("c")]}, ([U("q"), A("b"), U("x")], (A("c"),))),
    ({"messages": [U("q"), A("c"), U("later")]}, ([U("q")], (A("c"),))),
    # of a pair `chosen`, whatever `rejected` is
    ({"prompt": "p", "chosen": "c", "rejected": None}, ("p", ("c",))),
    ({"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": 7}, ("\n\nHuman: q\n\nAssistant:", (" c",))),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "response": "x"}, ("p", ("c",))),
]


@pytest.mark.parametrize("row, expected", PAIR_ROWS)
def test_pairs_of_every_shape(row, expected):
    assert texts(row) == expected


@pytest.mark.parametrize("row, expected", SINGLE_ROWS)
def test_single_responses_of_every_shape(row, expected):
    assert texts(row, pairs=False) == expected


@pytest.mark.parametrize("row, pairs, reason", [
    ({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: r"}, True,
     "rejected does not start with the prompt of chosen"),
    ({"chosen": [U("a"), A("c")], "rejected": [U("b"), A("r")]}, True,
     "rejected does not start with the prompt of chosen"),
    ({"chosen": "no marker", "rejected": "none"}, True, "chosen has no '\\n\\nAssistant:', where the prompt would end"),
    ({"prompt": "p", "chosen": " \n", "rejected": "r"}, True, "chosen is white space only"),
    ({"prompt": "p", "chosen": "c", "rejected": "\t"}, True, "rejected is white space only"),
    ({"prompt": "p", "chosen": "c", "rejected": "c"}, True, "chosen and rejected are equal"),
    ({"prompt": "p", "response": ""}, False, "response is white space only"),
    ({"messages": [U("q"), U("q")]}, False, "the conversation has no assistant turn after a prompt"),
    ({"messages": [A("q")]}, False, "the conversation has no assistant turn after a prompt"),
    ({"messages": [U("q"), A(" ")]}, False, "messages is white space only"),
])
def test_rows_that_cannot_be_trained_on_are_dropped(row, pairs, reason):
    with pytest.raises(Dropped) as dropped:
        texts(row, pairs)
    assert str(dropped.value) == reason


def test_what_the_objective_does_not_read_does_not_drop_a_row():
    assert texts({"prompt": "p", "chosen": "c", "rejected": "c"}, pairs=False) == ("p", ("c",))


@pytest.mark.parametrize("row, pairs, columns, said", [
    ([1], True, (), "list, not an object"),
    ({"prompt": "p", "chosen": "c"}, True, (), "has values in the columns prompt, chosen; this objective needs prompt, chosen, "),
    ({"prompt": "p", "chosen": 3, "rejected": "r"}, True, (), "column chosen is 3"),
    ({"prompt": "p", "chosen": "c", "rejected": [A("r")]}, True, (), "both be text or both be lists"),
    ({"messages": [{"role": "user"}]}, False, (), "column messages is"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, True, ["chosen_reward"],
     "needs a column chosen_reward (or score_chosen)"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": "high"}, True, ["chosen_reward"],
     "column chosen_reward is 'high'; it must be a finite number"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": math.nan}, True, ["chosen_reward"], "finite"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": True}, True, ["chosen_reward"], "finite"),
])
def test_malformed_rows_stop_the_run_with_their_place(row, pairs, columns, said):
    with pytest.raises(InputError) as refusal:
        read_row(row, "f.jsonl line 3", pairs, columns)
    assert "f.jsonl line 3" in str(refusal.value) and said in str(refusal.value)


def test_a_null_reward_falls_back_on_its_alias_and_input_must_be_text():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": None, "score_chosen": 2}
    assert read_row(row, "x", True, ["chosen_reward"]).columns == {"chosen_reward": 2.0}
    with pytest.raises(InputError, match="column input is NaN"):
        read_row({"instruction": "do", "input": math.nan, "output": "r"}, "x", False)


# ---------------------------------------------------------------- attributes

TEMPLATE = "{prompt} <{attributes}> Quality {quality}:"


def with_attributes(row, template=TEMPLATE, **more):
    write_lines("a.jsonl", [{"prompt": "p", "response": "r"} | row])
    return data.load_rows("a.jsonl", "train", OBJECTIVES["sft"], template, more)


def test_attributes_go_into_the_prompt():
    rows, _ = with_attributes({"attributes": {"quality": 4, "toxicity": 0.5, "tone": "dry", "unrated": None}})
    assert (rows[0].prompt, rows[0].responses) == ("p <quality:4,toxicity:0.5,tone:dry> Quality 4:", ("r",))
    chat = {"messages": [U("a"), A("b"), U("q"), A("c")], "attributes": {"quality": 4}}
    rows, _ = with_attributes(chat, "{prompt} [{quality}]")
    assert rows[0].prompt == [U("a"), A("b"), U("q [4]")] and rows[0].responses == (A("c"),)


def test_given_attributes_go_before_the_rows_own():
    rows, _ = with_attributes({"attributes": {"quality": 1, "tone": "dry"}}, quality=4)
    assert rows[0].prompt == "p <quality:4,tone:dry> Quality 4:"
    assert with_attributes({}, quality=4)[0][0].prompt == "p <quality:4> Quality 4:"
    with pytest.raises(InputError, match="has no quality"):
        with_attributes({"attributes": {"quality": 1}}, quality=None)


@pytest.mark.parametrize("row, said", [
    ({"attributes": {"tone": "dry"}}, "a.jsonl line 1 has no quality in its column attributes"),
    ({}, "a.jsonl line 1 has no quality in its column attributes"),
    ({"attributes": [4]}, "a.jsonl line 1: column attributes is [4]; it must map names to values"),
    ({"attributes": {"quality": [1, 2]}}, "a.jsonl line 1: the attribute quality is [1, 2]; it must be text or a number"),
    ({"attributes": {"quality": 1, "prompt": "x"}}, "a.jsonl line 1: the attribute prompt is"),
])
def test_attributes_that_do_not_fit(row, said):
    with pytest.raises(InputError) as caught:
        with_attributes(row)
    assert said in str(caught.value)
    with pytest.raises(InputError, match="sample_attributes.qualty is no attribute of a.jsonl line 1, which has quality"):
        with_attributes({"attributes": {"quality": 1}}, "{prompt} {attributes}", qualty=4)
    with pytest.raises(InputError, match="has no value in its column attributes"):
        with_attributes({}, "{prompt} {attributes}")


def test_attributes_without_a_template_are_reported():
    rows, report = with_attributes({"attributes": {"quality": 4}}, None)
    assert rows[0].prompt == "p"
    assert "  1 have attributes, unused: attribute_template is null" in list(report.lines())


def test_attributes_are_part_of_the_fingerprint():
    prints = {with_attributes({"attributes": {"quality": q}})[1].fingerprint for q in (1, 2, 2)}
    assert len(prints) == 2


def test_pairs_may_lack_rewards_where_a_reward_model_will_fill_them():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1}
    names = ("margin", "chosen_reward", "rejected_reward")
    assert read_row(row, "x", True, names, may_lack_rewards=True).columns == {
        "margin": 1.0, "chosen_reward": None, "rejected_reward": None}
    for changes, allowed in (({}, False), ({"score_chosen": 2}, True), ({"margin": None}, True)):
        with pytest.raises(InputError, match="x: the objective needs a column"):
            read_row(row | changes, "x", True, names, may_lack_rewards=allowed)


def test_a_byte_order_mark_is_no_part_of_a_column():
    for name, text in (("f.jsonl", '{"prompt": "p", "response": "r"}'), ("f.csv", "prompt,response\np,r\n")):
        open(name, "w", encoding="utf-8-sig").write(text)
        assert len(data.load_rows(name, "train", OBJECTIVES["sft"])[0]) == 1


def test_reward_columns_and_their_aliases():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": 2, "score_rejected": "-0.5"}
    columns = read_row(row, "x", True, ["chosen_reward", "rejected_reward"]).columns
    assert columns == {"chosen_reward": 2.0, "rejected_reward": -0.5}


# ---------------------------------------------------------------- files

ROWS = [{"prompt": "p1", "chosen": "a, \"b\"\nc", "rejected": "None"}, {"prompt": "p2", "chosen": "é", "rejected": "1"}]


def write(path, rows):
    if path.endswith(".jsonl"):
        write_lines(path, rows)
    elif path.endswith(".json"):
        json.dump(rows, open(path, "w"))
    elif path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).to_csv(path)
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.parquet", "f.csv"])
def test_every_kind_of_file_gives_the_same_rows(name):
    rows, report = data.load_rows(write(name, ROWS), "train", OBJECTIVES["dpo"])
    assert [(row.prompt, *row.responses) for row in rows] == [tuple(row.values()) for row in ROWS]
    assert report.rows == 2 and all(row.where.startswith(name) for row in rows)


def test_a_list_of_sources_is_concatenated_and_lines_keep_their_numbers():
    write("a.jsonl", ROWS[:1])
    open("b.jsonl", "w").write("\n" + json.dumps(ROWS[1]) + "\n")
    rows, _ = data.load_rows(["a.jsonl", "b.jsonl"], "train", OBJECTIVES["sft"])
    assert [row.where for row in rows] == ["a.jsonl line 1", "b.jsonl line 2"]


@pytest.mark.parametrize("name, content, said", [
    ("f.jsonl", b'{"prompt": "p", "response": "r"}\n{"prompt": \n', "f.jsonl line 2 is not JSON"),
    ("f.json", b'[{"prompt": "p"},\n 7 8]', "f.json is not JSON: .* line 2"),
    ("f.csv", b"prompt,response\na,b,c\n", "f.csv is no .csv file in UTF-8: line 2 has not the header's 2 cells"),
    ("f.parquet", b"nothing", "f.parquet is no .parquet file"),
    ("f.jsonl", b'{"prompt": "\xff", "response": "r"}\n', "no .jsonl file in UTF-8"),
    ("f.jsonl", b"3\n", "f.jsonl line 1 is int, not an object"),
])
def test_malformed_files_stop_the_run(name, content, said):
    open(name, "wb").write(content)
    with pytest.raises(InputError, match=said):
        data.load_rows(name, "train", OBJECTIVES["sft"])


@pytest.mark.parametrize("name, said", [
    ("missing.jsonl", "no such file"), ("toyy", "did you mean toy"), ("notes.txt", "no dataset"),
    ("nobody/nothing", "cannot be loaded"),
])
def test_unknown_sources_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        data.load_rows(name, "train", OBJECTIVES["sft"])


# ---------------------------------------------------------------- the hub's datasets, in the hub's schema


def hub_folder(tmp_path, name, splits):
    """Where load_dataset(name) finds files as they lie on the hub: a folder of that name."""
    folder = tmp_path / name / "data"
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_hh(tmp_path):
    def rows(word):
        return [{"chosen": f"\n\nHuman: q\n\nAssistant: {word}", "rejected": "\n\nHuman: q\n\nAssistant: r"}]
    hub_folder(tmp_path, "Anthropic/hh-rlhf", {"train": rows("good"), "test": rows("held")})
    for split, word in (("train", " good"), ("test", " held")):
        rows_read, _ = data.load_rows("hh", split, OBJECTIVES["dpo"])
        assert [(row.prompt, row.responses) for row in rows_read] == [("\n\nHuman: q\n\nAssistant:", (word, " r"))]
        assert rows_read[0].where == "hh row 1"


def test_shp(tmp_path):
    def row(history, a, b, score_a, score_b, label):
        return {"history": history, "human_ref_A": a, "human_ref_B": b, "score_A": score_a, "score_B": score_b,
                "labels": label}
    hub_folder(tmp_path, "stanfordnlp/SHP", {"train": [
        row("q1", "a", "b", 10, 5, 1),   # ratio 2: kept, A preferred
        row("q1", "c", "b", 4, 20, 0),   # B preferred
        row("q2", "x", "y", 10, 6, 1)]})  # ratio below 2: left out
    rows, _ = data.load_rows("shp", "train", OBJECTIVES["dpo"])
    assert [(row.prompt, row.responses) for row in rows] == [("\n\nHuman: q1\n\nAssistant:", (" a", " b")),
                                                            ("\n\nHuman: q1\n\nAssistant:", (" b", " c"))]
    rows, _ = data.load_rows("shp", "train", OBJECTIVES["sft"])
    assert [row.responses for row in rows] == [(" b",)]  # the best-scored answer, 20, of each post


def test_stack_exchange(tmp_path):
    rows = [{"question": f"<p>Why {i}?</p>", "answers": [
        {"text": "<p>Low</p>", "pm_score": 1}, {"text": "<p>Use <code>a &lt; b</code></p><pre>x</pre>", "pm_score": 5},
        {"text": "<p>Also low</p>", "pm_score": 1}]} for i in range(200)]
    hub_folder(tmp_path, "HuggingFaceH4/stack-exchange-preferences", {"train": rows})
    train_rows, _ = data.load_rows("se", "train", OBJECTIVES["dpo"])
    test_rows, _ = data.load_rows("se", "test", OBJECTIVES["dpo"])
    assert len(train_rows) == 198 * 2 and len(test_rows) == 2 * 2  # 1% held out; the tie is no pair
    assert {row.prompt for row in train_rows}.isdisjoint(row.prompt for row in test_rows)
    assert {row.responses for row in train_rows} == {(" Use a < b\n\nx", " Low"), (" Use a < b\n\nx", " Also low")}
    order = datasets.Dataset.from_list(rows).shuffle(seed=42)["question"][:2]
    assert {row.prompt for row in test_rows} == {f"\n\nHuman: {q[3:-4]}\n\nAssistant:" for q in order}
    sft_rows, _ = data.load_rows("se", "test", OBJECTIVES["sft"])
    assert [row.responses for row in sft_rows] == [(" Use a < b\n\nx",)] * 2


def test_ultrafeedback_with_its_scores(tmp_path):
    row = {"prompt": "q", "prompt_id": "0", "chosen": [U("q"), A("c")], "rejected": [U("q"), A("r")],
           "messages": [U("q"), A("c")], "score_chosen": 8.5, "score_rejected": 3.0}
    hub_folder(tmp_path, "HuggingFaceH4/ultrafeedback_binarized", {"train_prefs": [row], "test_prefs": [row] * 2})
    rows, _ = data.load_rows("ultrafeedback", "train", OBJECTIVES["rpo"])
    assert (rows[0].prompt, rows[0].responses) == ([U("q")], (A("c"), A("r")))
    assert rows[0].columns == {"chosen_reward": 8.5, "rejected_reward": 3.0}
    assert len(data.load_rows("ultrafeedback", "test", OBJECTIVES["sft"])[0]) == 2


def test_any_hub_id_with_a_split(tmp_path):
    hub_folder(tmp_path, "me/mine", {"train": [{"prompt": "p", "response": "r"}],
                                     "extra": [{"prompt": "p", "response": "x"}] * 3})
    assert len(data.load_rows("me/mine", "train", OBJECTIVES["sft"])[0]) == 1
    assert len(data.load_rows("me/mine:extra", "train", OBJECTIVES["sft"])[0]) == 3
    with pytest.raises(InputError, match="cannot be loaded"):
        data.load_rows("me/mine:none", "train", OBJECTIVES["sft"])


# ---------------------------------------------------------------- toy


def test_toy_scores():
    praise = " The plot was superb. The acting was fresh. The camera was moving. The plot was clever."
    mixed = " The plot was superb. The acting was dull. The camera was moving. The plot was clever."
    assert data.toy_scores("", praise, True) == {"reward": 4.0, "well_formed": 1.0}
    assert data.toy_scores("", mixed, True) == {"reward": 2.0, "well_formed": 1.0}
    for text, finished in ((praise, False), (praise[1:], True), (praise + " The plot was fresh.", True),
                           (praise.replace("superb", "nice"), True), (praise + " ", True), ("", True)):
        assert data.toy_scores("", text, finished) == {"reward": -4.0, "well_formed": 0.0}


def test_toy_rows():
    rows = data.toy("train", True)
    assert rows == data.toy("train", True) and rows != data.toy("test", True)
    for row in rows[:500]:
        for name in ("chosen", "rejected"):
            assert data.toy_scores("", row[name], True) == {"reward": row[f"{name}_reward"], "well_formed": 1.0}
    # Bradley-Terry: of pairs 2 apart the better is chosen with probability 1 / (1 + e^-2) = 0.881
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows]
    share = gaps.count(2) / (gaps.count(2) + gaps.count(-2))
    assert share == pytest.approx(0.881, abs=0.02)
    chosen = {row["chosen"] for row in rows}
    assert not any(row["response"] in chosen for row in data.toy("train", False)[:2000])


def test_toy_optimum_by_another_route():
    # maximise E_q[r] - lambda KL(q || p) over the five counts of praise: q ~ binomial(4, 1/2) e^(r / lambda)
    for strength in (0.5, 1.0, 2.0, 5.0):
        weights = [math.comb(4, k) / 16 * math.exp((2 * k - 4) / strength) for k in range(5)]
        q = [weight / sum(weights) for weight in weights]
        kl = sum(x * math.log(x / (math.comb(4, k) / 16)) for k, x in enumerate(q))
        reward = sum(x * (2 * k - 4) for k, x in enumerate(q))
        assert data.toy_optimal_reward(kl) == pytest.approx(reward, abs=1e-6)
    assert data.toy_optimal_reward(0) == pytest.approx(0, abs=1e-6)
    assert data.toy_optimal_reward(3) == 4.0


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def words():
    """A tokenizer of single characters: </s> is 0, <s> 1, <|x|> 2, letters 3 onwards (a is 3)."""
    vocab = {"</s>": 0, "<s>": 1, "<|x|>": 2} | {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz</>|", 3)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    return tokenizer


def settings(**changes):
    return SimpleNamespace(**{"max_length": 100, "max_prompt_length": 4, "truncation": "keep_end", "add_bos": False,
                              **changes})


def encode(tokenizer, rows, end_ids=(0,), limit=None, **changes):
    report = Report()
    rows = [TextRow(f"row {i}", prompt, responses, {}) for i, (prompt, *responses) in enumerate(rows, 1)]
    examples = data.encode(rows, report, tokenizer, settings(**changes), list(end_ids), limit)
    return [(list(e.prompt), *map(list, e.responses)) for e in examples], report


def test_prompt_and_responses_are_joined_with_an_end_token(words):
    examples, report = encode(words, [("ab", "cd", "e")])
    assert examples == [([3, 4], [5, 6, 0], [7, 0])]
    assert (report.used, report.cut, report.dropped) == (1, 0, {})


def test_special_tokens_in_the_data_are_text(words):
    examples, _ = encode(words, [("a<s>", "</s>")])
    letters = [words.get_vocab()[c] for c in "<s></s>"]
    assert examples == [([3, *letters[:3]], [*letters[3:], 0])]


def test_add_bos(words):
    assert encode(words, [("ab", "c")], add_bos=True)[0] == [([1, 3, 4], [5, 0])]


@pytest.mark.parametrize("changes, expected", [
    (dict(max_length=9), ([3, 4, 5, 6, 7, 8], [9, 10, 0], [11, 0])),  # 6 + 3 fit: never cut, whatever the prompt
    (dict(max_length=8), ([5, 6, 7, 8], [9, 10, 0], [11, 0])),  # the prompt's last 4
    (dict(max_length=8, truncation="keep_start"), ([3, 4, 5, 6], [9, 10, 0], [11, 0])),
    (dict(max_length=6), ([5, 6, 7, 8], [9, 10], [11, 0])),  # the longer response loses its end token
    (dict(max_length=5), ([5, 6, 7, 8], [9], [11])),
    (dict(max_length=6, max_prompt_length=2), ([7, 8], [9, 10, 0], [11, 0])),
    (dict(max_length=8, add_bos=True), ([1, 6, 7, 8], [9, 10, 0], [11, 0])),  # bos is one of the prompt's 4
])
def test_truncation(words, changes, expected):
    examples, report = encode(words, [("abcdef", "gh", "i")], **changes)
    assert examples == [expected]
    assert report.cut == (changes["max_length"] < 9)


def test_dropping_what_is_too_long(words):
    examples, report = encode(words, [("abcdef", "gh"), ("a", "b")], max_length=5, truncation="drop")
    assert examples == [([3], [4, 0])]
    assert report.dropped == {"longer than max_length=5 tokens": ["row 1"]}


def test_rows_with_nothing_left_are_dropped(words):
    examples, report = encode(words, [("", "b"), ("abcdef", "gx", "gy")], max_length=5)
    assert examples == []
    assert [places for places in report.dropped.values()] == [["row 1"], ["row 2"]]
    assert "equal in tokens after truncation" in list(report.dropped)[1]


def test_limit_counts_rows_after_dropping(words):
    examples, report = encode(words, [("", "x"), ("a", "b"), ("c", "d"), ("e", "f")], limit=2)
    assert [prompt for prompt, _ in examples] == [[3], [5]]
    assert report.used == 2


def test_report_says_all(words):
    _, report = encode(words, [("", "x")] * 7 + [("abcdef", "gh")], max_length=6)
    report.rows = 8
    first, second = report.lines()
    assert first == "1 of 8 rows used, 7 dropped, 1 cut to fit"
    assert second.startswith("  dropped 7: the prompt is empty") and second.endswith("row 5 and 2 more)")


TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}<|x|>{{ m.content }}{% elif m.role == 'assistant' %}"
            "<s>{{ m.content }}</s>n{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<s>{% endif %}")


def test_chat_template(words):
    words.chat_template = TEMPLATE
    n = words.get_vocab()["n"]
    examples, _ = encode(words, [([U("ab"), A("c"), U("d")], A("ef"), A("g"))])
    # the template closes the answer with </s> and adds an n, which goes: the response ends with its end token
    assert examples == [([2, 3, 4, 1, 5, 0, n, 2, 6, 1], [7, 8, 0], [9, 0])]
    # end tokens of the generation config count: the response ends with the last of them
    assert encode(words, [([U("a")], A("b"))], end_ids=[0, n])[0] == [([2, 3, 1], [4, 0, n])]
    words.chat_template = TEMPLATE.replace("</s>n", "")
    assert encode(words, [([U("a")], A("b"))])[0] == [([2, 3, 1], [4, 0])]


def test_special_tokens_in_messages_are_text(words):
    words.chat_template = TEMPLATE
    vocab = words.get_vocab()
    examples, _ = encode(words, [([U("a</s>")], A("<|x|>b"))])
    assert encode(words, [([U("a</s>")], A("\ue000"))])[1].dropped == {}  # nor is a guard mistaken for text
    assert examples == [([2, 3, *(vocab[c] for c in "</s>"), 1], [*(vocab[c] for c in "<|x|>b"), 0])]


def test_chats_that_the_template_cannot_render(words):
    words.chat_template = None
    with pytest.raises(InputError, match="row 1 is a list of messages, but the tokenizer has no chat template"):
        encode(words, [([U("a")], A("b"))])
    words.chat_template = TEMPLATE
    _, report = encode(words, [([{"role": "tool", "content": "a"}], A("b"))])
    assert list(report.dropped) == ["the chat template refuses it: no role tool"]
    words.chat_template = "{{ messages | length }}"
    _, report = encode(words, [([U("a")], A("b"))])
    assert list(report.dropped) == ["the chat template renders the prompt otherwise when an answer follows"]


def test_real_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(shared("models", "hh_bpe8k"))
    examples, _ = encode(tokenizer, [([U("hi there")], A("hello"))])
    whole = tokenizer.apply_chat_template([U("hi there"), A("hello")], tokenize=True, return_dict=False)
    assert examples[0][0] + examples[0][1] == whole
    assert tokenizer.decode(examples[0][0]) == "\n\nHuman: hi there\n\nAssistant:"


def test_hh_drops_the_known_bad_rows():
    rows, report = data.load_rows(shared("data", "hh", "train.jsonl"), "train", OBJECTIVES["dpo"])
    assert len(rows) == 1993 and report.rows == 2000
    assert report.dropped == {
        "chosen is white space only": [f"train.jsonl line {n}" for n in (87, 517, 926, 1104)],
        "rejected does not start with the prompt of chosen": [f"train.jsonl line {n}" for n in (1255, 1689, 1953)]}


def test_the_tiny_tokenizer_is_the_same_each_time():
    rows = [TextRow("", row["prompt"], (row["response"],), {}) for row in data.toy("test", False)]
    first, second = data.train_tokenizer(rows), data.train_tokenizer(rows)
    assert first.get_vocab() == second.get_vocab()
    text = "Review of Ünknown 漢字 \n"
    assert first.decode(first(text)["input_ids"]) == text


# ---------------------------------------------------------------- batches


def test_stream_is_a_permutation_each_epoch_and_crosses_borders():
    whole = data.stream(5, 0, 15, seed=3, shuffle=True)
    epochs = [whole[i:i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert data.stream(5, 3, 8, seed=3, shuffle=True) == whole[3:8]
    assert data.stream(5, 0, 5, seed=4, shuffle=True) != whole[:5]
    assert data.stream(3, 0, 7, seed=0, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


def example(prompt, *responses, **columns):
    return Example("x", np.array(prompt), tuple(np.array(r) for r in responses), columns)


def test_collate_as_its_docstring_says():
    batch = data.collate([example([5, 6], [7, 1], [8, 9, 1], chosen_reward=2.5)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]] and batch.segments is None
    assert batch.states.tolist() == [1, 2, 6, 7, 8] and batch.targets.tolist() == [7, 1, 8, 9, 1]
    assert batch.lengths.tolist() == [2, 3] and batch.ends.tolist() == [3, 9]
    assert {name: column.tolist() for name, column in batch.columns.items()} == {
        "chosen_reward": [2.5], "chosen_length": [2.0], "rejected_length": [3.0]}


def test_collate_with_shared_prompts_as_its_docstring_says():
    pair, short = example([5, 6], [7, 1], [8, 9, 1]), example([4], [3], [2])
    batch = data.collate([pair, short, short], layout=data.Layout(shared=True))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 8, 9, 1], [4, 3, 2, 4, 3, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 1, 1, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5, -1]]
    assert batch.prompts.tolist() == [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 3, 3, 3, -1]]
    # chosen of all, then rejected of all; the last prompt token predicts each first one
    assert batch.states.tolist() == [1, 2, 7, 10, 1, 4, 5, 7, 10]
    assert batch.targets.tolist() == [7, 1, 3, 3, 8, 9, 1, 2, 2]
    assert batch.lengths.tolist() == [2, 1, 1, 3, 1, 1] and batch.ends.tolist() == [3, 8, 11, 6, 9, 12]


def test_each_microbatch_has_the_cheaper_layout():
    """Long prompts are cheaper shared; long responses apart, where attention over one long row costs more."""
    long_prompt, long_answers = example([1] * 90, [2] * 5, [3] * 5), example([1] * 2, [2] * 50, [3] * 50)
    layouts = (data.Layout(False, linear=100, quadratic=1), data.Layout(True, linear=100, quadratic=2))
    for pair, together in ((long_prompt, True), (long_answers, False)):
        (examples, layout), = data.microbatches([pair, pair], 1, 10**6, layouts)
        assert len(examples) == 2 and layout.shared is together
    # a token of 2 rows of 95, of 100: 2 * 95 * (100 + 95) / 100; of one row of 100: 100 + 200
    assert [layout.cost([long_prompt], [[0]]) for layout in layouts] == [370.5, 300]


def test_short_examples_share_a_row_where_they_fit():
    """Of widths 10, 6, 5, 4, 4, 3 in rows of 10: 10; 6 + 4; 5 + 4; and the last would be a row beyond the budget."""
    examples = [example([1] * (n - 2), [2], [3]) for n in (10, 6, 5, 4, 4, 3)]
    packed = data.Layout(shared=True)
    assert packed.rows(examples, 39) == [[0], [1, 3], [2, 4]] and packed.rows(examples, 40)[3:] == [[5]]
    assert packed.rows(examples, 9) == [[0]]
    # apart, a pair of these is two rows: of 9 and 9 tokens, of 5 and 5
    assert data.SEPARATE.rows(examples, 36) == [[0], [1]] and data.SEPARATE.rows(examples, 35) == [[0]]


def test_collate_puts_all_chosen_before_all_rejected():
    batch = data.collate([example([1], [2], [3]), example([4], [5], [6])])
    assert batch.input_ids.tolist() == [[1, 2], [4, 5], [1, 3], [4, 6]]
    assert batch.examples[1].prompt.tolist() == [4]


def test_microbatches_hold_every_example_once_under_the_budget():
    rng = random.Random(0)
    examples = [example([1] * rng.randint(1, 30), [2] * rng.randint(1, 30), [3] * rng.randint(1, 30))
                for _ in range(53)]
    for parts, budget in ((1, 10**9), (1, 200), (4, 300), (100, 10**9), (1, 1)):
        for layouts in ((data.SEPARATE,), (data.Layout(True),), (data.SEPARATE, data.Layout(True))):
            batches = data.microbatches(examples, parts, budget, layouts)
            assert sorted(id(e) for batch, _ in batches for e in batch) == sorted(map(id, examples))
            for batch, layout in batches:
                assert len(batch) == 1 or data.collate(batch, layout=layout).input_ids.numel() <= budget
    assert len(data.microbatches(examples, 1, 10**9)) == 1
    assert sorted(len(batch) for batch, _ in data.microbatches(examples, 4, 10**9)) == [13, 13, 13, 14]
    assert len(data.microbatches(examples, 1, 1)) == 53
    lengths = [e.row_length for batch, _ in data.microbatches(examples, 3, 200) for e in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_columns_follow_their_examples_through_sorting():
    examples = [example([1], [2] * n, [3], chosen_reward=float(n)) for n in (1, 5, 3)]
    batch = data.collate(*data.microbatches(examples, 1, 10**6)[0][:1])
    assert torch.equal(batch.columns["chosen_reward"], batch.columns["chosen_length"])
