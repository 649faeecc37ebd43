"""Numbers worked out by hand: see the comment at each. One pair unless said otherwise."""

import inspect
import math

import numpy as np
import pytest
import torch
from conftest import OWN

from engine.batches import Example
from engine.config import read_schema
from engine.objectives import check_table
from losses import OBJECTIVES, dpo_loss, ipo_loss, kd_loss, rm_loss, rpo_loss, sft_loss, spin_loss

# policy -1, -3; reference -2, -2: log-ratios +1 for chosen, -1 for rejected, so h = 2
PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -3.0, -2.0, -2.0)]
LENGTHS = {"chosen_length": torch.tensor([2.0]), "rejected_length": torch.tensor([4.0])}
REWARDS = {"chosen_reward": torch.tensor([3.0], dtype=torch.float64),
           "rejected_reward": torch.tensor([1.0], dtype=torch.float64)}
PAIRWISE = {
    "dpo": lambda *logps, **options: dpo_loss(*logps, beta=0.5, **options),
    "ipo": lambda *logps, **options: ipo_loss(*logps, beta=0.5, **LENGTHS, **options),
    "rpo": lambda *logps, **options: rpo_loss(
        *logps, beta=0.5, **{name: reward.to(logps[0].dtype) for name, reward in REWARDS.items()}, **options),
    "spin": lambda *logps, **options: spin_loss(*logps, beta=0.5, **options),
}
SCORES = [torch.tensor([x], dtype=torch.float64) for x in (2.0, 0.5)]
# two tokens in the vocabulary: the policy gives them 1/4 and 3/4, the reference (the teacher) 1/2 each
LOGITS = [torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)]


def test_means_over_tokens_by_hand():
    """With 2 and 4 tokens the log-ratios +1 and -1 become 1/2 and -1/4, h = 3/4, and -log pi(y_w) = 1 becomes
    1/2: NeMo-Aligner's preference_average_log_probs, with its default for the SFT term."""
    margin = 0.5 * 0.75
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-margin))  # of the rewards 3 and 1, and of the model
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    for name, options, expected in (
            ("dpo", LENGTHS, math.log(1 + math.exp(-margin))), ("rpo", LENGTHS, kl),
            ("rpo", LENGTHS | {"divergence": "sq"}, (margin - 2) ** 2), ("ipo", {}, (0.75 - 1) ** 2)):
        values, metrics = PAIRWISE[name](*PAIR, average_logps=True, sft_weight=0.1, **options)
        assert values.item() == pytest.approx(expected + 0.1 * 0.5, abs=1e-12), name
        got = [metrics[x].item() for x in ("rewards/chosen", "rewards/rejected", "sft_loss", "logps/chosen")]
        assert got == [0.25, -0.125, 0.5, -1.0]


def test_sft_is_minus_the_summed_logp():
    values, metrics = sft_loss(torch.tensor([-3.5, -1.0]))
    assert values.tolist() == [3.5, 1.0]
    assert metrics["logps/chosen"].tolist() == [-3.5, -1.0]


def test_dpo_by_hand():
    # beta h = 0.5 * 2 = 1; -log sigmoid(1) = log(1 + e^-1) = 0.31326168751822286
    values, metrics = dpo_loss(*PAIR, beta=0.5)
    assert values.item() == pytest.approx(0.31326168751822286, abs=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/accuracies": 1.0, "rewards/margins": 1.0,
        "logps/chosen": -1.0, "logps/rejected": -3.0}


def test_conservative_dpo_by_hand():
    # 0.9 * 0.31326168751822286 + 0.1 * (1 + 0.31326168751822286), as -log sigmoid(-1) = 1 - log sigmoid(1)
    values, _ = dpo_loss(*PAIR, beta=0.5, label_smoothing=0.1)
    assert values.item() == pytest.approx(0.41326168751822286, abs=1e-12)


