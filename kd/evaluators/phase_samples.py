"""A probe of experts for parts of the noise, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import samples as samples_lib
from kd.evaluators.samples import Draw
from kd.ranges import Count, Seed
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling.denoiser import Denoiser


def phase_samples(
    context: Context,
    *,
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    support: str = '',
    classifier: str = '',
    feature: str = 'features',
    inception: str = '',
    seed: Seed = 0,
) -> Probe:
    """Samples of the experts before and of the last one, which the stage trains (Phased DMD).

    Each is asked at its own times, and Euler steps lead from one to the next.

    Args:
      context: the stage of the last phase, whose method is `kd.methods.diffusion.phased_dmd`.
      weights, samples, batch, support, classifier, feature, inception, seed: as of
        `kd.evaluators.flow_samples.flow_samples`. Metrics end in the number of calls.

    Raises:
      UserError: a phase that is not the last.
    """
    block, taught = context.config.method, context.trained_by.get('teacher')
    if block.get('end') or 'times' not in block:
        raise UserError(
            f'{context.stage}.evaluators: phase_samples is of the last phase, whose method has '
            'times and no end.'
        )
    own = denoisers.of_network(context.network, taught)
    asked = [
        (name, denoisers.of_network(context.references[name], taught), t)
        for name, levels in block.get('before', ())
        for t in levels
    ] + [('', own, t) for t in block['times']]

    def variables_of(state: Any) -> dict[str, Any]:
        before = {name: state.frozen[name] for name, _, _ in asked if name}
        return {**before, '': state.variables(None if weights == 'final' else weights)}

    scale = float(own.schedule.sigma(jnp.float32(asked[0][2])))
    return samples_lib.probe(
        context, {len(asked): jax.jit(by_phases(asked))}, scale=scale,
        weights=weights, samples=samples, batch=batch, support=support, classifier=classifier,
        feature=feature, inception=inception, seed=seed,
        told=denoisers.conditions(context.network, context.spec), variables_of=variables_of,
    )  # fmt: skip


def by_phases(asked: Sequence[tuple[str, Denoiser, float]]) -> Draw:
    """Euler steps from one time to the next, and what the last one says at the last.

    Args:
      asked: (name of its variables, denoiser, time) of each call, times decreasing.
    """
    step = diffusion.ddim()

    def draw(variables: Any, x: jax.Array, condition: Any, key: jax.Array) -> jax.Array:
        for (name, of, t), (_, _, to) in itertools.pairwise(asked):
            denoise = of.bind(variables[name], condition)
            x, _ = step.move(of.schedule, denoise, x, jnp.float32(t), jnp.float32(to), key, ())
        name, of, t = asked[-1]
        return of.bind(variables[name], condition)(x, jnp.float32(t))

    return draw
