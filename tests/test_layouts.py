"""Which layouts a model can be trusted with: what shares rows trains as each response alone does."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, obvious_logp, tiny_of

import engine.forward
from engine import InputError
from engine.batches import SEPARATE, Example, collate
from engine.forward import MARGIN, choose_layouts, layer_states, pairs_to_try, response_logps, why_not_shared

WINDOW = 24  # of tokens, shorter than the rows
HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MORE = {
    "bloom": {}, "mpt": {}, "gpt_neo": {"window_size": WINDOW}, "mamba": {}, "granite": {}, "stablelm": {},
    "phi": {}, "starcoder2": {}, "olmo": {}, "glm4": {}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": STATES | {"mamba_d_ssm": 64},
    "bamba": STATES | {"mamba_expand": 2, "attn_layer_indices": [1]},
    "qwen3_5_text": HYBRID, "cohere2": {"layer_types": ["sliding_attention", "full_attention"]}}
SHARE_NOT = ("bloom", "mpt", "gpt_neo", "mamba", "lfm2", "falcon_h1", "bamba", "qwen3_5_text")
WINDOWS = ("sliding_window", "attention_chunk_size")
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}


def family(model_type, scale=1.0, **more):
    """A tiny model with the weights of a fresh one, times `scale`: of 15 its predictions are peaked."""
    own = FAMILIES.get(model_type, {}) | MORE.get(model_type, {})
    own |= {name: WINDOW for name in WINDOWS if name in own or name == WINDOWS[0] == model_type}
    spread = {"init_std" if model_type == "opt" else "initializer_range": 0.02 * scale}
    return tiny_of(model_type, **own | spread | more)


def pairs_of(*sizes, vocab_size=60):
    rng = np.random.default_rng(0)
    return [Example("x", rng.integers(3, vocab_size, prompt), tuple(
        rng.integers(3, vocab_size, length) for length in lengths), {}) for prompt, *lengths in sizes]


PAIRS = pairs_of((30, 40, 25), (6, 12, 20), (9, 3, 4), (1, 1, 2))


def in_float64(model):
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # for the others have no float64
    return model


@contextlib.contextmanager
def doubles():
    """What transformers casts to float32 even in float64 models (norms, softmax, angles) stays float64."""
    cast, softmax = torch.Tensor.to, F.softmax

    def widened(x):
        return torch.float64 if x is torch.float32 else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", lambda x, *given, **named: cast(
            x, *map(widened, given), **{name: widened(value) for name, value in named.items()}))
        patch.setattr(F, "softmax", lambda *given, dtype=None, **named: softmax(
            *given, dtype=widened(dtype), **named))
        yield


def losses_of_steps(model, logps_of, num_steps=3):
    """Of DPO and SFT together, with the model as it is now for a reference; logps_of(model): (2, B)."""
    model = in_float64(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    with torch.no_grad():
        reference = logps_of(model)
    for _ in range(num_steps):
        ratio = logps_of(model) - reference
        loss = -F.logsigmoid(0.5 * (ratio[0] - ratio[1])).mean() - 0.1 * logps_of(model)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(examples):
    """The plain model, of each response by itself."""
    return lambda model: torch.stack([torch.stack([obvious_logp(model, x, x.responses[k]) for x in examples])
                                      for k in (0, 1)])


# ---------------------------------------------------------------- all families, by what training gives


def check_family(model_type, scale):
    """Three steps in float64 in each layout that the run may use, and what the first says in float32, against
    the plain model, of each response by itself; a model that is right does share, in each type of weights."""
    model = family(model_type, scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tried = in_float64(model) if dtype == torch.float64 else copy.deepcopy(model).to(dtype)
        layouts = choose_layouts("auto", [(tried, response_logps)], PAIRS)
        assert [layout.shared for layout in layouts] == [False] + [True] * (model_type not in SHARE_NOT)
    with torch.no_grad():
        exact = alone(PAIRS)(in_float64(model))
    with doubles():
        expected = losses_of_steps(model, alone(PAIRS))
    for layout in layouts:
        with torch.no_grad():
            first = response_logps(model, collate(PAIRS, layout=layout))
        assert (first - exact).abs().max() <= 1e-5 * exact.abs().max()
        batch = collate(PAIRS, torch.float64, layout)
        with doubles():
            losses = losses_of_steps(model, lambda model, batch=batch: response_logps(model, batch))
        assert losses == pytest.approx(expected, rel=1e-9) and len(set(losses)) == 3


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_neo", "bloom", "lfm2"])
def test_fresh_weights(model_type):
    check_family(model_type, 1)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1, 15])
@pytest.mark.parametrize("model_type", [*FAMILIES, *MORE])
def test_all_families(model_type, scale):
    check_family(model_type, scale)


# ---------------------------------------------------------------- wrong rules, in the attention of a Llama


def spoil(model, rule):
    """Puts rule(positions, allowed, is_shared) -> (positions, allowed) into a Llama's attention: (R, T) each
    token's, and (R, T, T) what it sees."""
    for layer in model.model.layers:
        def attend(hidden_states, position_embeddings, attention_mask, position_ids,
                   right=layer.self_attn.forward, **options):
            is_shared = attention_mask is not None
            allowed = attention_mask[:, 0] == 0 if is_shared else torch.ones(
                1, *2 * [hidden_states.shape[1]], dtype=torch.bool).tril()
            positions, allowed = rule(position_ids, allowed, is_shared)
            bias = torch.where(allowed, 0.0, -torch.inf).to(hidden_states.dtype)[:, None]
            turned = model.model.rotary_emb(hidden_states, positions)
            return right(hidden_states=hidden_states, position_embeddings=turned, attention_mask=bias,
                         **options)
        layer.self_attn.forward = attend
    return model


