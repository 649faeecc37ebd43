"""Token ids to batches, by hand: which examples go together, in which rows, and on which rank."""

import random

import numpy as np
import pytest
import torch
from conftest import FEW_ROWS, make_trainer

from engine import batches
from engine.batches import (PACKED, SEPARATE, SHARED, Batcher, Example, Layout, collate, default_max_tokens,
                            microbatches, split_over_ranks, stream)
from engine.distributed import Stopped, StopRequest


def example(prompt, *responses, **columns):
    return Example("x", np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses), columns)


def test_stream_is_a_permutation_each_epoch_and_crosses_borders():
    whole = stream(5, 0, 15, seed=3, shuffle=True)
    epochs = [whole[i:i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert stream(5, 3, 8, seed=3, shuffle=True) == whole[3:8]
    assert stream(5, 0, 5, seed=4, shuffle=True) != whole[:5]
    assert stream(3, 0, 7, seed=0, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


# ---------------------------------------------------------------- tensors


def test_collate_as_its_docstring_says():
    batch = collate([example([5, 6], [7, 1], [8, 9, 1], chosen_reward=2.5)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]] and batch.segments is None
    assert batch.states.tolist() == [1, 2, 6, 7, 8] and batch.targets.tolist() == [7, 1, 8, 9, 1]
    assert batch.lengths.tolist() == [2, 3] and batch.ends.tolist() == [3, 9]
    assert batch.token_weights.tolist() == [1, 1, 1, 1, 1] and batch.token_weights.dtype == torch.float32
    assert {name: column.tolist() for name, column in batch.columns.items()} == {
        "chosen_reward": [2.5], "chosen_length": [2.0], "rejected_length": [3.0], "lengths": [[2.0, 3.0]]}
    assert {column.dtype for column in batch.columns.values()} == {torch.float32}
    batch = collate([example([5, 6], [7, 1], chosen_reward=0.1)], torch.float64)  # one response
    assert batch.input_ids.tolist() == [[5, 6, 7, 1]] and batch.ends.tolist() == [3]
    assert batch.columns["chosen_reward"].tolist() == [0.1] and "rejected_length" not in batch.columns


def test_collate_with_shared_prompts_as_its_docstring_says():
    pair, short = example([5, 6], [7, 1], [8, 9, 1]), example([4], [3], [2])
    batch = collate([pair, short, short], layout=Layout(shared=True))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 8, 9, 1], [4, 3, 2, 4, 3, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 1, 1, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5, -1]]
    assert batch.prompts.tolist() == [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 3, 3, 3, -1]]
    # chosen of all, then rejected of all; the last prompt token predicts each first one
    assert batch.states.tolist() == [1, 2, 7, 10, 1, 4, 5, 7, 10]
    assert batch.targets.tolist() == [7, 1, 3, 3, 8, 9, 1, 2, 2]
    assert batch.lengths.tolist() == [2, 1, 1, 3, 1, 1] and batch.ends.tolist() == [3, 8, 11, 6, 9, 12]


