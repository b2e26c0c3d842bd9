"""Matching of training trajectories (Cazenavette et al. 2022, arXiv 2203.11932)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.context import Context
from kd.method import Method
from kd.methods.dataset.matching import Matching, trajectory_matching
from kd.ranges import Count, Positive, Size


def mtt(
    context: Context,
    *,
    images_per_class: Count,
    student_steps: Count,
    step_size: Positive,
    inner_batch: Size = 0,
    log_step_size: bool = False,
    step_size_optimizer: Mapping[str, Any] | None = None,
    labels: str = 'hard',
    start: str = 'random',
    augmentation: str = '',
    gradient: str = 'exact',
    unroll: Count | bool = 1,
) -> Method:
    """Matches the end of an expert's segment by plain descent on the synthetic set.

        loss = || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2

    with gradient='tesla' and labels='expert' the method of Cui et al. 2022, arXiv 2211.10586.
    Arguments are explained in `kd.methods.dataset.matching.Matching`.
    """
    options = Matching(
        images_per_class=images_per_class,
        student_steps=student_steps,
        step_size=step_size,
        inner_batch=inner_batch,
        log_step_size=log_step_size,
        step_size_optimizer=step_size_optimizer,
        labels=labels,
        start=start,
        augmentation=augmentation,
        gradient=gradient,
        unroll=unroll,
    )
    return trajectory_matching(context, options)
