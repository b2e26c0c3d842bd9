"""Flat trajectory distillation (Du et al. 2022, arXiv 2211.11004)."""

from __future__ import annotations

from typing import Any

from kd.context import Context
from kd.method import Method, with_ema
from kd.methods.dataset.matching import Matching, trajectory_matching
from kd.ranges import Fraction

AVERAGE = 'average'


def ftd(context: Context, *, ema: Fraction, **matching: Any) -> Method:
    """Matches trajectories of flat experts and keeps an average of the images.

        average <- ema average + (1 - ema) images      after every step, from the first images on

    The experts are flat because `expert_trajectories` trained them with `rho` and `alpha`: the loss
    is that of `kd.methods.dataset.mtt.mtt`. Images and average are evaluated apart; the step size
    is not averaged.

    Args:
      context: the stage, whose data are segments of flat experts.
      ema: decay of the average, which is kept in `state.ema['average']`.
      **matching: as in `kd.methods.dataset.mtt.mtt`.
    """
    return with_ema(trajectory_matching(context, Matching(**matching)), {AVERAGE: ema})
