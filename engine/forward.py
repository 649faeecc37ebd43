"""What does a model say of a batch, and in which layout? Where the loss meets the logits.

B: examples of a batch. K: responses of each. N: response tokens in it. D: hidden size. V: vocabulary.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine import InputError, first_line
from engine.attention import attention_of, kernel_error
from engine.batches import PACKED, SEPARATE, SHARED, Batch, Example, Layout, collate
from engine.distributed import (decoder_layers, device, from_first, num_ranks, raise_on_all_ranks, rank,
                                with_root_unsharded)
from engine.lora import as_asked

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # that exist at once: of a chunk, a GPU reads the whole head
ATTENTION_COST = 3.0  # a multiply-add in attention against one in a matrix product, by a CPU's clock
DISTURBANCE, MARGIN = 2**-20, 4  # 16 times what float32 rounds by; see why_not_shared


# ---------------------------------------------------------------- log-probabilities and scores


def response_logps(model: PreTrainedModel, batch: Batch, bf16=False) -> torch.Tensor:
    """Log-probabilities (K, B) of the responses, nats, summed over their tokens."""
    return sum_over_responses(token_logps(model, batch, bf16), batch)


def token_logps(model: PreTrainedModel, batch: Batch, bf16=False) -> torch.Tensor:
    """Log-probabilities (N,) of the response tokens, nats, float32 (float64 models: float64).

    bf16: bfloat16 arithmetic on float32 weights, here and below.
    """
    def logps(logits, targets):
        return {"logps": -F.cross_entropy(logits, targets, reduction="none")}
    return read_tokens(logps, [model], batch, bf16)["logps"]


def sum_over_responses(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums (K, B) over each response's tokens of values (N,), weighted, in a fixed order, on a GPU too."""
    values = values * batch.token_weights
    sums = torch.segment_reduce(values, "sum", lengths=batch.lengths, unsafe=True)
    return sums.view(-1, len(batch.examples))


def read_tokens(function: Callable, models: list, batch: Batch, bf16=False) -> dict[str, torch.Tensor]:
    """What `function` makes of the models' logits at each response token: {name: (N,)}.

    function(logits (n, V) of each model ..., targets (n,)) -> {name: (n,)}. Of many logits (N, V) only those
    of a chunk of tokens exist at once: made when they are read and, of several chunks, again in the backward.
    """
    outputs = []
    for model in models:
        with autocast(bf16), attention_of(model, batch):
            outputs.append(decode(model, decoder_inputs(batch)))
    states = [output[0].flatten(0, 1)[batch.states] for output in outputs]  # (N, D) each
    names = []

    def read_chunk(targets, *hidden):
        with autocast(bf16):
            logits = [as_float(run_head(*parts)) for parts in zip(models, outputs, hidden)]
        values = function(*logits, targets)
        names[:] = values
        return tuple(values.values())  # a checkpoint passes no dict on

    size = len(models) * models[0].config.get_text_config().vocab_size
    size = max(1, CHUNK_LOGITS[device().type] // size)
    chunks = list(zip(batch.targets.split(size), *(x.split(size) for x in states)))
    if len(chunks) > 1 and torch.is_grad_enabled():
        # reentrant: each chunk adds its (V, D) gradient in place
        read_chunk = functools.partial(checkpoint, read_chunk, use_reentrant=True, preserve_rng_state=False)
    values = [torch.cat(parts) for parts in zip(*itertools.starmap(read_chunk, chunks))]
    return dict(zip(names, values))


def token_kls(policy_logits, reference_logits, targets) -> dict[str, torch.Tensor]:
    """KL(policy || reference) over the vocabulary at each token: {"kl": (n,)}, nats, at least 0.

    Of vocabularies of two sizes it is over the tokens of both: embeddings may be padded beyond.
    """
    width = min(policy_logits.shape[-1], reference_logits.shape[-1])
    policy, reference = (logits[:, :width].log_softmax(-1) for logits in (policy_logits, reference_logits))
    return {"kl": F.kl_div(reference, policy, reduction="none", log_target=True).sum(-1).clamp(min=0)}


def response_scores(model: PreTrainedModel, batch: Batch, bf16=False) -> torch.Tensor:
    """A reward model's scores (K, B) of the responses: its head at each one's last token."""
    with autocast(bf16), attention_of(model, batch):
        states = with_root_unsharded(model, lambda: model.base_model(**decoder_inputs(batch))[0])
    hidden = as_float(states.flatten(0, 1)[batch.ends])  # (K * B, D)
    head = model.score  # read in float32, for of bfloat16 scores many would be equal
    return F.linear(hidden, head.weight.to(hidden.dtype), head.bias).view(-1, len(batch.examples))


@contextlib.contextmanager
def in_any_order():
    """While it lasts a GPU may add in any order; see add_in_order."""
    asked, warns = (torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)


# ---------------------------------------------------------------- decoder and head, one after the other


def decoder_inputs(batch):
    """A Batch as a decoder's arguments; see attention_of for the mask."""
    places = {} if batch.segments is None else {"position_ids": batch.positions}
    mask = torch.ones_like(batch.input_ids)
    return {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False, **places}


def decoder_of(model):
    """A causal language model without its head."""
    decoder = model.get_decoder()
    if decoder is model:  # as Llama 4's text model says
        decoder = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if decoder is None:
        raise InputError(f"{model.config.model_type} names no decoder beside its head: take another model")
    return decoder


def decode(model, inputs):
    """What a model's decoder gives: its states, and what else its head's forward may ask for."""
    outputs = []
    with as_asked(model) as model:
        def run_decoder():
            outputs.append(decoder_of(model)(**inputs))
            states = outputs[0][0]  # on these a sharded model waits in the backward
            return states if states.requires_grad else states.requires_grad_(torch.is_grad_enabled())
        with_root_unsharded(model, run_decoder)
    return outputs[0]


def run_head(model, output, hidden):
    """The logits (N, V) of decoder states (N, D): the model's own forward, around a decoder that gives these.

    output: what decode gave. Whatever a model does after its decoder (Gemma 2 caps, Cohere and Granite scale)
    is done here too.
    """
    output.last_hidden_state = hidden[None]
    with as_asked(model) as model:
        decoder = decoder_of(model)
        decoder.forward = lambda *arguments, **options: output
        try:
            ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)  # only their number is read
            return model.forward(input_ids=ids, use_cache=False).logits.squeeze(0)  # past a shard's hooks
        finally:
            del decoder.forward


