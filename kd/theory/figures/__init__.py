"""Figures of the theorems, for the report of `kd.theory.verify`: a module for each paper.

A module is called as its paper is in the index, and its `DRAWINGS` are the figures. Each function
computes what it draws with the functions under test and returns a matplotlib figure. Call them with
float64 enabled.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers as well.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY = '#666666'
STYLE: Any = {
    'font.size': 9,
    'axes.titlesize': 9.5,
    'axes.labelsize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.5,
    'legend.fontsize': 8,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
    'savefig.dpi': 180,
}


class Drawing(NamedTuple):
    """A figure of the report: file name without suffix, caption, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


def panels(columns: int, rows: int = 1, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes, [rows * columns]."""
    figure = Figure(figsize=(3.35 * columns, height * rows), layout='constrained')
    return figure, np.ravel(figure.subplots(rows, columns))


def drawings(paper: str) -> tuple[Drawing, ...]:
    """The figures of a paper; () where it has none."""
    module = f'{__name__}.{paper}'
    if importlib.util.find_spec(module) is None:
        return ()
    found: tuple[Drawing, ...] = importlib.import_module(module).DRAWINGS
    return found


def write(papers: list[str], directory: Path) -> dict[str, list[tuple[str, str]]]:
    """Draws the papers' figures into `directory`; returns paper -> [(file name, caption)]."""
    written: dict[str, list[tuple[str, str]]] = {}
    with matplotlib.rc_context(STYLE):
        for paper in papers:
            for drawing in drawings(paper):
                name = f'{drawing.name}.png'
                drawing.draw().savefig(directory / name)
                written.setdefault(paper, []).append((name, drawing.caption))
    return written
