"""Probes of a flow or flow map in training: its samples by number of steps, and its geometry."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import samples as samples_lib
from kd.evaluators.samples import Draw
from kd.losses.flow_map import flow_map, sample_triangle
from kd.network import Network
from kd.ranges import Count, Finite, Positive, Seed
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.sampling.flow import draw_noise, time_grid
from kd.sampling.velocity import fields_of, noise_scale, velocity_function
from kd.state import State


def flow_samples(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1, 2, 4, 8, 16),
    sampler: str = 'flow_map',
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    guidance: Finite = 1.0,
    scale: Positive | None = None,
    shift: Positive = 1.0,
    support: str = '',
    classifier: str = '',
    feature: str = 'features',
    inception: str = '',
    seed: Seed = 0,
) -> Probe:
    """Samples in each number of steps, against the examples of the split.

    Metrics, each with the number of steps at its end, `sliced_wasserstein_4`:
      sliced_wasserstein: between samples and at most as many examples;
      kl: for points in the plane, KL(data || samples) on a histogram, in nats; `kl_floor` is that
        of a perfect sampler, as many examples of the training split (its last);
      off_support: share of points outside `support`;
      frechet_CLASSIFIER: for a `classifier`, Frechet distance in its features; not FID;
      fid: for `inception`, Frechet distance in the features of Inception-v3. The paper's figures
        take 10,000 samples while training and 50,000 at the end; it grows with fewer.
    And a figure of the samples by steps: densities in the plane, or rows of images.

    Args:
      context: the stage; needs a velocity network.
      steps: of the sampler, each a row of metrics.
      sampler: 'flow_map' for jumps, 'euler' for Euler steps of the diagonal; each step is one
        evaluation of the network (two at once with guidance).
      weights: 'final' for the parameters, or the name of an average.
      samples: number of samples, the same noise at every evaluation and for every stage.
      batch: samples made at a time.
      guidance: scale of classifier-free guidance; the classes are those of the split's examples.
      scale: standard deviation of the noise; None for the network's `data_scale`.
      shift: of noise levels, above 1 towards noise, see `kd.methods.flow.arcflow.arcflow`.
      support: import path of `inside(points [N, 2]) -> bool [N]`, such as
        'kd.evaluators.distribution.in_checkerboard'.
      classifier: name of one of the stage's `references`, a classifier of the same data.
      feature: which of its features, see `kd.network.feature_names`.
      inception: file of weights, see `kd.evaluators.inception.inception_features`.
      seed: of the noise.
    """
    network = context.network
    if sampler not in ('flow_map', 'euler'):
        raise UserError(f"sampler must be 'flow_map' or 'euler', got '{sampler}'.")
    sigma = noise_scale(network, scale)
    advance = jax.jit(advance_of(network, sampler, guidance))

    def draw(n: int) -> Draw:
        def by_steps(variables, x, condition, key):
            del key
            told = fields_of(network, condition)
            for s, t in itertools.pairwise(times.moved(time_grid(n), 1 / shift)):
                x = advance(variables, s, t, x, condition.get('label'), told)
            return x

        return by_steps

    return samples_lib.probe(
        context,
        {n: draw(n) for n in steps},
        scale=sigma,
        weights=weights,
        samples=samples,
        batch=batch,
        support=support,
        classifier=classifier,
        feature=feature,
        inception=inception,
        seed=seed,
        told=denoisers.conditions(network, context.spec),
    )


def flow_geometry(
    context: Context,
    *,
    weights: str = 'final',
    samples: Count = 512,
    steps: Count = 32,
    scale: Positive | None = None,
    seed: Seed = 0,
) -> Probe:
    """How straight the flow is, and how far its map is from being one, unconditionally.

    Metrics, squared and summed over the dimensions of the data:
      straightness: int ||(x_1 - x_0) - v(t, t, x_t)||^2 dt along the flow's own paths;
      semigroup: ||X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)||^2 for random s <= u <= t, x on the path at s;
      map_to_flow: ||X_{0,1}(x) - x_1||^2 between the jump and the Euler path from the same noise.

    Args:
      context: the stage; needs a velocity network.
      weights: 'final' for the parameters, or the name of an average.
      samples: paths.
      steps: Euler steps of a path.
      scale: standard deviation of the noise; None for the network's `data_scale`.
      seed: of noise and times.
    """
    network, shape = context.network, context.spec['input'].shape
    samples_lib.check_weights(context, weights)
    sigma = noise_scale(network, scale)
    # One small program called from Python, not a loop inside a program: convolutions inside a
    # loop are slow on CPU.
    advance = jax.jit(advance_of(network, 'euler', 1.0))
    jump = jax.jit(advance_of(network, 'flow_map', 1.0))

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float]:
        del batches
        variables = state.variables(None if weights == 'final' else weights)
        noise_key, times_key, middle_key = jax.random.split(jax.random.key(seed), 3)
        path = [draw_noise(noise_key, samples, shape, scale=sigma)]
        for s, t in itertools.pairwise(time_grid(steps)):
            path.append(advance(variables, s, t, path[-1], None))
        states = jnp.stack(path)
        velocities = (states[1:] - states[:-1]) * steps
        gap = (states[-1] - states[0]) - velocities
        # Times on the grid of the path, so that x is a state of the flow.
        s, t = sample_triangle(times_key, samples)
        first = jnp.floor(s * steps).astype(int)
        s = first / steps
        t = jnp.maximum(s, t)
        u = s + (t - s) * jax.random.uniform(middle_key, (samples,))
        x = states[first, jnp.arange(samples)]
        two = jump(variables, u, t, jump(variables, s, u, x, None), None)
        one = jump(variables, s, t, x, None)
        to_data = jump(variables, 0.0, 1.0, states[0], None)
        return {
            'straightness': _mean_square(gap, shape),
            'semigroup': _mean_square(two - one, shape),
            'map_to_flow': _mean_square(to_data - states[-1], shape),
        }

    return Probe(run)


def advance_of(network: Network, sampler: str, guidance: float) -> Callable[..., jax.Array]:
    """(variables, s, t, x, label, fields) -> the state at t; one program for all numbers of steps.

    `fields` are what the network is told besides, see `kd.sampling.velocity.fields_of`.
    """

    def advance(variables, s, t, x, label, fields=None):
        vfn = velocity_function(network, variables, label, told=fields, guidance=guidance)
        if sampler == 'euler':
            return flow_map(lambda s, t, x: vfn(s, s, x), s, t, x)
        return flow_map(vfn, s, t, x)

    return advance


def _mean_square(x: jax.Array, shape: tuple[int, ...]) -> float:
    """Mean over the leading axes of x [..., *shape] of the square summed over the others."""
    return float(jnp.mean(jnp.square(x)) * np.prod(shape))
