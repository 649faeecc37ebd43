"""Rows of every shape to exact text and tokens; the named datasets, in the hub's own schema."""

import math
import os
from types import SimpleNamespace

import datasets
import pytest
from conftest import DATA, FEW_ROWS, config_of, losses_of, numbers, shared, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import Dropped, TextRow, read_row
from engine import InputError
from engine.report import Report
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
    # a list that begins with the prompt is the whole conversation
    ({"prompt": "q", "chosen": [U("q "), A("b"), U("x"), A("c")],
      "rejected": [U("q "), A("b"), U("x"), A("r")]}, ([U("q "), A("b"), U("x")], (A("c"), A("r")))),
    # one that begins with the assistant continues it
    ({"prompt": "q", "chosen": [A("b"), U("x"), A("c")], "rejected": [A("b"), U("x"), A("r")]},
     ([U("q"), A("b"), U("x")], (A("c"), A("r")))),
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
    ({"chosen": "no marker", "rejected": "none"}, True,
     "chosen has no '\\n\\nAssistant:', where the prompt would end, and no column prompt stands beside it in "
     "chosen, rejected"),
    ({"prompt": "else", "chosen": [U("q"), A("c")], "rejected": [U("q"), A("r")]}, True,
     "chosen neither continues its prompt nor begins with it"),
    ({"prompt": "p", "chosen": " \n", "rejected": "r"}, True, "chosen is white space only"),
    ({"prompt": "p", "chosen": "c", "rejected": "\t"}, True, "rejected is white space only"),
    ({"prompt": "p", "chosen": "c", "rejected": "c"}, True, "chosen and rejected are equal"),
    ({"prompt": "p", "response": ""}, False, "response is white space only"),
    ({"messages": [U("q"), U("q")]}, False, "the last message of messages is by user, not by the assistant"),
    ({"messages": [A("q")]}, False, "the conversation has nothing before its answer"),
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
    (3, False, (), "f.jsonl line 3 is int, not an object"),
    ({"prompt": "p", "chosen": "c"}, True, (),
     "has values in the columns prompt, chosen; this objective needs prompt, chosen, rejected; or chosen, "),
    ({"prompt": "p", "chosen": 3, "rejected": "r"}, True, (), "column chosen is 3"),
    ({"prompt": "p", "chosen": "c", "rejected": [A("r")]}, True, (), "both be text or both be lists"),
    ({"messages": [{"role": "user"}]}, False, (),
     'column messages has {"role": "user"}; a message has text for role and content'),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, True, ["chosen_reward"],
     "needs a column chosen_reward (or score_chosen)"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": "high"}, True, ["chosen_reward"],
     "column chosen_reward is 'high'; it must be a finite number"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": math.nan}, True, ["chosen_reward"],
     "column chosen_reward is nan; it must be a finite number"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": True}, True, ["chosen_reward"],
     "column chosen_reward is True; it must be a finite number"),
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
    ({"attributes": {"tone": "dry"}},
     "a.jsonl line 1 has no quality among its columns or in its column attributes, which prompt_template "),
    ({}, "among its columns or in its column attributes, which prompt_template needs: add it, or change"),
    ({"attributes": [4]}, "a.jsonl line 1: column attributes is [4]; it must map names to values"),
    ({"attributes": {"quality": [1, 2]}},
     "a.jsonl line 1: quality is [1, 2]; for prompt_template it must be text or a number"),
    ({"attributes": {"quality": 1, "prompt": "x"}}, 'a.jsonl line 1: prompt is "x"; for prompt_template it'),
])
def test_attributes_that_do_not_fit(row, said):
    with pytest.raises(InputError) as caught:
        with_attributes(row)
    assert said in str(caught.value)


def test_no_attributes_and_a_mistyped_one():
    with pytest.raises(InputError, match="a.jsonl line 1 has no attributes among its columns or in its"):
        with_attributes({}, "{prompt} {attributes}")
    with pytest.raises(InputError, match="sample_attributes.qualty is no attribute of a.jsonl line 1, which "
                                         "has quality"):
        with_attributes({"attributes": {"quality": 1}}, "{prompt} {attributes}", qualty=4)


def test_attributes_without_a_template_are_reported():
    rows, report = with_attributes({"attributes": {"quality": 4}}, None)
    assert rows[0].prompt == "p"
    assert "  1 rows have a column attributes, which is not read" in list(report.lines())


