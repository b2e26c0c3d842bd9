"""Completions of partial clouds against whole ones."""

from __future__ import annotations

import jax

from kd.context import Context, Evaluator
from kd.errors import UserError
from kd.losses import point_clouds
from kd.metrics import Mean, divide, mean
from kd.ranges import Seed, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, generator, times
from kd.sampling.completion import Completion
from kd.sampling.generator import Generator


def completions(
    context: Context, *, steps: Size = 0, weights: str = 'final', seed: Seed = 0
) -> Evaluator:
    """Chamfer distance of two completions to the whole, and `spread`, that between them.

    Args:
      context: the stage; its network is a denoiser that is conditioned on `partial`.
      steps: of DDIM, for a denoiser; 0 for a generator at the times of the stage's method.
      weights: 'final' for the parameters, or the name of an average.
      seed: of the noise.
    """
    network, block = context.network, context.config.method
    if steps:
        own = denoisers.of_network(network)
        grid = times.grid(times.even(own.schedule), steps, last=1 / steps)
        made = Generator(own, tuple(map(float, grid)), diffusion.ddim())
    elif 'times' in block:
        made = generator.of_block(network, block, {}, where=f'{context.stage}.method')
    else:
        raise UserError(
            f"{context.stage}: the method has no 'times'; give the evaluator `steps` of a denoiser."
        )
    completion = Completion(made)

    def update(state, batch) -> dict[str, Mean]:
        variables = state.variables(None if weights == 'final' else weights)
        condition, whole = denoisers.conditions(network, batch), batch['input']
        first, second = (
            completion.sample(variables, condition, key, whole.shape)
            for key in jax.random.split(jax.random.key(seed))
        )
        far = 0.5 * (point_clouds.chamfer(first, whole) + point_clouds.chamfer(second, whole))
        return {
            'chamfer': mean(far, where=batch['mask']),
            'spread': mean(point_clouds.chamfer(first, second), where=batch['mask']),
        }

    return Evaluator(update, divide)