def autocast(bf16):
    """bfloat16 arithmetic on float32 weights, if it is asked for."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16)


def as_float(values):
    return values.to(torch.promote_types(values.dtype, torch.float32))


# ---------------------------------------------------------------- layouts


def choose_layouts(setting: str, models: list[tuple], examples: list[Example], bf16=False,
                   measured=None, drawn=0) -> tuple[Layout, ...]:
    """The layouts that microbatches may have: separate rows, shared ones, the cheaper each time, or packed.

    setting: `separate`, `shared` or `auto`. models: (model, response_logps or response_scores) pairs, the
    policy's first; of several ranks the first tries them on the examples, and its answer counts. bf16:
    whether they compute in bfloat16. measured: a dict, where what is found on a GPU is noted, or known from
    before. drawn: tokens that an answer may get. Raises InputError where setting=shared is not possible.
    """
    measured = {} if measured is None else measured
    layouts = from_first(try_layouts(setting, models, examples, bf16, measured, drawn))
    if layouts != (PACKED,):
        sdpa_instead(models)
    elif device().type == "cuda" and num_ranks() == 1:
        add_in_order(*models[0], examples, bf16)
    return layouts


def sdpa_instead(models):
    """varlen is for packed rows: some models read the name of their attention, and do others wrong."""
    for model, _ in models:
        if model.config._attn_implementation == "varlen":
            model.set_attn_implementation("sdpa")


@raise_on_all_ranks
def try_layouts(setting, models, examples, bf16, measured, drawn):
    """choose_layouts on the first rank; the others have no weights yet."""
    if rank() > 0:
        return (SEPARATE,)
    policy = models[0][0]
    with at_hand([model for model, _ in models]):
        if setting != "separate" and policy.config._attn_implementation == "varlen":
            if "not packed" not in measured:
                reasons = (why_not_packed(*pair, examples, bf16, drawn) for pair in models)
                measured["not packed"] = next(filter(None, reasons), None)
            if measured["not packed"] is None:
                return (PACKED,)
            print(f"attention  sdpa: with varlen there is a model {measured['not packed']}")
            sdpa_instead(models)
        layout = SEPARATE if setting == "separate" else SHARED
        reasons = [why_not_shared(*pair, examples, drawn, layout) for pair in models]
        reason = next(filter(None, reasons), None)
        if reason and setting == "shared":
            raise InputError(f"layout=shared is not possible with this model, {reason}: use layout=auto")
        if reason and setting == "auto":
            print(f"layout     separate, {reason}")
        if reason or setting == "separate":
            return (SEPARATE,)
        if setting == "shared":
            return (SHARED,)
        linear, attention = multiply_adds(policy)
        costs = ATTENTION_COST * attention, ATTENTION_COST * 2 * attention
        if policy.device.type == "cuda":
            costs = measured.get("attention") or measure_attention(policy, linear, bf16)
            measured["attention"] = costs
    return Layout(False, linear, costs[0]), Layout(True, linear, costs[1])


def multiply_adds(model):
    """Of a token's forward: in matrix products, without embeddings and head, of the experts that it takes;
    and in causal attention, for each token of its row. A masked row looks at all of them, twice as many."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ends = model.get_input_embeddings(), model.get_output_embeddings()  # the second for responses alone
    heads = {end.weight for end in ends if end is not None}
    taken = getattr(config, "num_experts_per_tok", None)
    linear = sum(x.numel() * (taken / x.shape[0] if taken and x.dim() == 3 else 1)
                 for x in model.parameters() if x.dim() > 1 and x not in heads)
    return linear, config.num_hidden_layers * config.num_attention_heads * head_dim


