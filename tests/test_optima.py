"""Each loss ends where its paper says: minimised over all policies of a few answers, on data in exact
expectation, at the policy of a closed form.

To add a loss's optimum, give OPTIMA a Case of it, worked out by hand; what `settings` leaves out is as in
config.yaml. It may be a loss of one response or of pairs, of log-probabilities, scores, or logits, where an
answer is one token; not of lists or whole_batch, nor with token_values. A constant factor moves no minimum:
where there is an SFT term, weigh the loss against that, and the factor shows.

Those cases have two answers and a uniform reference, and are worked out backwards: the policy is (2/3, 1/3),
of log-odds s = log 2, and the data are those with which the derivative by s is 0 there. The SFT term's is
sigmoid(s) - p, p the probability that answer 0 is chosen; its weight is 1.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch

from engine.config import read_schema
from engine.objectives import call_loss, parameters
from losses import OBJECTIVES

LOG_2 = math.log(2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


def normalised(weights):
    return [x / sum(weights) for x in weights]


# ---------------------------------------------------------------- worlds of a few answers


REFERENCE = [0.4, 0.3, 0.2, 0.1]
DRAWN = [0.1, 0.2, 0.3, 0.4]  # how often each answer is among the data's, before one of a pair is chosen
REWARDS = [0.0, 1.5, -1.0, 0.5]


@dataclass
class Case:
    """settings: keys of the loss's block. data: {(chosen, rejected): probability}, answers by number, up to a
    factor; of losses of one response {(answer,): probability}. optimum: the policy's probabilities, or
    softmax(scores). reference: its probabilities, uniform where none are given. numbers: of each answer,
    {"length": ...} for the columns chosen_length, rejected_length. least: the expected loss at the optimum.
    """
    settings: dict
    data: dict
    optimum: list
    reference: list | None = None
    numbers: dict = field(default_factory=dict)
    least: float | None = None


def pairs(prefers):
    """Both answers drawn alone, i chosen over j with probability prefers(i, j)."""
    return {(i, j): DRAWN[i] * DRAWN[j] * prefers(i, j) for i in range(4) for j in range(4) if i != j}


def tilted(exponents):
    """ref exp(x) / Z."""
    return normalised([p * math.exp(x) for p, x in zip(REFERENCE, exponents)])


def coin(p, **more):
    """Of two answers, 0 is chosen with probability p; the optimum is (2/3, 1/3)."""
    return {"data": {(0, 1): p, (1, 0): 1 - p}, "optimum": [2 / 3, 1 / 3]} | more


def around(i, j):
    """0 beats 1, 1 beats 2, 2 beats 3 and 3 beats 0: no reward says that."""
    return {0: 0.5, 1: 0.9, 2: 0.5, 3: 0.1}[(j - i) % 4]


def wins(i):
    """The probability that i is preferred to an answer of the data's."""
    return sum(DRAWN[j] * around(i, j) for j in range(4))


