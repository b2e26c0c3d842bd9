"""Probe of a distilled flow: how far it carries noise from where its teacher does."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators.flow_samples import advance_of
from kd.evaluators.samples import check_weights
from kd.ranges import Count, Finite, Positive, Seed
from kd.sampling.flow import SAMPLERS, draw_noise, time_grid
from kd.sampling.velocity import noise_scale, num_classes, velocity_function
from kd.state import State


def flow_fidelity(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1, 2, 4, 8),
    sampler: str = 'flow_map',
    weights: str = 'final',
    guidance: Finite = 1.0,
    solver_steps: Count = 128,
    samples: Count = 512,
    scale: Positive | None = None,
    seed: Seed = 0,
) -> Probe:
    """Distances to the teacher's solution from the same noise, in units of the noise.

    Metrics, each with the number of steps at its end, `end_rmse_4`:
      end_rmse, end_median: root mean square over elements, and median over samples of each one's
        own. Few samples at the borders of basins can make the first, so that the two say different
        things;
      middle_rmse: the same in the middle of every step, of which an end says nothing.

    Args:
      context: the stage; a velocity network and its teacher, a flow.
      steps: of the student.
      sampler: 'flow_map' for jumps, 'euler' for Euler steps of the diagonal.
      weights: 'final' for the parameters, or the name of an average.
      guidance: of the teacher.
      solver_steps: Heun steps of the teacher from noise to data; rounded up to whole ones for each
        half of a step.
      samples: how many noises.
      scale: standard deviation of the noise; None for the network's `data_scale`.
      seed: of the noise.
    """
    check_weights(context, weights)
    if sampler not in ('flow_map', 'euler'):
        raise UserError(f"sampler must be 'flow_map' or 'euler', got '{sampler}'.")
    network, shape = context.network, context.spec['input'].shape
    sigma, teacher = noise_scale(network, scale), context.teacher
    advance = jax.jit(advance_of(network, sampler, 1.0))

    def solve(variables, x, label, n):
        """The teacher at the 2n + 1 ends and middles of n steps."""
        field = velocity_function(teacher, variables, label, guidance=guidance)
        each = -(-solver_steps // (2 * n))
        states = SAMPLERS['heun'](field, x, time_grid(2 * n * each), trajectory=True)
        return states[::each]

    solved = jax.jit(solve, static_argnums=3)

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float]:
        noise = draw_noise(jax.random.key(seed), samples, shape, scale=sigma)
        label = None if num_classes(teacher) is None else _labels(batches, samples)
        variables = state.variables(None if weights == 'final' else weights)
        found = {}
        for n in steps:
            exact = solved(state.frozen['teacher'], noise, label, n)
            x, middles = noise, []
            for i, (s, t) in enumerate(itertools.pairwise(time_grid(n))):
                half = advance(variables, s, 0.5 * (s + t), x, label)
                middles.append(_square(half - exact[2 * i + 1], sigma))
                x = advance(variables, s, t, x, label)
            ends = _square(x - exact[-1], sigma)
            found[f'end_rmse_{n}'] = float(jnp.sqrt(ends.mean()))
            found[f'end_median_{n}'] = float(jnp.median(jnp.sqrt(ends)))
            found[f'middle_rmse_{n}'] = float(jnp.sqrt(jnp.stack(middles).mean()))
        return found

    return Probe(run)


def _labels(batches: Iterable[dict[str, jax.Array]], count: int) -> jax.Array | None:
    """Classes of the first examples, over again where there are more samples."""
    parts = [batch['label'][batch['mask']] for batch in batches if 'label' in batch]
    return jnp.resize(jnp.concatenate(parts), (count,)) if parts else None


def _square(away: jax.Array, sigma: float) -> jax.Array:
    """Mean over the elements of each sample, [B]."""
    return jnp.mean(jnp.square(away / sigma), axis=tuple(range(1, away.ndim)))
