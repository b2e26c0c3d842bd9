"""Figures, drawn without pyplot so that nothing global is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

# Distinguishable without colour vision (Okabe and Ito).
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def new_figure(width: float, height: float, **kwargs) -> Figure:
    """An empty figure in the house's style; sizes in inches at 150 dots per inch."""
    return Figure(figsize=(width, height), dpi=150, layout='constrained', **kwargs)


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss and validation accuracy over steps, one curve per run.

    Args:
      runs: {title: lines of metrics.jsonl}.
    """
    figure = new_figure(9, 3.4)
    axes = figure.subplots(1, 2)
    panels = (
        ('train/loss', 'training loss', 'log'),
        ('validation/accuracy', 'validation accuracy', 'linear'),
    )
    for axis, (metric, label, scale) in zip(axes, panels, strict=True):
        for colour, (title, lines) in zip(COLOURS, runs.items(), strict=False):
            points = [(line['step'], line[metric]) for line in lines if metric in line]
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=colour, label=title, marker='o', markersize=3)
        axis.set(xlabel='step', ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(runs), frameon=False)
    return figure


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