def test_attributes_are_part_of_the_fingerprint():
    prints = {with_attributes({"attributes": {"quality": q}})[1].digest.hexdigest()
              for q in (1, 2, 2)}
    assert len(prints) == 2


# ---------------------------------------------------------------- rewards


def test_pairs_may_lack_rewards_where_a_reward_model_will_fill_them():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1}
    names = ("margin", "chosen_reward", "rejected_reward")
    assert read_row(row, "x", True, names, may_lack_rewards=True).columns == {
        "margin": 1.0, "chosen_reward": None, "rejected_reward": None}
    for changes, allowed in (({}, False), ({"score_chosen": 2}, True), ({"margin": None}, True)):
        with pytest.raises(InputError, match="x: the objective needs a column"):
            read_row(row | changes, "x", True, names, may_lack_rewards=allowed)


def test_default_rewards(run, refused, capsys):
    """For pairs that bring none, as if they stood there; half a pair is still refused."""
    bare = [{"prompt": f"p {i}", "chosen": "yes", "rejected": "no"} for i in range(8)]
    write_lines("bare.jsonl", bare)
    write_lines("rated.jsonl", [row | {"chosen_reward": 2.5, "rejected_reward": 1} for row in bare])
    settings = ["loss=rpo", "eval_data=null", "batch_size=4", "max_steps=2", "num_epochs=9", "num_samples=0"]
    run("data=bare.jsonl", *settings, "rpo.default_rewards=[2.5,1]", "run_dir=a")
    assert "8 rows bring no rewards" in capsys.readouterr().out
    run("data=rated.jsonl", *settings, "rpo.default_rewards=[7,0]", "run_dir=b")
    assert numbers("a") == numbers("b") and losses_of("a")[0] > 0.1
    assert "rpo.default_rewards= gives both" in refused("data=bare.jsonl", *settings, "run_dir=c")
    write_lines("bare.jsonl", [row | {"chosen_reward": 1} for row in bare])
    assert "needs a column rejected_reward" in refused("data=bare.jsonl", *settings, "run_dir=c",
                                                       "rpo.default_rewards=[1,0]")
    for wrong in (["rpo.default_rewards=[1]"], ["rpo.default_rewards=[1,0]", "reward_model=tiny"]):
        assert "must be two numbers" in refused("data=bare.jsonl", *settings, *wrong)


def test_reward_columns_and_their_aliases():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": 2, "score_rejected": "-0.5"}
    columns = read_row(row, "x", True, ["chosen_reward", "rejected_reward"]).columns
    assert columns == {"chosen_reward": 2.0, "rejected_reward": -0.5}


# ---------------------------------------------------------------- the hub's datasets, in the hub's schema


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, {split: rows}) puts files where load_dataset(name) finds them: in a folder of that name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make_folder(name, splits):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return make_folder


def test_hh(hub):
    def rows(word):
        return [{"chosen": f"\n\nHuman: q\n\nAssistant: {word}", "rejected": "\n\nHuman: q\n\nAssistant: r"}]
    hub("Anthropic/hh-rlhf", {"train": rows("good"), "test": rows("held")})
    for split, word in (("train", " good"), ("test", " held")):
        rows_read, _ = data.load_rows("hh", split, OBJECTIVES["dpo"])
        assert [(row.prompt, row.responses) for row in rows_read] == [
            ("\n\nHuman: q\n\nAssistant:", (word, " r"))]
        assert rows_read[0].where == "hh row 1"


def test_shp(hub):
    def row(history, a, b, score_a, score_b, label):
        return {"history": history, "human_ref_A": a, "human_ref_B": b, "score_A": score_a,
                "score_B": score_b, "labels": label}
    hub("stanfordnlp/SHP", {"train": [
        row("q1", "a", "b", 10, 5, 1),   # ratio 2: kept, A preferred
        row("q1", "c", "b", 4, 20, 0),   # B preferred
        row("q2", "x", "y", 10, 6, 1)]})  # ratio below 2: left out
    rows, _ = data.load_rows("shp", "train", OBJECTIVES["dpo"])
    assert {row.prompt for row in rows} == {"\n\nHuman: q1\n\nAssistant:"}
    assert [row.responses for row in rows] == [(" a", " b"), (" b", " c")]
    rows, _ = data.load_rows("shp", "train", OBJECTIVES["sft"])
    assert [row.responses for row in rows] == [(" b",)]  # the best-scored answer, 20, of each post