def as_it_is(positions, allowed, is_shared):
    return positions, allowed


def window_off_by_one(positions, allowed, is_shared):
    """Of 200 tokens, and in shared rows of one less."""
    distance = positions[:, :, None] - positions[:, None, :]
    return positions, allowed & (distance < 200 - is_shared)


def window_of_the_row(positions, allowed, is_shared):
    """Of 200 tokens, counted in the row instead of in the sequence."""
    return positions, allowed & torch.ones_like(allowed).triu(-199)


def next_position(positions, allowed, is_shared):
    """In shared rows the second response stands one further from its prompt."""
    follows = (positions.diff(dim=1, prepend=positions[:, :1]) < 0).cumsum(1) > 0
    return positions + (follows & is_shared), allowed


def own_place(positions, allowed, is_shared):
    """A token does not see itself, in shared rows, where it is the 240th."""
    return positions, allowed & ~((positions == 240)[:, :, None] & torch.eye(
        allowed.shape[-1], dtype=torch.bool) & is_shared)


@pytest.mark.parametrize("scale", [1, 15])
@pytest.mark.parametrize("rule", [window_off_by_one, window_of_the_row, next_position, own_place])
def test_a_wrong_rule_is_found(rule, scale):
    """In rows of 250 tokens, and not where rows are too short for it to act; nor is the copy itself wrong."""
    model = family("llama", scale)
    short, long = pairs_of((60, 60, 50), (9, 3, 4)), pairs_of((150, 100, 90), (9, 3, 4))
    assert why_not_shared(spoil(copy.deepcopy(model), as_it_is), response_logps, long) is None
    wrong = spoil(model, rule)
    assert "in shared rows are off" in why_not_shared(wrong, response_logps, long)
    if rule is not next_position:
        assert why_not_shared(wrong, response_logps, short) is None
        assert "are off" in why_not_shared(wrong, response_logps, short, drawn=200)  # as an answer may be


@pytest.mark.parametrize("sizes", [(3, 2, 1), (1, 1, 1), (20, 1, 1), (4, 9)])
def test_short_rows_tell_enough(sizes):
    for model_type in ("llama", "mistral"):
        assert why_not_shared(family(model_type), response_logps, pairs_of(sizes)) is None
    for model_type in ("lfm2", "mamba", "bloom", "mpt"):
        assert "are off" in why_not_shared(family(model_type), response_logps, pairs_of(sizes))


def test_what_is_tried():
    """The longest row, with tokens of its own; its other response as long as some example has room for."""
    pairs = pairs_of((30, 4, 50), (70, 5, 20), (2, 3, 4), (8, 8, 100))
    long, other = pairs_to_try(tiny_of("llama"), pairs, 0)
    assert long.prompt is pairs[3].prompt and [*map(len, long.responses)] == [100, 32]
    assert np.array_equal(long.responses[0], pairs[3].responses[1])
    assert np.array_equal(long.responses[1], long.responses[0][:-33:-1])  # backwards: other tokens
    assert other.row_length == 2 + 32
    long, _ = pairs_to_try(tiny_of("llama"), pairs, 60)  # to a prompt of 70
    assert long.row_length == 130 and long.num_tokens == 162
    long, other = pairs_to_try(tiny_of("gpt2", n_positions=80), pairs[:3], 60)  # within its positions
    assert [len(long.prompt), *map(len, long.responses)] == [70, 20, 10] and other.row_length == 64
    long, other = pairs_to_try(tiny_of("llama"), pairs_of((6, 40)), 0)
    assert (long.row_length, long.num_tokens) == (46, 78)


