"""Samples of a generator by number of steps, against the examples of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from matplotlib.figure import Figure

from kd import callables, figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import distribution, fidelity, generation
from kd.evaluators.inception import inception_features
from kd.ranges import Count, Positive, Seed
from kd.sampling.denoiser import Condition
from kd.sampling.flow import draw_noise
from kd.state import PyTree, State

# Samples shown in a figure, for images.
_SHOWN = 8

# (state, inputs [N, ...]) -> moments of the features of some network.
_Judge = Callable[[State, np.ndarray], distribution.Moments]
# (variables, noise [B, ...], fields [B, ...] of the condition by name, key) -> samples [B, ...]
Draw = Callable[[PyTree, jax.Array, Condition, jax.Array], jax.Array]


def probe(
    context: Context,
    draws: Mapping[int, Draw],
    *,
    scale: Positive,
    weights: str,
    samples: Count,
    batch: Count,
    support: str,
    classifier: str,
    feature: str,
    inception: str,
    seed: Seed,
    told: Iterable[str] = (),
    variables_of: Callable[[State], PyTree] | None = None,
) -> Probe:
    """The probe of `draws`, by number of steps, from noise of deviation `scale`.

    Arguments and metrics are those of `kd.evaluators.flow_samples.flow_samples`, and besides
    `diversity` is the mean distance of two samples over that of two examples, `saturation` the
    deviation of the samples over that of the examples. `told` are the fields of the examples that
    draws take as conditions; those of the 'label' have `class_diversity`, the diversity within
    classes, 1 where it is that of the examples. `variables_of` gives what the draws take as
    variables, where these are no weights of the result alone.
    """
    check_weights(context, weights)
    if classifier and classifier not in context.references:
        raise UserError(
            f"classifier='{classifier}' is none of {context.stage}.references, which are "
            f'{sorted(context.references)}.'
        )
    shape = context.spec['input'].shape
    inside = callables.resolve(support) if support else None
    judges = _judges(context, classifier, feature, inception)
    # Of the split, which no step changes: computed at the first evaluation.
    moments: dict[str, distribution.Moments] = {}
    floor: dict[str, float | Figure] = {}

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        real, fields = _examples(batches, samples, state, judges, moments, told)
        of = variables_of or (
            lambda state: state.variables(None if weights == 'final' else weights)
        )
        variables = of(state)
        scalars: dict[str, float | Figure] = {}
        by_steps = {}
        for n, draw in draws.items():
            generated = _generate(draw, variables, fields, samples, batch, shape, scale, seed)
            by_steps[n] = generated
            values = _compare(real, generated, inside, fields.get('label'))
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


def check_weights(context: Context, weights: str) -> None:
    """Refuses the name of an average that the stage does not keep."""
    averages = context.config.ema
    if weights != 'final' and weights not in averages:
        raise UserError(f"{context.stage}.ema has no '{weights}', only {list(averages)}.")


def _generate(draw, variables, fields, samples, batch, shape, scale, seed) -> np.ndarray:
    """Samples [samples, ...]; sample i has the fields of example i."""
    parts, key = [], jax.random.key(seed)
    for first in range(0, samples, batch):
        places = first + np.arange(batch)
        condition = {name: x[places % len(x)] for name, x in fields.items()}
        noise = draw_noise(key, batch, shape, scale=scale, first=first)
        parts.append(np.asarray(draw(variables, noise, condition, jax.random.fold_in(key, first))))
    return np.concatenate(parts)[:samples]


def _examples(
    batches: Iterable[dict[str, jax.Array]],
    count: int,
    state: State,
    judges: Mapping[str, _Judge],
    moments: dict[str, distribution.Moments],
    told: Iterable[str],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Inputs and fields of the first examples, on the host; fills in moments of all that lack."""
    kept: dict[str, list[np.ndarray]] = {name: [] for name in ('input', *told)}
    missing = {name: judge for name, judge in judges.items() if name not in moments}
    held = 0
    for batch in batches:
        mask = np.asarray(batch['mask'])
        part = np.asarray(batch['input'])[mask]
        if held < count:
            for name, parts in kept.items():
                parts.append(np.asarray(batch[name])[mask])
            held += len(part)
        elif not missing:
            break
        for name, judge in missing.items():
            found = judge(state, part)
            moments[name] = moments[name].merge(found) if name in moments else found
    fields = {name: np.concatenate(parts)[:count] for name, parts in kept.items()}
    return fields.pop('input'), fields


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


def _compare(
    real: np.ndarray, generated: np.ndarray, inside, labels: np.ndarray | None
) -> dict[str, float]:
    if not np.isfinite(generated).all():
        # A diverged sampler has no distance; the training goes on and may recover.
        return {'finite': float(np.isfinite(generated).mean())}
    values = {
        'sliced_wasserstein': distribution.sliced_wasserstein(real, generated),
        'diversity': _diversity(generated) / _diversity(real),
        'saturation': fidelity.spread(real, generated)[0],
    }
    if labels is not None:
        # Samples begin anew with the first example where there are more of them.
        own = labels[np.arange(len(generated)) % len(labels)]
        known = fidelity.class_diversity(real, labels)
        values['class_diversity'] = fidelity.class_diversity(generated, own) / known
    if generated.shape[1:] == (2,):
        values['kl'] = distribution.histogram_kl(real, generated)
    if inside is not None:
        values['off_support'] = distribution.off_support(generated, inside)
    return values


def _diversity(x: np.ndarray) -> float:
    return fidelity.pairwise_distance(x[:500])


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
    if len(shape) == 2 and shape[1] == 2:
        shown = {titles[n]: videos for n, videos in by_steps.items()} | {'data': real}
        return generation.frames_page(shown)
    if len(shape) != 3 or shape[-1] not in (1, 3):
        return None
    rows = [*by_steps.values(), real]
    images = context.source('train').to_pixels(np.concatenate([row[:_SHOWN] for row in rows]))
    rows_titles = [*titles.values(), 'data']
    captions = [title for title in rows_titles for _ in range(_SHOWN)]
    return figures.image_page(images, captions, columns=_SHOWN)
