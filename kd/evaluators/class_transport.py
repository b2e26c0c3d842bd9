"""How far a training set lies from the classes it stands for, and what it says of labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure, SubFigure
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree

from kd import figures
from kd.context import Context, Probe
from kd.data.distilled import synthetic
from kd.data.transforms import standardised
from kd.evaluators import distribution
from kd.ranges import Count, SplitName


class Scores(NamedTuple):
    """A set against data.

    Attributes:
      w1: mean over classes of the exact W_1 between the set's examples of it and data of it.
      nearest: accuracy on the data of the label of the nearest example of the set.
    """

    w1: float
    nearest: float


def scores(
    made: Mapping[str, ArrayLike], data: Mapping[str, ArrayLike], *, most: int = 400
) -> Scores:
    """Scores of a set {'input', 'label'} against data of the same fields.

    Args:
      made: at least an example of each class; inputs are flattened.
      data: of every class at least as many.
      most: examples of a class that count for `w1`, the first ones: the largest multiple of those
        in the set up to this.
    """
    x, label = _flat(made['input']), np.asarray(made['label'])
    real, known = _flat(data['input']), np.asarray(data['label'])
    away = []
    for name in np.unique(label):
        own, others = x[label == name], real[known == name]
        size = min(most, len(others)) // len(own) * len(own)
        if not size:
            raise ValueError(f'class {name} has {len(own)} examples made and {len(others)} real.')
        away.append(distribution.wasserstein(own, others[:size]))
    _, nearest = cKDTree(x).query(real)
    return Scores(float(np.mean(away)), float(np.mean(label[nearest] == known)))


def novelty(made: ArrayLike, data: ArrayLike, held: ArrayLike) -> float:
    """Mean distance of what is made to the nearest of the data, over that of data held out.

    0 for copies of the data, about 1 for fresh draws of their distribution.
    """
    tree = cKDTree(_flat(data))
    return float(tree.query(_flat(made))[0].mean() / tree.query(_flat(held))[0].mean())


def class_transport(
    context: Context, *, data: SplitName = 'validation', most: Count = 400
) -> Probe:
    """`w1`, `nearest` and `novelty` of the stage's synthetic set, and a picture of points.

    In the stage, give it `split='train'`: it reads its own split.

    Args:
      context: the stage, whose state is that of a method in `kd.methods.dataset`.
      data: a split of the recipe's data.
      most: see `scores`.
    """
    judged, train = context.recipe_source(data), context.recipe_source('train')

    @functools.cache
    def everything() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return standardised.everything(judged), standardised.everything(train)

    def run(state, batches):
        del batches
        made = jax.device_get(synthetic.of_state(state)).examples
        held, known = everything()
        found: dict[str, Any] = scores(made, held, most=most)._asdict()
        found['novelty'] = novelty(made['input'], known['input'], held['input'])
        if np.shape(made['input'])[1:] == (2,):
            found['points'] = picture({'': made}, held)
        return found

    return Probe(run)


def picture(
    sets: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any],
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Sets of points in the plane, each on the data, by class; in a new figure if there is none."""
    figure = figure or figures.new_figure(3.0 * len(sets) + 0.4, 3.2)
    axes = np.atleast_1d(figure.subplots(1, len(sets), sharex=True, sharey=True))
    real, known = np.asarray(data['input']), np.asarray(data['label'])
    for axis, (title, made) in zip(axes, sets.items(), strict=True):
        x, label = np.asarray(made['input']), np.asarray(made['label'])
        for name in np.unique(known):
            colour = figures.COLOURS[name % len(figures.COLOURS)]
            axis.plot(*real[known == name][:400].T, '.', color=colour, ms=2, alpha=0.25)
            axis.plot(*x[label == name].T, 'o', color=colour, ms=5, mec='black', mew=0.8)
        axis.set(title=title, aspect='equal', xticks=(), yticks=())
    return figure


def _flat(x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x.reshape(len(x), -1)
