"""What does a flow or flow map generate, how well, and is it the map that it should be?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from kd.evaluators.distribution import Moments, frechet_distance, moments
from kd.figures import COLOURS, new_figure
from kd.losses.flow_map import VelocityFunction, flow_map, squared_error
from kd.sampling.flow import draw_noise, euler_sample, time_grid

__all__ = [
    'density_page',
    'feature_moments',
    'frames_page',
    'frechet_metric',
    'generate',
    'image_grid',
    'save_image_grid',
    'semigroup_error',
    'straightness',
]


def generate(
    key: jax.Array,
    sampler: Callable[[jax.Array], jax.Array],
    n: int,
    shape: tuple[int, ...],
    *,
    scale: float = 1.0,
    batch: int = 500,
) -> np.ndarray:
    """n samples [n, *shape] on the host, in batches of one size so that nothing is recompiled.

    Sample i depends on key and i alone, whatever the batch size, as far as `sampler` treats the
    examples of a batch independently.

    Args:
      key: of the noise.
      sampler: noise [batch, *shape] -> samples; jitted by the caller.
      n: number of samples.
      shape: of one sample.
      scale: standard deviation of the noise.
      batch: size of a batch; the surplus of the last one is dropped.
    """
    parts = [
        np.asarray(sampler(draw_noise(key, batch, shape, scale=scale, first=first)))
        for first in range(0, n, batch)
    ]
    return np.concatenate(parts)[:n]


# Metrics in the features of a network.


def feature_moments(
    features: Callable[[jax.Array], ArrayLike], batches: Iterable[ArrayLike]
) -> Moments:
    """Moments of `features` [B, ...] -> [B, D] over batches of images, summed in float64."""
    total: Moments | None = None
    for images in batches:
        part = moments(np.asarray(features(jnp.asarray(images))))
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError('feature_moments: no batches.')
    return total


def frechet_metric(network: str, real: Moments, generated: Moments) -> dict[str, float]:
    """{metric name: Frechet distance} between features of real and generated images.

    The name says whose features they are: `frechet_<network>`. Only the Inception-v3 network with
    its published weights, passed as network='inception_v3', yields the number known as FID.

    Raises:
      ValueError: for a network called 'fid', which would pretend.
    """
    if 'fid' in network.lower():
        raise ValueError(
            f'network={network!r}: name the network whose features these are; only '
            "'inception_v3' with its published weights gives FID."
        )
    name = 'fid' if network == 'inception_v3' else f'frechet_{network}'
    return {name: frechet_distance(real, generated)}


# Metrics of the map itself, per example.


def straightness(vfn: VelocityFunction, x0: jax.Array, *, steps: int = 50) -> jax.Array:
    """int_0^1 ||(x_1 - x_0) - v(t, t, x_t)||^2 dt along the flow's own path, [B]; 0 if straight.

    x_t is the flow's Euler solution from noise x0 [B, ...] with `steps` steps; squares are summed
    over data dimensions. Source: Liu et al., arXiv 2209.03003, section 2.2.
    """
    times = time_grid(steps)
    states = euler_sample(vfn, x0, times, trajectory=True)
    # Of an Euler path the velocities are the differences, without calling the network again.
    velocities = (states[1:] - states[:-1]) * steps
    gap = (states[-1] - states[0])[None] - velocities
    return jnp.mean(jax.vmap(squared_error)(gap), axis=0)


def semigroup_error(
    vfn: VelocityFunction, s: ArrayLike, u: ArrayLike, t: ArrayLike, x: jax.Array
) -> jax.Array:
    """||X_{u,t}(X_{s,u}(x)) - X_{s,t}(x)||^2, summed over data dimensions, [B].

    Times [B] or scalars with s <= u <= t; x [B, ...] are states at s. Zero for every flow map,
    right or wrong: it measures self-consistency, not quality.
    """
    two = flow_map(vfn, u, t, flow_map(vfn, s, u, x))
    return squared_error(two - flow_map(vfn, s, t, x))


# Figures.


def image_grid(images: ArrayLike, *, columns: int = 8, gap: int = 1) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1], C 1 or 3, as one uint8 [.., .., 3] picture on white.

    Row by row from the upper left; values outside [-1, 1] are clipped; non-finite ones are black.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f'image_grid: got shape {images.shape}, expected [N, H, W, 1 or 3].')
    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    pixels = np.clip(np.nan_to_num(images, nan=-1.0, posinf=-1.0, neginf=-1.0), -1.0, 1.0)
    pixels = np.round((pixels + 1.0) * 127.5).astype(np.uint8)
    for k, image in enumerate(pixels):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def save_image_grid(
    path: str | Path, images: ArrayLike, *, columns: int = 8, zoom: int = 1
) -> None:
    """Writes `image_grid` to a PNG file, each pixel as a square of `zoom` pixels."""
    page = image_grid(images, columns=columns)
    page = np.repeat(np.repeat(page, zoom, axis=0), zoom, axis=1)
    matplotlib.image.imsave(str(path), page, format='png')


def density_page(
    panels: Mapping[str, Mapping[str, ArrayLike]],
    *,
    low: float = -1.2,
    high: float = 1.2,
    bins: int = 96,
    vmax: float = 0.75,
) -> Figure:
    """A figure of densities of points in the plane: one row per method, one column per setting.

    Args:
      panels: {row title: {column title: points [N, 2]}}; all rows have the same columns.
      low: lower limit of both axes.
      high: upper limit of both axes.
      bins: cells along each axis.
      vmax: density at the top of the colour scale, which all panels share; a checkerboard on
        [-1, 1]^2 has density 0.5.
    """
    columns = list(next(iter(panels.values())))
    figure = new_figure(1.7 * len(columns) + 0.4, 1.7 * len(panels) + 0.3)
    axes = figure.subplots(len(panels), len(columns), squeeze=False)
    edges = np.linspace(low, high, bins + 1)
    for i, (row, points_by_column) in enumerate(panels.items()):
        if list(points_by_column) != columns:
            raise ValueError(
                f'row {row!r} has columns {list(points_by_column)}, expected {columns}.'
            )
        for j, (column, points) in enumerate(points_by_column.items()):
            points = np.asarray(points)
            density = np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0]
            density /= len(points) * (edges[1] - edges[0]) ** 2
            axis = axes[i, j]
            axis.imshow(
                density.T, origin='lower', extent=(low, high, low, high), vmin=0.0, vmax=vmax,
                cmap='viridis',
            )  # fmt: skip
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(column, fontsize=8)
            if j == 0:
                axis.set_ylabel(row, fontsize=8)
    return figure


def frames_page(
    videos: Mapping[str, ArrayLike], *, limit: float = 1.6, points: int = 400, paths: int = 6
) -> Figure:
    """A figure of videos of points in the plane: a row for each set, a column for each frame.

    Points have the colour of their direction in the first frame, and a circle of radius 1 stands
    behind them; the last column has a few videos as paths, which begin at a dot.

    Args:
      videos: {title: [N, F, 2]}, all of as many frames.
      limit: of both axes.
      points: of a set that are shown.
      paths: of a set that are shown.
    """
    sets = {title: np.asarray(x) for title, x in videos.items()}
    frames = next(iter(sets.values())).shape[1]
    figure = new_figure(1.25 * (frames + 1) + 0.4, 1.25 * len(sets) + 0.3)
    axes = figure.subplots(len(sets), frames + 1, squeeze=False)
    around = np.linspace(0, 2 * np.pi, 100)
    for place, (title, all_of) in enumerate(sets.items()):
        row = axes[place]
        shown = all_of[:points]
        hue = np.arctan2(shown[:, 0, 1], shown[:, 0, 0])
        for axis, number in zip(row, range(frames + 1), strict=True):
            axis.plot(np.cos(around), np.sin(around), color='#cccccc', lw=0.6, zorder=0)
            axis.set(xticks=[], yticks=[], xlim=(-limit, limit), ylim=(-limit, limit))
            axis.set_aspect('equal')
            if number < frames:
                axis.scatter(
                    *shown[:, number].T, c=hue, s=1.5, cmap='hsv', vmin=-np.pi, vmax=np.pi,
                    lw=0,
                )  # fmt: skip
            if place == 0:
                axis.set_title(f'frame {number + 1}' if number < frames else 'paths', fontsize=8)
        for path, colour in zip(shown[:paths], itertools.cycle(COLOURS), strict=False):
            row[-1].plot(*path.T, color=colour, lw=0.8)
            row[-1].plot(*path[0], 'o', color=colour, ms=2.5)
        row[0].set_ylabel(title, fontsize=8)
    return figure
