"""Rows of lists, labels, borrowed answers, and weights of one's own: from columns to tokens that count."""

import math

import numpy as np
import pytest
import torch
from conftest import (TINY_RUN, config_of, losses_of, make_trainer, obvious_logp, read_lines,
                      save_random_judge, write_lines)
from test_tokens import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import losses
from data import Dropped, Encoder, read_row
from engine import InputError
from engine.batches import collate
from engine.cache import fill_in_rewards
from engine.report import Report
from engine.toy import toy
from losses import Objective

U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
EXACT = ["dtype=float64", "compute_dtype=float64"]


@pytest.fixture
def dpo_is(monkeypatch):
    """dpo_is(loss, ...) puts another row in dpo's place."""
    def put(loss, **fields):
        fields = {"needs_pairs": False, "needs_reference": False} | fields
        monkeypatch.setitem(losses.OBJECTIVES, "dpo", Objective(loss, **fields))
    return put


def read(row, *columns, **options):
    return read_row(row, "x row 1", False, columns, lists=True, **options)


def said_of(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- lists


def test_responses_are_texts_or_messages():
    row = read({"prompt": "p", "responses": ["a", "b", "c"]})
    assert (row.prompt, row.responses, row.columns, row.weights) == ("p", ("a", "b", "c"), {}, None)
    row = read({"prompt": "p", "responses": [[A("a")], [A("b")]]})
    assert (row.prompt, row.responses) == ([U("p")], (A("a"), A("b")))
    row = read({"prompt": [U("p")], "responses": [A("a"), A("b"), A("c")]})
    assert (row.prompt, row.responses) == ([U("p")], (A("a"), A("b"), A("c")))
    whole = [[U("p"), A("x"), U("q"), A(text)] for text in "ab"]
    assert read({"prompt": "p", "responses": whole}).responses == (A("a"), A("b"))


def test_columns_of_lists():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, "3", 1.5], "scores": [0, -1, 4],
           "label": [True, "false", 1]}
    assert read(row, "ranks", "rewards", "label").columns == {
        "ranks": [2.0, 3.0, 1.5], "rewards": [0.0, -1.0, 4.0], "label": [1.0, 0.0, 1.0]}
    assert read(row | {"rewards": [7, 8, 9]}, "rewards").columns == {"rewards": [7.0, 8.0, 9.0]}
    assert read(row | {"ranks": 3}, "ranks").columns == {"ranks": 3.0}
    for ranks, said in (
            ([1, 2], "x row 1: column ranks has 2 numbers for 3 responses"),
            ([1, 2, 3, 4], "x row 1: column ranks has 4 numbers for 3 responses"),
            ([1, None, 3], "x row 1: column ranks is None; it must be a finite number"),
            ([1, math.nan, 3], "x row 1: column ranks is nan; it must be a finite number"),
            (None, "x row 1: the objective needs a column ranks, a number")):
        assert said in said_of(InputError, read, row | {"ranks": ranks}, "ranks")
    assert "column rewards is True" in said_of(InputError, read, row | {"scores": [True, 1, 0]}, "rewards")
    bare = {"prompt": "p", "responses": ["a", "b"]}
    assert "rewards (or scores), a number (where a row has no reward, reward_model= gives all)" in said_of(
        InputError, read, bare, "rewards")
    assert read(bare, "rewards", may_lack_rewards=True).columns == {"rewards": None}


@pytest.mark.parametrize("responses, error, said", [
    (["a"], Dropped, "responses has fewer than two responses"),
    ([], Dropped, "responses has fewer than two responses"),
    (["a", "a", "a"], Dropped, "responses[0] and responses[2] are equal"),
    (["a", " "], Dropped, "responses[1] is white space only"),
    ("a", InputError, 'x row 1: column responses is "a"; it must be a list of responses'),
    ({"a": 1}, InputError, "it must be a list of responses, each text or a list of messages"),
    (["a", 5], InputError, "x row 1: column responses[1] is 5; it must be text, or a list of messages"),
    (None, InputError, "this objective needs prompt, responses")])
def test_lists_that_are_none(responses, error, said):
    assert said in said_of(error, read, {"prompt": "p", "responses": responses})


def test_of_equal_responses_some_may_stay():
    assert read({"prompt": "p", "responses": ["a", "a", "b"]}).responses == ("a", "a", "b")
    kinds = {"prompt": "p", "responses": ["a", [A("b")]]}
    assert "responses[0] and responses[1] must both be text" in said_of(InputError, read, kinds)
    assert "must " in said_of(InputError, read, {"prompt": "p", "responses": ["a", "b", [A("b")]]})


