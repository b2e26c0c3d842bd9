"""Which part of an elastic network is best for a budget? A predictor is asked, then the part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from kd import figures
from kd.context import Context, Probe
from kd.evaluators import sub_networks
from kd.models import elastic
from kd.models.elastic_space import Architecture, Space
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive, Size
from kd.search.evolution import nsga2

KINDS = ('clean', 'robust')


class Predictor(nn.Module):
    """Layers of ReLU and a linear one without bias: [n, F] -> [n, outputs]."""

    width: Count = 400
    layers: Count = 6
    outputs: Count = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(self.outputs, use_bias=False)(x)


def fit(
    key: jax.Array,
    features: np.ndarray,
    targets: np.ndarray,
    *,
    epochs: int = 50,
    batch: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    width: Count = 400,
) -> Callable[[np.ndarray], np.ndarray]:
    """`predict(features [n, F]) -> [n, k]` of a `Predictor` that has seen some targets [N, k].

    Minimises the sum over outputs of squared errors, by Adam with L2 as ProARD's (arXiv 2506.07666)
    does; of targets that are standardised, which is ours: from a few hundred architectures R^2 on
    others was .25 to .9 without, and is .98 with it.
    """
    center, scale = targets.mean(0), np.maximum(targets.std(0), 1e-6)
    network = Predictor(width=width, outputs=targets.shape[1])
    start_key, order_key = jax.random.split(key)
    apply: Callable[..., Any] = network.apply
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(lr))
    size = min(batch, len(features))
    steps = epochs * max(len(features) // size, 1)
    rows = jnp.concatenate([
        jax.random.permutation(k, len(features))[: len(features) // size * size].reshape(-1, size)
        for k in jax.random.split(order_key, epochs)
    ])  # fmt: skip
    assert len(rows) == steps
    x, y = (jnp.asarray(z, jnp.float32) for z in (features, (targets - center) / scale))

    @jax.jit
    def train(key):
        params = network.init(key, x[:1])

        def step(carry, rows):
            params, opt_state = carry
            grads = jax.grad(lambda p: jnp.square(apply(p, x[rows]) - y[rows]).mean(0).sum())(
                params
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

    params, predict = train(start_key), jax.jit(apply)
    return lambda z: center + scale * np.asarray(predict(params, jnp.asarray(z, jnp.float32)))


def explained(targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """R^2 of each column, 1 - sum of squared errors / that of the mean; [n, k] -> [k]."""
    errors = np.square(targets - predicted).sum(0)
    return 1.0 - errors / np.square(targets - targets.mean(0)).sum(0)


def architecture_search(
    context: Context,
    *,
    epsilon: NonNegative,
    step: Positive,
    steps: Count = 10,
    architectures: Count = 2_000,
    held_out: Fraction = 0.2,
    budgets: tuple[Fraction, ...] = (0.25, 0.5, 1.0),
    population: Count = 100,
    generations: Count = 100,
    epochs: Count = 50,
    low: Finite = -1.0,
    high: Finite = 1.0,
    jitter: NonNegative = 0.002,
    examples: Size = 2_000,
    calibration: Size = 2_000,
    batch: Count = 500,
    together: Count = 8,
    unroll: bool = False,
) -> Probe:
    """Measures some architectures, predicts all others, and searches them by NSGA-II.

    `r2_clean` and `r2_robust` are of the predictor on architectures it has not seen. For each
    budget, a share of the multiply-adds of the largest network, the front of predicted accuracies
    is searched, its point with the largest sum of both is measured, and stands in `students` beside
    the best of the architectures that were measured to train the predictor, which is what a search
    has to beat. The figure has predictions against measurements, and the choice by budget.

    Args:
      context: the stage, of an elastic network.
      epsilon, step, steps, low, high, jitter, examples, calibration, batch, together, unroll: as of
        `kd.evaluators.sub_networks.sub_networks`.
      architectures: that are measured.
      held_out: share of these that the predictor does not see.
      budgets: see above.
      population, generations: of the search.
      epochs: of the predictor.

    Source: ProARD 2025, arXiv:2506.07666.
    """
    network = context.classifier
    space = elastic.elastic(network, f'{context.stage}.network').space()
    attack = dict(
        epsilon=epsilon, step=step, steps=steps, low=low, high=high, jitter=jitter, unroll=unroll
    )
    described = jax.jit(jax.vmap(space.one_hot))
    costs = jax.jit(jax.vmap(lambda arch: elastic.multiply_adds(network, arch)))

    def run(state, batches):
        measure = sub_networks.measurer(
            network, *sub_networks.taken(network, batches, examples),
            sub_networks.images(context, calibration, batch), attack,
            together=together, batch=batch,
        )  # fmt: skip
        drawn = sub_networks.draw(network, np.arange(architectures))
        features, cost = np.asarray(described(drawn)), np.asarray(costs(drawn))
        values = measure(state.variables(), drawn)
        apart = _apart(features, held_out)
        predict = fit(jax.random.key(0), features[~apart], values[~apart], epochs=epochs)
        predicted = predict(features[apart])
        whole = float(costs({name: x[None] for name, x in space.largest().items()})[0])
        result: dict[str, Any] = dict(
            zip(
                ('r2_clean', 'r2_robust'), explained(values[apart], predicted).tolist(), strict=True
            )
        )
        rows = []
        for budget in budgets:
            affordable = cost <= budget * whole
            best = (
                values[affordable][values[affordable].sum(1).argmax()] if any(affordable) else None
            )
            found = searched(
                space, lambda arch: predict(described(arch)), costs, budget * whole,
                population=population, generations=generations,
            )  # fmt: skip
            if found is None:
                rows.append(Row(budget, None, None, None, '', best))
                continue
            arch, told = found
            measured = measure(state.variables(), arch)[0]
            arch_of = {name: x[0] for name, x in arch.items()}
            spent = float(costs(arch)[0]) / whole
            rows.append(Row(budget, spent, told, measured, space.describe(arch_of), best))
            result[f'robust_at_{budget:g}'] = float(measured[1])
        result['predictions'] = _drawn(values[apart], predicted, cost / whole, values, rows)
        result['students'] = _text(rows)
        return result

    return Probe(run)


def searched(
    space: Space,
    predict: Callable[[Architecture], np.ndarray],
    costs: Callable[[Architecture], Any],
    most: float,
    *,
    population: int,
    generations: int,
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """The architecture [1, ...] of a front with the largest sum of accuracies, and these, [2].

    Args:
      space: what may be chosen.
      predict: architectures [n, ...] -> accuracies [n, 2].
      costs: architectures [n, ...] -> multiply-adds [n].
      most: of these; None is returned where none was found that has no more.
      population, generations: of the search.
    """

    def many(function: Callable[[Architecture], Any]) -> Callable[[np.ndarray], np.ndarray]:
        """Of genes [n, G], as many at a time as have a program."""

        def call(genes: np.ndarray) -> np.ndarray:
            padded = np.resize(genes, (population, genes.shape[1]))
            return np.asarray(function(space.architectures(padded)))[: len(genes)]

        return call

    accuracies, spent = many(predict), many(costs)
    front = nsga2(
        np.random.default_rng(0),
        lambda genes: 1.0 - accuracies(genes),
        space.genes(),
        constraint=lambda genes: spent(genes) - most,
        population=population,
        generations=generations,
    )
    if not len(front.genes):
        return None
    place = int(np.argmin(front.values.sum(1)))
    return space.architectures(front.genes[place : place + 1]), 1.0 - front.values[place]


class Row(NamedTuple):
    """A budget: the choice of the search and what it costs, and the best that was measured.

    Attributes:
      budget: share of the largest network's multiply-adds.
      spent: of the choice, None where nothing fits.
      predicted, measured: accuracies [2] of the choice.
      told: its architecture in words.
      best: accuracies [2] of the best within the budget that the predictor has seen.
    """

    budget: float
    spent: float | None
    predicted: np.ndarray | None
    measured: np.ndarray | None
    told: str
    best: np.ndarray | None


def _apart(features: np.ndarray, share: float) -> np.ndarray:
    """Which rows are held out: all or none of those with the same features."""
    number = np.unique(features, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.random.default_rng(0).permutation(number.max() + 1)
    return order[number] < share * (number.max() + 1)


def _text(rows: Sequence[Row]) -> str:
    """A table of the choices."""
    lines = [
        '| budget | spent | predicted clean, robust | measured | best at random | network |',
        '|---:|---:|---:|---:|---:|---|',
    ]
    for row in rows:
        spent = '' if row.spent is None else f'{row.spent:.2f}'
        pairs = (row.predicted, row.measured, row.best)
        cells = ['' if pair is None else f'{pair[0]:.3f}, {pair[1]:.3f}' for pair in pairs]
        lines.append(f'| {row.budget:g} | {spent} | {" | ".join(cells)} | {row.told} |')
    return '\n'.join(lines) + '\n'


def _drawn(targets, predicted, shares, values, rows: Sequence[Row]) -> Figure:
    """Predictions against measurements, and what a budget buys."""
    figure = figures.new_figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    for i, kind in enumerate(KINDS):
        left.plot(targets[:, i], predicted[:, i], 'o', ms=3, color=figures.COLOURS[i], label=kind)
    ends = [min(targets.min(), predicted.min()), max(targets.max(), predicted.max())]
    left.plot(ends, ends, '--', color='grey', lw=1)
    left.set(xlabel='measured accuracy', ylabel='predicted, not seen before')
    left.legend()
    right.plot(shares, values[:, 1], 'o', ms=2, color=figures.COLOURS[5], label='drawn at random')
    chosen = [(row.spent, row.measured[1]) for row in rows if row.measured is not None]
    if chosen:
        right.plot(*zip(*chosen, strict=True), 's', color=figures.COLOURS[1], label='chosen')
    right.set(xlabel='multiply-adds over the largest', ylabel='robust accuracy')
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure
