"""What is the maths? Tensors in, tensors out.

B: examples in a batch. N: response tokens in it. V: vocabulary. logps: (B,) float, log-probabilities in
nats, summed over a response's tokens with its end-of-sequence token, never averaged. policy: the model in
training, pi. reference: the frozen model, ref. beta: how strongly the policy is tied to the reference.
Every loss has the form

    loss(policy_chosen_logps[, policy_rejected_logps][, reference_chosen_logps, reference_rejected_logps],
         *, <columns of the data>, <keys of its block in config.yaml>) -> losses, metrics

with losses (B,), which carry the gradient, and metrics, a dict of detached (B,) tensors; a reward model's
takes scores (B,) instead, distillation's logits (N, V), and gives losses (N,). Nothing here averages over
examples or tokens; the trainer does, once, over the whole global batch. Throughout,

    h = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)],  w chosen, l rejected.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F


def sft_loss(policy_chosen_logps):
    """Supervised fine-tuning: -log pi(y|x), summed over the response's tokens.

    policy_chosen_logps: (B,) float, nats. Returns losses (B,) in nats and metrics.
    What the sum over the batch is divided by is `sft.average`: tokens or examples (see OBJECTIVES).
    """
    return -policy_chosen_logps, {"logps/chosen": policy_chosen_logps.detach()}


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             *, beta, label_smoothing=0.0, sft_weight=0.0, average_logps=False, chosen_length=None,
             rejected_length=None):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7) and conservative DPO (Mitchell 2023, cDPO note).

        -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),  e = label_smoothing

    e is the probability that a label is flipped; 0 gives DPO. TRL's label_smoothing (1.16) is not cDPO's but
    the unbiased rDPO's, arXiv:2403.00409. logps: (B,) float, nats summed over response tokens.
    average_logps: log-ratios and the SFT term are means over a response's tokens, of which there are
    chosen_length, rejected_length, (B,) (NeMo-Aligner's preference_average_log_probs; Tulu 3's loss).
    Returns losses (B,) and metrics. Raises ValueError if beta <= 0, label_smoothing is outside [0, 0.5) or
    sft_weight < 0.
    """
    chosen_length, rejected_length = (chosen_length, rejected_length) if average_logps else (1, 1)
    check(beta > 0, "beta", beta, "above 0")
    check(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "in [0, 0.5)")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps) / chosen_length
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps) / rejected_length
    margins = chosen_rewards - rejected_rewards  # beta h
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return preference_result(losses, chosen_rewards, rejected_rewards,
                             policy_chosen_logps, policy_rejected_logps, sft_weight, chosen_length)


def ipo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             *, chosen_length, rejected_length, beta, average_logps=False, sft_weight=0.0):
    """IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17): (h - 1/(2 beta))^2; the paper's tau is `beta`.

    average_logps=False: h from log-probabilities summed over tokens (the DPO authors' code, NeMo-Aligner).
    average_logps=True: from each response's mean over its tokens (TRL, after its authors asked IPO's), and
    so is the SFT term.
    logps: (B,) float, nats summed over response tokens. chosen_length, rejected_length: (B,), the responses'
    tokens, read only when averaging. Rewards are beta times the log-ratios that the loss used.
    Returns losses (B,) and metrics. Raises ValueError if beta <= 0 or sft_weight < 0.
    """
    chosen_length, rejected_length = (chosen_length, rejected_length) if average_logps else (1, 1)
    check(beta > 0, "beta", beta, "above 0")
    chosen_ratios = (policy_chosen_logps - reference_chosen_logps) / chosen_length
    rejected_ratios = (policy_rejected_logps - reference_rejected_logps) / rejected_length
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * beta)).square()
    return preference_result(losses, beta * chosen_ratios, beta * rejected_ratios,
                             policy_chosen_logps, policy_rejected_logps, sft_weight, chosen_length)


def rpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             *, chosen_reward, rejected_reward, beta, reward_scale=1.0, divergence="bwd_kl", sft_weight=0.0,
             average_logps=False, chosen_length=None, rejected_length=None):
    """NVIDIA's reward-aware preference optimization (arXiv:2406.11704; arXiv:2502.00203; NeMo-Aligner).

    At least four published methods are called RPO; this one pulls the model's preference
    q = sigmoid(beta h) to the data's p = sigmoid(eta (r_w - r_l)), eta = reward_scale:

        bwd_kl  KL(p || q) over {p, 1 - p}: KL(target || model)
        fwd_kl  KL(q || p): KL(model || target)
        sq      (beta h - eta (r_w - r_l))^2

    The two KL names are NeMo-Aligner's, which names distillation's the other way round.
    logps: (B,) float, nats summed over response tokens. chosen_reward, rejected_reward: (B,), r_w and r_l,
    from the data. average_logps and the lengths as in dpo_loss. Returns losses (B,) and metrics.
    Raises ValueError if beta <= 0, reward_scale <= 0, sft_weight < 0 or the divergence is unknown.
    """
    check(beta > 0, "beta", beta, "above 0")
    chosen_length, rejected_length = (chosen_length, rejected_length) if average_logps else (1, 1)
    check(reward_scale > 0, "reward_scale", reward_scale, "above 0")
    check(divergence in ("bwd_kl", "fwd_kl", "sq"), "divergence", divergence, "bwd_kl, fwd_kl or sq")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps) / chosen_length
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps) / rejected_length
    model_margins = chosen_rewards - rejected_rewards  # beta h
    data_margins = reward_scale * (chosen_reward - rejected_reward)
    if divergence == "bwd_kl":
        losses = bernoulli_kl(data_margins, model_margins)
    elif divergence == "fwd_kl":
        losses = bernoulli_kl(model_margins, data_margins)
    else:
        losses = (model_margins - data_margins).square()
    return preference_result(losses, chosen_rewards, rejected_rewards,
                             policy_chosen_logps, policy_rejected_logps, sft_weight, chosen_length)


def spin_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              *, beta, sft_weight=0.0):
    """SPIN, self-play fine-tuning (Chen et al. 2024, arXiv:2401.01335, Eq. 4.7 with the logistic loss).

    DPO's formula: chosen is the data's response, rejected the opponent's own sample, reference the opponent,
    the policy as it was when the iteration began. The paper's lambda is `beta`.
    logps: (B,) float, nats summed over response tokens. Returns losses (B,) and metrics.
    Raises ValueError if beta <= 0 or sft_weight < 0.
    """
    return dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                    reference_rejected_logps, beta=beta, sft_weight=sft_weight)


def own_answer_as_rejected(example, answers):
    """SPIN's pairs: the data's response, and the policy's own answer, unless that is the same."""
    if answers[0].tolist() == example.responses[0].tolist():
        return None
    return example.with_responses(example.responses[0], answers[0])


def rm_loss(policy_chosen_scores, policy_rejected_scores, *, center_weight=0.0):
    """A reward model's Bradley-Terry loss (Ouyang et al. 2022, arXiv:2203.02155, Eq. 1).

        -log sigmoid(r(x, y_w) - r(x, y_l)) + center_weight (r(x, y_w) + r(x, y_l))^2

    The second term ties the mean reward, which pairs leave open, to 0 (Eisenstein et al. 2023,
    arXiv:2312.09244). scores: (B,) float, r, the scalar head's output at each response's last token.
    Returns losses (B,) and metrics. `rewards/mean` and `rewards/mean_square` are over both responses of a
    pair; from their averages the trainer makes `rewards/std`, the spread over all responses.
    Raises ValueError if center_weight < 0.
    """
    check(center_weight >= 0, "center_weight", center_weight, "at least 0")
    margins = policy_chosen_scores - policy_rejected_scores
    sums = policy_chosen_scores + policy_rejected_scores
    squares = policy_chosen_scores.double().square() + policy_rejected_scores.double().square()
    metrics = {
        "rewards/chosen": policy_chosen_scores,
        "rewards/rejected": policy_rejected_scores,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "rewards/margins": margins,
        "rewards/mean": sums / 2,
        "rewards/mean_square": squares / 2,
    }
    losses = -F.logsigmoid(margins) + center_weight * sums.square()
    return losses, {name: value.detach() for name, value in metrics.items()}