def test_ipo_by_hand():
    # (2 - 1/(2 * 0.25))^2 = 0; with beta 0.5, (2 - 1)^2 = 1
    assert ipo_loss(*PAIR, **LENGTHS, beta=0.25)[0].item() == 0
    values, metrics = ipo_loss(*PAIR, **LENGTHS, beta=0.5)
    assert values.item() == 1
    assert metrics["rewards/margins"].item() == 1.0  # beta * 2


def test_averaged_ipo_by_hand():
    # log-ratios 1/2 and -1/4 a token: (0.75 - 1)^2 = 0.0625; rewards 0.5 * 0.5 and 0.5 * -0.25
    values, metrics = ipo_loss(*PAIR, **LENGTHS, beta=0.5, average_logps=True)
    assert values.item() == 0.0625
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == (0.25, -0.125)


def test_spin_by_hand():
    # -log sigmoid(0.5 * 2), as for DPO: the data's response leads the opponent's by h = 2
    values, metrics = spin_loss(*PAIR, beta=0.5)
    assert values.item() == pytest.approx(0.31326168751822286, abs=1e-12)
    assert metrics["rewards/margins"].item() == 1.0


def test_spin_is_dpo_on_the_same_logps():
    torch.manual_seed(0)
    logps = [torch.randn(50, dtype=torch.float64) * 5 for _ in range(4)]
    for options in ({"beta": 0.1}, {"beta": 2.0, "sft_weight": 0.3}):
        (spin, spin_metrics), (dpo, dpo_metrics) = spin_loss(*logps, **options), dpo_loss(*logps, **options)
        assert torch.equal(spin, dpo) and spin.std() > 0.1
        assert spin_metrics.keys() == dpo_metrics.keys()
        assert all(torch.equal(spin_metrics[name], dpo_metrics[name]) for name in spin_metrics)


def test_rm_by_hand():
    # -log sigmoid(2 - 0.5) = log(1 + e^-1.5) = 0.2014132779827524; the mean of 2 and 0.5 is 1.25,
    # of their squares (4 + 0.25) / 2 = 2.125
    values, metrics = rm_loss(*SCORES)
    assert values.item() == pytest.approx(0.2014132779827524, abs=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 2.0, "rewards/rejected": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 1.5,
        "rewards/mean": 1.25, "rewards/mean_square": 2.125}
    # 0.1 * (2 + 0.5)^2 = 0.625 more
    assert rm_loss(*SCORES, center_weight=0.1)[0].item() == pytest.approx(0.8264132779827524, abs=1e-12)


def test_a_reward_models_gradient_raises_chosen_and_a_tie_is_no_win():
    scores = [torch.tensor([1.0], requires_grad=True) for _ in range(2)]
    values, metrics = rm_loss(*scores)
    values.sum().backward()
    assert [score.grad.item() for score in scores] == [-0.5, 0.5]  # sigmoid(0) = 1/2
    assert values.item() == pytest.approx(math.log(2)) and metrics["rewards/accuracies"].item() == 0.0
    assert rm_loss(SCORES[1], SCORES[0])[0].item() == pytest.approx(1.7014132779827524)  # 1.5 + 0.2014...


