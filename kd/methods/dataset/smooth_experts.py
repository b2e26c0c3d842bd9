"""Alignment with smooth experts (Shen et al. 2023, arXiv 2310.10541)."""

from __future__ import annotations

from typing import Any

from kd.context import Context
from kd.method import Method
from kd.methods.dataset.matching import Matching, trajectory_matching
from kd.ranges import Decay, NonNegative, Size


def smooth_experts(
    context: Context,
    *,
    momentum: Decay = 0.9,
    balance_epochs: Size = 0,
    perturbation: NonNegative = 1.0,
    intermediate: str = 'all',
    start: str = 'kmeans',
    start_experts: str = 'experts',
    **matching: Any,
) -> Method:
    """Matches trajectories of smooth experts with a more careful student.

    The student starts at perturbed kernels, has momentum, weighs its loss by the start epoch, and
    is compared with the expert after each of its epochs; the images start from the real ones that
    an expert finds representative. The experts are smooth because `expert_trajectories` trained
    them with `ramp_epochs` and `penalty`.

    Args:
      context: the stage, whose data are segments of smooth experts.
      momentum: of the student.
      balance_epochs: the bound of start epochs if the loss is to be balanced; 0 for no balance.
      perturbation: 0 for none.
      intermediate: 'all', 'rising' or 'end'.
      start, start_experts: see `kd.methods.dataset.common.real_start`.
      **matching: as in `kd.methods.dataset.mtt.mtt`.
    """
    options = Matching(
        momentum=momentum,
        balance_epochs=balance_epochs,
        perturbation=perturbation,
        intermediate=intermediate,
        start=start,
        start_experts=start_experts,
        **matching,
    )
    return trajectory_matching(context, options)