def kd_loss(policy_logits, reference_logits, targets,
            *, divergence="fwd_kl", temperature=1.0, sft_weight=0.0):
    """Distillation, token by token (Hinton et al. 2015, arXiv:1503.02531; NeMo-Aligner).

        fwd_kl  KL(reference || policy), summed over the vocabulary: the student covers the teacher
        bwd_kl  KL(policy || reference): the student seeks the teacher's modes

    The reference is the teacher. The names are NeMo-Aligner's, which in RPO's go the other way round.
    Both distributions are softmax(logits / temperature); the loss is that KL itself, without Hinton's factor
    of temperature^2, so its gradient shrinks as the temperature grows. sft_weight adds that many times
    -log pi(target) at temperature 1. Of vocabularies of two sizes the KL is over the tokens of both.
    logits: (N, V) float. targets: (N,) int64, the data's tokens. Returns losses (N,), in nats, and metrics
    (N,). Raises ValueError if temperature <= 0, sft_weight < 0 or the divergence is unknown.
    """
    check(temperature > 0, "temperature", temperature, "above 0")
    check(sft_weight >= 0, "sft_weight", sft_weight, "at least 0")
    check(divergence in ("fwd_kl", "bwd_kl"), "divergence", divergence, "fwd_kl or bwd_kl")
    width = min(policy_logits.shape[-1], reference_logits.shape[-1])  # embeddings may be padded beyond
    policy = (policy_logits[:, :width] / temperature).log_softmax(-1)
    reference = (reference_logits[:, :width] / temperature).log_softmax(-1)
    p, q = (reference, policy) if divergence == "fwd_kl" else (policy, reference)
    losses = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # torch's KL(p || q)
    if sft_weight == 0:
        return losses, {}
    sft_losses = F.cross_entropy(policy_logits, targets, reduction="none")
    return losses + sft_weight * sft_losses, {"kd_loss": losses.detach(), "sft_loss": sft_losses.detach()}


def bernoulli_kl(a, b):
    """KL between coins of odds e^a and e^b, in nats: (B,), (B,) -> (B,)."""
    return (a.sigmoid() * (F.logsigmoid(a) - F.logsigmoid(b))
            + (-a).sigmoid() * (F.logsigmoid(-a) - F.logsigmoid(-b)))


def preference_result(preference_losses, chosen_rewards, rejected_rewards,
                      policy_chosen_logps, policy_rejected_logps, sft_weight=0.0, chosen_length=1):
    """What every pairwise loss ends with: its metrics, and sft_weight * -log pi(y_w|x) / chosen_length.

    All tensors (B,); a chosen_length of 1 sums over tokens. Returns losses (B,) and metrics; with a weight,
    both parts of the loss are metrics too. Raises ValueError if sft_weight < 0.
    """
    check(sft_weight >= 0, "sft_weight", sft_weight, "at least 0")
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }
    losses = preference_losses
    if sft_weight > 0:
        sft_losses = -policy_chosen_logps / chosen_length
        losses = preference_losses + sft_weight * sft_losses
        metrics |= {"preference_loss": preference_losses, "sft_loss": sft_losses}
    return losses, {name: value.detach() for name, value in metrics.items()}


def check(allowed, name, value, rule):
    if not allowed:
        raise ValueError(f"{name}={value!r}: it must be {rule}")