def rewarded(policy_logps, *, rewards, beta, label_smoothing=0.0, sft_weight=0.0, average_logps=False):
    return -(rewards.softmax(-1) * policy_logps.log_softmax(-1)).sum(-1), {"rewards/all": rewards.sum(-1)}


def test_a_reward_model_fills_in_the_rewards_of_lists(dpo_is, run, sft_run):
    """Of lists of two and three that lack them; a row's own rewards stay."""
    model, tokenizer = save_random_judge(sft_run)
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], " The plot."][:2 + i % 2]}
            for i, row in enumerate(toy("train", True)[:6])]
    rows[1]["rewards"], rows[2]["scores"] = [1, 2, 3.5], [4, 5]
    write_lines("lists.jsonl", rows)
    dpo_is(rewarded, needs_lists=True, columns=("rewards",))
    settings = [*TINY_RUN, "loss=dpo", f"model={sft_run}/LATEST", "reward_model=judge", "data=lists.jsonl",
                "eval_data=lists.jsonl", "max_steps=1", "num_samples=0", "batch_size=6"]
    folder = run(*settings)
    own, end = {1: [1, 2, 3.5], 2: [4, 5]}, tokenizer.eos_token_id
    total = 0.0
    trainer = make_trainer(*settings, "exp_name=again")
    fill_in_rewards([*trainer.data.train_examples, *trainer.data.eval_examples], None, trainer.score)
    for i, example in enumerate(trainer.data.train_examples):
        expected = own.get(i)
        if expected is None:
            rendered = [tokenizer(rows[i]["prompt"] + x)["input_ids"] + [end] for x in rows[i]["responses"]]
            with torch.no_grad():
                expected = [model(torch.tensor([ids])).logits.item() for ids in rendered]
        assert example.columns["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        total += sum(expected)
    lines = read_lines(f"{folder}/metrics.jsonl")
    assert [line["rewards/all"] for line in lines] == pytest.approx([total / 6] * 3, rel=1e-4)
    kept = read_lines(f"{folder}/rewards.jsonl")
    assert [set(line) - {"key", "where"} for line in kept[:4]] == [
        {"chosen_reward", "rejected_reward"}, {"rewards"}, {"chosen_reward", "rejected_reward"}, {"rewards"}]


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("label, number", [
    (True, 1.0), (False, 0.0), ("true", 1.0), ("False", 0.0), (1, 1.0), (0, 0.0), ("1", 1.0), (0.5, 0.5)])
def test_a_label_is_a_number_where_the_objective_reads_it(label, number):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert read_row(row, "x row 1", False, ("label",)).columns == {"label": number}


@pytest.mark.parametrize("label", ["maybe", [True], math.inf, None])
def test_a_label_that_is_no_number(label):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert "label" in said_of(InputError, read_row, row, "x row 1", False, ("label",))


def test_where_the_label_is_not_read_false_is_no_example():
    for label in (False, "false", "False"):
        row = {"prompt": "p", "completion": "c", "label": label}
        assert "its label is false" in said_of(Dropped, read_row, row, "x", False)
        assert read_row(row, "x", False, ("label",)).responses == ("c",)
    for label in (True, "true", None, 1):
        assert read_row({"prompt": "p", "completion": "c", "label": label}, "x", False).responses == ("c",)
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "responses": ["c", "r"], "label": False}
    assert read_row(pair, "x", True).responses == read(pair).responses == ("c", "r")


# ---------------------------------------------------------------- borrowed answers