BRADLEY_TERRY = pairs(lambda i, j: sigmoid(REWARDS[i] - REWARDS[j]))
SINGLE = {(i,): p for i, p in enumerate(DRAWN)}
OPTIMA = {
    "sft": [Case({}, SINGLE, DRAWN, least=-sum(p * math.log(p) for p in DRAWN))],
    "dpo": [
        Case({"beta": 0.5}, BRADLEY_TERRY, tilted([r / 0.5 for r in REWARDS]), REFERENCE),
        # beta (sigmoid(beta s) - p) + sigmoid(s) - p = 2 (4/5 - p) + 2/3 - p = 0
        Case({"beta": 2.0, "sft_weight": 1.0}, **coin(34 / 45)),
    ],
    "ipo": [  # 0.25 is the paper's tau; x are log-ratios, m = 1 / (2 tau)
        # 0 over 1 over 2, surely: 2 x_0 - x_1 - x_2 = 2 m and 2 x_1 = x_0 + x_2, so that x_1 - x_2 = 2 m / 3
        Case({"beta": 0.25}, {(0, 1): 1, (1, 2): 1, (0, 2): 1},
             normalised([math.exp(2 / 0.75), math.exp(1 / 0.75), 1])),
        # 0 and 1 over 2: x_0 - x_2 = x_1 - x_2 = m
        Case({"beta": 0.25}, {(0, 2): 1, (1, 2): 1}, normalised([math.exp(2), math.exp(2), 1])),
        # any preference: ref exp(p(y is preferred to one of the data's) / tau) / Z, the paper's objective's
        Case({"beta": 0.25}, pairs(around), tilted([wins(i) / 0.25 for i in range(4)]),
             REFERENCE, {"length": [1, 2, 3, 5]}),
        # of lengths 1 and 2, surely: log-ratios log 2 and -log 2 are 1.5 log 2 = m apart by token
        Case({"beta": 1 / (3 * LOG_2), "average_logps": True}, {(0, 1): 1}, [2 / 3, 1 / 3],
             [1 / 3, 2 / 3], {"length": [1, 2]}),
        # m = 1: 2 (s - (2 p - 1)) + sigmoid(s) - p = 0
        Case({"beta": 0.5, "sft_weight": 1.0}, **coin((2 * LOG_2 + 2 + 2 / 3) / 5)),
    ],
    "rpo": [
        *[Case({"beta": 0.8, "reward_scale": 0.5, "divergence": divergence}, BRADLEY_TERRY,
               tilted([0.5 * r / 0.8 for r in REWARDS]), REFERENCE, {"reward": REWARDS})
          for divergence in ("bwd_kl", "fwd_kl", "sq")],
        # answer 0 leads by a reward of d and is always chosen; u = beta s = 2 log 2, q = sigmoid(u) = 4/5
        *[Case({"beta": 2.0, "reward_scale": 1.0, "divergence": divergence, "sft_weight": 1.0},
               **coin(1, numbers={"reward": [d, 0.0]})) for divergence, d in (
            ("bwd_kl", logit(4 / 5 - 1 / 6)),  # beta (q - sigmoid(d)) = 1/3
            ("fwd_kl", 2 * LOG_2 - 25 / 24),   # beta q (1 - q) (u - d) = 1/3
            ("sq", 2 * LOG_2 - 1 / 12))],      # beta 2 (u - d) = 1/3
    ],
    "spin": [  # of i from the data and j from ref: Bradley-Terry's with rewards log(data / ref); Theorem 5.4
        Case({"beta": 2.0}, {(i, j): DRAWN[i] * REFERENCE[j] for i in range(4) for j in range(4) if i != j},
             normalised([math.sqrt(p * q) for p, q in zip(DRAWN, REFERENCE)]), REFERENCE),
        Case({"beta": 2.0, "sft_weight": 1.0}, **coin(34 / 45)),  # as DPO
    ],
    "rm": [
        Case({}, BRADLEY_TERRY, normalised([math.exp(r) for r in REWARDS])),
        # scores 0, log 2 and -2 log 2, pairs of neighbours, c = 0.05. With p_ij the probability that i is
        # chosen over j, by score 0: sigmoid(-log 2) - p_01 + 2 c (0 + log 2) = 0; by score 2:
        # sigmoid(-3 log 2) - p_21 + 2 c (log 2 - 2 log 2) = 0; by score 1 then too
        Case({"center_weight": 0.05}, {(0, 1): 1 / 3 + LOG_2 / 10, (1, 0): 2 / 3 - LOG_2 / 10,
                                       (1, 2): 8 / 9 + LOG_2 / 10, (2, 1): 1 / 9 - LOG_2 / 10},
             [4 / 13, 8 / 13, 1 / 13]),
    ],
    "kd": [
        *[Case({"divergence": divergence, "temperature": 2.0}, SINGLE, REFERENCE, REFERENCE)
          for divergence in ("fwd_kl", "bwd_kl")],
        # at temperature 1 the KL is the cross-entropy to the teacher, and a constant
        Case({"divergence": "fwd_kl", "sft_weight": 3.0}, SINGLE,
             [(p + 3 * q) / 4 for p, q in zip(REFERENCE, DRAWN)], REFERENCE),
        # the data have token 0 with p; at temperature 2 log-odds of 2 log 2 are v = log 2, q = sigmoid(v)
        *[Case({"divergence": divergence, "temperature": 2.0, "sft_weight": 1.0}, {(0,): p, (1,): 1 - p},
               [4 / 5, 1 / 5]) for divergence, p in (
            ("fwd_kl", 4 / 5 + 1 / 12),      # (q - 1/2) / 2 + 4/5 - p = 0
            ("bwd_kl", 4 / 5 + LOG_2 / 9))]  # q (1 - q) v / 2 + 4/5 - p = 0
    ],
}