@pytest.mark.parametrize("layout", [SEPARATE, Layout(shared=True)])
def test_tokens_that_do_not_count_are_context_only(layout):
    """Of 7 1 5 9 1 and 3 the 5 is context: in the row, but nothing is predicted there."""
    long, short = example([4], [7, 1, 5, 9, 1]), example([6], [3])
    long.token_weights = (np.array([1, 1, 0, 1, 1], np.float32),)
    assert (long.lengths, short.lengths, long.num_tokens) == ((4,), (1,), 6)
    batch = collate([long, short], layout=layout)
    assert batch.input_ids.tolist() == [[4, 7, 1, 5, 9, 1], [6, 3, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [7, 1, 9, 1, 3] and batch.states.tolist() == [0, 1, 3, 4, 6]
    assert batch.token_weights.tolist() == [1, 1, 1, 1, 1]
    assert batch.lengths.tolist() == [4, 1] and batch.ends.tolist() == [5, 7]
    assert batch.columns["chosen_length"].tolist() == [4, 1]


def test_collate_puts_all_chosen_before_all_rejected():
    batch = collate([example([1], [2], [3]), example([4], [5], [6])])
    assert batch.input_ids.tolist() == [[1, 2], [4, 5], [1, 3], [4, 6]]
    assert batch.examples[1].prompt.tolist() == [4]


# ---------------------------------------------------------------- which examples go together, in which rows


def test_each_microbatch_has_the_cheaper_layout():
    """Long prompts are cheaper shared; long responses apart, where attention over one long row costs more."""
    long_prompt, long_answers = example([1] * 90, [2] * 5, [3] * 5), example([1] * 2, [2] * 50, [3] * 50)
    layouts = (Layout(False, linear=100, quadratic=1), Layout(True, linear=100, quadratic=2))
    for pair, together in ((long_prompt, True), (long_answers, False)):
        (examples, layout), = microbatches([pair, pair], 1, 10**6, layouts)
        assert len(examples) == 2 and layout.shared is together
    # a token of 2 rows of 95, of 100: 2 * 95 * (100 + 95) / 100; of one row of 100: 100 + 200
    assert [layout.cost([long_prompt], [[0]]) for layout in layouts] == [370.5, 300]


def test_short_examples_share_a_row_where_they_fit():
    """Of widths 10, 6, 5, 4, 4, 3 in rows of 10: 10; 6 + 4; 5 + 4; and the last would be a row too many."""
    examples = [example([1] * (n - 2), [2], [3]) for n in (10, 6, 5, 4, 4, 3)]
    packed = Layout(shared=True)
    assert packed.rows(examples, 39) == [[0], [1, 3], [2, 4]] and packed.rows(examples, 40)[3:] == [[5]]
    assert packed.rows(examples, 9) == [[0]]
    # apart, a pair of these is two rows: of 9 and 9 tokens, of 5 and 5
    assert SEPARATE.rows(examples, 36) == [[0], [1]] and SEPARATE.rows(examples, 35) == [[0]]


def test_microbatches_hold_every_example_once_under_the_budget():
    rng = random.Random(0)
    examples = [example([1] * rng.randint(1, 30), [2] * rng.randint(1, 30), [3] * rng.randint(1, 30))
                for _ in range(53)]
    for parts, budget in ((1, 10**9), (1, 200), (4, 300), (100, 10**9), (1, 1)):
        for layouts in ((SEPARATE,), (Layout(True),), (SEPARATE, Layout(True))):
            batches = microbatches(examples, parts, budget, layouts)
            assert sorted(id(e) for batch, _ in batches for e in batch) == sorted(map(id, examples))
            for batch, layout in batches:
                assert len(batch) == 1 or collate(batch, layout=layout).input_ids.numel() <= budget
    assert len(microbatches(examples, 1, 10**9)) == 1
    assert sorted(len(batch) for batch, _ in microbatches(examples, 4, 10**9)) == [13, 13, 13, 14]
    assert len(microbatches(examples, 1, 1)) == 53
    lengths = [e.row_length for batch, _ in microbatches(examples, 3, 200) for e in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_microbatches_of_a_step_are_balanced_on_a_gpu():
    """By hand: 6 pairs of 10 tokens each, in a budget of 40: as 4 and 2, or 3 and 3. Of any lengths no more
    pieces, none beyond the budget, and no small rest."""
    pairs = [example([1] * 6, [2] * 2, [3] * 2) for _ in range(6)]
    for balanced, sizes in ((False, [4, 2]), (True, [3, 3])):
        assert [len(part) for part, _ in microbatches(pairs, 1, 40, (PACKED,), balanced)] == sizes
    rng = random.Random(0)
    examples = [example([1] * rng.randint(1, 30), [2] * rng.randint(1, 30), [3] * rng.randint(1, 30))
                for _ in range(53)]
    for layouts in ((SEPARATE,), (SHARED,), (PACKED,), (SEPARATE, SHARED)):
        sizes = {}
        for balanced in (False, True):
            parts = microbatches(examples, 1, 500, layouts, balanced)
            assert sorted(id(x) for part, _ in parts for x in part) == sorted(map(id, examples))
            sizes[balanced] = [collate(part, layout=layout).input_ids.numel() for part, layout in parts]
        assert len(sizes[True]) == len(sizes[False]) > 3 and max(sizes[True]) <= 500
        assert min(sizes[True]) >= max(min(sizes[False]), 0.75 * max(sizes[True]))


def test_packed_rows_are_one_row_of_all_that_fit():
    examples = [example([1] * (n - 2), [2], [3]) for n in (10, 6, 5, 4)]
    assert PACKED.rows(examples, 20) == [[0, 1]] and PACKED.rows(examples, 21) == [[0, 1, 2]]
    assert PACKED.rows(examples, 9) == [[0]] and PACKED.rows(examples) == [[0, 1, 2, 3]]
    assert collate(examples, layout=PACKED).input_ids.shape == (1, 25)


def test_columns_follow_their_examples_through_sorting():
    examples = [example([1], [2] * n, [3], chosen_reward=float(n)) for n in (1, 5, 3)]
    batch = collate(*microbatches(examples, 1, 10**6)[0][:1])
    assert torch.equal(batch.columns["chosen_reward"], batch.columns["chosen_length"])


def test_the_token_budget_suits_the_device(monkeypatch):
    """Apart, a toy pair is two rows of about 33 tokens: 15 of them in 1,024 tokens, 31 in 2,048."""
    monkeypatch.setattr(batches, "device", lambda: torch.device("cpu"))
    for settings, tokens in (([], 1024), (["compute_dtype=bfloat16"], 2048),
                             (["max_tokens_per_microbatch=300"], 300)):
        trainer = make_trainer("loss=dpo", "layout=separate", f"eval_data={FEW_ROWS}", *settings)
        sizes = [collate(part, layout=layout).input_ids.numel()
                 for part, layout in trainer.batcher.eval_parts(trainer.data.train_examples)]
        assert tokens * 0.8 < max(sizes) <= tokens
    monkeypatch.setattr(batches, "device", lambda: torch.device("cuda", 0))
    assert default_max_tokens("float32") == default_max_tokens("bfloat16") == 16384


# ---------------------------------------------------------------- each rank's share


def test_examples_are_split_over_ranks():
    """By hand: 9, 8, 7; 5 to the 7, 4 to the 8, 3 to the 9, which make 12 each; 2 to the first."""
    examples = [example([1] * (n - 1), [2]) for n in (4, 9, 2, 7, 5, 8, 3)]
    shares = [[x.num_tokens for x in share] for share in split_over_ranks(examples, 3)]
    assert shares == [[9, 2, 3], [4, 8], [7, 5]]
    assert split_over_ranks(examples, 1) == [examples]
    assert list(map(len, split_over_ranks(examples[:2], 4))) == [1, 1, 0, 0]


def batcher(**changes):
    return Batcher(**{"layouts": (SEPARATE,), "max_tokens": 40, "eval_batch_size": 4, "dtype": torch.float32,
                      "stop": StopRequest(None), **changes})


@pytest.mark.parametrize("num_examples", [11, 2])
def test_every_rank_has_as_many_batches_and_every_example_is_in_one(num_examples, monkeypatch):
    """Else a rank would wait for ever; those that only keep pace are marked, and count nowhere."""
    monkeypatch.setattr(batches, "num_ranks", lambda: 3)
    examples = [example([1] * (n + 1), [2], [3, 4]) for n in range(num_examples)]
    trained, evaluated = [], []
    for rank in range(3):
        monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
        trained.append(batcher().train_share(examples, 2))
        evaluated.append(list(batcher().eval_share(examples, "title")))
    for shares in (trained, evaluated):
        assert len({len(share) for share in shares}) == 1
        counted = [x for share in shares for batch in share if not batch.is_idle for x in batch.examples]
        assert sorted(map(id, counted)) == sorted(map(id, examples))
    assert any(batch.is_idle for share in evaluated for batch in share)


def test_values_come_in_the_order_of_the_examples():
    examples = [example([1], [2] * n, [3]) for n in (1, 5, 3, 2, 4, 1)]
    values = batcher().values(lambda batch: batch.lengths.view(2, -1), examples, "title")
    assert values == [[1, 1], [5, 1], [3, 1], [2, 1], [4, 1], [1, 1]]


def test_an_evaluation_may_end_between_its_batches():
    stop, examples, seen = StopRequest(None), [example([1], [2]) for _ in range(9)], []
    with pytest.raises(Stopped):
        for batch in batcher(stop=stop).eval_share(examples, "title"):
            seen.append(len(batch.examples))
            stop.reason = 15
    assert seen == [3]  # of three parts of three
