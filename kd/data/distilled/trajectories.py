"""Segments of expert trajectories as a data source, for matching them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kd import config as config_lib
from kd.config import Recipe, StageConfig
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import trajectories
from kd.losses import segments as segments_lib
from kd.networks import build_network
from kd.ranges import Count


def segments(
    context: SourceContext,
    *,
    network: Mapping[str, Any],
    max_start_epoch: Count,
    expert_epochs: Count,
    experts: str = 'experts',
) -> sources.Source:
    """Every segment of M epochs that starts before `max_start_epoch`, of every expert.

    An example has `start` float32 [P], the parameters after t epochs; `targets` float32 [M, P],
    those 1..M epochs later; and `epoch` int32, t. The training pipeline takes each (expert, t) once
    per pass, in random order, which draws t uniformly.

    For the key `source` of a stage's data, with `train='train'`; slices such as 'train[:90%]' go
    through the experts one after another.

    Args:
      context: of the split 'train' or a slice of it; the recipe's data must be what the experts
        were trained on.
      network: block of the network whose parameters these are.
      max_start_epoch: bound of t, exclusive.
      expert_epochs: M, at least 1.
      experts: the stage that trained the experts, or the directory of a stage of another run.

    Raises:
      UserError: no finished buffer, or one made with another network or data set.
      ValueError: segments that reach beyond the trajectories.

    Source: arXiv 2203.11932, algorithm 1.
    """
    real = context.recipe_data(context.recipe.data['train'])
    buffer = None
    if context.workdir is None and experts in context.recipe.stages:
        planned = context.recipe.stages[experts]
        _check_network(planned, experts, network)
        segments_lib.check(planned.method['epochs'], max_start_epoch, expert_epochs)
        count = planned.method['experts']
    else:
        buffer = trajectories.Buffer(context.locate(experts))
        expected = trajectories.fingerprint(network=network, data=training_data(context.recipe))
        buffer.check(expected, 'data.source')
        segments_lib.check(buffer.manifest.epochs, max_start_epoch, expert_epochs)
        count = buffer.manifest.experts
    built = build_network(network, real, where='data.source.network')
    if built is None:
        raise UserError('data.source.network must name the network of the trajectories.')
    abstract = jax.eval_shape(built.init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(abstract['params']))

    def read(rows: np.ndarray) -> sources.Batch:
        assert buffer is not None, 'a recipe that is only checked reads no trajectories'
        who, when = np.divmod(rows, max_start_epoch)
        pairs = list(zip(who.tolist(), when.tolist(), strict=True))
        later = range(1, expert_epochs + 1)
        return {
            'start': np.stack([buffer.snapshot(e, t) for e, t in pairs]),
            'targets': np.stack([[buffer.snapshot(e, t + j) for j in later] for e, t in pairs]),
            'epoch': when.astype(np.int32),
        }

    data = sources.DataSet(
        name='trajectories',
        sizes={'train': count * max_start_epoch},
        reader=lambda _: read,
        spec={
            'start': jax.ShapeDtypeStruct((size,), np.float32),
            'targets': jax.ShapeDtypeStruct((expert_epochs, size), np.float32),
            'epoch': jax.ShapeDtypeStruct((), np.int32),
        },
        num_classes=real.num_classes,
        class_names=real.class_names,
    )
    return sources.Source(data, context.split)


def _check_network(stage: StageConfig, experts: str, network: Mapping[str, Any]) -> None:
    """Refuses segments of another network than a stage is going to train."""
    planned = trajectories.fingerprint(network=stage.network)
    difference = config_lib.first_difference(planned, trajectories.fingerprint(network=network))
    if difference:
        raise UserError(
            f'data.source: the stage {experts} trains another network: {difference}. Change both.'
        )


def training_data(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe's data that training sees."""
    return {key: recipe.data[key] for key in ('name', 'source', 'train') if key in recipe.data}
