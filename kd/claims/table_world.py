"""The experiments that several claims do in the world of `kd.data.builders.table`.

Every seed has a table of its own; runs of all seeds are trained side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from kd import figures
from kd.claims import seeds
from kd.context import Context
from kd.data.builders import table
from kd.evaluators.coverage import law_metrics
from kd.method import Method
from kd.metrics import mean_interval
from kd.models.structured import BottleneckLM
from kd.network import Network, from_linen
from kd.state import PyTree

BATCH = 256


def laws(runs: int) -> np.ndarray:
    """The teacher's logits of each seed, float32 [R, V^2, V]."""
    made = [table.logits(seed) for seed in range(runs)]
    return np.stack([law.reshape(-1, law.shape[-1]) for law in made])


def student(width: int) -> Network:
    """A student whose logits have rank `width`."""
    return from_linen(BottleneckLM(width=width), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def every_context(laws: np.ndarray) -> dict[str, np.ndarray]:
    """All contexts with what the teacher says of them and an answer of it: arrays [R, V^2, ...]."""
    runs, size, tokens = laws.shape
    labels = [
        table.answers(law, np.random.default_rng([seed, 50])) for seed, law in enumerate(laws)
    ]
    return {
        'input': np.broadcast_to(table.contexts(tokens), (runs, size, 2)),
        'teacher_logits': laws,
        'label': np.stack(labels),
    }


def context(
    network: Network,
    steps: int,
    lr: float,
    schedule: str = 'cosine',
    *,
    references: Sequence[str] = (),
) -> Context:
    """For a method's builder: Adam with a clipped gradient, the rate falling to 0.

    References are such networks too; their parameters are given to `train`.
    """
    optimizer = dict(name='adam', lr=lr, schedule=schedule, clip_norm=1.0)
    return seeds.context(
        network=network,
        num_classes=table.TOKENS,
        steps=steps,
        batch_size=BATCH,
        optimizer=optimizer,
        references=dict.fromkeys(references, network),
    )


def tuned_context(network: Network, steps: int, references: Sequence[str]) -> Context:
    """The same on a line, with references to such networks, and a rate for each run; see `tune`."""

    @optax.inject_hyperparams
    def adam(lr):
        # Called anew at every step, with the rate of the run.
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            optax.scale_by_schedule(lambda step: -lr * (1 - step / steps)),
        )

    return seeds.context(
        network=network,
        tx=adam(lr=1e-3),
        num_classes=table.TOKENS,
        steps=steps,
        batch_size=BATCH,
        references=dict.fromkeys(references, network),
    )


def train(
    method: Method,
    data: Mapping[str, np.ndarray],
    steps: int,
    references: Mapping[str, PyTree] | None = None,
) -> PyTree:
    """Parameters [R, ...] of each seed after so many steps on data of its own, [R, N, ...].

    `references` are parameters [R, ...] by name.
    """
    runs = len(next(iter(data.values())))
    frozen = {name: {'params': params} for name, params in (references or {}).items()}
    state = seeds.train(
        method, {}, np.arange(runs), steps=steps, batch_size=BATCH, per_run=data,
        frozen_per_run=frozen,
    )  # fmt: skip
    return state.params['network']


def tune(
    method: Method,
    data: Mapping[str, np.ndarray],
    steps: int,
    rates: Sequence[float],
    references: Mapping[str, PyTree],
) -> dict[float, PyTree]:
    """Parameters {rate: [R, ...]} after a run of every seed at every rate, side by side.

    Args:
      method: of a `tuned_context`.
      data: of each seed, [R, N, ...].
      steps: of every run.
      rates: learning rates.
      references: parameters [R, ...] of the references by name.
    """
    runs = len(next(iter(data.values())))

    def every(x):
        return np.tile(x, (len(rates), *[1] * (np.ndim(x) - 1)))

    state = seeds.train(
        method, {}, every(np.arange(runs)), steps=steps, batch_size=BATCH,
        per_run={name: every(value) for name, value in data.items()},
        frozen_per_run={
            name: {'params': jax.tree.map(every, params)} for name, params in references.items()
        },
        hyperparameters={'lr': np.repeat(rates, runs)},
    )  # fmt: skip
    return {
        rate: jax.tree.map(lambda x, i=i: x[i * runs : (i + 1) * runs], state.params['network'])
        for i, rate in enumerate(rates)
    }


def measure(
    network: Network, params: PyTree, laws: np.ndarray, further: Callable | None = None
) -> dict[str, np.ndarray]:
    """`law_metrics` over all contexts, and how often both agree on the first answer: [R] each.

    `further(logits, law)`, both [V^2, V], may give more by name, [V^2] each.
    """
    found = _measured(network, further, params, laws)
    return {name: np.asarray(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(network: Network, further: Callable | None, params: PyTree, laws: jax.Array):
    every = jnp.asarray(table.contexts(laws.shape[-1]))

    @jax.vmap
    def of_run(params, law):
        logits = network.apply({'params': params}, every).logits
        found = law_metrics(logits, law)
        found |= further(logits, law) if further else {}
        found['agreement'] = (logits.argmax(-1) == law.argmax(-1)).astype(jnp.float32)
        return {name: value.mean() for name, value in found.items()}

    return of_run(params, laws)


def draw(
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    panels: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
) -> Figure:
    """Every arm a row, every seed a dot, a panel for each metric: (name, label)."""
    arms = [arm for arm in titles if arm in measured]

    def spread(values: Sequence[float]) -> figures.Spread:
        return (list(values), *mean_interval(np.asarray(values)))

    return figures.comparison({
        label: {titles[arm]: spread(measured[arm][metric]) for arm in arms}
        for metric, label in panels
    })  # fmt: skip
