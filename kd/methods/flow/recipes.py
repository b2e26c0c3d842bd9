"""Recipes of flows and flow maps: the blocks that the configs in `configs/flow` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd import config as kd_config

SELF_DISTILLED = (
    'lsd', 'esd', 'psd_uniform', 'psd_midpoint', 'meanflow', 'shortcut', 'consistency',
)  # fmt: skip
DISTILLED = ('lmd', 'emd', 'pfmm')
STEPS = (1, 2, 4, 8, 16)

Block = Mapping[str, Any]


def parse(variant: str, scales: Mapping[str, Callable[[str], ConfigDict]]) -> ConfigDict:
    """The recipe of 'scale,algorithm'; without a comma the algorithm is lsd."""
    scale, _, algorithm = variant.partition(',')
    algorithm = algorithm or 'lsd'
    kd_config.variant(algorithm, dict.fromkeys((*SELF_DISTILLED, *DISTILLED)))
    return kd_config.variant(scale, scales)(algorithm)


def flow_map(
    algorithm: str,
    *,
    data: Block,
    run: Block,
    evaluators: Callable[[str], Mapping[str, Block]],
    weights: str,
    baseline: bool,
    classifier: Block | None = None,
) -> ConfigDict:
    """Stages 'classifier' (if any), 'flow' (if needed) and 'map', and their report.

    Args:
      algorithm: see `kd.methods.flow`; a distilled one makes the flow its teacher.
      data: of the recipe.
      run: arguments of the stages that train flows: network, optimizer, steps, ...
      evaluators: of a flow or map, given the sampler 'euler' or 'flow_map'.
      weights: 'final' or the average that teaches.
      baseline: whether to train the plain flow also where no map is distilled from it.
      classifier: arguments of a stage whose features measure the samples.
    """
    distilled = algorithm in DISTILLED
    stages = (
        *(('classifier',) if classifier else ()),
        *(('flow',) if baseline or distilled else ()),
        'map',
    )
    rows = (('flow, Euler', 'flow'), (f'flow map, {algorithm}', 'map'))
    config = kd_config.recipe(
        stages=stages,
        data=data,
        report=dict(
            name='kd.reports.generation.generation',
            rows=tuple(row for row in rows if row[1] in stages),
        ),
    )
    references = {'classifier': 'classifier'} if classifier else {}
    if classifier:
        config.classifier = kd_config.stage(**classifier)
    if 'flow' in stages:
        config.flow = kd_config.stage(
            method=dict(name='kd.methods.flow.flow_matching.flow_matching'),
            evaluators=evaluators('euler'),
            references=references,
            **run,
        )
    if distilled:
        method: dict[str, Any] = dict(
            name='kd.methods.flow.flow_map_distillation.flow_map_distillation',
            algorithm=algorithm,
            teacher_jumps='euler',
        )
        teacher: dict[str, Any] = dict(teacher='flow', teacher_weights=weights)
    else:
        method = dict(name='kd.methods.flow.flow_map.flow_map', algorithm=algorithm)
        teacher = {}
    config.map = kd_config.stage(
        method=method, evaluators=evaluators('flow_map'), references=references, **teacher, **run
    )
    return config


def samples(sampler: str, *, weights: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """The evaluators 'samples' and 'geometry' on the averaged weights."""
    probes = 'kd.evaluators.flow_samples'
    return {
        'samples': dict(
            name=f'{probes}.flow_samples',
            steps=STEPS,
            sampler=sampler,
            weights=weights,
            **arguments,
        ),
        'geometry': dict(name=f'{probes}.flow_geometry', weights=weights),
    }
