"""What a run has trained, for a notebook, a script, or another look at it.

import kd

model = kd.load('runs/mine/student')
logits = model(model.inputs(images))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd import files
from kd.config import Recipe, StageConfig
from kd.data.context import source_loader, splits
from kd.data.sources import Source
from kd.errors import UserError
from kd.io import checkpoints, finished, safetensors
from kd.network import Network
from kd.networks import build_network
from kd.state import PyTree, State
from kd.training.stage import Stage
from kd.training.step import initial_state


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The network of a finished stage.

    Attributes:
      network: pure functions, see `kd.network.Network`.
      variables: {'params': ..., **mutables}, arrays on the first device; {} where only the network
        was asked for.
      source: `source(split)` are the data of the stage, by the names of its recipe's splits, as the
        network sees them; nothing is read before it is called.
      splits: these names.
      stage: the config of the stage.
      recipe: that of its run.
    """

    network: Network
    variables: PyTree
    source: Callable[[str], Source]
    splits: tuple[str, ...]
    stage: StageConfig
    recipe: Recipe

    def __call__(self, *inputs: jax.Array | np.ndarray) -> jax.Array:
        """What the network says of a batch, float32 [B, classes] for a classifier.

        Args:
          *inputs: what the network takes, [B, ...] each, as `source(split).fetch` has them in its
            fields `network.fields`.
        """
        return self._applied(self.variables, *map(jnp.asarray, inputs))

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """Images as the data of the stage would show them to the network.

        Args:
          images: [B, H, W, C], uint8, or floats in [-1, 1].

        Returns:
          float32 [B, ...]: cropped, resized and standardised as the data are.

        Raises:
          ValueError: other numbers, or images that come out in another shape than the network's.
        """
        images = np.asarray(images)
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 127.5 - 1
        elif not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f'images are uint8, or floats in [-1, 1], not {images.dtype}.')
        source = self.source(self.splits[0])
        found, shape = source.from_pixels(images.astype(np.float32)), source.spec['input'].shape
        if found.shape[1:] != shape:
            raise ValueError(
                f'images {list(images.shape)} come to {list(found.shape)}, and the network takes '
                f'{[len(images), *shape]}.'
            )
        return found

    @functools.cached_property
    def _applied(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda variables, *x: self.network.apply(variables, *x).logits)


def load(directory: str | Path, weights: str = 'final') -> Loaded:
    """The network of a finished stage, with what it has learnt.

    Args:
      directory: of the stage, such as runs/mine/student.
      weights: 'final', or the name of an average that the stage kept.

    Raises:
      UserError: no finished stage, one that trains no network, other weights, or a damaged file.
    """
    found = untrained(directory)
    return dataclasses.replace(
        found, variables=safetensors.stage_variables(Path(directory), weights)
    )


def untrained(directory: str | Path) -> Loaded:
    """As `load`, without the variables.

    Raises:
      UserError: no finished stage, or one that trains no network.
    """
    directory = Path(directory)
    recipe = recipe_of(directory)
    stage = recipe.stages[directory.name]
    data = config_lib.data_of(recipe.data, stage.data)
    names = splits(data)
    names = tuple(sorted(names, key=lambda name: name != 'train'))
    source = source_loader(data, recipe, directory.parent)
    network = build_network(
        stage.network,
        source(names[0]),
        where=f'{directory.name}.network',
        locate=lambda reference: recipe.locate(reference, directory.parent),
    )
    if network is None:
        raise UserError(f'{directory} trains no network.')
    return Loaded(network, {}, source, names, stage, recipe)


def recipe_of(directory: Path) -> Recipe:
    """The recipe of the run that a finished stage is of.

    Raises:
      UserError: no finished stage.
    """
    file = directory.parent / 'config.json'
    if finished.read_done(directory) is None or not file.is_file():
        raise UserError(
            f"'{directory}' is not the directory of a finished stage, such as runs/mine/student."
        )
    stored = files.read_json(file, 'manifest.json beside it holds it too')
    recipe = config_lib.parse(config_lib.to_plain(stored))
    if directory.name not in recipe.stages:
        raise UserError(f"{file} has no stage '{directory.name}', only {list(recipe.stages)}.")
    return recipe


def restored(stage: Stage, directory: Path) -> State:
    """The state of a finished stage as its evaluators saw it: the variables of its result, and the
    frozen networks. What the optimiser and the method remember is that of the beginning.

    Args:
      stage: prepared with its work directory.
      directory: of the stage.

    Raises:
      UserError: not finished, or a checkpoint that does not fit.
    """
    step, variables = result(stage, directory)
    state = initial_state(stage)
    now = jax.device_put(np.asarray(step, state.step.dtype), state.step.sharding)
    return state.replace(**variables, step=now, frozen=stage.frozen)


def result(stage: Stage, directory: Path) -> tuple[int, dict[str, Any]]:
    """(step, {'params', 'mutables', 'ema'} as far as there are any) that a stage ended with.

    Raises:
      UserError: not finished, or a checkpoint that does not fit.
    """
    done = finished.read_done(directory)
    if done is None:
        raise UserError(f'stage {directory.name} of {directory.parent} is not finished.')
    parts = checkpoints.variables(stage.abstract_state())
    wanted = {part: tree for part, tree in parts.items() if jax.tree.leaves(tree)}
    return done['step'], finished.restore_variables(directory, done['step'], wanted, stage.name)
