"""Probes of a flow or flow map in training: its samples by number of steps, and its geometry."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import config as config_lib
from kd import figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import distribution, generation
from kd.evaluators.inception import inception_features
from kd.losses.flow_map import flow_map, sample_triangle
from kd.network import Network
from kd.ranges import Count, Finite, Positive, Seed
from kd.sampling.flow import draw_noise, time_grid
from kd.sampling.velocity import noise_scale, velocity_function
from kd.state import State

# Samples shown in a figure, for images.
_SHOWN = 8

# (state, inputs [N, ...]) -> moments of the features of some network.
_Judge = Callable[[State, np.ndarray], distribution.Moments]


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
      support: import path of `inside(points [N, 2]) -> bool [N]`, such as
        'kd.evaluators.distribution.in_checkerboard'.
      classifier: name of one of the stage's `references`, a classifier of the same data.
      feature: which of its features, see `kd.network.feature_names`.
      inception: file of weights, see `kd.evaluators.inception.inception_features`.
      seed: of the noise.
    """
    network = context.network
    check_weights(context, weights)
    if sampler not in ('flow_map', 'euler'):
        raise UserError(f"sampler must be 'flow_map' or 'euler', got '{sampler}'.")
    if classifier and classifier not in context.references:
        raise UserError(
            f"classifier='{classifier}' is none of {context.stage}.references, which are "
            f'{sorted(context.references)}.'
        )
    shape = context.spec['input'].shape
    sigma = noise_scale(network, scale)
    advance = jax.jit(_advance(network, sampler, guidance))
    inside = config_lib.resolve(support) if support else None
    judges = _judges(context, classifier, feature, inception)
    # Of the split, which no step changes: computed at the first evaluation.
    moments: dict[str, distribution.Moments] = {}
    floor: dict[str, float | Figure] = {}

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        real, labels = _examples(batches, samples, state, judges, moments)
        variables = state.variables(None if weights == 'final' else weights)
        scalars: dict[str, float | Figure] = {}
        by_steps = {}
        for n in steps:
            generated = _generate(advance, variables, labels, n, samples, batch, shape, sigma, seed)
            by_steps[n] = generated
            values = _compare(real, generated, inside)
            if 'finite' not in values:
                for name, judge in judges.items():
                    found = judge(state, generated)
                    values |= generation.frechet_metric(name, moments[name], found)
            scalars |= {f'{name}_{n}': value for name, value in values.items()}
        if not floor:
            floor.update(_floor(context, real, samples))
        scalars |= floor
        page = _page(context, by_steps, real)
        return scalars | ({'samples': page} if page is not None else {})

    return Probe(run)


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
    check_weights(context, weights)
    sigma = noise_scale(network, scale)
    # One small program called from Python, not a loop inside a program: convolutions inside a
    # loop are slow on CPU.
    advance = jax.jit(_advance(network, 'euler', 1.0))
    jump = jax.jit(_advance(network, 'flow_map', 1.0))

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


def check_weights(context: Context, weights: str) -> None:
    """Refuses the name of an average that the stage does not keep."""
    averages = context.config.ema
    if weights != 'final' and weights not in averages:
        raise UserError(f"{context.stage}.ema has no '{weights}', only {list(averages)}.")


def _advance(network: Network, sampler: str, guidance: float) -> Callable[..., jax.Array]:
    """(variables, s, t, x, label) -> the state at t; one program for all numbers of steps."""

    def advance(variables, s, t, x, label):
        vfn = velocity_function(network, variables, label, guidance=guidance)
        if sampler == 'euler':
            return flow_map(lambda s, t, x: vfn(s, s, x), s, t, x)
        return flow_map(vfn, s, t, x)

    return advance


def _generate(advance, variables, labels, n, samples, batch, shape, sigma, seed) -> np.ndarray:
    """`samples` samples in n steps; sample i has the label of example i."""
    counter = itertools.count()

    def sampler(x: jax.Array) -> jax.Array:
        rows = (next(counter) * batch + np.arange(batch)) % max(len(labels), 1)
        label = labels[rows] if len(labels) else None
        for s, t in itertools.pairwise(time_grid(n)):
            x = advance(variables, s, t, x, label)
        return x

    key = jax.random.key(seed)
    return generation.generate(key, sampler, samples, shape, scale=sigma, batch=batch)


