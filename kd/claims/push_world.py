"""What claims of reinforcement learning on pushed boxes share (`kd.data.builders.push`).

All runs begin with one base, `configs/rl/bases.py:push`, and those that differ in numbers alone are
trained side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import figures
from kd.claims import seeds
from kd.context import Context
from kd.data import push, sources
from kd.data.builders import push as world
from kd.data.builders import symbols
from kd.data.context import SourceContext
from kd.io import safetensors
from kd.method import Batch
from kd.methods.rl import common
from kd.methods.rl.pi_distill import told as with_told
from kd.metrics import mean_interval
from kd.models import decoders
from kd.network import Network, from_linen
from kd.rewards import push as rewards
from kd.state import PyTree
from kd.training import loop

# Levels of a step and episodes of each; tries of each level when it is measured.
LEVELS, GROUP, TRIES = 16, 8, 8
LR = 3e-4
SAMPLING: dict[str, Any] = {
    'group': GROUP,
    'max_new': 1,
    'only': world.ACTIONS,
    'environment': {'name': 'kd.rewards.push.environment'},
}
REWARD = {'name': 'kd.rewards.push.push'}
# Seeds of the runs.
FIRST = 10


def network() -> Network:
    """The network of the base."""
    return from_linen(decoders.preset('toy'), jax.ShapeDtypeStruct((1, 8), jnp.int32))


def base(smoke: bool = False) -> PyTree:
    """Its parameters; it is trained if nobody has. Those of nobody where `smoke`."""
    if smoke:
        return network().init(jax.random.key(0))['params']
    place = loop.provide('configs/rl/bases.py:push')
    return safetensors.stage_variables(place / 'base')['params']


def context(
    steps: int, *, references: Sequence[str] = ('start',), asked: sources.Batch | None = None
) -> Context:  # fmt: skip
    """For a method's builder: Adam at 3e-4."""
    own, asked = network(), push.levels('train', 'full') if asked is None else asked
    return seeds.context(
        network=own, references=dict.fromkeys(references, own), steps=steps,
        optimizer={'name': 'adam', 'lr': LR}, batch_size=LEVELS, num_classes=symbols.TOKENS,
        spec={name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in asked.items()},
        source=lambda split: push.push(SourceContext(split)),
    )  # fmt: skip


def measure(
    params: PyTree, *, told: world.Told | None = None, tries: int = TRIES, few: int = 0
) -> dict[str, np.ndarray]:
    """How runs, parameters [R, ...], do on levels that are held out and on those of 'train'.

    Args:
      params: of the runs.
      told: what an expert says of the levels before they are played; None for nothing.
      tries: of each level.
      few: so many levels of a split; 0 for all.

    Returns:
      success, completion (held out), train_success, train_completion: [R].
    """
    found = {}
    for split, prefix in (('test', ''), ('train', 'train_')):
        levels = push.levels(split, told or 'full')
        asked = {name: np.repeat(x[: few or None], tries, axis=0) for name, x in levels.items()}
        for name, value in _measured(told is not None)(params, asked).items():
            found[prefix + name] = np.asarray(value)
    return found


@functools.cache
def _measured(told: bool):
    own = context(1)
    draw = common.drawing(own, common.Sampling(**SAMPLING))
    rewarded = {
        'success': rewards.push(own),
        'completion': rewards.push(own, of='completion'),
    }

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def of_run(params: PyTree, asked: Batch):
        batch = with_told(asked) if told else asked
        said = draw.of({'params': params}, batch, jax.random.key(7))
        return {
            name: reward(said.tokens, said.mask, asked).mean() for name, reward in rewarded.items()
        }

    return of_run


def draw(
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    panels: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
) -> Figure:
    """Every arm a row, every seed a dot, a panel for each metric: (name, label)."""

    def spread(values: Sequence[float]) -> figures.Spread:
        return (list(values), *mean_interval(np.asarray(values)))

    return figures.comparison({
        label: {
            title: spread(measured[arm][metric])
            for arm, title in titles.items()
            if arm in measured and metric in measured[arm]
        }
        for metric, label in panels
    })  # fmt: skip
