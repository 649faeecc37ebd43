"""What is read of a model is what the plain model says, in any layout, chunk by chunk, in any arithmetic."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, FEW_ROWS, last_gradient, make_trainer, tiny_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

import engine.forward
from engine import InputError
from engine.batches import SEPARATE, Example, Layout, collate
from engine.forward import (choose_layouts, decoder_inputs, decoder_of, in_float32, read_tokens,
                            response_logps, response_scores, run_head, sum_over_responses, token_logps)

QUICK = [f"eval_data={FEW_ROWS}", "num_samples=0", "max_tokens_per_microbatch=100000"]  # in one microbatch
EXACT = ["dtype=float64", "compute_dtype=float64"]
NOT_IN_FLOAT64 = ("gemma2", "gpt_oss", "mixtral")  # masks whose padding is not finite, kernels without it
# What float32 may be off by, relative to the largest: 2^-24 times the root of the number of additions, some
# ten products of 64 terms one after another, for each of 100 tokens; times ten, for room
ROUNDING = 10 * 2**-24 * 2**8


def random_pairs(vocab_size=60):
    rng = np.random.default_rng(0)
    return [Example("x", rng.integers(3, vocab_size, prompt),
                    tuple(rng.integers(3, vocab_size, length) for length in lengths), {})
            for prompt, *lengths in ((12, 9, 14), (5, 20, 3), (16, 4, 4), (1, 1, 2))]


def largest_difference(a, b):
    """Of two models' gradients, each relative to the largest of its weight."""
    return max(((last_gradient(p) - last_gradient(q)).abs().max() / last_gradient(p).abs().max()).item()
               for p, q in zip(a.parameters(), b.parameters()))


# ---------------------------------------------------------------- log-probabilities and scores


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_layouts_agree_with_the_plain_model(model_type):
    """Log-probabilities and gradients, the last in one row with another, against each sequence padded on the
    left and run by the model as transformers has it; activation checkpointing too."""
    dtype = torch.float32 if model_type in NOT_IN_FLOAT64 else torch.float64
    tolerance = ROUNDING if model_type in NOT_IN_FLOAT64 else 1e-5  # RMSNorms compute in float32 there too
    model = tiny_of(model_type).to(dtype)
    pairs, logps, gradients = random_pairs(), [], []
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)

    def add(values):
        model.zero_grad()
        (values * weights).sum().backward()
        logps.append(values.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    rows = [np.append(pair.prompt, pair.responses[k]) for k in (0, 1) for pair in pairs]
    ids, mask = torch.zeros(2, 8, 32, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row):], mask[i, -len(row):] = torch.from_numpy(row), 1
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                   use_cache=False).logits.log_softmax(-1)
    lengths = [len(pair.responses[k]) for k in (0, 1) for pair in pairs]
    add(torch.stack([logits[i, -n - 1:-1].gather(1, ids[i, -n:, None]).sum()
                     for i, n in enumerate(lengths)]).view(2, 4))
    batches = [collate(pairs, layout=Layout(shared)) for shared in (False, True)]
    assert batches[1].input_ids.shape == (3, 35)  # 1 + 1 + 2 tokens go into the row of 28 or that of 24
    for batch in batches:
        add(response_logps(model, batch))
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        add(response_logps(model, batches[1]))
    assert logps[0].std() > 1 and len(logps) >= 3
    for values, gradient in zip(logps[1:], gradients[1:]):
        assert (values - logps[0]).abs().max() <= tolerance * logps[0].abs().max()
        assert (gradient - gradients[0]).abs().max() <= tolerance * gradients[0].abs().max()


