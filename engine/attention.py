"""What does a token see? Masks of shared rows, and attention of packed rows without any."""

import contextlib
import functools

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.masking_utils import sdpa_mask

from engine.batches import Batch, Plan
from engine.distributed import device


@contextlib.contextmanager
def attention_of(model, batch: Batch):
    """While it lasts, a token of a shared row sees only its prompt and its own response, by the model's rule.

    The rule (causal, a sliding window, ...) is asked with the positions in the response's own sequence. The
    decoder is given a mask of ones, so that transformers looks for no packing of its own, for which a GPU
    would be waited for; it ends here: padding is on the right, where causal attention never looks. LongRoPE,
    whose factors are those of the longest position that it is given, is given one row after another.
    """
    rotaries = [x for x in model.modules() if "longrope" in str(vars(x).get("rope_type"))]
    name, segments = model.config._attn_implementation, batch.segments
    make_mask = MASKS[name] if name in MASKS else None

    def make_own_mask(*arguments, mask_function, attention_mask=None, dtype=None, **options):
        if segments is None:
            return make_mask(*arguments, mask_function=mask_function, attention_mask=None, dtype=dtype,
                             **options)
        if name == "varlen" and batch.plan is not None:
            return batch.plan  # which the layers hand on to attend, as whatever stands here

        def allowed(b, h, q, k):
            seen = (segments[b, k] == segments[b, q]) | (segments[b, k] == batch.prompts[b, q])
            return seen & mask_function(b, h, batch.positions[b, q], batch.positions[b, k])
        mask = make_mask(*arguments, mask_function=allowed, attention_mask=None, dtype=dtype,
                         **options | {"allow_is_causal_skip": False})
        return as_bias(mask, dtype) if torch.is_tensor(mask) and mask.dtype == torch.bool else mask

    if make_mask:
        MASKS[name] = make_own_mask
    for rotary in rotaries:
        rotary.forward = functools.partial(turn_by_row, rotary.forward, batch.positions)
    try:
        yield
    finally:
        if make_mask:
            del MASKS[name]  # the override, not transformers' own entry
        for rotary in rotaries:
            del rotary.forward


def turn_by_row(forward, positions, x, position_ids, *more, **options):
    """Cosines and sines of a rotary embedding at positions (R, T), a row at a time."""
    parts = [forward(x, row, *more, **options) for row in positions.split(1)]
    return tuple(map(torch.cat, zip(*parts)))


def as_bias(mask, dtype):
    """A boolean mask (R, 1, T, T) as what is added to scores: made once, where each layer would make its own
    and keep it. Rows of a multiple of 16 in memory, or a GPU's kernel would copy it."""
    if torch.is_autocast_enabled(mask.device.type):
        dtype = torch.get_autocast_dtype(mask.device.type)
    width = mask.shape[-1]
    bias = torch.full((*mask.shape[:-1], -(-width // 16) * 16), -torch.inf, dtype=dtype, device=mask.device)
    return bias[..., :width].masked_fill_(mask, 0)


# ---------------------------------------------------------------- packed rows, a sequence at a time


KNOWN = ("dropout", "scaling", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache",
         "output_attentions", "output_hidden_states", "output_router_logits")  # what models say to attention


def attend(module, query, key, value, attention_mask, **options):
    """transformers' attention=varlen: (1, heads, T, head_dim) each -> (1, T, heads, head_dim).

    In a packed row each sequence of its Plan by itself; any other row by sdpa. Raises ValueError for what
    FlashAttention does not know: a soft cap, sinks, sparse attention, and some sizes.
    """
    if not isinstance(attention_mask, Plan):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if unknown := [name for name, x in options.items() if name not in KNOWN and x is not None]:
        raise ValueError(f"attention=varlen has no {', '.join(unknown)}")
    size = query.shape[-1]
    if not size == key.shape[-1] == value.shape[-1] <= 256 or size % 8:
        raise ValueError(f"attention=varlen has no heads of {size} and {value.shape[-1]}")
    plan, kernel = attention_mask, varlen_attn if query.is_cuda else attend_one_by_one
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    window = options.get("sliding_window")  # of so many keys, the query's own counted
    attended = kernel(
        query.contiguous(), key[plan.keys], value[plan.keys], plan.query_ends, plan.key_ends,
        plan.max_queries, plan.max_keys, scale=options.get("scaling"), enable_gqa=True,
        window_size=(window - 1 if window else -1, 0))
    return attended[None], None


def attend_one_by_one(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, enable_gqa,
                      window_size):
    """What torch's varlen_attn gives, where there is no FlashAttention: (T, heads, head_dim).

    A sequence's last query stands at its last key; each sees the keys up to its own place, and so many as
    the window has before it (-1: all).
    """
    def attend_to(query, key, value):
        places = torch.arange(len(key), device=key.device)
        back = places[len(key) - len(query):, None] - places  # how far a key lies behind a query
        mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        heads = (x.transpose(0, 1) for x in (query, key, value))
        return scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
    queries, keys = (ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k))
    return torch.cat([*map(attend_to, query.split(queries), key.split(keys), value.split(keys))])


@torch.no_grad()
def kernel_error(config) -> float:
    """How far torch's kernel is off on this GPU, for a model's heads and window: of random numbers, in two
    sequences of which the second has fewer queries than keys."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = min(getattr(config, "sliding_window", None) or 0, 30)
    like = {"device": device(), "dtype": torch.bfloat16}
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    query, key, value = (torch.randn(number, each, size, **like) for number, each in (
        (100, heads), (130, key_heads), (130, key_heads)))
    ends = (torch.tensor(ends, dtype=torch.int32, device=device()) for ends in ([0, 60, 100], [0, 60, 130]))
    options = {"scale": None, "enable_gqa": True, "window_size": (window - 1, 0)}
    given = *ends, 60, 70
    exact = attend_one_by_one(query.float(), key.float(), value.float(), *given, **options)
    return (varlen_attn(query, key, value, *given, **options).float() - exact).abs().max().item()


AttentionInterface.register("varlen", attend)
AttentionMaskInterface.register("varlen", sdpa_mask)