# ---------------------------------------------------------------- where a loss ends


def minimise(name, case):
    """The log-probabilities, or scores, (K,) at which the expected loss is least, and that loss."""
    block = {key.partition(".")[2]: value for key, value in read_schema()[0].items()
             if key.startswith(name + ".")}
    assert case.settings.keys() <= block.keys()
    objective = OBJECTIVES[name].bound(block | case.settings)
    answers = torch.tensor(list(case.data)).T  # (2, n), or (1, n)
    weights = torch.tensor(normalised(list(case.data.values())), dtype=torch.float64)
    reference = case.reference or normalised([1] * len(case.optimum))
    reference = torch.tensor(reference, dtype=torch.float64).log()

    def says(free):
        return free if objective.inputs == "scores" else free.log_softmax(-1)

    def expected_loss(free):
        models = [says(free), reference][:1 + objective.needs_reference]
        if objective.inputs == "logits":
            given = [*(x.expand(len(weights), -1) for x in models), answers[0]]
        else:
            given = [x[which] for x in models for which in answers]
        values = dict(zip(parameters(objective.loss)[0], given))
        for column in objective.columns:
            who, _, number = column.partition("_")
            of_answers = torch.tensor(case.numbers.get(number, [1.0] * len(free)), dtype=torch.float64)
            values[column] = of_answers[answers[("chosen", "rejected").index(who)]]
        return (call_loss(objective, values)[0] * weights).sum()

    free = torch.zeros_like(reference, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(free)
        loss.backward()
        return loss
    optimizer.step(closure)
    assert free.isfinite().all(), "it ends nowhere"
    for _ in range(3):  # Newton's steps; a constant added to all logits changes nothing, hence pinv
        closure()
        hessian = torch.autograd.functional.hessian(expected_loss, free)
        free.data -= torch.linalg.pinv(hessian, rtol=1e-9, hermitian=True) @ free.grad
    least = closure()
    assert free.grad.abs().max() < 1e-10, "no minimum was found"
    return says(free).detach(), least.item()


@pytest.mark.parametrize("name, case", [
    pytest.param(name, case, id=f"{name} {case and case.settings}")
    for name in OBJECTIVES for case in OPTIMA.get(name, [None])])
def test_a_loss_ends_where_its_paper_says(name, case):
    if case is None:
        pytest.skip(f"OPTIMA has no case of {name}")
    found, least = minimise(name, case)
    assert found.softmax(-1).tolist() == pytest.approx(case.optimum, rel=0, abs=1e-7)
    if case.least is not None:
        assert least == pytest.approx(case.least, rel=1e-12)


@pytest.mark.parametrize("e, by_dpo, by_cdpo", [
    (0.1, 1.416, 1.065), (0.2, 0.987, 0.563), (0.4, 0.307, 0.061)])
def test_conservative_dpo_does_not_undo_flipped_labels(e, by_dpo, by_cdpo):
    """It ends at a smaller margin beta h still than DPO on the same labels.

    The better of two answers wins with sigmoid(2), so that the true margin is 2. With a share e of labels
    flipped it is chosen with p = (1 - 2 e) sigmoid(2) + e. DPO is a logistic regression on that, and ends at
    logit(p). cDPO counts each label as the other one with weight e, and ends at logit((1 - e) p + e (1 - p)).
    rDPO (arXiv:2403.00409), whose e TRL's label_smoothing is by now, subtracts the other label's loss instead
    of adding it, and ends at the true margin: the logit of (p - e) / (1 - 2 e) = sigmoid(2).
    """
    p = (1 - 2 * e) * sigmoid(2) + e
    for told, share, expected, rounded in ((0.0, p, logit(p), by_dpo),
                                           (e, p, logit((1 - e) * p + e * (1 - p)), by_cdpo),
                                           (e, sigmoid(2), logit(p), by_dpo)):  # told of flips, and none
        found, _ = minimise("dpo", Case({"beta": 0.5, "label_smoothing": told},
                                        {(0, 1): share, (1, 0): 1 - share}, [], [0.7, 0.3]))
        margin = 0.5 * (found[0] - found[1] - math.log(0.7 / 0.3)).item()
        assert margin == pytest.approx(expected, abs=1e-7) and margin == pytest.approx(rounded, abs=5e-4)
