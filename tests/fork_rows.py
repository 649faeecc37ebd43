"""Rows of the table as forks have them, for runs in processes of their own: on_ranks(trouble="row ...")."""

import torch
import torch.nn.functional as F

from losses import Objective, dpo_loss


def normalised_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                    reference_rejected_logps, *, beta, label_smoothing=0.0, sft_weight=0.0,
                    average_logps=False):
    """Margins in units of their spread over the batch."""
    margins = policy_chosen_logps - reference_chosen_logps - policy_rejected_logps + reference_rejected_logps
    scaled = margins / margins.std()
    is_high = (scaled > 0).to(scaled.dtype)
    return -F.logsigmoid(beta * scaled), {
        "margin": margins.detach(), "high": (margins.detach(), is_high),
        "none": (margins.detach(), torch.zeros_like(margins))}


def lerp(step, metrics, policy, reference, state):
    for p, q in zip(policy.parameters(), reference.parameters()):
        q.lerp_(p, 0.3)
    return {"moved": state.get("moved", 0) + 1}


ROWS = {
    "normalised": Objective(normalised_loss, needs_pairs=True, needs_reference=True, whole_batch=True),
    "following": Objective(dpo_loss, needs_pairs=True, needs_reference=True, after_step=lerp,
                           moves_reference=True),
}
