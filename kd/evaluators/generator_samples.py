"""Probes of denoisers and of the generators that are made of them: samples by number of steps."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import samples as samples_lib
from kd.evaluators.samples import Draw
from kd.ranges import Count, Finite, Seed
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, generator, times
from kd.sampling.generator import Generator


def generator_samples(
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
    """Samples of the generator that the stage trains, at its own times, those of its method.

    Metrics as of `kd.evaluators.samples.probe`, with the number of its steps at their end.

    Args:
      context: the stage; its method has `times`.
      weights, samples, batch, support, classifier, feature, inception, seed: as of
        `kd.evaluators.flow_samples.flow_samples`.
    """
    block = context.config.method
    if 'times' not in block:
        raise UserError(
            f'{context.stage}: generator_samples asks a generator at the times of its method, and '
            f'{block.get("name", "this")} has none; take denoiser_samples.'
        )
    own = generator.of_block(
        context.network,
        block,
        context.trained_by.get('teacher', {}),
        where=f'{context.stage}.method',
    )
    return _probe(
        context, {len(own.times): own}, 1.0, weights=weights, samples=samples, batch=batch,
        support=support, classifier=classifier, feature=feature, inception=inception, seed=seed,
    )  # fmt: skip


def denoiser_samples(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1, 2, 4, 16),
    sampler: str = 'ddim',
    rho: Finite = 7.0,
    guidance: Finite = 1.0,
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    support: str = '',
    classifier: str = '',
    feature: str = 'features',
    inception: str = '',
    seed: Seed = 0,
) -> Probe:
    """Samples of a denoiser in each number of steps.

    Args:
      context: the stage; its network is a denoiser or a flow.
      steps: each a row of metrics; from the noisiest time to the cleanest.
      sampler: one of `kd.sampling.diffusion.STEPS`.
      rho: of the grid of Karras et al. where times are deviations; other schedules have even ones.
      guidance: see `kd.sampling.denoiser.guided`.
      weights, samples, batch, support, classifier, feature, inception, seed: as of
        `kd.evaluators.flow_samples.flow_samples`.
    """
    if sampler not in diffusion.STEPS:
        raise UserError(f"sampler must be one of {list(diffusion.STEPS)}, got '{sampler}'.")
    own = denoisers.of_network(context.network, context.config.method)
    step = diffusion.STEPS[sampler]()
    made = {
        n: Generator(own, tuple(map(float, times.sampling(own.schedule, n, rho))), step)
        for n in steps
    }
    return _probe(
        context, made, guidance, weights=weights, samples=samples, batch=batch, support=support,
        classifier=classifier, feature=feature, inception=inception, seed=seed,
    )  # fmt: skip


def _probe(context: Context, made: dict[int, Generator], guidance: float, **options: Any) -> Probe:
    one = next(iter(made.values()))
    own, path = denoisers.guided(one.denoiser, guidance), one.denoiser.schedule
    noisy = one.times[0]

    # One small program called from Python: convolutions inside a loop are slow on CPU.
    @jax.jit
    def advance(variables, x, memory, t, to, known, key):
        denoise = own.bind(variables, known)
        x, memory = one.step.move(path, denoise, x, t, to, key, memory)
        return x.astype(jnp.float32), memory

    @jax.jit
    def end(variables, x, t, known):
        return own.bind(variables, known)(x, t).astype(jnp.float32)

    def draw(grid: tuple[float, ...]) -> Draw:
        def by_steps(variables, x, condition, key):
            memory = one.step.memory(x)
            for i, (t, to) in enumerate(itertools.pairwise(grid)):
                of_step = jax.random.fold_in(key, i)
                x, memory = advance(
                    variables, x, memory, jnp.float32(t), jnp.float32(to), condition, of_step
                )
            return end(variables, x, jnp.float32(grid[-1]), condition)

        return by_steps

    return samples_lib.probe(
        context,
        {n: draw(each.times) for n, each in made.items()},
        scale=float(path.sigma(jnp.float32(noisy))),
        told=denoisers.conditions(context.network, context.spec),
        **options,
    )
