"""Figures, drawn without pyplot so that nothing global is touched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Distinguishable without colour vision (Okabe and Ito).
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def new_figure(width: float, height: float, **kwargs) -> Figure:
    """An empty figure in the house's style; sizes in inches at 150 dots per inch."""
    return Figure(figsize=(width, height), dpi=150, layout='constrained', **kwargs)


# Of one network over seeds: its values, their mean, and half of an interval around it.
Spread = tuple[Sequence[float], float, float]


def comparison(panels: Mapping[str, Mapping[str, Spread]]) -> Figure:
    """Networks below each other, a dot per seed, mean and interval as a bar; a panel per metric.

    Args:
      panels: {label of a metric: {title of a network: values over seeds}}.
    """
    titles = list(next(iter(panels.values())))
    figure = new_figure(3.1 * len(panels) + 1.2, 0.45 * len(titles) + 0.9)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, (label, networks) in zip(axes, panels.items(), strict=True):
        for place, title in enumerate(titles):
            values, mean, half = networks[title]
            colour = COLOURS[place % len(COLOURS)]
            axis.plot(values, [place - 0.25] * len(values), 'o', color=colour, ms=4, alpha=0.5)
            axis.plot([mean - half, mean + half], [place, place], color=colour, lw=2.5)
            axis.plot(mean, place, '|', color=colour, ms=14, mew=2.5)
        axis.set(xlabel=label, yticks=range(len(titles)), ylim=(len(titles) - 0.5, -0.6))
        axis.locator_params(axis='x', nbins=5)
        axis.grid(alpha=0.3)
    axes[0].set_yticklabels(titles)
    return figure


def dots(axis: Axes, rows: Mapping[str, ArrayLike]) -> None:
    """A row for each title, from above: the value of every seed as a dot, their mean as a bar."""
    for place, values in enumerate(map(np.asarray, rows.values())):
        axis.plot(values, np.full(len(values), place), 'o', color=COLOURS[5], ms=4)
        axis.plot(values.mean(), place, '|', color=COLOURS[0], ms=18, mew=2.5)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(alpha=0.3)


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    losses: Mapping[str, str],
    metrics: Sequence[tuple[str, str]] = (),
) -> Figure:
    """Training losses, each on axes of its own, and validation over steps, one curve per run.

    Args:
      runs: {title: lines of metrics.jsonl}.
      losses: {title: name of what it minimises}; runs of one name share their axes.
      metrics: (name, label) of others to be drawn in place of all these, where a loss is no measure
        of anything.
    """
    panels = _panels(runs, losses, metrics)
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = new_figure(3.2 * columns, 2.8 * rows + 0.4)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    lines = {}
    for axis, (label, curves) in zip(axes, panels.items(), strict=False):
        for title, points in curves.items():
            x, y = zip(*points, strict=True)
            (lines[title],) = axis.plot(x, y, color=colours[title], marker='o', markersize=2)
        # Losses of preferences may be negative.
        positive = all(value > 0 for points in curves.values() for _, value in points)
        logarithmic = label.startswith('training') and positive
        axis.set(xlabel='step', yscale='log' if logarithmic else 'linear')
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    titles = [title for title in runs if title in lines]
    handles = [lines[title] for title in titles]
    # As many side by side as fit, at about a tenth of an inch for a letter.
    fit = int(figure.get_figwidth() / (0.1 * max(map(len, titles), default=0) + 0.6))
    columns = min(max(fit, 1), len(titles)) or 1
    figure.legend(handles, titles, loc='outside lower center', ncols=columns, frameon=False)
    return figure


def _panels(runs, losses, metrics) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{label: {title: (step, value) pairs}} of what has been logged."""
    wanted = [
        (f'training loss: {loss}', 'train/loss', [title for title in runs if losses[title] == loss])
        for loss in dict.fromkeys(losses.values())
    ]
    for metric, label in (('accuracy', 'accuracy'), ('nll', 'NLL (nats)')):
        wanted.append((f'validation {label}', f'validation/{metric}', list(runs)))
    if metrics:
        wanted = [(label, metric, list(runs)) for metric, label in metrics]
    panels = {}
    for label, metric, titles in wanted:
        curves = {
            title: [(line['step'], line[metric]) for line in runs[title] if metric in line]
            for title in titles
        }
        panels[label] = {title: points for title, points in curves.items() if points}
    return {label: curves for label, curves in panels.items() if curves}


def reliability(rows: Mapping[str, tuple[np.ndarray, np.ndarray, float]]) -> Figure:
    """Accuracy over confidence, one panel per network, with the share of examples per bin.

    Args:
      rows: {title: (examples [bins], correct ones [bins], expected calibration error)}, for bins of
        equal width on [0, 1].
    """
    figure = new_figure(3.1 * len(rows), 3.4)
    axes = np.atleast_1d(figure.subplots(1, len(rows), sharey=True))
    for axis, (title, (examples, correct, ece)) in zip(axes, rows.items(), strict=True):
        count = np.asarray(examples)
        width = 1.0 / len(count)
        centres = (np.arange(len(count)) + 0.5) * width
        accuracy = np.asarray(correct) / np.maximum(count, 1)
        shown = count > 0
        axis.plot([0, 1], [0, 1], color='black', linewidth=0.8, linestyle='--')
        axis.bar(
            centres[shown],
            accuracy[shown],
            width,
            color=COLOURS[0],
            edgecolor='white',
            label='accuracy',
        )
        axis.step(
            centres, count / count.sum(), where='mid', color=COLOURS[1], label='share of examples'
        )
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel='confidence', title=f'{title}\nECE {ece:.3f}')
    axes[0].set_ylabel('accuracy in the bin')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
    return figure


def image_page(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Figure:
    """A page of images with captions.

    Args:
      images: [N, H, W, C] in [-1, 1], C 1 or 3.
      captions: N texts.
      columns: images per row.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.25 * columns, 1.65 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
        pixels = np.clip((image + 1) / 2, 0, 1)
        axis.imshow(
            pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap='gray', vmin=0, vmax=1
        )
        axis.set_title(caption, fontsize=6)
    return figure