def test_what_is_read_is_of_each_response_token():
    """Named numbers, one for each token in the order of the targets, of both models' logits; their sums."""
    model, other = tiny_of("gpt2").double(), tiny_of("gpt2").double()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    pairs = random_pairs()
    batch = collate(pairs, torch.float64, Layout(True))
    values = read_tokens(lambda ours, others, targets: {
        "target": targets, "ours": ours.gather(1, targets[:, None])[:, 0], "others": others.amax(1)},
        [model, other], batch)
    assert list(values) == ["target", "ours", "others"]
    answers = [(pair, pair.responses[k]) for k in (0, 1) for pair in pairs]
    assert values["target"].tolist() == [token for _, answer in answers for token in answer]
    with torch.no_grad():
        logits = [[m(input_ids=torch.tensor([[*pair.prompt, *answer]])).logits[0, len(pair.prompt) - 1:-1]
                   for pair, answer in answers] for m in (model, other)]
    ours, others = map(torch.cat, logits)
    targets = values["target"][:, None]
    assert torch.allclose(values["ours"], ours.gather(1, targets)[:, 0], rtol=0, atol=1e-9)
    assert torch.allclose(values["others"], others.amax(1), rtol=0, atol=1e-9)
    logps = token_logps(model, batch)
    assert torch.allclose(logps, ours.log_softmax(1).gather(1, targets)[:, 0], rtol=0, atol=1e-9)
    sums = [part.sum() for part in logps.split([len(answer) for _, answer in answers])]
    assert torch.equal(response_logps(model, batch), sum_over_responses(logps, batch))
    assert torch.allclose(sum_over_responses(logps, batch), torch.stack(sums).view(2, 4), rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings, passes", [
    (["loss=dpo"], 3),  # policy and reference, and the policy again in the backward
    (["loss=kd", "kd.divergence=bwd_kl", "kd.temperature=2", "kd.sft_weight=0.5"], 4)], ids=["dpo", "kd"])
def test_logits_exist_a_chunk_at_a_time(settings, passes, sft_run, monkeypatch):
    """Ten tokens, or one; neither losses nor gradients change."""
    numbers = []

    def counted(model, output, hidden):
        numbers.append(len(hidden))
        return run_head(model, output, hidden)
    monkeypatch.setattr(engine.forward, "run_head", counted)

    def one_step(num_tokens):
        trainer = make_trainer(*settings, f"model={sft_run}/LATEST", *QUICK, *EXACT,
                               *([f"reference={sft_run}/LATEST"] if "loss=kd" in settings else []))
        with torch.no_grad():
            trainer.reference.lm_head.weight.mul_(0.5)
        size = num_tokens * trainer.policy.config.vocab_size + 1
        monkeypatch.setitem(engine.forward.CHUNK_LOGITS, "cpu", size * (2 if "loss=kd" in settings else 1))
        numbers.clear()
        return trainer, trainer.train_step(), list(numbers)
    whole, expected, (size, *_) = one_step(10**6)
    for num_tokens in (10, 1):
        chunked, metrics, sizes = one_step(num_tokens)
        assert max(sizes) == num_tokens and len(sizes) == passes * math.ceil(size / num_tokens)
        assert metrics == pytest.approx(expected, rel=1e-9)
        assert largest_difference(whole.policy, chunked.policy) <= 1e-9
        _, detached = chunked.compute_losses(chunked.next_global_batch[1][0], chunked.train_objective)
        assert not any(metric.requires_grad for metric in detached.values())  # or its graph would stay
    if "loss=kd" in settings:
        assert expected["loss"] == pytest.approx(expected["kd_loss"] + 0.5 * expected["sft_loss"])
        assert expected["kd_loss"] > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "cohere", "granite",
                                        "mixtral"])
