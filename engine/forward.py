"""What does a model say of a batch, and in which layout? Where the loss meets the logits.

B: examples of a batch. K: responses of each. N: response tokens in it. D: hidden size. V: vocabulary.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

from engine import InputError, first_line
from engine.batches import SEPARATE, Batch, Example, Layout, collate
from engine.distributed import device, num_ranks, raise_on_all_ranks, rank, with_root_unsharded

CHUNK_LOGITS = 2**24  # how many logits of a model exist at once
ATTENTION_COST = 3.0  # a multiply-add in attention against one in a matrix product, by the clock


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
        with autocast(bf16), shared_attention(model, batch):
            outputs.append(decode(model, decoder_inputs(batch)))
    states = [output[0].flatten(0, 1)[batch.states] for output in outputs]  # (N, D) each
    names = []

    def read_chunk(targets, *hidden):
        with autocast(bf16):
            logits = [as_float(run_head(*parts)) for parts in zip(models, outputs, hidden)]
        values = function(*logits, targets)
        names[:] = values
        return tuple(values.values())  # a checkpoint passes no dict on

    size = max(1, CHUNK_LOGITS // models[0].config.get_text_config().vocab_size)
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
    with autocast(bf16), shared_attention(model, batch):
        states = with_root_unsharded(model, lambda: model.base_model(**decoder_inputs(batch))[0])
    hidden = as_float(states.flatten(0, 1)[batch.ends])  # (K * B, D)
    head = model.score  # read in float32, for of bfloat16 scores many would be equal
    return F.linear(hidden, head.weight.to(hidden.dtype), head.bias).view(-1, len(batch.examples))


# ---------------------------------------------------------------- decoder and head, one after the other


def decoder_inputs(batch):
    """A Batch as a decoder's arguments. Padding is on the right, where causal attention never looks."""
    options = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.segments is not None:  # with a mask of ones transformers looks for no packing of its own
        options |= {"position_ids": batch.positions, "attention_mask": torch.ones_like(batch.input_ids)}
    return options


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

    def run_decoder():
        outputs.append(decoder_of(model)(**inputs))
        return outputs[0][0]  # on these a sharded model waits in the backward
    with_root_unsharded(model, run_decoder)
    return outputs[0]


def run_head(model, output, hidden):
    """The logits (N, V) of decoder states (N, D): the model's own forward, around a decoder that gives these.

    output: what decode gave. Whatever a model does after its decoder (Gemma 2 caps, Cohere and Granite scale)
    is done here too.
    """
    output.last_hidden_state = hidden[None]
    decoder = decoder_of(model)
    decoder.forward = lambda *arguments, **options: output
    try:
        ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)  # only their number is read
        return model.forward(input_ids=ids, use_cache=False).logits.squeeze(0)  # past a sharded model's hooks
    finally:
        del decoder.forward


def autocast(bf16):
    """bfloat16 arithmetic on float32 weights, if it is asked for."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16)


def as_float(values):
    return values.to(torch.promote_types(values.dtype, torch.float32))


# ---------------------------------------------------------------- several branches in a row


@contextlib.contextmanager
def shared_attention(model, batch):
    """While it lasts, a token of a shared row sees only its prompt and its own response, by the model's rule.

    The rule (causal, a sliding window, ...) is asked with the positions in the response's own sequence.
    """
    if batch.segments is None:
        yield
        return
    name, segments, prompts, positions = (
        model.config._attn_implementation, batch.segments, batch.prompts, batch.positions)
    make_mask = MASKS[name]

    def make_shared_mask(*arguments, mask_function, attention_mask=None, **options):
        def allowed(b, h, q, k):
            seen = (segments[b, k] == segments[b, q]) | (segments[b, k] == prompts[b, q])
            return seen & mask_function(b, h, positions[b, q], positions[b, k])
        return make_mask(*arguments, mask_function=allowed, attention_mask=None,
                         **options | {"allow_is_causal_skip": False})

    MASKS[name] = make_shared_mask
    try:
        yield
    finally:
        del MASKS[name]  # the override, not transformers' own entry


@raise_on_all_ranks
def choose_layouts(setting: str, models: list[tuple], examples: list[Example]) -> tuple[Layout, ...]:
    """The layouts that microbatches may have: separate rows, shared ones, or the cheaper each time.

    setting: `separate`, `shared` or `auto`. models: (model, response_logps or response_scores) pairs, the
    policy's first; of several ranks the first tries them on the examples, and its answer counts. Costs are
    multiply-adds of a token's forward, those in attention weighted by how much slower they are.
    Raises InputError where setting=shared is not possible.
    """
    if setting == "separate" or rank() > 0:  # which has no weights yet
        return (SEPARATE,)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() if num_ranks() > 1 else num_threads)  # while the others wait
    reason = next(filter(None, (why_not_shared(*pair, examples) for pair in models)), None)
    torch.set_num_threads(num_threads)
    if reason and setting == "shared":
        raise InputError(f"layout=shared is not possible with this model, {reason}: use layout=auto")
    if reason:
        print(f"layout     separate, {reason}")
        return (SEPARATE,)
    policy = models[0][0]
    config = policy.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = ATTENTION_COST * config.num_hidden_layers * config.num_attention_heads * head_dim
    ends = policy.get_input_embeddings(), policy.get_output_embeddings()  # the second for responses alone
    heads = {end.weight for end in ends if end is not None}
    linear = sum(x.numel() for x in policy.parameters() if x not in heads)
    shared = Layout(True, linear, 2 * attention)
    return (shared,) if setting == "shared" else (Layout(False, linear, attention), shared)


@torch.no_grad()
def why_not_shared(model, response_values, examples):
    """Why shared rows give this model other numbers than separate ones, or None: tried on three examples.

    In float32 the responses' values must agree, and one's must not move with another's tokens: those of the
    longest example in a row of its own, and of the two shortest, in one if they fit.
    """
    def backwards(example, k):
        responses = list(example.responses)[:1] + [example.responses[-1]]
        responses[k] = responses[k][::-1].copy()
        return dataclasses.replace(example, responses=tuple(responses), columns={}, token_weights=None)
    ordered = sorted(examples, key=lambda example: example.num_tokens)
    pairs = [backwards(example, 1) for example in (ordered[-1], *ordered[:2])]
    others = [backwards(pair, 0) for pair in pairs[:2]] + pairs[2:]
    was_training = model.training
    model.eval()
    narrow = [x for x in (*model.parameters(), *model.buffers()) if x.dtype == torch.bfloat16]
    for x in narrow:
        x.data = x.data.float()
    try:
        apart, together, moved = (
            response_values(model, collate(rows, layout=Layout(shared)).to(model.device))
            for rows, shared in ((pairs, False), (pairs, True), (others, True)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse positions or masks in its own way
        return f"which does not take shared prompts: {first_line(error)}"
    finally:
        for x in narrow:
            x.data = x.data.bfloat16()  # just what it was
        model.train(was_training)
    scale = apart.abs().clamp(min=1)
    error = ((together - apart).abs() / scale).max().item()
    if not error < 1e-4:
        return f"whose numbers in shared rows are off by {error:.1e}"
    change = (together - moved).abs() / scale
    leak = max(change[1].max().item(), change[:, 2:].amax(0).sum().item())
    return f"in which one response sees another (by {leak:.1e})" if leak > 1e-5 else None
