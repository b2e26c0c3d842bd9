"""What builders of methods and evaluators get to work with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from kd.config import ConfigDict
from kd.data import sources
from kd.network import Network
from kd.state import State


@dataclasses.dataclass(frozen=True)
class Context:
    """What the builder of a method or an evaluator may use.

    Attributes:
      network: the network that is trained (None if the stage has none).
      teacher: the frozen network (None if the stage has no teacher); its variables are in
        `state.frozen['teacher']`.
      tx: the stage's optimiser (None without `optimizer`).
      optimizer: makes further optimisers: `optimizer(lr=1e-3, name='adam')`.
      spec: shape and dtype of one example by name.
      num_classes: of the data set, None where it has no labels.
      steps, batch_size: of the stage.
      source: loads a split: `source('train')`.
      config: the whole recipe, read-only.
    """

    network: Network | None
    teacher: Network | None
    tx: optax.GradientTransformation | None
    optimizer: Callable[..., optax.GradientTransformation]
    spec: dict[str, jax.ShapeDtypeStruct]
    num_classes: int | None
    steps: int
    batch_size: int
    source: Callable[[str], sources.Source]
    config: ConfigDict


class Evaluator(NamedTuple):
    """`update(state, batch) -> sums` is jitted, sums are added; `finish(sums) -> scalars`.

    Batches have a bool [B] `mask`; examples outside it are padding and must not count.
    """

    update: Callable[[State, dict[str, jax.Array]], Any]
    finish: Callable[[Any], dict[str, float]]
