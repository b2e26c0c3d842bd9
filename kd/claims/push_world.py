"""What claims of reinforcement learning on pushed boxes share (`kd.data.builders.push`).

All runs begin with one base, `configs/rl/bases.py:push`, and those that differ in numbers alone are
trained side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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

LR = 3e-4
REWARD = {'name': 'kd.rewards.push.push'}
# Seeds of the runs.
FIRST = 10


class Size(NamedTuple):
    """How much a claim does.

    Attributes:
      runs: of each arm.
      steps: of each run.
      levels, group: of a step, and episodes of each.
      horizon: turns of an episode at most.
      few, tries: levels of a split when runs are measured, 0 for all, and episodes of each.
      network: what differs from that of the base, of `kd.models.decoders.preset`; then there is no
        base to load.
    """

    runs: int = 3
    steps: int = 100
    levels: int = 16
    group: int = 8
    horizon: int = world.HORIZON
    few: int = 0
    tries: int = 8
    network: tuple[tuple[str, Any], ...] = ()

    @property
    def sampling(self) -> dict[str, Any]:
        """Of episodes."""
        return {
            'group': self.group,
            'max_new': 1,
            'only': world.ACTIONS,
            'environment': {'name': 'kd.rewards.push.environment', 'horizon': self.horizon},
        }


FULL = Size()
SMOKE = Size(
    steps=2, levels=2, group=2, horizon=3, few=2, tries=1,
    network=(('width', 16), ('depth', 1), ('heads', 2), ('kv_heads', 2), ('mlp_hidden', 24)),
)  # fmt: skip


def network(size: Size = FULL) -> Network:
    """The network of the base, or of this size."""
    inputs = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return from_linen(decoders.preset('toy', **dict(size.network)), inputs)


def base(size: Size = FULL) -> PyTree:
    """Parameters of the base, which is trained if nobody has; those of nobody of another size."""
    if size.network:
        return jax.jit(network(size).init)(jax.random.key(0))['params']
    place = loop.provide('configs/rl/bases.py:push')
    return safetensors.stage_variables(place / 'base')['params']


def context(size: Size, asked: sources.Batch) -> Context:
    """For a method's builder: Adam at 3e-4."""
    own = network(size)
    return seeds.context(
        network=own, references={'start': own}, steps=size.steps,
        optimizer={'name': 'adam', 'lr': LR}, batch_size=size.levels, num_classes=symbols.TOKENS,
        spec={name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in asked.items()},
        source=lambda split: push.push(SourceContext(split)),
    )  # fmt: skip


def measure(
    params: PyTree, size: Size = FULL, *, told: world.Told | None = None
) -> dict[str, np.ndarray]:
    """How runs, parameters [R, ...], do on levels that are held out and on those of 'train'.

    Args:
      params: of the runs.
      size: of the claim.
      told: what an expert says of the levels before they are played; None for nothing.

    Returns:
      success, completion (held out), train_success, train_completion: [R].
    """
    found = {}
    for split, prefix in (('test', ''), ('train', 'train_')):
        levels = push.levels(split, told or 'full')
        asked = {
            name: np.repeat(x[: size.few or None], size.tries, axis=0) for name, x in levels.items()
        }
        for name, value in _measured(size, told is not None)(params, asked).items():
            found[prefix + name] = np.asarray(value)
    return found


@functools.cache
def _measured(size: Size, told: bool):
    own = context(size, push.levels('train', 'full'))
    draw = common.drawing(own, common.Sampling(**size.sampling))
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
