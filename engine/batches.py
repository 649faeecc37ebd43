"""How do token ids become a batch? Examples -> microbatches -> collate -> Batch; each rank has its share."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from engine.distributed import StopRequest, device, from_all, num_ranks, rank
from engine.report import progress

COMPUTED_COLUMNS = ("chosen_length", "rejected_length", "lengths")  # that no row has to bring
REWARDS, LIST_REWARDS = ("chosen_reward", "rejected_reward"), "rewards"  # that a reward model can fill
CACHED = "reference_logps"  # the column of the reference's log-probabilities, once they are computed


@dataclass
class Example:
    """Token ids of one row, as int32 arrays, responses with their end token unless it was cut off.

    columns: numbers of the data, and what a reference or reward model has said of the responses; a list has
    one for each response. prompt: what stands before the first token that counts. token_weights: of each
    response float32, one for each token: 0 for context between answers. None: all 1. after: ids that a chat
    template writes after a response, where reward models are read. is_whole: whether no response is cut, and
    there is room for these.
    """

    where: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    columns: dict[str, float | list[float]]
    token_weights: tuple[np.ndarray, ...] | None = None
    after: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    is_whole: bool = True

    def weights(self, k):
        """Response k's token weights."""
        if self.token_weights is None:
            return np.ones(len(self.responses[k]), np.float32)
        return self.token_weights[k]

    def num_counting(self, k):
        """How many of response k's tokens count."""
        return np.count_nonzero(self.weights(k))

    @property
    def lengths(self):
        """Tokens of each response, as they count: the sums of their weights."""
        if self.token_weights is None:
            return tuple(map(len, self.responses))
        return tuple(float(weights.sum()) for weights in self.token_weights)

    def with_responses(self, *responses, **columns):
        """The same prompt with these responses, arrays of ids of which all count, and more columns."""
        arrays = tuple(np.asarray(ids, np.int32) for ids in responses)
        return replace(self, responses=arrays, columns=self.columns | columns, token_weights=None)

    def rendered(self):
        """The same without columns, its responses to the end of the chat template's rendering if they fit."""
        responses = tuple(np.append(ids, self.after) for ids in self.responses)
        responses = responses if self.is_whole else self.responses
        return replace(self, columns={}, responses=responses, token_weights=None)

    @property
    def fingerprint(self) -> bytes:
        """sha256 of all ids, and of the weights."""
        digest = hashlib.sha256()
        for part in (self.prompt, *self.responses, *(self.token_weights or ()), self.after):
            digest.update(len(part).to_bytes(4) + part.tobytes())
        return digest.digest()

    @property
    def num_tokens(self):
        """Each prompt and response once, no padding."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def row_length(self):
        return len(self.prompt) + max(map(len, self.responses))


def stream(num_rows, start, stop, *, seed, shuffle) -> list[int]:
    """Row numbers at positions start to stop of the endless stream of epochs, each a seeded permutation."""
    return [int(epoch_order(num_rows, seed, position // num_rows, shuffle)[position % num_rows])
            for position in range(start, stop)]


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows, seed, epoch, shuffle):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator) if shuffle else torch.arange(num_rows)


# ---------------------------------------------------------------- which examples go together, in which rows


@dataclass(frozen=True)
class Layout:
    """How a microbatch is laid in rows, all as wide as the widest: each response after a prompt of its own;
    or shared, examples one after another as they fit, each [prompt | chosen | rejected]; or packed, which is
    shared in one row of all.

    A row of T tokens costs T (linear + quadratic T).
    """

    shared: bool
    linear: float = 1.0
    quadratic: float = 0.0
    packed: bool = False

    def width(self, example):
        return example.num_tokens if self.shared else example.row_length

    def rows(self, examples, max_tokens=math.inf):
        """Rows, lists of places in `examples`, which come longest first. They end with the first example that
        has another number of responses, or for which the budget of tokens, padding counted, has no room; the
        first always goes in."""
        rows, room, width = [], [], max_tokens if self.packed else 0
        for place, example in enumerate(examples):
            own = self.width(example)
            if len(example.responses) != len(examples[0].responses):
                break
            i = next((i for i, left in enumerate(room) if self.shared and left >= own), len(rows))
            if i == len(rows):
                width = max(width, own)
                height = (i + 1) * (1 if self.shared else len(example.responses))
                if i > 0 and height * width > max_tokens:
                    break
                rows.append([])
                room.append(width)
            rows[i].append(place)
            room[i] -= own
        return rows

    def shape(self, examples, rows):
        """(R, T) of these rows."""
        width = max(sum(self.width(examples[i]) for i in row) for row in rows)
        return len(rows) if self.shared else len(rows) * len(examples[0].responses), width

    def cost(self, examples, rows):
        """Of these rows, per token that is not repeated."""
        height, width = self.shape(examples, rows)
        num_tokens = sum(examples[i].num_tokens for row in rows for i in row)
        return height * width * (self.linear + self.quadratic * width) / num_tokens


SEPARATE, SHARED, PACKED = Layout(shared=False), Layout(shared=True), Layout(shared=True, packed=True)


def microbatches(examples, num_parts, max_tokens, layouts=(SEPARATE,), balanced=False):
    """Cuts examples, longest first, into nearly equal parts, and these by a budget of tokens: a list of
    (examples, layout).

    The budget counts padding; an example beyond it goes alone. Each microbatch gets the cheapest of the
    layouts. balanced: what the budget cuts is cut into no more pieces, but of nearly as many tokens each,
    instead of full ones and a rest: on a GPU, and more so in shards, each microbatch has costs of its own.
    """
    ordered = sorted(examples, key=lambda x: (len(x.responses), layouts[-1].width(x)), reverse=True)
    parts = []
    for i in range(num_parts):
        part = ordered[i * len(ordered) // num_parts:(i + 1) * len(ordered) // num_parts]
        pieces = cut_by_budget(part, max_tokens, layouts)
        low, high = 0, max_tokens if balanced and len(pieces) > 1 else 0
        while high - low > max(1, high // 50):  # for the smallest budget that cuts it into no more
            middle = (low + high) // 2
            tried = cut_by_budget(part, middle, layouts)
            if len(tried) <= len(pieces):
                pieces, high = tried, middle
            else:
                low = middle
        parts += pieces
    return parts


def cut_by_budget(rest, max_tokens, layouts):
    """Examples, longest first, as (examples, layout) pairs, each within the budget."""
    pieces = []
    while rest:
        choices = [(layout, layout.rows(rest, max_tokens)) for layout in layouts]
        layout, rows = min(choices, key=lambda choice: choice[0].cost(rest, choice[1]))
        size = sum(map(len, rows))
        pieces.append((rest[:size], layout))
        rest = rest[size:]
    return pieces


def default_max_tokens(compute_dtype: str) -> int:
    """Tokens of a microbatch that suit the caches of a CPU, or fill a GPU."""
    on_cpu = 2**11 if compute_dtype == "bfloat16" else 2**10
    return 2**14 if device().type == "cuda" else on_cpu


def split_over_ranks(examples, num_ranks) -> list[list[Example]]:
    """Deals examples, longest first, each to the rank with the fewest tokens so far: a list for each rank."""
    shares, tokens = [[] for _ in range(num_ranks)], [0] * num_ranks
    for i in sorted(range(len(examples)), key=lambda i: -examples[i].num_tokens):
        poorest = tokens.index(min(tokens))
        shares[poorest].append(i)
        tokens[poorest] += examples[i].num_tokens
    return [[examples[i] for i in sorted(share)] for share in shares]


# ---------------------------------------------------------------- tensors


class Plan(NamedTuple):
    """The sequences of a packed row, S in all: a prompt with its first response, then each other response,
    whose keys are the prompt's and its own.

    keys: (N,) int64, the places of all sequences' keys, one after another. query_ends, key_ends: (S + 1,)
    int32, where sequences end among the row's tokens and among those, from 0 on. max_queries, max_keys: of a
    sequence.
    """

    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int


@dataclass
class Batch:
    """Tensors of B examples with K responses each, laid in R rows of T tokens, padded on the right.

    input_ids, positions: (R, T) int64; a token's position is that in its prompt with its own response.
    segments: (R, T) int64, a number for each prompt and each response, -1 for padding.
    prompts: (R, T) int64, the segment of each token's prompt: a token sees that and its own segment. Both are
    None where each row is one response, which a causal model sees so by itself.
    states: (N,) int64, for each of N response tokens that count, the place in R * T of the token before it,
    which predicts it.
    targets: (N,) int64, those tokens, response after response, all chosen before all rejected.
    token_weights: (N,) float32, how much each counts.
    lengths, ends: (K * B,) int64, how many of a response's tokens count, and the place of its last one.
    columns: name -> (B,) float, or (B, K).
    plan: of a packed row, which has no padding, the same as sequences.
    joint: what a loss of the whole batch says of it; see objectives.join.
    is_idle: whether it is there only to keep pace with other ranks, and its numbers count nowhere.

    One pair, prompt [5, 6], chosen [7, 1], rejected [8, 9, 1], separate and shared:

        input_ids   5 6 7 1 0     input_ids   5 6 7 1 8 9 1     targets  7 1 8 9 1
                    5 6 8 9 1     positions   0 1 2 3 2 3 4     lengths  2 3
        states      1 2 6 7 8     segments    0 0 1 1 2 2 2
        ends        3 9           prompts     0 0 0 0 0 0 0
                                  states      1 2 1 4 5
                                  ends        3 6
    """

    examples: list[Example]
    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor | None
    prompts: torch.Tensor | None
    states: torch.Tensor
    targets: torch.Tensor
    token_weights: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    columns: dict[str, torch.Tensor]
    plan: Plan | None = None
    is_idle: bool = False
    joint: tuple | None = None

    def to(self, target: torch.device):
        """On a GPU the copies are queued, and nobody waits for them."""
        def move(value):
            if not torch.is_tensor(value) or target.type == "cpu":
                return value
            return value.pin_memory().to(target, non_blocking=True)
        moved = {name: move(value) for name, value in vars(self).items()}
        moved |= {"columns": {name: move(x) for name, x in self.columns.items()},
                  "plan": self.plan and Plan(*map(move, self.plan))}
        return replace(self, **moved)


def collate(examples: list[Example], dtype=torch.float32, layout=SEPARATE) -> Batch:
    """Examples, longest first, to a Batch; its columns are of `dtype`. See Batch for what is laid where."""
    num_responses = len(examples[0].responses)
    if layout.shared:
        rows = [[(place, range(num_responses)) for place in row] for row in layout.rows(examples)]
    else:
        rows = [[(place, [k])] for k in range(num_responses) for place in range(len(examples))]
    width = max(sum(len(examples[i].prompt) + sum(len(examples[i].responses[k]) for k in ks) for i, ks in row)
                for row in rows)
    input_ids, positions = np.zeros((2, len(rows), width), np.int64)
    segments, prompts = np.full((2, len(rows), width), -1, np.int64)
    states, ends = ([None] * num_responses * len(examples) for _ in range(2))
    for r, row in enumerate(rows):
        at, segment = 0, 0
        for place, ks in row:
            example = examples[place]
            last, own_prompt = at + len(example.prompt) - 1, segment
            for k in (None, *ks):
                ids, start = (example.prompt, 0) if k is None else (example.responses[k], len(example.prompt))
                span = slice(at, at + len(ids))
                input_ids[r, span], positions[r, span] = ids, np.arange(start, start + len(ids))
                segments[r, span], prompts[r, span] = segment, own_prompt
                if k is not None:
                    number = k * len(examples) + place
                    states[number] = r * width + np.append(last, np.arange(at, at + len(ids) - 1))
                    ends[number] = r * width + at + len(ids) - 1
                at, segment = at + len(ids), segment + 1
    answers = [(x.responses[k], x.weights(k)) for k in range(num_responses) for x in examples]
    counted = [np.flatnonzero(weights) for _, weights in answers]
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    lengths = [example.lengths for example in examples]
    columns |= dict(zip(COMPUTED_COLUMNS, zip(*lengths))) | {COMPUTED_COLUMNS[-1]: lengths}
    tensors = (input_ids, positions, *((segments, prompts) if layout.shared else (None, None)),
               np.concatenate([places[at] for places, at in zip(states, counted)]),
               np.concatenate([ids[at] for (ids, _), at in zip(answers, counted)]).astype(np.int64),
               np.concatenate([weights[at] for (_, weights), at in zip(answers, counted)]),
               np.array([len(at) for at in counted]), np.array(ends))
    return Batch(list(examples), *(x if x is None else torch.from_numpy(x) for x in tensors),
                 {name: torch.tensor(column, dtype=dtype) for name, column in columns.items()},
                 plan_of(examples) if layout.packed else None)


def plan_of(examples) -> Plan:
    """The Plan of a row of these examples, one after another."""
    keys, num_queries, at = [], [], 0
    for example in examples:
        prompt, at = np.arange(at, at + len(example.prompt)), at + len(example.prompt)
        for k, response in enumerate(example.responses):
            keys.append(np.append(prompt, np.arange(at, at + len(response))))
            num_queries.append(len(response) + (len(prompt) if k == 0 else 0))
            at += len(response)
    num_keys = [*map(len, keys)]
    ends = (torch.from_numpy(np.cumsum([0, *counts]).astype(np.int32)) for counts in (num_queries, num_keys))
    return Plan(torch.from_numpy(np.concatenate(keys)), *ends, max(num_queries), max(num_keys))


@dataclass(frozen=True)
class Batcher:
    """Makes this rank's Batches, on its device.

    layouts: those that a microbatch may have. max_tokens: of one, padding counted. eval_batch_size: examples
    of one in evaluation. dtype: of columns. stop: may end an evaluation between its batches.
    """

    layouts: tuple[Layout, ...]
    max_tokens: int
    eval_batch_size: int
    dtype: torch.dtype
    stop: StopRequest

    def collate(self, examples, layout, is_idle=False):
        return replace(collate(examples, self.dtype, layout).to(device()), is_idle=is_idle)

    def train_share(self, examples: list[Example], num_parts: int) -> list[Batch]:
        """Of a step's examples nearly as many tokens as other ranks have, and just as many Batches."""
        balanced = device().type == "cuda"
        parts = [microbatches(share, num_parts, self.max_tokens, self.layouts, balanced)
                 for share in split_over_ranks(examples, num_ranks())]
        num_idle = max(map(len, parts)) - len(parts[rank()])
        return [*(self.collate(*part) for part in parts[rank()]),
                *(self.collate(examples[-1:], SEPARATE, is_idle=True) for _ in range(num_idle))]

    def eval_parts(self, examples):
        """The microbatches in which examples are evaluated, the same on any number of ranks."""
        num_parts = math.ceil(len(examples) / self.eval_batch_size)
        return microbatches(examples, num_parts, self.max_tokens, self.layouts)

    def eval_share(self, examples, title: str) -> Iterator[Batch]:
        """This rank's of these, one after another, with a progress bar; raises Stopped between them."""
        parts = self.eval_parts(examples)
        idle = [(*parts[-1], True)] * (-len(parts) % num_ranks())
        for part in progress([*parts, *idle][rank()::num_ranks()], title, unit="batch"):
            self.stop.check()
            yield self.collate(*part)

    def values(self, function: Callable[[Batch], torch.Tensor], examples, title) -> list[list[float]]:
        """What function(batch), (K, B), gives for each of the examples: K floats each, on every rank."""
        places, rows = {id(example): place for place, example in enumerate(examples)}, {}
        for batch in self.eval_share(examples, title):
            values = function(batch).T.tolist()
            if not batch.is_idle:
                rows |= {places[id(example)]: row for example, row in zip(batch.examples, values)}
        rows = {place: row for part in from_all(rows) for place, row in part.items()}
        return [rows[place] for place in range(len(examples))]