@dataclass(frozen=True)
class Objective:
    """What the rest of the code asks about a loss; it never asks for a loss by name. See docs/losses.md.

    What `loss` gets by position: of the policy and then, if it needs_reference, of the frozen one, `inputs`:
    the log-probability of a response (`logps`), a scalar head's `scores`, or the `logits` of tokens. (B,) of
    one response, of two if it needs_pairs (chosen, rejected); (B, K) of any number if it needs_lists.
    By name: keys of its config block; `columns`, numbers of the data, (B,), of lists also (B, K), or one of
    batches.COMPUTED_COLUMNS; and what token_values(policy_logits[, reference_logits], targets), of logits
    (n, V), gives as {name: (n,)}, summed over each response: chosen_name, rejected_name, of lists name.
    by_token: all that is read of tokens comes as (B, T), with chosen_mask and rejected_mask, of lists mask.
    whole_batch: it compares examples, and is called once for the global batch, however a step is cut.
    average: what a batch's losses are divided by, its `examples` or its response `tokens`; a key `average` in
    the loss's config block overrides it. evaluated_as: the loss of held-out examples, where it is another.
    needs_teacher: the reference must be named in the config.

    add_responses(examples) -> examples: adds to the one response of each row, once, before the first step.
    self_play(example, answers[, scores]) -> Example, list or None: what is trained on of a prompt and the
    policy's own answers, arrays of ids, drawn in each iteration, and judged if it names scores.
    after_step(step, metrics, policy, reference, state) -> state: numbers that move with the run, which `loss`
    gets by name, over its block's. moves_reference: the reference moves, by after_step, or in self-play to
    the policy as each iteration begins. These functions take keys of the block by name as well.
    """

    loss: Callable
    needs_pairs: bool
    needs_reference: bool
    needs_lists: bool = False
    inputs: str = "logps"
    columns: tuple[str, ...] = ()
    token_values: Callable | None = None
    by_token: bool = False
    whole_batch: bool = False
    average: str = "examples"
    evaluated_as: str | None = None
    needs_teacher: bool = False
    add_responses: Callable | None = None
    self_play: Callable | None = None
    after_step: Callable | None = None
    moves_reference: bool = False

    @property
    def reads_pairs(self):
        """Whether a row must bring both responses."""
        return self.needs_pairs and not self.self_play and not self.add_responses

    @property
    def reads_lists(self):
        return self.needs_lists and not self.self_play and not self.add_responses

    @property
    def in_stages(self):
        """Whether each iteration of self-play has its own schedule, and the policy at its start as ref."""
        return bool(self.self_play) and self.moves_reference

    def bound(self, settings: dict):
        """The same with the settings of its config block put into its functions, where they name them."""
        bound = {"average": settings.get("average", self.average)}
        for name in FUNCTIONS:
            if function := getattr(self, name):
                named = [p.name for p in inspect.signature(function).parameters.values()
                         if p.kind == p.KEYWORD_ONLY and p.name in settings]
                bound[name] = functools.partial(function, **{key: settings[key] for key in named})
        return replace(self, **bound)

    def denominator(self, examples) -> int | float:
        """What the sum of a global batch's losses is divided by."""
        if self.average == "tokens":
            return sum(length for example in examples for length in example.lengths)
        return len(examples)


FUNCTIONS = ("loss", "token_values", "add_responses", "self_play", "after_step")  # that take settings
OBJECTIVES = {
    "sft": Objective(sft_loss, needs_pairs=False, needs_reference=False),
    "dpo": Objective(dpo_loss, needs_pairs=True, needs_reference=True,
                     columns=("chosen_length", "rejected_length")),
    "ipo": Objective(ipo_loss, needs_pairs=True, needs_reference=True,
                     columns=("chosen_length", "rejected_length")),
    "rpo": Objective(rpo_loss, needs_pairs=True, needs_reference=True,
                     columns=("chosen_reward", "rejected_reward", "chosen_length", "rejected_length")),
    "spin": Objective(spin_loss, needs_pairs=True, needs_reference=True, self_play=own_answer_as_rejected,
                      moves_reference=True, evaluated_as="sft"),
    "rm": Objective(rm_loss, needs_pairs=True, needs_reference=False, inputs="scores"),
    "kd": Objective(kd_loss, needs_pairs=False, needs_reference=True, needs_teacher=True, inputs="logits",
                    average="tokens"),
}
