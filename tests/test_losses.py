"""Numbers worked out by hand: see the comment at each. One pair unless said otherwise."""

import inspect
import math

import pytest
import torch

import train
from losses import OBJECTIVES, dpo_loss, ipo_loss, rpo_loss, sft_loss

# policy -1, -3; reference -2, -2: log-ratios +1 for chosen, -1 for rejected, so h = 2
PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -3.0, -2.0, -2.0)]
LENGTHS = {"chosen_length": torch.tensor([2.0]), "rejected_length": torch.tensor([4.0])}
REWARDS = {name: torch.tensor([x], dtype=torch.float64) for name, x in (("chosen_reward", 3), ("rejected_reward", 1))}
PAIRWISE = {
    "dpo": lambda *logps, **options: dpo_loss(*logps, beta=0.5, **options),
    "ipo": lambda *logps, **options: ipo_loss(*logps, beta=0.5, **LENGTHS, **options),
    "rpo": lambda *logps, **options: rpo_loss(
        *logps, beta=0.5, **{name: reward.to(logps[0].dtype) for name, reward in REWARDS.items()}, **options),
}


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
    assert dpo_loss(*PAIR, beta=0.5, label_smoothing=0.1)[0].item() == pytest.approx(0.41326168751822286, abs=1e-12)


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
    forward, backward = (rpo_loss(*PAIR, **REWARDS, beta=0.5, divergence=name)[0].item() for name in ("fwd_kl", "bwd_kl"))
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
    assert values.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["rewards/accuracies"].item() == 0.0  # a tie is not a win
    assert ipo_loss(*same, **LENGTHS, beta=0.1)[0].item() == pytest.approx(25)  # (1 / 0.2)^2
    equal = {name: torch.tensor([1.0], dtype=torch.float64) for name in REWARDS}
    for divergence in ("bwd_kl", "fwd_kl", "sq"):
        assert rpo_loss(*same, **equal, beta=0.1, divergence=divergence)[0].item() == pytest.approx(0, abs=1e-15)


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
])
def test_values_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_the_table_says_what_each_loss_takes():
    defaults, _ = train.read_schema()
    for name, objective in OBJECTIVES.items():
        parameters = inspect.signature(objective.loss).parameters.values()
        positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        wanted = [f"{model}_{response}_logps" for model in ["policy", "reference"][:1 + objective.needs_reference]
                  for response in ["chosen", "rejected"][:1 + objective.needs_pairs]]
        assert positional == wanted
        block = {key.split(".")[1] for key in defaults if key.startswith(name + ".")}
        keywords = {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
        assert keywords == (block - {"average"}) | set(objective.columns)