def test_stack_exchange(hub):
    rows = [{"question": f"<p>Why {i}?</p>", "answers": [
        {"text": "<p>Low</p>", "pm_score": 1},
        {"text": "<p>Use <code>a &lt; b</code></p><pre>x</pre>", "pm_score": 5},
        {"text": "<p>Also low</p>", "pm_score": 1}]} for i in range(200)]
    hub("HuggingFaceH4/stack-exchange-preferences", {"train": rows})
    train_rows, _ = data.load_rows("se", "train", OBJECTIVES["dpo"])
    test_rows, _ = data.load_rows("se", "test", OBJECTIVES["dpo"])
    assert len(train_rows) == 198 * 2 and len(test_rows) == 2 * 2  # 1% held out; the tie is no pair
    assert {row.prompt for row in train_rows}.isdisjoint(row.prompt for row in test_rows)
    assert {row.responses for row in train_rows} == {
        (" Use a < b\n\nx", " Low"), (" Use a < b\n\nx", " Also low")}
    order = datasets.Dataset.from_list(rows).shuffle(seed=42)["question"][:2]
    assert {row.prompt for row in test_rows} == {f"\n\nHuman: {q[3:-4]}\n\nAssistant:" for q in order}
    sft_rows, _ = data.load_rows("se", "test", OBJECTIVES["sft"])
    assert [row.responses for row in sft_rows] == [(" Use a < b\n\nx",)] * 2


def test_ultrafeedback_with_its_scores(hub):
    row = {"prompt": "q", "prompt_id": "0", "chosen": [U("q"), A("c")], "rejected": [U("q"), A("r")],
           "messages": [U("q"), A("c")], "score_chosen": 8.5, "score_rejected": 3.0}
    hub("HuggingFaceH4/ultrafeedback_binarized", {"train_prefs": [row], "test_prefs": [row] * 2})
    rows, _ = data.load_rows("ultrafeedback", "train", OBJECTIVES["rpo"])
    assert (rows[0].prompt, rows[0].responses) == ([U("q")], (A("c"), A("r")))
    assert rows[0].columns == {"chosen_reward": 8.5, "rejected_reward": 3.0}
    assert len(data.load_rows("ultrafeedback", "test", OBJECTIVES["sft"])[0]) == 2


def test_any_hub_id_with_a_split(hub):
    row = {"prompt": "p", "response": "r"}
    hub("me/mine", {"train": [row], "extra": [row] * 3})
    assert len(data.load_rows("me/mine", "train", OBJECTIVES["sft"])[0]) == 1
    rows, _ = data.load_rows("me/mine:extra", "train", OBJECTIVES["sft"])
    assert [row.where for row in rows] == [f"me/mine:extra row {n}" for n in (1, 2, 3)]
    with pytest.raises(InputError, match="dataset me/mine, config None, split none cannot be loaded"):
        data.load_rows("me/mine:none", "train", OBJECTIVES["sft"])


HH_REASONS = ("chosen is white space only", "rejected does not start with the prompt of chosen")


def test_bad_rows_of_hh_are_dropped():
    rows, report = data.load_rows(os.path.join(DATA, "hh.jsonl"), "train", OBJECTIVES["dpo"])
    assert len(rows) == 57 and report.rows == 64
    assert report.dropped == dict(zip(HH_REASONS, (
        [f"hh.jsonl line {n}" for n in (2, 14, 25, 32)], [f"hh.jsonl line {n}" for n in (37, 55, 64)])))
    for row in rows:
        assert row.prompt.startswith("\n\nHuman:") and row.prompt.endswith("\n\nAssistant:")
        assert row.responses[0] != row.responses[1]


def test_bad_rows_of_all_hh_are_dropped():
    rows, report = data.load_rows(shared("data", "hh", "train.jsonl"), "train", OBJECTIVES["dpo"])
    assert len(rows) == 1993 and report.rows == 2000
    assert report.dropped == dict(zip(HH_REASONS, (
        [f"train.jsonl line {n}" for n in (87, 517, 926, 1104)],
        [f"train.jsonl line {n}" for n in (1255, 1689, 1953)])))


# ---------------------------------------------------------------- what a run reads


