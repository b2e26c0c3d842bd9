"""The gradient of differentially private descent (Abadi et al. 2016, arXiv:1607.00133, alg. 1).

    minimize(loss, tx, init, along=private(Privacy(clip_norm, noise_multiplier, expected)))

Any loss becomes private by it that treats the rows of a batch apart: a row is a record, the loss is
called with one at a time, and what it knows of the other records (a mean over the batch, advantages
within a group, statistics of normalisation, filters) would break the guarantee unseen. So would
`with_collect` that mixes rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from kd.errors import UserError
from kd.method.base import Loss, Objective
from kd.method.single import Gradient, check_objective, merged, over_parts, trained
from kd.metrics import Mean, scalar
from kd.state import NETWORK, PyTree, State

# What no record's key is folded with.
_NOISE = zlib.crc32(b'noise')
_ROW = 'row'


class Privacy(NamedTuple):
    """What a private gradient is made by; numbers, or scalar arrays.

    Attributes:
      clip_norm: C, the largest norm of a record's gradient; more is scaled down.
      noise_multiplier: sigma, deviation of the noise in units of C.
      expected: B, the expected number of records in a batch.
    """

    clip_norm: ArrayLike
    noise_multiplier: ArrayLike
    expected: ArrayLike


def private(privacy: Privacy | Callable[[State], Privacy]) -> Gradient:
    """The gradient of a loss with every record's share bounded, and noise that hides it.

        g_n = grad l_n,   g = ( sum_n g_n min(1, C / |g_n|) + N(0, (sigma C)^2) ) / B

    over the records n of the batch, with l_n = sum / count of what the loss returns for record n
    alone. Of batches by the coins of `StageConfig.poisson` this is what `kd.theory.privacy` counts.
    One record more or less moves the sum by at most C, another in its place by at most 2 C. B is
    the expected number of records, and not the number that has come, which is private.

    A batch has a bool `mask`, False for rows that hold no record; these add nothing. Gradients of
    the rows of a micro-batch exist at once, and are summed in float32: take so many `micro_batches`
    that they fit. The noise is drawn once, from the step's key, in the shapes of the parameters:
    micro-batches and devices change nothing but the order of sums. A record's own key depends on
    its row.

    Metrics, which are of the records and have no noise, so that whoever sees them sees more than is
    accounted for: those of the loss, `clipped`, the share of records with |g_n| > C, `record_norm`,
    the mean |g_n|, and `records`, how many there were.

    Args:
      privacy: C, sigma and B; or a function of the state that returns them.

    Raises:
      UserError: variables that are statistics of a batch; a batch without `mask`.
    """

    def gradient(
        loss: Loss,
        params: PyTree,
        state: State,
        batch: dict,
        key: jax.Array,
        micro_batches: int = 1,
        *,
        part: str = NETWORK,
        trainable=None,
    ) -> tuple[PyTree, Objective]:
        del part
        given = privacy(state) if callable(privacy) else privacy
        _check(state, batch)
        moving = trained(params, trainable)

        def differentiate(moving, mutables, records, part_key):
            del mutables, part_key
            return _clipped(loss, moving, params, state, records, key, given.clip_norm)

        rows = jnp.arange(len(batch['mask']))
        total, objective = over_parts(
            differentiate, moving, state, {**batch, _ROW: rows}, key, micro_batches
        )
        deviation = jnp.asarray(given.noise_multiplier) * given.clip_norm
        noisy = with_noise(total, jax.random.fold_in(key, _NOISE), deviation)
        grads = jax.tree.map(lambda g, x: (g / given.expected).astype(x.dtype), noisy, moving)
        metrics = {**objective.metrics, 'records': scalar(objective.metrics['clipped'].count)}
        return grads, objective._replace(metrics=metrics)

    return gradient


def with_noise(tree: PyTree, key: jax.Array, deviation: ArrayLike) -> PyTree:
    """The tree and N(0, deviation^2) at each number, independent of each other."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            x + deviation * jax.random.normal(k, x.shape, x.dtype)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def _clipped(loss, moving, params, state, records, key, clip_norm) -> tuple[PyTree, Objective]:
    """Sum of the clipped gradients of the records of a batch, and of what the loss says of each."""
    records = dict(records)
    mask, rows = records.pop('mask'), records.pop(_ROW)

    def of_record(record, row):
        def value(moving):
            one = jax.tree.map(lambda x: x[None], record)
            objective = loss(merged(moving, params), state, one, jax.random.fold_in(key, row))
            check_objective(loss, objective)
            if objective.mutables:
                raise UserError(_SHARED.format(sorted(objective.mutables)))
            total, count = objective.loss
            return total / jnp.maximum(count, 1e-12), objective

        (mean, objective), grads = jax.value_and_grad(value, has_aux=True)(moving)
        return mean, objective, grads, optax.tree.norm(_wide(grads))

    means, objectives, grads, norms = jax.vmap(of_record)(records, rows)
    scales = jnp.minimum(1.0, clip_norm / jnp.maximum(norms, 1e-12))

    def summed(weights, x):
        return jnp.tensordot(weights, x.astype(jnp.float32), 1)

    total = jax.tree.map(lambda g: summed(jnp.where(mask, scales, 0.0), g), grads)
    counted = mask.astype(jnp.float32)
    # A record without anything that counts has a gradient of 0, and no loss.
    told = jnp.where(objectives.loss.count > 0, counted, 0.0)
    metrics = {
        **jax.tree.map(lambda x: summed(counted, x), objectives.metrics),
        'clipped': Mean(summed(counted, norms > clip_norm), counted.sum()),
        'record_norm': Mean(summed(counted, norms), counted.sum()),
    }
    return total, Objective(Mean(summed(told, means), told.sum()), metrics)


_SHARED = 'private gradients need a network without {}, which all records of a batch would share.'


def _check(state: State, batch: dict) -> None:
    if state.mutables:
        shared = {name for collections in state.mutables.values() for name in collections}
        raise UserError(_SHARED.format(sorted(shared)))
    if 'mask' not in batch:
        raise UserError(
            "private gradients need a batch whose 'mask' says which rows hold a record; set the "
            "stage's poisson to the expected number of records."
        )


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
