"""Labelled graphs, and files of them as published: TU and OGB."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd.data.sources import DataError


class Graph(NamedTuple):
    """A graph of labelled nodes and edges, with a class.

    Attributes:
      nodes: int32 [n, F], columns of labels.
      edges: int32 [m, 2 + E]: the node that hears, the node that is heard, and columns of labels.
        An undirected edge is there both ways.
      label: of the graph.
    """

    nodes: np.ndarray
    edges: np.ndarray
    label: int

    @property
    def degree(self) -> np.ndarray:
        """Edges at which each node hears, float32 [n]."""
        return np.bincount(self.edges[:, 0], minlength=len(self.nodes)).astype(np.float32)


def tu(folder: Path) -> list[Graph]:
    """The graphs of a TU data set, `NAME/NAME_A.txt` and the files beside it, in their order.

    Nodes without labels have their degree for one. Classes are the graph labels in order of size.

    Raises:
      DataError: a file is missing, or does not fit the others.

    Source: Morris et al. 2020, arXiv 2007.08663.
    """
    name = folder.name

    def column(kind: str, *, optional: bool = False) -> np.ndarray | None:
        file = folder / f'{name}_{kind}.txt'
        if optional and not file.is_file():
            return None
        return _numbers(file, _text(file), ',')

    pairs = column('A')
    owner = column('graph_indicator')
    label = column('graph_labels')
    assert pairs is not None
    assert owner is not None
    assert label is not None
    owner, pairs = owner[:, 0] - 1, pairs - 1
    labels, kinds = column('node_labels', optional=True), column('edge_labels', optional=True)
    classes = np.unique(label[:, 0], return_inverse=True)[1]
    if labels is None:
        _check_ends(folder, pairs, len(owner))
        labels = np.bincount(pairs[:, 0], minlength=len(owner))[:, None]
    kinds = np.zeros((len(pairs), 0), int) if kinds is None else kinds
    fits = len(labels) == len(owner) and len(kinds) == len(pairs) and pairs.shape[1] == 2
    if not fits or len(classes) != owner.max() + 1 or (np.diff(owner) < 0).any():
        raise DataError(f'the files in {folder} are not of one data set; bring them back together')
    _check_ends(folder, pairs, len(owner))
    return _cut(labels, np.hstack([pairs, kinds]), owner, classes)


def ogb(folder: Path, split: str = 'scaffold') -> dict[str, list[Graph]]:
    """The graphs of an OGB data set for molecules, by split: 'train', 'validation', 'test'.

    In `folder/raw` lie edge, num-node-list, num-edge-list, node-feat, edge-feat and graph-label,
    `.csv.gz`; in `folder/split/SPLIT` train, valid and test. An edge is there once, and read both
    ways.

    Args:
      folder: such as ogbg_molbace.
      split: by which the data are split.

    Raises:
      DataError: a file is missing, or the graphs have not one label each.

    Source: Hu et al. 2020, arXiv 2005.00687.
    """

    def read(place: str) -> np.ndarray:
        file = folder / f'{place}.csv.gz'
        return _numbers(file, _text(file), ',')

    nodes, edges = (read(f'raw/num-{kind}-list')[:, 0] for kind in ('node', 'edge'))
    labels = read('raw/graph-label')
    if labels.shape != (len(nodes), 1):
        raise DataError(f'{folder} has {labels.shape[1]} labels a graph, and one is wanted')
    pairs, kinds, features = read('raw/edge'), read('raw/edge-feat'), read('raw/node-feat')
    if len(features) != nodes.sum() or not len(pairs) == len(kinds) == edges.sum():
        raise DataError(f'the files in {folder} are not of one data set; bring them back together')
    owner = np.repeat(np.arange(len(nodes)), edges)
    pairs = pairs + (np.cumsum(nodes) - nodes)[owner, None]
    both = np.concatenate([np.hstack([pairs, kinds]), np.hstack([pairs[:, ::-1], kinds])])
    graphs = _cut(features, both, np.repeat(np.arange(len(nodes)), nodes), labels[:, 0])
    names = {'train': 'train', 'validation': 'valid', 'test': 'test'}
    return {
        ours: [graphs[i] for i in read(f'split/{split}/{theirs}')[:, 0]]
        for ours, theirs in names.items()
    }


def _check_ends(folder: Path, pairs: np.ndarray, count: int) -> None:
    """Edges are of nodes 0 .. count - 1."""
    if len(pairs) and not (pairs.min() >= 0 and pairs.max() < count):
        raise DataError(f'{folder} has an edge to a node that is not there; bring its files again')


def _cut(
    nodes: np.ndarray, edges: np.ndarray, owner: np.ndarray, labels: np.ndarray
) -> list[Graph]:
    """Graphs of all nodes [N, F], edges [M, 2 + E] by number of node, and owners [N], sorted."""
    first = np.searchsorted(owner, np.arange(len(labels) + 1))
    order = np.argsort(edges[:, 0], kind='stable')
    edges = edges[order].astype(np.int32)
    begin = np.searchsorted(edges[:, 0], first)
    found = []
    for number, label in enumerate(labels):
        start, inside = first[number], edges[begin[number] : begin[number + 1]].copy()
        inside[:, :2] -= start
        own = nodes[start : first[number + 1]].astype(np.int32)
        if len(inside) and not (inside[:, :2].min() >= 0 and inside[:, :2].max() < len(own)):
            raise DataError(f'graph {number} has an edge to a node of another graph')
        found.append(Graph(own, inside, int(label)))
    return found


def _text(file: Path) -> str:
    if not file.is_file():
        raise DataError(
            f'there is no file {file}; name the folder that has it by --data_dir, or bring it there'
        )
    if file.suffix != '.gz':
        return file.read_text('utf-8')
    try:
        return gzip.decompress(file.read_bytes()).decode('utf-8')
    except (OSError, EOFError) as error:
        raise DataError(f'{file} is damaged: {error}; bring it again') from error


def _numbers(file: Path, text: str, delimiter: str) -> np.ndarray:
    """Integers [lines, columns]."""
    if not text.strip():
        raise DataError(f'{file} is empty; bring it again')
    try:
        values = np.loadtxt(io.StringIO(text), delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise DataError(f'{file} is no table of numbers: {error}') from error
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        raise DataError(f'{file} has what is no whole number; leave such graphs out')
    return values.astype(np.int64)


def largest(graphs: Sequence[Graph]) -> tuple[int, int]:
    """Nodes and edges of the largest graphs, at least one of each."""
    return (
        max(1, *(len(graph.nodes) for graph in graphs)),
        max(1, *(len(graph.edges) for graph in graphs)),
    )
