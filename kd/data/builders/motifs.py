"""Graphs of chained motifs, whose classes are mixtures of them: many equal computation trees."""

from __future__ import annotations

import numpy as np

from kd.data.builders.graph_files import Graph

SIZES = {'train': 600, 'validation': 200, 'test': 300}
LABELS, CLASSES = 5, 2
# Labels of the nodes, and edges, of a triangle, a star and a path.
_MOTIFS = (
    ((0, 0, 0), ((0, 1), (1, 2), (0, 2))),
    ((1, 2, 2, 2), ((0, 1), (0, 2), (0, 3))),
    ((3, 4, 3), ((0, 1), (1, 2))),
)
_SHARES = np.array([[0.5, 0.2, 0.3], [0.25, 0.45, 0.3]])
_COUNTS, _CHANGED = (4, 7), 0.3


def graphs(rng: np.random.Generator, count: int) -> list[Graph]:
    """Graphs of 4 to 7 motifs in a chain, each triangle, star or path by the shares of its class.

    The last node of a motif has an edge to the first of the next. In 30 % of the graphs one node
    has a random label. Classes alternate.
    """
    return [_graph(rng, number % CLASSES) for number in range(count)]


def _graph(rng: np.random.Generator, label: int) -> Graph:
    nodes: list[int] = []
    edges: list[tuple[int, int]] = []
    for kind in rng.choice(
        len(_MOTIFS), rng.integers(_COUNTS[0], _COUNTS[1] + 1), p=_SHARES[label]
    ):
        labels, inside = _MOTIFS[kind]
        first = len(nodes)
        edges += [(first - 1, first)] if nodes else []
        edges += [(first + i, first + j) for i, j in inside]
        nodes += labels
    if rng.random() < _CHANGED:
        nodes[rng.integers(len(nodes))] = int(rng.integers(LABELS))
    both = np.array(edges + [(j, i) for i, j in edges], np.int32)
    return Graph(np.array(nodes, np.int32)[:, None], both, label)