def test_what_is_evaluated_and_what_is_sampled_are_the_first_held_out_rows():
    def load(*arguments):
        config = config_of(f"data={FEW_ROWS}", *arguments)
        return data.load_data(config, OBJECTIVES[config.loss])

    held_out = [f"few.jsonl line {n}" for n in range(1, 6)]
    few = load(f"eval_data={FEW_ROWS}", "num_eval_examples=3", "num_samples=5", "loss=dpo")
    assert len(few.train_examples) == 400 and few.judge is None
    assert [x.where for x in few.eval_examples] == held_out[:3]
    assert [x.where for x in few.sample_examples] == held_out
    assert list(few.reports["eval data"].lines()) == [
        "3 of 400 rows used, 0 dropped, 0 cut to fit, 397 beyond what was asked for"]
    assert list(few.reports["samples"].lines()) == [
        "5 of 400 prompts used, 0 dropped, 0 cut to fit, 395 beyond what was asked for"]
    # toy's true rewards are known, so more are sampled (16 here, see conftest) than are shown
    toy = load("eval_data=toy", "num_eval_examples=3", "num_samples=5")
    assert (len(toy.eval_examples), len(toy.sample_examples)) == (3, 16) and toy.judge.scores
    # they are not where other rows are mixed in; and a reward model writes nothing
    assert load(f"eval_data=[toy,{FEW_ROWS}]").judge is None
    judge = load(f"eval_data={FEW_ROWS}", "num_eval_examples=null", "loss=rm")
    assert (len(judge.eval_examples), judge.sample_examples) == (400, [])


# ---------------------------------------------------------------- tokens