@pytest.mark.parametrize("options, expected", [
    # KL([1/2, 1/2] || [1/4, 3/4]) = 1/2 log 2 + 1/2 log(2/3)
    ({}, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    # KL([1/4, 3/4] || [1/2, 1/2]) = 1/4 log(1/2) + 3/4 log(3/2)
    ({"divergence": "bwd_kl"}, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
    # at temperature 1/2 the policy's odds are squared, 1 to 9: 1/2 log 5 + 1/2 log(5/9)
    ({"temperature": 0.5}, 0.5 * math.log(5) + 0.5 * math.log(5 / 9)),
])
def test_kd_by_hand(options, expected):
    values, metrics = kd_loss(*LOGITS, torch.tensor([1]), **options)
    assert values.item() == pytest.approx(expected, abs=1e-12) and metrics == {}
    # with sft_weight 2 the token of probability 3/4 adds 2 log(4/3), at any temperature
    weighted, metrics = kd_loss(*LOGITS, torch.tensor([1]), **options, sft_weight=2.0)
    assert weighted.item() == pytest.approx(expected + 2 * math.log(4 / 3), abs=1e-12)
    assert metrics["kd_loss"].item() == pytest.approx(expected)
    assert metrics["sft_loss"].item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("divergence", ["fwd_kl", "bwd_kl"])
def test_kd_against_direct_sums(divergence):
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5, 11, dtype=torch.float64) * 3
    q, p = ((x - x.max()).exp() / (x - x.max()).exp().sum(-1, keepdim=True) for x in (policy, reference))
    a, b = (p, q) if divergence == "fwd_kl" else (q, p)
    direct = [sum(x * math.log(x / y) for x, y in zip(*rows)) for rows in zip(a.tolist(), b.tolist())]
    values, _ = kd_loss(policy, reference, torch.zeros(5, dtype=torch.long), divergence=divergence)
    assert values.tolist() == pytest.approx(direct, rel=1e-10)


def test_kd_pulls_the_policy_to_the_reference():
    policy = LOGITS[0].clone().requires_grad_()
    kd_loss(policy, LOGITS[1], torch.tensor([0]))[0].sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([-0.25, 0.25])  # q - p = [1/4, 3/4] - [1/2, 1/2]
    assert kd_loss(LOGITS[1], LOGITS[1] + 7, torch.tensor([0]))[0].item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("divergence, expected", [
    # q = sigmoid(1) = 0.7310585786, p = sigmoid(0.25 * (3 - 1)) = sigmoid(0.5) = 0.6224593312
    # KL(p||q) = p log(p/q) + (1-p) log((1-p)/(1-q))
    ("bwd_kl", 0.6224593312 * math.log(0.6224593312 / 0.7310585786)
               + 0.3775406688 * math.log(0.3775406688 / 0.2689414214)),
    ("fwd_kl", 0.7310585786 * math.log(0.7310585786 / 0.6224593312)
               + 0.2689414214 * math.log(0.2689414214 / 0.3775406688)),
    ("sq", 0.25),  # (1 - 0.5)^2
])
def test_rpo_by_hand(divergence, expected):
    values, metrics = rpo_loss(*PAIR, **REWARDS, beta=0.5, reward_scale=0.25, divergence=divergence)
    assert values.item() == pytest.approx(expected, abs=1e-9)
    assert metrics["rewards/margins"].item() == 1.0


def test_the_two_kl_divergences_of_rpo_differ():
    forward, backward = (rpo_loss(*PAIR, **REWARDS, beta=0.5, divergence=name)[0].item()
                         for name in ("fwd_kl", "bwd_kl"))
    assert forward != pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("name", PAIRWISE)
def test_sft_weight_adds_the_summed_chosen_logp(name):
    plain, _ = PAIRWISE[name](*PAIR)
    weighted, metrics = PAIRWISE[name](*PAIR, sft_weight=0.25)
    assert (weighted - plain).item() == pytest.approx(0.25 * 1.0)  # -log pi(y_w|x) = 1
    assert metrics["sft_loss"].item() == 1.0
    assert metrics["preference_loss"].item() == pytest.approx(plain.item())


def test_policy_equal_to_reference():
    same = [PAIR[0], PAIR[1], PAIR[0], PAIR[1]]
    values, metrics = dpo_loss(*same, beta=0.1)
    assert values.item() == pytest.approx(math.log(2), abs=1e-14)
    assert metrics["rewards/accuracies"].item() == 0.0  # a tie is not a win
    assert ipo_loss(*same, **LENGTHS, beta=0.1)[0].item() == pytest.approx(25)  # (1 / 0.2)^2
    equal = {name: torch.tensor([1.0], dtype=torch.float64) for name in REWARDS}
    for divergence in ("bwd_kl", "fwd_kl", "sq"):
        values, _ = rpo_loss(*same, **equal, beta=0.1, divergence=divergence)
        assert values.item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_raise_chosen_and_lower_rejected(name):
    logps = [torch.tensor([-2.0], requires_grad=True) for _ in range(4)]
    PAIRWISE[name](*logps)[0].sum().backward()
    gradients = [tensor.grad.item() for tensor in logps]
    assert gradients[0] < 0 < gradients[1]
    assert gradients[0] == pytest.approx(-gradients[1])
    assert gradients[2] == pytest.approx(-gradients[0])


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapped_pairs_change_the_sign_of_margins_and_raise_the_loss(name):
    loss, metrics = PAIRWISE[name](*PAIR)
    swapped_loss, swapped = PAIRWISE[name](PAIR[1], PAIR[0], PAIR[3], PAIR[2])
    assert swapped["rewards/margins"].item() == -metrics["rewards/margins"].item()
    assert swapped["rewards/accuracies"].item() == 0.0
    assert swapped_loss.item() > loss.item()


@pytest.mark.parametrize("name", PAIRWISE)
def test_losses_are_per_example_and_metrics_carry_no_gradient(name):
    logps = [torch.randn(3, requires_grad=True) for _ in range(4)]
    values, metrics = PAIRWISE[name](*logps, sft_weight=0.1)
    assert values.shape == (3,)
    assert all(metric.shape == (3,) and not metric.requires_grad for metric in metrics.values())
    assert values.dtype == torch.float32


def test_extreme_margins_stay_finite():
    huge = [torch.tensor([x]) for x in (0.0, -2000.0, -1000.0, -1000.0)]
    for divergence in ("bwd_kl", "fwd_kl"):
        assert rpo_loss(*huge, **REWARDS, beta=1.0, divergence=divergence)[0].isfinite().all()
    assert dpo_loss(huge[1], huge[0], huge[2], huge[3], beta=1.0)[0].item() == 2000.0


@pytest.mark.parametrize("call, name", [
    (lambda: dpo_loss(*PAIR, beta=0), "beta"),
    (lambda: ipo_loss(*PAIR, **LENGTHS, beta=-0.1), "beta"),
    (lambda: rpo_loss(*PAIR, **REWARDS, beta=0.0), "beta"),
    (lambda: dpo_loss(*PAIR, beta=0.1, label_smoothing=0.5), "label_smoothing"),
    (lambda: dpo_loss(*PAIR, beta=0.1, label_smoothing=-0.1), "label_smoothing"),
    (lambda: dpo_loss(*PAIR, beta=0.1, sft_weight=-1), "sft_weight"),
    (lambda: rpo_loss(*PAIR, **REWARDS, beta=0.1, divergence="kl"), "divergence"),
    (lambda: rpo_loss(*PAIR, **REWARDS, beta=0.1, reward_scale=0), "reward_scale"),
    (lambda: spin_loss(*PAIR, beta=0), "beta"),
    (lambda: rm_loss(*SCORES, center_weight=-1), "center_weight"),
    (lambda: kd_loss(*LOGITS, torch.tensor([0]), temperature=0), "temperature"),
    (lambda: kd_loss(*LOGITS, torch.tensor([0]), divergence="sq"), "divergence"),
    (lambda: kd_loss(*LOGITS, torch.tensor([0]), sft_weight=-1), "sft_weight"),
])
def test_values_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# ---------------------------------------------------------------- what the trainer asks about a loss


def test_the_table_is_possible():
    check_table(OBJECTIVES, read_schema()[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_does_not_know_how_its_batch_is_cut(name):
    """What it says of six examples is what it says of the first two and the last four; or its row says
    whole_batch. Of any loss that stands in the table, on numbers that data could have."""
    objective, random = OBJECTIVES[name], torch.Generator().manual_seed(1)
    block = {key.partition(".")[2]: value for key, value in read_schema()[0].items()
             if key.startswith(name + ".")}
    bound = objective.bound(block)
    shape = (6, 3) if objective.needs_lists else (6, 11) if objective.inputs == "logits" else (6,)
    shape += (4,) * objective.by_token

    def draw(parameter):
        if parameter == "targets":
            return torch.arange(6)
        if parameter in objective.columns:
            return torch.randint(0, 2, shape, generator=random).double() + ("label" not in parameter)
        return -torch.rand(shape, generator=random, dtype=torch.float64) * (5 if "logps" in parameter else 1)
    given = {p.name: draw(p.name) for p in inspect.signature(bound.loss).parameters.values()
             if p.default is p.empty}
    losses, metrics = bound.loss(**given)
    assert losses.shape == (6,) and losses.isfinite().all()
    if not objective.whole_batch:
        for part in (slice(2), slice(2, 6)):
            some, some_metrics = bound.loss(**{name: value[part] for name, value in given.items()})
            assert some.tolist() == pytest.approx(losses[part].tolist(), rel=1e-12)
            for key, value in some_metrics.items():
                assert not isinstance(value, tuple) and value.tolist() == metrics[key][part].tolist()


def test_bound_puts_settings_into_a_loss():
    # log-ratios 1/2 and -1/4 a token: (0.75 - 1)^2 = 0.0625, as in test_averaged_ipo_by_hand
    bound = OBJECTIVES["ipo"].bound({"beta": 0.5, "average_logps": True, "sft_weight": 0.0})
    assert bound.loss(*PAIR, **LENGTHS)[0].item() == 0.0625
    assert bound.columns == ("chosen_length", "rejected_length") and OBJECTIVES["ipo"].loss is ipo_loss
    # what the trainer reads is no argument of the loss: -log sigmoid(0.5 * 2) all the same
    bound = OBJECTIVES["spin"].bound({"beta": 0.5, "iterations": 3, "temperature": 2.0, "lr": None})
    assert bound.loss(*PAIR)[0].item() == pytest.approx(0.31326168751822286, abs=1e-12)


@pytest.mark.parametrize("name, settings, denominator", [
    ("sft", {"average": "tokens"}, 8), ("sft", {"average": "examples"}, 2), ("kd", {"temperature": 1.0}, 8),
    ("dpo", {"beta": 0.1}, 2), ("rm", {}, 2)])
def test_what_a_batchs_losses_are_divided_by(name, settings, denominator):
    # 2 examples, with responses of 1 + 2 and of 6 tokens, of which one does not count
    weights = np.array([1, 1, 0, 1, 1, 1], np.float32)
    examples = [Example("x", np.array([2]), (np.array([7]), np.array([8, 1])), {}),
                Example("x", np.array([2]), (np.array([3, 4, 9, 5, 6, 1]),), {}, (weights,))]
    assert OBJECTIVES[name].bound(settings).denominator(examples) == denominator


def test_held_out_examples_have_what_their_loss_takes():
    """Self-play's rows have one response, and so its held-out loss is SFT's; all others are their own."""
    assert {name: OBJECTIVES[name].evaluated_as for name in OWN if OBJECTIVES[name].evaluated_as} == {
        "spin": "sft"}
    assert all(OBJECTIVES[name].reads_pairs for name in ("dpo", "ipo", "rpo", "rm"))
    assert not any(OBJECTIVES[name].reads_pairs for name in ("sft", "spin", "kd"))
    for objective in OBJECTIVES.values():
        held_out = OBJECTIVES[objective.evaluated_as] if objective.evaluated_as else objective
        makes_pairs = objective.reads_pairs or bool(objective.add_responses)  # of held-out rows too
        assert held_out.needs_pairs <= makes_pairs and not held_out.self_play
