"""Does a run begin right? Before step 1 its first examples are read by the model's own forward as well.

Policy and reference are read by the same code: what is wrong in both leaves the first loss at log 2.
"""

import contextlib
import functools
import math

import numpy as np
import torch

from engine import InputError
from engine.batches import CACHED, PACKED
from engine.distributed import device, max_over_ranks, num_ranks, raise_on_all_ranks, reshard
from engine.forward import (MARGIN, as_float, autocast, in_any_order, in_float32, layer_states,
                            response_scores, sum_over_responses, token_logps)
from engine.lora import as_asked

NUM_EXAMPLES, NUM_TRIES = 8, 8
MAX_LOGITS = 2**27  # of a row that is read plainly: the head makes them all at once
NOISE = {False: 2**-20, True: 2**-8}  # 16 times what float32 rounds by, twice what bfloat16 does
READ = ("as the run reads it and {:.6g} by the model's own forward of that row alone, where rounding allows "
        "{:.1g}: try layout=separate or attention=eager; if it stays, the model's code or a change to "
        "engine/ takes other tokens, positions or masks (check_first_batch=false goes on regardless)")
START = ("by the reference and {:.6g} by the model, where rounding allows {:.1g}, but the reference is this "
         "model as it starts: delete the folder of reference_cache if the number is from there; if it stays, "
         "weights have changed since they were loaded")


