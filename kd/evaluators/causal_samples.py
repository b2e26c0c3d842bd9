"""A probe of generators that make videos frame by frame, by the calls that a frame takes."""

from __future__ import annotations

import jax

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import samples as samples_lib
from kd.evaluators.samples import Draw
from kd.ranges import Count, Seed, Size
from kd.sampling import causal


def causal_samples(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1, 2, 4),
    whole: tuple[Size, ...] = (),
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    support: str = '',
    classifier: str = '',
    feature: str = 'features',
    inception: str = '',
    seed: Seed = 0,
) -> Probe:
    """Samples of a causal generator by the first calls of its method's times.

    Args:
      context: the stage; its method has `times`.
      steps: calls for a frame, each a row of metrics.
      whole: blocks that take all calls at every row; (0,) is first-frame enhancement.
      weights, samples, batch, support, classifier, feature, inception, seed: as of
        `kd.evaluators.flow_samples.flow_samples`.
    """
    where, block = f'{context.stage}.evaluators', context.config.method
    if 'times' not in block:
        raise UserError(f'{where}: causal_samples needs a method with times, a generator.')
    own = causal.generator(
        context.network, block['times'], block.get('step', 'restart'), where=where
    )
    blocks, count = context.spec['input'].shape[0] // own.causal.frames, len(own.times)
    if max(steps) > count or max(whole, default=0) >= blocks:
        raise UserError(
            f'{where}: steps={tuple(steps)} of {count} times, whole={tuple(whole)} of {blocks} '
            'blocks of frames: there are fewer.'
        )

    def draw(n: int) -> Draw:
        grid = causal.times_of_blocks(own.times, n, blocks, whole=whole)

        @jax.jit
        def made(variables, z, condition, key):
            return causal.causal_sample(
                own.causal, variables, grid, z, key, condition, step=own.step
            )  # fmt: skip

        return made

    return samples_lib.probe(
        context, {n: draw(n) for n in steps}, scale=1.0, weights=weights, samples=samples,
        batch=batch, support=support, classifier=classifier, feature=feature, inception=inception,
        seed=seed,
    )  # fmt: skip
