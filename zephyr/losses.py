"""The losses, as pure functions of log-probabilities: no model, no config, no device, no mean.

    N targets   P pairs

They return sums or one value a pair; the training script knows the count of the whole step, on all
ranks, and divides once. So the result does not depend on how the data fell on ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(logps: Tensor) -> Tensor:
    """Negative log-likelihood, summed: () from (N,) log-probabilities of the targets."""
    return -logps.sum()


def branch_sums(logps: Tensor, pack) -> Tensor:
    """log pi(answer | prompt) of every branch of a pack: (branches,) from (N,) log-probabilities.

    A branch's log-probability is the sum over its targets, in the dtype of logps (float32).
    """
    sums = torch.zeros(pack.n_branches, dtype=logps.dtype, device=logps.device)
    return sums.index_add(0, pack.branch_of_target, logps)  # (branches,)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), one value a pair.

    Args:
        policy_chosen_logps ... reference_rejected_logps: (P,) each, log-probability of the whole
            answer given its prompt, summed over its tokens.
        beta: the strength of the pull towards the reference.
        label_smoothing: how often a label is believed to be flipped, in [0, 0.5); 0 is plain DPO,
            more is conservative DPO (Mitchell 2023).

    Returns: losses, chosen rewards, rejected rewards, each (P,); the rewards carry no gradient.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)  # r(x, y_w), up to beta log Z(x)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)  # r(x, y_l)
    margins = chosen - rejected  # log Z(x) cancels
    losses = (
        -(1 - label_smoothing) * F.logsigmoid(margins)  # equation 7
        - label_smoothing * F.logsigmoid(-margins)  # the label is wrong
    )
    return losses, chosen.detach(), rejected.detach()
