"""What builders of methods, evaluators, writers and reports get to work with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from kd.config import Block, Recipe, StageConfig
from kd.data import sources
from kd.data.context import source_loader
from kd.errors import UserError
from kd.network import Network, output_shape
from kd.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A stage, seen by the builder of its method or of an evaluator.

    Attributes:
      stage: name of the stage.
      optimizer: makes further optimisers: `optimizer(lr=1e-3, name='adam')`.
      spec: shape and dtype of one example by name.
      num_classes: of the data set, None where it has no labels.
      steps, batch_size: of the stage.
      source: loads a split: `source('train')`.
      splits: names that `source` knows.
      recipe_source: the same for the recipe's own data, where the stage brings other data.
      locate: directory of a stage of this recipe, or of another run, by its name or path; None
        while a recipe is only checked.
      references: further frozen networks by name; variables in `state.frozen[name]`.
      trained_by: blocks of the methods that train the teacher ('teacher') and the references.
      config: what the recipe says of the stage.
      recipe: the whole of it.
      rollout: `rollout(variables, prefix='')`, inside a step: a tree of weights in the layout and
        type of the recipe's `rollout_sharding` and `rollout_dtype`, for use before a loop that
        samples; see `kd.parallel.sharding.rollout`.
      mesh: the devices of the step; None for one.
      optional_network, optional_teacher, optional_tx: None where the stage has none; a builder
        that needs them asks for `network`, `teacher`, `tx`.
    """

    stage: str
    optimizer: Callable[..., optax.GradientTransformation]
    spec: dict[str, jax.ShapeDtypeStruct]
    num_classes: int | None
    steps: int
    batch_size: int
    source: Callable[[str], sources.Source]
    splits: tuple[str, ...]
    recipe_source: Callable[[str], sources.Source]
    locate: Callable[[str], Path] | None
    references: dict[str, Network]
    config: StageConfig
    recipe: Recipe
    optional_network: Network | None
    optional_teacher: Network | None
    optional_tx: optax.GradientTransformation | None
    trained_by: Mapping[str, Block] = dataclasses.field(default_factory=dict)
    rollout: Callable[..., Any] = lambda variables, prefix='': variables
    mesh: Mesh | None = None

    @property
    def network(self) -> Network:
        """The network that is trained."""
        return self._needed('network', self.optional_network)

    @property
    def classifier(self) -> Network:
        """The network that is trained, held to an output for every class of the data.

        Logits of sequences may have more, as padded vocabularies do.
        """
        network, classes = self.network, self.num_classes
        if classes is not None:
            shape = output_shape(network)
            if shape[-1] < classes or (len(shape) == 2 and shape[-1] != classes):
                raise UserError(
                    f'{self.stage}.network has {shape[-1]} outputs, and the data has {classes} '
                    'classes; give it as many (num_classes, left out, is that of the data).'
                )
        return network

    @property
    def teacher(self) -> Network:
        """The frozen network; its variables are in `state.frozen['teacher']`."""
        return self._needed('teacher', self.optional_teacher)

    @property
    def tx(self) -> optax.GradientTransformation:
        """The stage's optimiser."""
        return self._needed('optimizer', self.optional_tx)

    def tx_of(self, updates: int) -> optax.GradientTransformation:
        """The stage's optimiser for a step of several updates; its schedule goes by steps.

        One that no config describes is as it is: it counts updates.
        """
        if updates == 1 or not self.config.optimizer:
            return self.tx
        return self.optimizer(updates=updates, **self.config.optimizer)

    def _needed(self, what: str, value: Any) -> Any:
        if value is None:
            raise UserError(f'this needs {self.stage}.{what}, which is not set.')
        return value


@dataclasses.dataclass(frozen=True)
class ReportContext:
    """A finished run, seen by the function that reports on it.

    Attributes:
      recipe: what was run.
      workdir: of the run; its stages lie in folders of their names.
      mesh: devices to evaluate on.
    """

    recipe: Recipe
    workdir: Path
    mesh: Mesh

    def source(self, split: str) -> sources.Source:
        """A split of the recipe's own data."""
        return source_loader(self.recipe.data, self.recipe, self.workdir)(split)


class Evaluator(NamedTuple):
    """`update(state, batch) -> sums` is jitted, sums are added; `finish(sums) -> scalars`.

    Batches have a bool [B] `mask`; examples outside it are padding and must not count.
    """

    update: Callable[[State, dict[str, jax.Array]], Any]
    finish: Callable[[Any], dict[str, float]]


class Probe(NamedTuple):
    """An evaluator for questions that are not sums over examples: samples, geometry, fresh runs.

    `run(state, batches) -> {name: scalar, Figure or str}`; `batches` are those of `Evaluator`, on
    the device, to be used or not. Figures are written to `figures/` in the stage's directory, texts
    to `texts/`, as Markdown.
    """

    run: Callable[[State, Iterable[dict[str, jax.Array]]], Mapping[str, float | Figure | str]]


# Writes files of a stage: `write(state, step, directory)`, at step 0 and then every so often.
Writer = Callable[[State, int, Path], None]