def test_borrowed_answers_are_cut_and_counted(dpo_is):
    def borrow(examples):
        others = [*examples[1:], examples[0]]
        return [x.with_responses(x.responses[0], other.responses[0]) for x, other in zip(examples, others)]

    def loss(chosen, rejected, *, label, beta, label_smoothing=0.0, sft_weight=0.0, average_logps=False):
        return -(chosen - rejected) * label, {"kept": (label, label)}
    dpo_is(loss, needs_pairs=True, columns=("label",), add_responses=borrow)
    words = [(5, 2), (3, 9), (9, 1), (1, 4), (8, 3)]  # of prompt and response, and an end token
    write_lines("rows.jsonl", [
        {"prompt": "w" + " w" * (n - 1), "response": f" {'xyzuv'[i]}" * m, "label": i < 3}
        for i, (n, m) in enumerate(words)])
    vocab = {"<end>": 0, "?": 1} | {x: i for i, x in enumerate("wxyzuv", 2)}
    tokenizer = Tokenizer(models.WordLevel(vocab, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("t")
    settings = ["loss=dpo", "data=rows.jsonl", "eval_data=rows.jsonl", "tokenizer=t", "max_length=13",
                "max_prompt_length=10", "batch_size=5", "num_eval_examples=3"]
    trainer = make_trainer(*settings)
    expected, num_cut = [], 0
    for i, (n, m) in enumerate(words):
        j = (i + 1) % 5
        own, other = [i + 3] * m + [0], [j + 3] * words[j][1] + [0]
        expected.append(([2] * n, own[:13 - n], other[:13 - n]))
        num_cut += n + max(len(own), len(other)) > 13
    assert [([*x.prompt], *map(list, x.responses)) for x in trainer.data.train_examples] == expected
    assert trainer.data.reports["data"].cut == num_cut == 2
    assert [x.columns for x in trainer.data.train_examples] == [{"label": float(i < 3)} for i in range(5)]
    (held_out,) = trainer.data.eval_sources.values()
    assert [list(x.responses[1]) for x in held_out] == [*(row[2] for row in expected[:2]), [3] * 2 + [0]]
    assert trainer.train_step()["kept"] == 1.0  # the mean of labels, weighed by themselves
    dpo_is(loss, needs_pairs=True, columns=("label",), add_responses=lambda examples: examples)
    assert "must return Examples of several responses" in said_of(
        InputError, make_trainer, *settings)


# ---------------------------------------------------------------- weights


@pytest.fixture
def bpe():
    """A byte-level BPE that knows " good", " bad" and "oo", and else single bytes; a template like ChatML."""
    merges = [("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("Ġgoo", "d"), ("Ġ", "b"), ("Ġb", "a"), ("Ġba", "d")]
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>",
                                        additional_special_tokens=["<|start|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")
    return tokenizer


def encoded(tokenizer, row, *settings, pairs=False, lists=False):
    """The row's Example (none if it is dropped), and the report."""
    report = Report()
    row = read_row(row, "x row 1", pairs, lists=lists)
    encoder = Encoder(tokenizer, config_of("max_length=200", "max_prompt_length=100", *settings),
                      [tokenizer.eos_token_id], "2026-11-25")
    return (encoder.examples([row], report) or [None])[0], report


@pytest.mark.parametrize("spans, weights", [
    ([[0, 5, 0.5], [5, 9, 0]], [0.5, 0, 1]),  # " good", " bad", and the end, just past the last character
    ([[9, 10, 2]], [1, 1, 2]), ([[0, 10, 0.25]], [0.25, 0.25, 0.25]),
    ([[4, 6, 3]], [3, 1, 1]),  # a token has the weight of its last character
    ([[0, 4, 3], [5, 8, 3]], [1, 1, 1]), ([[8, 9, 0]], [1, 0, 1]),
    ([[0, 9, 2], [3, 5, 0.5]], [0.5, 2, 1]), ([], [1, 1, 1])])  # of two spans the later
def test_spans_of_characters_are_weights_of_tokens(spans, weights, bpe):
    row = {"prompt": "Is it good bad?", "response": " good bad", "response_weights": spans}
    example, _ = encoded(bpe, row)
    assert bpe.convert_ids_to_tokens(example.responses[0]) == ["Ġgood", "Ġbad", "<|end|>"]
    assert list(example.weights(0)) == weights and example.lengths == (sum(weights),)
    assert collate([example]).columns["chosen_length"].tolist() == [sum(weights)]


def test_tokens_of_parts_of_a_character_have_its_weight(bpe):
    row = {"prompt": "Q:", "response": " é ok", "response_weights": [[1, 2, 0.5], [4, 5, 0]]}
    example, _ = encoded(bpe, row)
    assert bpe.convert_ids_to_tokens(example.responses[0]) == ["Ġ", "Ã", "©", "Ġ", "o", "k", "<|end|>"]
    assert list(example.weights(0)) == [1, 0.5, 0.5, 1, 1, 0, 1]


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_weights_of_a_sentencepiece_tokenizer(name):
    """Each token has the weight of its last character in the text, whose pieces are of any lengths."""
    family, said = FAMILIES[name], " Cork floats, iron does not."
    parts = {"Cork floats": 0, ", iron": 3, "t.": 0.5}
    spans = [[said.index(part), said.index(part) + len(part), weight] for part, weight in parts.items()]
    row = read_row({"prompt": "Q: What floats?\nA:", "response": said,
                    "response_weights": [*spans, [len(said), len(said) + 1, 2]]}, "x row 1", False)
    (example,) = Encoder(family.tokenizer, config_of("max_length=1000"), family.end_ids,
                         "2026-11-25").examples([row], Report())
    tokens = family.tokenizer.convert_ids_to_tokens(example.responses[0].tolist())
    pieces = [token.replace("▁", " ") for token in tokens[:-1]]
    assert "".join(pieces) == said
    weights, at = [], 0
    for piece in pieces:
        at += len(piece)
        weights.append(next((weight for start, stop, weight in spans if start < at <= stop), 1))
    assert list(example.weights(0)) == [*weights, 2]


@pytest.mark.parametrize("room", [1, 2, 4])
def test_weights_of_a_cut_answer(room, bpe):
    """It keeps the weights of those tokens that stay."""
    row = {"prompt": "Is it good?", "response": " good bad good bad",
           "response_weights": [[0, 5, 2], [5, 9, 0.5], [14, 18, 3], [18, 19, 0.25]]}
    whole, report = encoded(bpe, row)
    assert list(whole.weights(0)) == [2, 0.5, 1, 3, 0.25] and not report.cut
    example, report = encoded(bpe, row, f"max_length={2 + room}", "max_prompt_length=2")
    assert len(example.prompt) == 2 and report.cut == 1
    assert example.responses[0].tolist() == whole.responses[0][:room].tolist()
    assert list(example.weights(0)) == [2, 0.5, 1, 3][:room] and len(collate([example]).targets) == room


def test_weights_of_pairs_and_of_lists(bpe):
    pair = {"prompt": "Q:", "chosen": " good", "rejected": " bad bad", "chosen_weights": [[5, 6, 3]],
            "rejected_weights": [[0, 4, 0.5]]}
    example, _ = encoded(bpe, pair, pairs=True)
    assert [list(x) for x in example.token_weights] == [[1, 3], [0.5, 1, 1]] and example.lengths == (4.0, 2.5)
    example, _ = encoded(bpe, pair | {"chosen_weights": None}, pairs=True)
    assert [list(x) for x in example.token_weights] == [[1, 1], [0.5, 1, 1]]
    example, _ = encoded(bpe, pair)  # one response alone
    assert [list(x) for x in example.token_weights] == [[1, 3]]
    lists = {"prompt": "Q:", "responses": [" good", " bad bad", " bad"],
             "responses_weights": [[[0, 5, 2]], None, [[0, 4, 0], [4, 5, 0.5]]]}
    example, _ = encoded(bpe, lists, lists=True)
    assert [list(x) for x in example.token_weights] == [[2, 1], [1, 1, 1], [0, 0.5]]
    assert collate([example]).columns["lengths"].tolist() == [[3, 3, 0.5]]
    assert encoded(bpe, {"prompt": "Q:", "response": " good"})[0].token_weights is None


def test_weights_within_a_rendering(bpe):
    """The content stands in the question too; the end token's weight is that past the last character."""
    row = {"messages": [U("good bad"), A("good bad")],
           "messages_weights": [[0, 4, 0.5], [5, 8, 0], [8, 9, 3]]}
    example, _ = encoded(bpe, row)
    assert bpe.convert_ids_to_tokens(example.responses[0]) == ["g", "oo", "d", "Ġbad", "<|end|>"]
    assert list(example.weights(0)) == [0.5, 0.5, 0.5, 0, 3]
    row = {"messages": [U("q"), A("a <|end|> b")], "messages_weights": [[0, 1, 2]]}  # a mention
    example, report = encoded(bpe, row)
    assert example is None and list(report.dropped) == [
        "the places of its weights cannot be told: text or tokens are not the row's own"]


def test_what_counts_nowhere_is_dropped(bpe):
    example, report = encoded(bpe, {"prompt": "Q:", "response": " good", "response_weights": [[0, 6, 0]]})
    assert example is None and list(report.dropped) == ["no token of a response counts"]


@pytest.mark.parametrize("spans", [
    [[0, 11, 1]], [[-1, 2, 1]], [[3, 3, 1]], [[4, 2, 1]], [[0, 1, -1]], [[0, 1, math.nan]],
    [[0, 1, math.inf]], [[0, 1]], [[0, 1, 1, 1]], [0, 1, 1],
    5, "x", {"a": 1}, [[0.5, 1, 1]], [[0, 1, "2"]], [[0, 1, None]]])
def test_spans_that_are_none(spans):
    row = {"prompt": "Q:", "response": " good bad", "response_weights": spans}
    assert said_of(InputError, read_row, row, "x row 1", False) == (
        "x row 1: column response_weights must hold spans [start, stop, weight] of response's characters, "
        "0 <= start < stop <= 10 (with its end, past the last one), and weights of at least 0")


@pytest.mark.parametrize("weights, name, length", [
    ([], "responses[0]", 6), (5, "responses[0]", 6), ([[]], "responses[1]", 9),
    ([[], [[0, 10, 1]]], "responses[1]", 9), ({"a": 1}, "responses[0]", 6),
    ([[[0, 7, 1]], []], "responses[0]", 6)])
def test_lists_of_spans_that_are_none(weights, name, length):
    row = {"prompt": "Q:", "responses": [" good", " bad bad"], "responses_weights": weights}
    said = said_of(InputError, read, row)
    assert f"column responses_weights must hold spans [start, stop, weight] of {name}'s characters" in said
    assert f"0 <= start < stop <= {length} (with its end" in said


def test_the_loss_and_its_denominator_are_weighted(bpe, run):
    bpe.save_pretrained("bpe")
    spans = [[[0, 5, 0.5]], [[5, 9, 0], [9, 10, 2]], None]
    write_lines("rows.jsonl", [{"prompt": "Q" * (i + 1), "response": " good bad", "response_weights": x}
                               for i, x in enumerate(spans)])
    weights = [[0.5, 1, 1], [1, 0, 2], [1, 1, 1]]
    shared = ["data=rows.jsonl", "eval_data=rows.jsonl", "tokenizer=bpe", *EXACT, "batch_size=3", "lr=0"]
    for average, divisor in (("tokens", 8.5), ("examples", 3)):  # 2.5 + 3 + 3
        trainer = make_trainer(*shared, f"sft.average={average}", f"exp_name={average}")
        examples = trainer.data.train_examples
        assert trainer.train_objective.denominator(examples) == divisor
        total = 0.0
        for example, own in zip(examples, weights, strict=True):
            ids = [*example.prompt, *example.responses[0]]
            with torch.no_grad():
                logps = trainer.policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(example.prompt)
            total -= sum(w * logps[at - 1, ids[at]].item() for at, w in enumerate(own, start))
        assert trainer.train_step()["loss"] == pytest.approx(total / divisor, rel=1e-7)
        folder = run(*TINY_RUN, *shared, f"sft.average={average}", "max_steps=1", f"exp_name=run-{average}")
        assert losses_of(folder) == pytest.approx([total / divisor], rel=1e-7)


def test_ipo_averages_over_weighted_lengths(bpe):
    bpe.save_pretrained("bpe")
    write_lines("rows.jsonl", [{"prompt": "Q:", "chosen": " good bad", "rejected": " bad",
                                "chosen_weights": [[0, 5, 2], [5, 9, 0]], "rejected_weights": [[4, 5, 0.5]]}])
    trainer = make_trainer("loss=ipo", "data=rows.jsonl", "eval_data=rows.jsonl", "tokenizer=bpe", *EXACT,
                           "ipo.average_logps=true", "batch_size=1")
    with torch.no_grad():
        trainer.policy.lm_head.weight += 0.01 * torch.arange(trainer.policy.config.vocab_size)[:, None].sin()
    (example,) = trainer.data.train_examples
    means = []
    for k, own in enumerate(([2, 0, 1], [1, 0.5])):
        gaps, so_far = [], 0.0
        for at in range(1, len(own) + 1):  # of each token: the gap up to it less that before it
            head = np.array(example.responses[k][:at])
            with torch.no_grad():
                gap = (obvious_logp(trainer.policy, example, head)
                       - obvious_logp(trainer.reference, example, head)).item()
            gaps.append(gap - so_far)
            so_far = gap
        means.append(sum(w * gap for w, gap in zip(own, gaps)) / sum(own))
    assert trainer.train_step()["loss"] == pytest.approx((means[0] - means[1] - 5) ** 2, rel=1e-7)