@torch.no_grad()
def check_first_batch(examples, eval_sources, batcher, policy, reference, objective, config, bf16, is_start):
    """Raises InputError where a run would begin wrong; changes neither weights nor random state.

    Eight of the first batch's examples, from the shortest to the longest, are read in the run's own layout,
    and each response by itself; of bfloat16, whose rounding hides much, on one device in float32 as well.
    is_start: whether the policy is where an unnamed reference is; then both must say the same of these, and
    of eight of each evaluation source whose log-probabilities are known.
    """
    if not config.check_first_batch:
        return
    scores, vocabulary = objective.inputs == "scores", policy.config.get_text_config().vocab_size
    some = spread(examples, MAX_LOGITS if scores else MAX_LOGITS // vocabulary)
    narrow = "bfloat16" in (config.dtype, config.compute_dtype, config.lora["base_dtype"])
    how = batcher, scores, bf16, NOISE[narrow]
    needs_narrow = "flash" in (config.attention or "") or (
        batcher.layouts == (PACKED,) and device().type == "cuda")  # by their kernels
    is_policy = is_start and (objective.in_stages or config.reference in (None, config.model))
    there = reference and reference.device == device()  # or it waits in the host, and its numbers are known
    policy.eval()
    for model in (policy, reference if there and not is_policy else None):
        if some and model:
            check_reading(model, some, *how)
            if narrow and num_ranks() == 1 and not needs_narrow:
                with in_float32(model), torch.compiler.set_stance("force_eager"):
                    check_reading(model, some, batcher, scores, False, NOISE[False])
    for part in (some, *map(spread, eval_sources.values())):
        if is_policy and part and (CACHED in part[0].columns or (there and part is some)):
            check_reference(policy, reference, part, *how)
    policy.train()
    for model in (policy, reference):
        reshard(model)


def spread(examples, max_length=math.inf):
    """Eight of these, or all, from the shortest row to the longest of at most so many tokens; or one."""
    ordered = sorted(examples, key=lambda example: example.row_length)
    ordered = [example for example in ordered if example.row_length <= max_length] or ordered[:1]
    places = np.linspace(0, len(ordered) - 1, min(NUM_EXAMPLES, len(ordered)))
    return [ordered[place] for place in places.round().astype(int)]


def check_reading(model, examples, batcher, scores, bf16, noise):
    """Compares each token that counts, by its weight, and the responses' sums; or scores. Each rank reads all
    rows plainly, so that shards are gathered as often on all, and its share as the run does."""
    plain = {(id(x), k): read_plainly(model, x, k, scores, bf16)
             for x in examples for k in range(len(x.responses))}
    batches = batcher.train_share(examples, 1)
    responses, found = responses_of(batches), read(model, batches, scores, bf16)
    check_counts(batches, responses, found[0], scores)
    expected = [plain[id(x), k][0] for x, k in responses]
    names = [f"response {k + 1} of {x.where}" for x, k in responses]
    tokens = [f"token {place + 1} of {name}" for (x, k), name in zip(responses, names)
              for place in ([len(x.responses[k]) - 1] if scores else np.flatnonzero(x.weights(k)))]
    largest = max(size.item() for _, size in plain.values())
    disturbed = functools.cache(lambda seed: read(model, batches, scores, bf16, noise, seed))
    compare(tokens, found[0], torch.cat(expected), largest, READ, lambda seed: disturbed(seed)[0])
    sums = torch.stack([values.double().sum() for values in expected])
    sizes = sums.abs().max().item() * max(map(len, expected)) ** 0.5  # which float32 adds one by one
    compare(names, found[1], sums, max(largest, sizes), READ, lambda seed: disturbed(seed)[1])


def check_reference(policy, reference, examples, batcher, scores, bf16, noise):
    """Compares what is known of the responses under the reference, or what it says, with the policy's."""
    batches = batcher.train_share(examples, 1)
    found = torch.cat([batch.columns[CACHED].T.flatten() if CACHED in batch.columns
                       else read(reference, [batch], scores, bf16)[1] for batch in batches])
    names = [f"response {k + 1} of {x.where}" for x, k in responses_of(batches)]
    expected = read(policy, batches, scores, bf16)[1]
    size = expected.abs().max().item() * max(max(x.lengths) for x in examples) ** 0.5
    compare(names, found, expected, size, START,
            lambda seed: read(policy, batches, scores, bf16, noise, seed)[1])


def responses_of(batches):
    """(example, k), in the order in which batches have their responses."""
    return [(x, k) for batch in batches for k in range(len(batch.examples[0].responses))
            for x in batch.examples]


@raise_on_all_ranks
def check_counts(batches, responses, found, scores):
    counts = torch.cat([batch.lengths for batch in batches]).tolist()
    for (x, k), count in zip(responses, counts, strict=True):
        if count != x.num_counting(k):
            raise InputError(f"this run would begin wrong: {x.num_counting(k)} tokens of response {k + 1} of "
                             f"{x.where} count, and the run reads {count}: a change to engine/ leaves some "
                             "out, or adds some")
    assert len(found) == (len(counts) if scores else sum(counts))


@raise_on_all_ranks
def compare(names, found, expected, largest, text, disturbed):
    """Raises InputError where numbers are further from what is expected than rounding brings them.

    Rounding is measured, by how far readings lie apart in which every layer's output is disturbed. Numbers
    are compared in the order of size, for some tokens may go to other experts. Two such readings clear what
    is right; a run is stopped after eight. largest: of the numbers that these are made of.
    """
    found, expected = (torch.nan_to_num(x.double()) for x in (found, expected))
    errors, order = (found - expected).abs().sort()
    floor = max(largest, expected.abs().max().item()) * torch.finfo(torch.float32).eps
    allowed, readings = torch.full_like(errors, MARGIN * floor), []
    while max_over_ranks(int((errors > allowed).any())) and len(readings) < NUM_TRIES:
        readings += [disturbed(len(readings) + i) for i in range(2 if not readings else NUM_TRIES - 2)]
        apart = torch.nan_to_num(torch.stack(readings).double())
        apart = (apart.amax(0) - apart.amin(0)).sort().values
        allowed = MARGIN * apart.clamp(min=max(apart.median().item(), floor))
    if (errors > allowed).any():
        worst = (errors / allowed).argmax()
        at = order[worst]
        raise InputError(f"this run would begin wrong: {names[at]} is {found[at]:.6g} "
                         + text.format(expected[at], allowed[worst]))


def read(model, batches, scores, bf16, noise=0.0, seed=0):
    """What the run reads of each token that counts, times its weight, and of each response; or scores."""
    values, sums = [], []
    for batch in batches:
        with contextlib.ExitStack() as stack:
            if noise:  # not as it is compiled: hooks would compile it anew
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(layer_states(model, batch, noise, seed))
            own = (response_scores if scores else token_logps)(model, batch, bf16)
        values.append(own.flatten() if scores else own * batch.token_weights)
        sums.append((own if scores else sum_over_responses(own, batch)).flatten())
    return torch.cat(values), torch.cat(sums)


def read_plainly(model, example, k, scores, bf16):
    """The same of response k by the model's own forward, in a row by itself; and its largest logit."""
    ids = torch.tensor([[*example.prompt, *example.responses[k]]], device=device())
    with autocast(bf16), as_asked(model) as asked, in_any_order(), torch.compiler.set_stance("force_eager"):
        logits = asked(input_ids=ids, use_cache=False).logits[0]
    start = len(example.prompt)
    logits = as_float(logits if scores else logits[start - 1:-1])  # of a long row only what is needed
    if scores:
        return logits, logits.abs().max()
    values = logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
    weights = torch.tensor(example.weights(k), device=device())
    return (values * weights)[weights != 0], logits.abs().max()
