"""A probe of samples that a base model begins and the stage's generator finishes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import samples as samples_lib
from kd.ranges import Count, Finite, Seed, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, generator, times
from kd.sampling.generator import Generator
from kd.sampling.hybrid import hybrid


def hybrid_samples(
    context: Context,
    *,
    base: str = 'base',
    switch: Size = 1,
    skip: bool = False,
    base_steps: Size = 0,
    sampler: str = 'ddim',
    guidance: Finite = 1.0,
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    classifier: str = '',
    feature: str = 'features',
    inception: str = '',
    seed: Seed = 0,
) -> Probe:
    """Diversity distillation (arXiv:2503.10637): no training, another first step.

    Args:
      context: the stage, whose method has `times`; `references` has the base.
      base: name of the reference.
      switch: index of the generator's first own time; steps before it are the base's.
      skip: nobody makes these steps, as in the released script with its defaults.
      base_steps: the base's own number of steps, by its own `sampler`, until it is nearest to the
        generator's time; 0 for the grid and the step of the generator.
      sampler: of `kd.sampling.diffusion.STEPS`, for `base_steps` above 0.
      guidance: of the base; 1 for none, which is the paper's best. (Its code writes 0 for it.)
      weights, samples, batch, classifier, feature, inception, seed: as of
        `kd.evaluators.flow_samples.flow_samples`. Metrics end in the number of calls of networks.
    """
    block, where = context.config.method, f'{context.stage}.evaluators'
    if base not in context.references:
        raise UserError(
            f"{where}: base='{base}' is none of {context.stage}.references, which are "
            f'{sorted(context.references)}.'
        )
    if 'times' not in block:
        raise UserError(f'{where}: hybrid_samples needs a method with times, a generator.')
    taught = context.trained_by.get('teacher', {})
    own = generator.of_block(context.network, block, taught, where=f'{context.stage}.method')
    named = context.references[base]
    first = denoisers.guided(denoisers.of_network(named, context.trained_by.get(base)), guidance)
    if base_steps:
        grid = tuple(map(float, times.sampling(first.schedule, base_steps)))
        begun = Generator(first, grid, diffusion.STEPS[sampler]())
    else:
        begun = Generator(first, own.times, own.step)
    made = hybrid(begun, own, switch, skip=skip, where=where)

    @jax.jit
    def draw(variables, x, condition, key):
        return made.finish(variables['base'], variables['own'], condition, key, x)

    def variables_of(state):
        own = state.variables(None if weights == 'final' else weights)
        return {'own': own, 'base': state.frozen[base]}

    calls = made.steps + len(own.times) - switch
    return samples_lib.probe(
        context, {calls: draw},
        scale=float(own.denoiser.schedule.sigma(jnp.float32(made.first))),
        weights=weights, samples=samples, batch=batch, support='', classifier=classifier,
        feature=feature, inception=inception, seed=seed,
        told=denoisers.conditions(context.network, context.spec), variables_of=variables_of,
    )  # fmt: skip