def _examples(
    batches: Iterable[dict[str, jax.Array]],
    count: int,
    state: State,
    judges: Mapping[str, _Judge],
    moments: dict[str, distribution.Moments],
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the first examples, on the host; fills in moments of all that lack."""
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    missing = {name: judge for name, judge in judges.items() if name not in moments}
    held = 0
    for batch in batches:
        mask = np.asarray(batch['mask'])
        part = np.asarray(batch['input'])[mask]
        if held < count:
            inputs.append(part)
            labels.append(
                np.asarray(batch['label'])[mask] if 'label' in batch else np.zeros(0, int)
            )
            held += len(part)
        elif not missing:
            break
        for name, judge in missing.items():
            found = judge(state, part)
            moments[name] = moments[name].merge(found) if name in moments else found
    return np.concatenate(inputs)[:count], np.concatenate(labels)[:count]


def _judges(context: Context, classifier: str, feature: str, inception: str) -> dict[str, _Judge]:
    """By the name of their network."""
    judges: dict[str, _Judge] = {}
    if classifier:
        network = context.references[classifier]

        @jax.jit
        def apply(variables, x):
            return network.apply(variables, x, capture=(feature,)).features[feature]

        def by_classifier(state: State, inputs: np.ndarray) -> distribution.Moments:
            variables = state.frozen[classifier]
            return generation.feature_moments(lambda x: apply(variables, x), _chunks(inputs))

        judges[classifier] = by_classifier
    if inception:
        features, source = inception_features(inception), context.source('train')

        def by_inception(state: State, inputs: np.ndarray) -> distribution.Moments:
            del state
            images = (source.to_pixels(part) for part in _chunks(inputs))
            return generation.feature_moments(features, images)

        judges['inception_v3'] = by_inception
    return judges


def _chunks(inputs: np.ndarray) -> Iterable[np.ndarray]:
    return (inputs[i : i + 500] for i in range(0, len(inputs), 500))


def _compare(real: np.ndarray, generated: np.ndarray, inside) -> dict[str, float]:
    if not np.isfinite(generated).all():
        # A diverged sampler has no distance; the training goes on and may recover.
        return {'finite': float(np.isfinite(generated).mean())}
    values = {'sliced_wasserstein': distribution.sliced_wasserstein(real, generated)}
    if generated.shape[1:] == (2,):
        values['kl'] = distribution.histogram_kl(real, generated)
    if inside is not None:
        values['off_support'] = distribution.off_support(generated, inside)
    return values


def _floor(context: Context, real: np.ndarray, samples: int) -> dict[str, float]:
    """What a perfect sampler scores; nothing where that is 0 or the training split is too small."""
    if real.shape[1:] != (2,):
        return {}
    train = context.source('train')
    if len(train) < samples:
        return {}
    fresh = train.fetch(np.arange(len(train) - samples, len(train)))['input']
    return {'kl_floor': distribution.histogram_kl(real, fresh)}


def _page(context: Context, by_steps: Mapping[int, np.ndarray], real: np.ndarray) -> Figure | None:
    shape = real.shape[1:]
    titles = {n: f'{n} step{"s" * (n > 1)}' for n in by_steps}
    if shape == (2,):
        panels = {titles[n]: points for n, points in by_steps.items()} | {'data': real}
        return generation.density_page({context.stage: panels})
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return None
    rows = [*by_steps.values(), real]
    images = context.source('train').to_pixels(np.concatenate([row[:_SHOWN] for row in rows]))
    rows_titles = [*titles.values(), 'data']
    captions = [title for title in rows_titles for _ in range(_SHOWN)]
    return figures.image_page(images, captions, columns=_SHOWN)


def _mean_square(x: jax.Array, shape: tuple[int, ...]) -> float:
    """Mean over the leading axes of x [..., *shape] of the square summed over the others."""
    return float(jnp.mean(jnp.square(x)) * np.prod(shape))