@pytest.fixture
def words():
    """A tokenizer of single characters: </s> is 0, <s> 1, <|x|> 2, letters 3 onwards (a is 3)."""
    vocab = {"</s>": 0, "<s>": 1, "<|x|>": 2}
    vocab |= {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz</>|\ue000", 3)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    return tokenizer


def settings(**changes):
    return SimpleNamespace(**{"max_length": 100, "max_prompt_length": 4, "truncation": "keep_end",
                              "add_bos": False, "chat_template_kwargs": {}, "content_tokens": None,
                              **changes})


def encode(tokenizer, rows, end_ids=(0,), limit=None, **changes):
    report = Report()
    rows = [TextRow(f"row {i}", prompt, responses, {}) for i, (prompt, *responses) in enumerate(rows, 1)]
    encoder = data.Encoder(tokenizer, settings(**changes), list(end_ids), "2026-11-25")
    examples = encoder.examples(rows, report, limit=limit)
    return [(list(e.prompt), *map(list, e.responses)) for e in examples], report


def test_prompt_and_responses_are_joined_with_an_end_token(words):
    examples, report = encode(words, [("ab", "cd", "e")])
    assert examples == [([3, 4], [5, 6, 0], [7, 0])]
    assert (report.used, report.cut, report.dropped) == (1, 0, {})


def test_special_tokens_in_plain_text_are_tokens(words):
    """And an end token at a response's end is its end token."""
    examples, report = encode(words, [("a<s>", "b</s>", "c"), ("a", "b")])
    assert examples == [([3, 1], [4, 0], [5, 0]), ([3], [4, 0])]
    assert report.notes == {"hold special tokens in plain text, which are read as tokens": 1}


def test_add_bos(words):
    assert encode(words, [("ab", "c")], add_bos=True)[0] == [([1, 3, 4], [5, 0])]


@pytest.mark.parametrize("changes, expected", [
    ({"max_length": 9}, ([3, 4, 5, 6, 7, 8], [9, 10, 0], [11, 0])),  # 6 + 3 fit: not cut, whatever the prompt
    ({"max_length": 8}, ([5, 6, 7, 8], [9, 10, 0], [11, 0])),  # the prompt's last 4
    ({"max_length": 8, "truncation": "keep_start"}, ([3, 4, 5, 6], [9, 10, 0], [11, 0])),
    ({"max_length": 6}, ([5, 6, 7, 8], [9, 10], [11, 0])),  # the longer response loses its end token
    ({"max_length": 5}, ([5, 6, 7, 8], [9], [11])),
    ({"max_length": 6, "max_prompt_length": 2}, ([7, 8], [9, 10, 0], [11, 0])),
    ({"max_length": 8, "add_bos": True}, ([1, 6, 7, 8], [9, 10, 0], [11, 0])),  # bos is one of the prompt's 4
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
    assert report.dropped == {
        "the prompt is empty, so nothing predicts the first token (add_bos=true does)": ["row 1"],
        "the two responses are equal in tokens after truncation": ["row 2"]}
    assert encode(words, [("", "b")], add_bos=True)[0] == [([1], [4, 0])]


def test_limit_counts_rows_after_dropping(words):
    examples, report = encode(words, [("", "x"), ("a", "b"), ("c", "d"), ("e", "f")], limit=2)
    assert [prompt for prompt, _ in examples] == [[3], [5]]
    assert report.used == 2


# ---------------------------------------------------------------- chats

CHAT = ("{% for m in messages %}{% if m.role == 'user' %}<|x|>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<s>{{ m.content }}</s>n{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}")


def test_chat_template(words):
    words.chat_template = CHAT
    n = words.get_vocab()["n"]
    examples, _ = encode(words, [([U("ab"), A("c"), U("d")], A("ef"), A("g"))])
    # the template closes the answer with </s> and adds an n, which goes: the response ends with its end token
    assert examples == [([2, 3, 4, 1, 5, 0, n, 2, 6, 1], [7, 8, 0], [9, 0])]
    words.chat_template = CHAT.replace("</s>n", "")
    examples, report = encode(words, [([U("a")], A("b"))])
    assert examples == [([2, 3, 1], [4, 0])]
    assert list(report.lines())[1:] == [
        "  1 rows have answers without an end token of the template's; one is put after the last"]
    # end tokens of the generation config count: the response ends with the first of them
    for written, first in (("</s>n", 0), ("n</s>", n)):
        words.chat_template = CHAT.replace("</s>n", written)
        assert encode(words, [([U("a")], A("b"))], end_ids=[0, n])[0] == [([2, 3, 1], [4, first])]


def test_special_tokens_in_messages_are_text(words):
    words.chat_template = CHAT
    vocab = words.get_vocab()
    examples, _ = encode(words, [([U("a</s>")], A("<|x|>b"))])
    assert examples == [([2, 3, *(vocab[c] for c in "</s>"), 1], [*(vocab[c] for c in "<|x|>b"), 0])]
    # nor is a character of private use anything else
    assert encode(words, [([U("a</s>\ue000")], A("b\ue000"))])[0] == [
        ([2, 3, *(vocab[c] for c in "</s>\ue000"), 1], [4, vocab["\ue000"], 0])]


def test_chats_that_the_template_cannot_render(words):
    words.chat_template = None
    with pytest.raises(InputError, match="lists of messages, but the tokenizer has no chat template"):
        encode(words, [([U("a")], A("b"))])
    words.chat_template = CHAT
    _, report = encode(words, [([{"role": "tool", "content": "a"}], A("b"))])
    assert list(report.dropped) == ["the chat template refuses it: no role tool"]
    words.chat_template = "{{ messages | length }}"
    _, report = encode(words, [([U("a")], A("b"))])
    assert list(report.dropped) == ["the chat template leaves out a turn, by user"]


def test_chat_template_of_a_real_tokenizer():
    """Prompt and answer together are the ids that transformers gives the whole chat."""
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(DATA, "stories260K"))
    tokenizer.chat_template = ("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
                               "{% if add_generation_prompt %}<s>{% endif %}")
    chat = [U("Hi there, où?"), A("Once upon a time.")]
    examples, _ = encode(tokenizer, [(chat[:1], chat[1])], end_ids=[2])
    prompt, answer = examples[0]
    assert prompt + answer == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert (prompt[0], prompt[-2:], answer[-1], len(answer) > 3) == (1, [2, 1], 2, True)
    # the end token's text in a message is not that token
    examples, _ = encode(tokenizer, [([U("Hi</s>there")], A("Once"))], end_ids=[2])
    prompt, answer = examples[0]
    assert prompt.count(2) == 1
    assert "".join(tokenizer.convert_ids_to_tokens(prompt)) == "<s>▁Hi</s>there</s><s>"


def test_a_chat_template_that_comes_with_a_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(shared("models", "hh_bpe8k"))
    examples, _ = encode(tokenizer, [([U("hi there")], A("hello"))])
    whole = tokenizer.apply_chat_template([U("hi there"), A("hello")], tokenize=True, return_dict=False)
    assert examples[0][0] + examples[0][1] == whole
    assert tokenizer.decode(examples[0][0]) == "\n\nHuman: hi there\n\nAssistant:"