def test_each_layers_states_are_noted():
    """Every second of 32 numbers, at the tokens before those of responses, as transformers gives them."""
    model, (pair, *_) = family("llama"), PAIRS
    with torch.no_grad(), layer_states(model, collate([pair]), 0.0) as states:
        response_logps(model, collate([pair]))
    for k, (start, stop) in enumerate(((0, 40), (40, 65))):
        ids = torch.tensor([[*pair.prompt, *pair.responses[k]]])
        embedded = model.model.embed_tokens(ids)
        angles = model.model.rotary_emb(embedded, torch.arange(ids.shape[1])[None])
        exact = model.model.layers[0](embedded, position_embeddings=angles)
        assert torch.allclose(states[0][start:stop], exact[0, 29:-1, ::2], rtol=0, atol=1e-6)
    assert [x.shape for x in states] == [(65, 16)] * 2 and not torch.equal(*states)


def test_rounding_has_a_margin():
    """A model that is right is off by less than a quarter of what is allowed."""
    found, excess = [], engine.forward.excess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.forward, "excess", lambda *given: found.append(excess(*given)) or found[-1])
        for model_type in ("llama", "gpt2", "gemma2", "mixtral", "stablelm"):
            for scale in (1, 15):
                assert why_not_shared(family(model_type, scale), response_logps, PAIRS) is None
    assert len(found) == 20 and 0 < max(found) < MARGIN / 4


def test_a_difference_must_show_twice(monkeypatch):
    """On other rows too: once a token may go to another expert for rounding alone."""
    for found, is_right in (([0, 9, 0, 0], True), ([9, 0, 0, 0], True), ([0, 9, 0, 9], False)):
        answers = iter(found)
        monkeypatch.setattr(engine.forward, "excess", lambda *given, answers=answers: next(answers))
        assert (why_not_shared(family("llama"), response_logps, PAIRS) is None) == is_right
        assert not [*answers]


def test_of_experts_a_token_may_change():
    """One state of a hundred is elsewhere, as are two under the disturbance; in another model half are."""
    right = torch.ones(100, 16)
    moved, disturbed, wrong = (right + 1e-7 * (1 + i % 2) for i in range(3))
    disturbed = right + 1e-6
    moved[7], disturbed[[3, 50]], wrong[:50] = 1.5, 1.5, 1.01
    assert engine.forward.excess([moved], [right], [disturbed]) < 1.5
    assert engine.forward.excess([wrong], [right], [disturbed]) > 1000
    assert not engine.forward.excess([torch.full_like(right, torch.nan)], [right], [disturbed]) < MARGIN


# ---------------------------------------------------------------- neighbours


def longrope(scale=15):
    return family("phi3", scale, sliding_window=None, rope_parameters=LONGROPE, max_position_embeddings=512,
                  original_max_position_embeddings=64)


BOTH_SIDES = pairs_of((60, 63, 2), (30, 50, 20), (5, 5, 5))


@pytest.mark.parametrize("scale", [1, 15])
def test_longrope_has_a_rows_own_factors(scale, capsys):
    """Rows on both sides of the original length, and a pair with a response on each: as each alone."""
    model = longrope(scale)
    assert choose_layouts("auto", [(model, response_logps)], BOTH_SIDES) == (SEPARATE,)
    assert "layout     separate, whose numbers in shared rows are off" in capsys.readouterr().out
    batch = collate(BOTH_SIDES, torch.float64)
    with doubles():
        expected = losses_of_steps(model, alone(BOTH_SIDES))
        assert losses_of_steps(model, lambda model: response_logps(model, batch)) == pytest.approx(
            expected, rel=1e-9)
    short = pairs_of((20, 22, 9), (9, 3, 4))
    assert len(choose_layouts("auto", [(model, response_logps)], short)) == 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("setting", ["auto", "separate", "shared"])
def test_a_model_whose_rows_depend_on_others_is_refused(setting):
    """As any other rotary embedding that looks at the longest position would be."""
    model = longrope()
    model.model.rotary_emb.rope_type, known = "of its own", model.model.rotary_emb.forward

    def forward(x, position_ids):
        model.model.rotary_emb.rope_type = "longrope"
        try:
            return known(x, position_ids)
        finally:
            model.model.rotary_emb.rope_type = "of its own"
    model.model.rotary_emb.forward = forward
    with pytest.raises(InputError, match="phi3 says other things of a row where a longer one is beside it"):
        choose_layouts(setting, [(model, response_logps)], BOTH_SIDES)
    choose_layouts(setting, [(model, response_logps)], pairs_of((20, 22, 9), (9, 3, 4)))
