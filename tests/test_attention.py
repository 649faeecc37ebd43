"""What a token sees is the same in every layout: by a mask that is made once, or a sequence at a time."""

import copy

import numpy as np
import pytest
import torch
import transformers.masking_utils
from conftest import FEW_ROWS, losses_of, same_weights, tiny_of
from torch._subclasses import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

import engine.attention
from engine.attention import attend, attend_one_by_one
from engine.batches import PACKED, SEPARATE, SHARED, Example, collate
from engine.forward import choose_layouts, decode, decoder_inputs, response_logps

SIZES = {"llama": {"num_attention_heads": 4, "num_key_value_heads": 2}, "mistral": {"sliding_window": 7},
         "gpt_neox": {}, "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1}}


def random_examples(vocab_size=60):
    """Prompt and responses, of which the sliding window of 7 cuts some off and some not."""
    rng = np.random.default_rng(0)
    return [Example("x", rng.integers(3, vocab_size, prompt), tuple(
        rng.integers(3, vocab_size, length) for length in lengths), {})
        for prompt, *lengths in ((12, 9, 14), (5, 20, 3), (16, 4, 4), (1, 1, 2))]


def states_and_gradients(model, batch):
    """The decoder's states where there is no padding, and the gradients of a sum of them."""
    model.zero_grad()
    with engine.attention.attention_of(model, batch):
        states = decode(model, decoder_inputs(batch))[0][batch.segments >= 0]
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    (states * direction).sum().backward()
    return states.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model_type", SIZES)
def test_a_packed_row_is_a_row_with_a_dense_mask(model_type, checkpointed):
    """The very row, by sequences and by the mask of all its tokens: states and gradients."""
    dense = tiny_of(model_type, **SIZES[model_type])
    packed = copy.deepcopy(dense)
    packed.set_attn_implementation("varlen")
    if checkpointed:
        packed.activation_checkpointing_enable({"use_reentrant": False})
        packed.train()
    batch = collate(random_examples(), layout=PACKED)
    assert batch.input_ids.shape == (1, 91)  # each token once, no padding
    expected, gradients = states_and_gradients(dense, batch)
    states, own = states_and_gradients(packed, batch)
    assert expected.std() > 0.1 and (states - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
    assert len(own) == len(gradients) > 10
    for a, b in zip(own, gradients):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_plan_is_what_each_response_sees():
    """By hand: prompts of 2 and 1, responses of 1 and 2, of 1 and 1."""
    pairs = [Example("x", np.arange(2), (np.arange(1), np.arange(2)), {}),
             Example("y", np.arange(1), (np.arange(1), np.arange(1)), {})]
    plan = collate(pairs, layout=PACKED).plan
    assert plan.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 5, 7]
    assert plan.query_ends.tolist() == [0, 3, 5, 7, 8] and plan.key_ends.tolist() == [0, 3, 7, 9, 11]
    assert plan.query_ends.dtype == plan.key_ends.dtype == torch.int32
    assert (plan.max_queries, plan.max_keys) == (3, 4)
    assert collate(pairs, layout=SHARED).plan is collate(pairs).plan is None


@pytest.mark.parametrize("window", [-1, 0, 3])
def test_a_query_sees_the_keys_up_to_its_own_place_from_the_end(window):
    """One head after another, by hand: 2 queries of 5 keys, then 3 of 3; 4 heads share 2 of keys."""
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 5, 8], dtype=torch.int32)
    attended = attend_one_by_one(query, key, value, *ends, 3, 5, scale=0.5, enable_gqa=True,
                                 window_size=(window, 0))
    sees = [range(0, 4), range(0, 5), range(5, 6), range(5, 7), range(5, 8)]
    for place, keys in enumerate(sees):
        keys = [*keys][-(window + 1):] if window >= 0 else [*keys]
        for head in range(4):
            weights = torch.softmax(0.5 * key[keys, head // 2] @ query[place, head], 0)
            assert torch.allclose(attended[place, head], weights @ value[keys, head // 2], atol=1e-6)


def test_the_kernel_takes_what_it_is_given(monkeypatch):
    """torch's own, which no CPU runs: its arguments, and the shapes of what it gives and of gradients."""
    monkeypatch.setattr(engine.attention, "attend_one_by_one", varlen_attn)
    batch, module = collate(random_examples(), layout=PACKED), torch.nn.Module()
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(1, heads, 91, 16, dtype=torch.bfloat16, requires_grad=True)
                             for heads in (4, 2, 2))
        for window in (None, 7):
            given, _ = attend(module, query, key, value, batch.plan, scaling=0.25, sliding_window=window)
            assert given.shape == (1, 91, 4, 16) and given.dtype == torch.bfloat16
            given.sum().backward()
        assert query.grad.shape == query.shape and key.grad.shape == value.grad.shape == key.shape


def test_what_flash_attention_does_not_know_is_not_packed(capsys):
    batch = collate(random_examples(), layout=PACKED)
    states = torch.zeros(1, 2, 91, 16)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"attention=varlen has no {name}"):
            attend(torch.nn.Module(), states, states, states, batch.plan, **{name: 1.0})
    model = tiny_of("llama", head_dim=12)
    model.set_attn_implementation("varlen")
    layouts = choose_layouts("auto", [(model, response_logps)], random_examples())
    assert [layout.packed for layout in layouts] == [False, False]
    assert model.config._attn_implementation == "sdpa"
    assert "attention=varlen has no heads of 12 and 12" in capsys.readouterr().out


@pytest.mark.parametrize("bf16", [False, True])
def test_packed_rows_are_tried_before_they_are_used(bf16, capsys, monkeypatch):
    """A kernel that counts a query's place from its keys' start, or forgets the window, is found out."""
    model, examples = tiny_of("mistral", sliding_window=7), random_examples()
    model.set_attn_implementation("varlen")
    models = [(model, response_logps)]
    assert choose_layouts("auto", models, examples, bf16) == (PACKED,) and not capsys.readouterr().out
    assert choose_layouts("separate", models, examples, bf16) == (SEPARATE,)
    assert model.config._attn_implementation == "sdpa"  # as no row is packed
    right = engine.attention.attend_one_by_one

    def no_window(*arguments, window_size, **options):
        return right(*arguments, window_size=(-1, 0), **options)

    def from_the_start(query, key, value, query_ends, key_ends, *arguments, **options):
        parts = [right(q, k[:len(q)], v[:len(q)], *[torch.tensor([0, len(q)])] * 2, *arguments, **options)
                 for q, k, v in zip(*(x.split(ends.diff().tolist()) for x, ends in (
                     (query, query_ends), (key, key_ends), (value, key_ends))))]
        return torch.cat(parts)
    for wrong in (no_window, from_the_start):
        monkeypatch.setattr(engine.attention, "attend_one_by_one", wrong)
        model.set_attn_implementation("varlen")
        layouts = choose_layouts("auto", models, examples, bf16)
        assert [layout.packed for layout in layouts] == [False, False]
        assert "attention  sdpa: with varlen there is a model whose numbers" in capsys.readouterr().out


def test_a_run_in_packed_rows(run, monkeypatch):
    """DPO with varlen from the command line: the losses of shared rows, and the same bits when it goes on."""
    settings = ["loss=dpo", f"data={FEW_ROWS}", f"eval_data={FEW_ROWS}", "num_samples=2",
                "dtype=float64", "compute_dtype=float64", "max_tokens_per_microbatch=300", "batch_size=8",
                "lr_schedule=constant", "sample_max_tokens=8"]
    run(*settings, "attention=varlen", "max_steps=4", "run_dir=packed")
    run(*settings, "layout=shared", "max_steps=4", "run_dir=shared")
    assert losses_of("packed") == pytest.approx(losses_of("shared"), rel=1e-6)
    run(*settings, "attention=varlen", "max_steps=2", "run_dir=half")
    run("resume=true", "run_dir=half", "max_steps=4")
    assert losses_of("half") == losses_of("packed") and same_weights("half", "packed")


# ---------------------------------------------------------------- masks


def test_a_mask_is_made_once_for_all_layers():
    """The forward keeps one bias for its backward, not one of each layer; rows of 16 in memory."""
    model, kept, batch = tiny_of("llama"), [], collate(random_examples(), layout=SHARED)

    def keep(x):
        if x.shape[-2:] == (35, 35):
            kept.append(x)
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), (
            engine.attention.attention_of(model, batch)):
        decode(model, decoder_inputs(batch))
    assert len(kept) == 2 and len({x.untyped_storage().data_ptr() for x in kept}) == 1  # of two layers
    assert kept[0].dtype == torch.float32 and kept[0].stride(-2) == 48
    assert set(kept[0].unique().tolist()) == {-torch.inf, 0}


def test_a_bias_has_the_type_that_attention_computes_in():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert engine.attention.as_bias(mask, torch.float64).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        bias = engine.attention.as_bias(mask, torch.float32)
    assert bias.dtype == torch.bfloat16 and torch.equal(bias == 0, mask)


def test_separate_rows_look_for_no_packing(monkeypatch):
    """For what transformers looks for, a GPU is waited for."""
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", None)  # is not callable
    for model_type in ("llama", "mistral", "gemma3_text"):
        batch = collate(random_examples(), layout=SEPARATE)
        assert response_logps(tiny_of(model_type), batch).isfinite().all()


def test_the_signature_is_torchs():
    """A CPU's stand-in is called as torch's function is."""
    import inspect
    theirs, ours = (inspect.signature(function).parameters for function in (varlen_attn, attend_one_by_one))
    assert [*ours][:7] == [*theirs][:7] and {*ours} <= {*theirs}
