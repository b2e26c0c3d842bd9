"""The experiments that several claims do in the world of `kd.data.builders.table`.

Every seed has a table of its own; runs of all seeds are trained side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
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


def context(network: Network, steps: int, lr: float) -> Context:
    """For a method's builder: Adam with a clipped gradient, the rate falling as a cosine."""
    optimizer = dict(name='adam', lr=lr, schedule='cosine', clip_norm=1.0)
    return seeds.context(
        network=network,
        num_classes=table.TOKENS,
        steps=steps,
        batch_size=BATCH,
        optimizer=optimizer,
    )


def train(method: Method, data: Mapping[str, np.ndarray], steps: int) -> PyTree:
    """Parameters [R, ...] of each seed after so many steps on data of its own, [R, N, ...]."""
    runs = len(next(iter(data.values())))
    state = seeds.train(method, {}, np.arange(runs), steps=steps, batch_size=BATCH, per_run=data)
    return state.params['network']


def measure(network: Network, params: PyTree, laws: np.ndarray) -> dict[str, np.ndarray]:
    """`law_metrics` over all contexts, and how often both agree on the first answer: [R] each."""
    every = jnp.asarray(table.contexts(laws.shape[-1]))

    @jax.jit
    @jax.vmap
    def of_run(params, law):
        logits = network.apply({'params': params}, every).logits
        found = law_metrics(logits, law)
        found['agreement'] = (logits.argmax(-1) == law.argmax(-1)).astype(jnp.float32)
        return {name: value.mean() for name, value in found.items()}

    return {name: np.asarray(value) for name, value in of_run(params, laws).items()}


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