def test_the_head_by_itself_is_the_models_own(model_type):
    """Gemma 2 caps its logits, Cohere and Granite scale them: run_head must do the same."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5,
        **{} if model_type in ("gpt2", "opt") else {
            "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0})
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if hasattr(config, name):
            setattr(config, name, 0.7)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = collate([Example("x", np.arange(3, 8), (np.arange(9, 9 + n),), {}) for n in (4, 2)])
    states = model.get_decoder()(**decoder_inputs(batch))
    hidden = states[0].flatten(0, 1)[batch.states]
    expected = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.states]
    parts = torch.cat([run_head(model, states, part) for part in hidden.split(4)])
    assert (parts - expected).abs().max() <= ROUNDING * expected.abs().max() and expected.std() > 0.05
    assert "forward" not in vars(model.get_decoder())


def test_a_model_that_is_its_own_decoder_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="odd"), children=lambda: [torch.nn.ReLU()])
    model.get_decoder = lambda: model
    with pytest.raises(InputError, match="odd names no decoder beside its head"):
        decoder_of(model)


# ---------------------------------------------------------------- bfloat16


def test_bfloat16_computes_on_float32_weights():
    trainer = make_trainer("loss=dpo", "compute_dtype=bfloat16", *QUICK)
    assert trainer.bf16 and all(p.dtype == torch.float32 for p in trainer.policy.parameters())
    batch = collate(trainer.train_examples[:8])
    logps, exact = (response_logps(trainer.policy, batch, bf16) for bf16 in (True, False))
    assert logps.dtype == torch.float32
    # really bfloat16, which is off by more than float32 can be, and by no more than 2^-8 of the numbers
    assert (logps - exact).abs().max() > 1e-6 * exact.abs().max()
    assert (logps - exact).abs().max() < 2**-8 * exact.abs().max()
    assert trainer.train_step()["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_layer_is_float32_only_while_it_runs():
    """What a wholly float32 copy says; afterwards all are the bits that they were."""
    model = tiny_of("llama").bfloat16()
    exact, ids, seen = copy.deepcopy(model).float(), torch.arange(3, 23)[None], []
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, second = model.model.layers
    second.mlp.register_forward_hook(lambda *_: seen.append((first.mlp.up_proj.weight.dtype,
                                                             second.mlp.up_proj.weight.dtype)))
    with torch.no_grad(), in_float32(model):
        assert torch.equal(model(ids).logits, exact(ids).logits)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_are_computed_in_float32(dtype):
    """The head's, whatever the decoder's arithmetic: in bfloat16 many scores would be equal."""
    trainer = make_trainer("loss=rm", f"dtype={dtype}", "compute_dtype=bfloat16", *QUICK)
    batch = collate(trainer.train_examples[:50])
    scores = response_scores(trainer.policy, batch, bf16=trainer.bf16).flatten()
    assert scores.dtype == torch.float32 and trainer.bf16 is (dtype == "float32")
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9
    exact = response_scores(copy.deepcopy(trainer.policy).float(), batch).flatten()
    assert 0 < (scores - exact).abs().max() < 0.5 * exact.std()


# ---------------------------------------------------------------- which layouts a model can be trusted with


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_neo", "mamba"])
def test_models_that_cannot_share_prompts_are_found_out(model_type, dtype, capsys):
    """They are tried in float32, and are afterwards just what they were."""
    model, examples = tiny_of(model_type).to(dtype).train(), random_pairs()
    before = [x.clone() for x in (*model.parameters(), *model.buffers())]
    assert choose_layouts("auto", [(model, response_logps)], examples) == (SEPARATE,)
    assert capsys.readouterr().out.startswith("layout     separate, ")
    after = [*model.parameters(), *model.buffers()]
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert model.training
    with pytest.raises(InputError, match="layout=shared is not possible with this model"):
        choose_layouts("shared", [(model, response_logps)], examples)
    assert choose_layouts("separate", [(model, response_logps)], examples) == (SEPARATE,)
    assert not capsys.readouterr().out


def test_packed_examples_and_reward_models_are_tried_too(capsys):
    """A model that is right for one pair in a row but not for two, and a judge that is another model."""
    policy, examples = tiny_of("llama"), random_pairs()
    models = [(policy, response_logps)]
    assert [layout.shared for layout in choose_layouts("auto", models, examples)] == [False, True]
    assert [layout.shared for layout in choose_layouts("shared", models, examples)] == [True]

    def leak(model, arguments, options):
        if "position_ids" in options:  # in shared rows a second prompt is read as another, by the first
            second = ((options["position_ids"] == 0) & (options["input_ids"] != 0)).cumsum(1) == 2
            options["input_ids"] = (options["input_ids"] + second * options["input_ids"][:, :1]) % 60
        return arguments, options
    hook = policy.model.register_forward_pre_hook(leak, with_kwargs=True)
    assert choose_layouts("auto", models, examples) == (SEPARATE,)
    hook.remove()
    judge = AutoModelForSequenceClassification.from_config(tiny_of("bloom").config)
    models.append((judge, response_scores))
    capsys.readouterr()
    assert choose_layouts("auto", models, examples) == (SEPARATE,)
    assert "layout     separate, whose numbers" in capsys.readouterr().out