@torch.no_grad()
def measure_attention(model, linear, bf16, length=2048, num_tokens=2**13, repeats=3) -> tuple[float, float]:
    """Layout.quadratic of separate and of shared rows, by the clock: from rows of `length` tokens against
    short ones, in which matrix products take all the time."""
    length = min(length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or length)

    def measure(layout, length):
        """Seconds a token, the fastest of a few, and how long the rows are."""
        third = np.ones(max(1, length // 3), np.int32)
        examples = [Example("", third, (third, third), {})] * max(1, num_tokens // (2 * length))
        batch, times = collate(examples, layout=layout).to(model.device), []
        for _ in range(1 + repeats):  # the first makes plans and gets memory
            started = time.perf_counter()
            with autocast(bf16), attention_of(model, batch):
                decode(model, decoder_inputs(batch))[0].flatten()[0].item()  # waits
            times.append(time.perf_counter() - started)
        return min(times[1:]) / batch.input_ids.numel(), batch.input_ids.shape[1]
    short, _ = measure(SEPARATE, 64)
    long_ones = [measure(layout, length) for layout in (SEPARATE, SHARED)]
    costs = (max(0.0, linear * (seconds / short - 1) / width) for seconds, width in long_ones)
    return tuple(float(f"{cost:.0e}") for cost in costs)  # not a little other each time


def add_in_order(model, response_values, examples, bf16):
    """Asks a GPU to add in one order, in attention's backward above all, so that a run gives the same bits
    again; unless the model has an operation without one, by a try forward and backward on a few tokens."""
    few = dataclasses.replace(examples[0], prompt=examples[0].prompt[-32:], columns={}, token_weights=None,
                              responses=tuple(ids[:32] for ids in examples[0].responses))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would only take time
    try:
        values = response_values(model, collate([few], layout=PACKED).to(model.device), bf16)
        torch.autograd.grad(values.sum(), next(x for x in model.parameters() if x.requires_grad))
    except RuntimeError as error:
        torch.use_deterministic_algorithms(False)
        if "deterministic" not in str(error):
            raise
        print(f"bits       of a run are others each time: {first_line(error)}")


@contextlib.contextmanager
def at_hand(models):
    """While it lasts: in a sharded run the first rank's models on its GPU, if they fit there; on a CPU with
    all its cores, as other ranks wait."""
    num_threads = torch.get_num_threads()
    num_bytes = sum(4 * x.numel() for model in models for x in model.parameters())
    is_moved = num_ranks() > 1 and device().type == "cuda" and 1.3 * num_bytes < torch.cuda.mem_get_info()[0]
    if is_moved:
        for model in models:
            model.to(device())
    elif num_ranks() > 1:
        torch.set_num_threads(os.cpu_count())
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        for model in models if is_moved else ():
            model.to("cpu")
        torch.cuda.empty_cache()  # copies in float32


def why_not_packed(model, response_values, examples, bf16, drawn):
    """Why packed rows are not right, or None: why_not_shared, and on a GPU torch's kernel by itself."""
    reason = why_not_shared(model, response_values, examples, drawn, PACKED, bf16)
    error = kernel_error(model.config.get_text_config()) if device().type == "cuda" and not reason else 0
    return reason if error < 0.05 else f"for whose heads torch's kernel is off by {error:.1e}"


@torch.no_grad()
def why_not_shared(model, response_values, examples, drawn=0, layout=SHARED, bf16=False):
    """Why this layout gives a model other numbers than separate rows, or None; tried on pairs_to_try.

    After each layer the states that predict response tokens are compared: there a wrong rule shows, however
    flat the predictions are. They may differ as far as separate rows' do when every layer's output is changed
    by DISTURBANCE of itself; all in float32. With bf16 as far as bfloat16's do from these. Raises InputError
    if separate rows are not right either, as a row's states depend on the rows beside it.
    """
    def read(pairs, layout=SEPARATE, bf16=False, disturbance=0.0):
        batch = collate(pairs, layout=layout).to(model.device)
        with layer_states(model, batch, disturbance) as states:
            response_values(model, batch, bf16)
        return states

    def compare(pairs):
        """How far off a short row beside a longer one is, and this layout: times what rounding does."""
        if layout.packed:
            model.set_attn_implementation("sdpa")
        with in_float32(model):
            exact, disturbed, alone = read(pairs), read(pairs, disturbance=DISTURBANCE), read(pairs[1:])
        apart = read(pairs, bf16=True) if bf16 else exact
        if layout.packed:
            model.set_attn_implementation("varlen")
        with contextlib.nullcontext() if bf16 else in_float32(model):
            together = read(pairs, PACKED if layout.shared else SEPARATE, bf16)  # in one row
        places = np.repeat([False, True] * 2, [len(pair.responses[k]) for k in (0, 1) for pair in pairs])
        beside = excess(alone, *([x[places] for x in states] for states in (exact, disturbed)))
        return beside, excess(together, apart, exact if bf16 else disturbed)
    pairs, was_training = pairs_to_try(model, examples, drawn), model.training
    model.eval()
    try:
        beside, error = compare(pairs)
        if not max(beside, error) < MARGIN:  # or rounding gave a token to another expert: on other rows too?
            pairs = [dataclasses.replace(pair, prompt=pair.prompt[::-1].copy()) for pair in pairs]
            beside, error = map(min, (beside, error), compare(pairs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse positions or masks in its own way
        return f"which does not take shared prompts: {first_line(error)}"
    finally:
        model.train(was_training)
    if not beside < MARGIN:
        raise InputError(f"{model.config.model_type} says other things of a row where a longer one is beside "
                         f"it, {beside:.0e} times what rounding does: lower max_length, or choose another")
    return None if error < MARGIN else (
        f"whose numbers in shared rows are off, {error:.0e} times what rounding does")


def pairs_to_try(model, examples, drawn):
    """Two pairs: one with the longest row that may come, answers of `drawn` tokens counted, for a rule may
    act only at a distance; and one of few tokens. Second responses are backwards, so that they are others."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    longest = max(examples, key=lambda x: len(x.prompt) + max(drawn, *map(len, x.responses)))
    left, few = positions - len(longest.prompt), min(32, positions // 2)
    size = max(*map(len, longest.responses), min(drawn, left))
    room = max(x.num_tokens for x in examples) - len(longest.prompt) - size

    def pair(example, prompt, *sizes):
        ids = max(example.responses, key=len)
        responses = np.resize(ids, sizes[0]), np.resize(ids[::-1], sizes[1])
        return Example(example.where, prompt, responses, {})
    other = examples[len(examples) // 2]
    return [pair(longest, longest.prompt, size, min(left, max(few, min(size, room)))),
            pair(other, other.prompt[-few:], few, few)]


@contextlib.contextmanager
def layer_states(model, batch, disturbance, seed=0):
    """While it lasts each layer notes 16 numbers of the states that predict response tokens: gives a list of
    (N, 16). disturbance: of its output, which is added to that at random."""
    generator, states = torch.Generator(batch.input_ids.device).manual_seed(seed), []

    def note(module, arguments, output):
        x = output if torch.is_tensor(output) else output[0]
        if disturbance:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x.mul_(1 + disturbance * noise)
        x = x.reshape(-1, batch.input_ids.numel(), x.shape[-1])[:, batch.states]
        states.append(as_float(x[..., ::max(1, x.shape[-1] // 16)].transpose(0, 1).flatten(1)).cpu())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = decoder_layers(model) or max(lists, key=len)  # which older code does not mark
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def excess(states, expected, disturbed):
    """How many times as far as disturbed states others are from what is expected, at most.

    Of each layer the token that is furthest off, relative to its largest number, against the furthest there,
    the second against the second, and so on: some may go to other experts, the more the more is disturbed.
    """
    ratios = []
    for layer, right, other in zip(states, expected, disturbed, strict=True):
        scale = right.abs().amax(1).clamp(min=torch.finfo(right.dtype).tiny)
        error, own = (((x - right).abs().amax(1) / scale).sort().values for x in (layer, other))
        ratios.append((error / own.clamp(min=own.median())).max())
    return torch.stack(ratios).max().item()


@contextlib.contextmanager
def in_float32(model):
    """While it lasts a model's bfloat16 weights are float32; those of a layer only while it runs, or a model
    that just fits would not start."""
    def narrow(module):
        return {x for x in (*module.parameters(), *module.buffers()) if x.dtype == torch.bfloat16}

    def change(tensors, dtype):
        for x in tensors:
            x.data = x.data.to(dtype)  # and back to just what it was
    layers = {layer: narrow(layer) for layer in decoder_layers(model)}
    rest, hooks = narrow(model).difference(*layers.values()), []
    change(rest, torch.float32)
    for layer, own in layers.items():
        hooks += [layer.register_forward_pre_hook(lambda *_, own=own: change(own, torch.float32)),
                  layer.register_forward_hook(lambda *_, own=own: change(own, torch.bfloat16))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        change(rest.union(*layers.values()), torch.bfloat16)
