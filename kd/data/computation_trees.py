"""Computation trees of message passing, each kept once, and the forests that are made of them.

The tree of depth L of a node is all that L layers of message passing know of it: its root is the
node, and the children of a node of the tree are all its neighbours in the graph, the parent too. A
tree has degree^L nodes; here equal subtrees are one (hash-consing), so that a graph costs its edges
times L.

Source: arXiv 2310.09486.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kd.data.builders.graph_files import Graph

Labels = tuple[int, ...]
# Labels of the edge to a child, and the child's code.
Child = tuple[Labels, int]


class Tree(NamedTuple):
    """A tree by its root: equal for isomorphic trees, as its children are by code and sorted.

    Attributes:
      labels: of the root.
      degree: of a leaf's node in its graph, -1 where it is not told apart.
      children: sorted.
    """

    labels: Labels
    degree: int
    children: tuple[Child, ...]


class Trees:
    """Trees by code: equal codes are isomorphic trees, with labels of nodes and edges, and back.

    Args:
      degrees: tell leaves of different degrees apart, as graph convolutions do, which divide by
        them; a tree is then exact for these too, and there are more of them.
    """

    def __init__(self, degrees: bool = False) -> None:
        self.degrees = degrees
        self._codes: dict[Tree, int] = {}
        self._trees: list[Tree] = []
        self._sizes: list[int] = []
        # Sum and number of the degrees of nodes that were leaves, by code.
        self._seen: dict[int, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._trees)

    def tree(self, code: int) -> Tree:
        """The tree of a code."""
        return self._trees[code]

    def size(self, code: int) -> int:
        """Nodes of a tree when nothing in it is shared."""
        return self._sizes[code]

    def degree(self, code: int) -> float:
        """Of the root in its graph; of a leaf the mean over all nodes that have been that leaf."""
        if children := self._trees[code].children:
            return float(len(children))
        total, count = self._seen.get(code, (0.0, 1))
        return total / count

    def code(self, tree: Tree) -> int:
        """The number of a tree, a new one where it is new."""
        found = self._codes.get(tree)
        if found is None:
            found = self._codes[tree] = len(self._trees)
            self._trees.append(tree)
            self._sizes.append(1 + sum(self._sizes[child] for _, child in tree.children))
        return found

    def codes(self, graph: Graph, depth: int) -> np.ndarray:
        """Code of the tree of every node, int64 [n].

            code_0(v) = (label of v),   code_l(v) = (label of v, {(label of uv, code_{l-1}(u))})

        Args:
          graph: undirected, or a forest whose parents hear their children.
          depth: L, at least 1.
        """
        labels = [tuple(row) for row in graph.nodes.tolist()]
        degree = graph.degree.astype(int).tolist()
        heard: list[list[tuple[Labels, int]]] = [[] for _ in labels]
        for to, source, *kinds in graph.edges.tolist():
            heard[to].append((tuple(kinds), source))
        now = []
        for own, at in zip(labels, degree, strict=True):
            leaf = self.code(Tree(own, at if self.degrees else -1, ()))
            total, count = self._seen.get(leaf, (0.0, 0))
            self._seen[leaf] = total + at, count + 1
            now.append(leaf)
        for _ in range(depth):
            now = [
                self.code(Tree(own, -1, tuple(sorted((kind, now[at]) for kind, at in of))))
                if of
                else leaf
                for own, of, leaf in zip(labels, heard, now, strict=True)
            ]
        return np.array(now, np.int64)


class Forests(NamedTuple):
    """Sets of trees with the number of graphs that they stand for, as arrays.

    Every subtree is stored once, whatever has it: a node hears each of its children as often as
    they are its children, which is all that message passing can tell.

    Attributes:
      nodes: int32 [K, F], labels of the roots of all subtrees.
      degree: float32 [K], in the graph.
      edges: int32 [M, 2 + E]: (parent, child, labels).
      items: int32 [T], roots of the first forest, the second, and so on.
      ends: int32 [I], where each forest ends in `items`.
      support: int32 [I], graphs of the class in which all its trees occur.
      label: int32 [I], the class.
      unrolled: int32 [I], nodes of each forest when nothing is shared.
    """

    nodes: np.ndarray
    degree: np.ndarray
    edges: np.ndarray
    items: np.ndarray
    ends: np.ndarray
    support: np.ndarray
    label: np.ndarray
    unrolled: np.ndarray

    @property
    def number(self) -> int:
        """Forests."""
        return len(self.ends)

    def roots(self, number: int) -> np.ndarray:
        """Roots of a forest, places in `nodes`."""
        return self.items[self.ends[number - 1] if number else 0 : self.ends[number]]

    def forest(self, number: int) -> tuple[Graph, np.ndarray, np.ndarray]:
        """A forest as a directed graph in which parents hear children; its roots; its degrees."""
        inside = np.zeros(len(self.nodes), bool)
        reached = np.unique(self.roots(number))
        while len(reached):
            inside[reached] = True
            children = self.edges[np.isin(self.edges[:, 0], reached), 1]
            reached = np.unique(children[~inside[children]])
        place = np.cumsum(inside) - 1
        edges = self.edges[inside[self.edges[:, 0]]].copy()
        edges[:, :2] = place[edges[:, :2]]
        graph = Graph(self.nodes[inside], edges, int(self.label[number]))
        return graph, place[self.roots(number)], self.degree[inside]


def forests(
    trees: Trees, found: Iterable[tuple[Sequence[int], int, int]], edge_columns: int
) -> Forests:
    """Forests of (codes, support, class), in their order.

    Args:
      trees: of the codes.
      found: sets of trees.
      edge_columns: labels of an edge, E.
    """
    found = list(found)
    place: dict[int, int] = {}
    waiting = [code for codes, _, _ in found for code in codes]
    while waiting:
        code = waiting.pop()
        if code not in place:
            place[code] = len(place)
            waiting += [child for _, child in trees.tree(code).children]
    edges = [
        (own, place[child], *kinds)
        for code, own in place.items()
        for kinds, child in trees.tree(code).children
    ]
    columns = len(trees.tree(0).labels) if len(trees) else 1
    return Forests(
        nodes=np.array([trees.tree(c).labels for c in place], np.int32).reshape(-1, columns),
        degree=np.array([trees.degree(code) for code in place], np.float32),
        edges=np.array(edges, np.int32).reshape(-1, 2 + edge_columns),
        items=np.array([place[code] for codes, _, _ in found for code in codes], np.int32),
        ends=np.cumsum([len(codes) for codes, _, _ in found]).astype(np.int32),
        support=np.array([support for _, support, _ in found], np.int32),
        label=np.array([label for _, _, label in found], np.int32),
        unrolled=np.array([sum(map(trees.size, codes)) for codes, _, _ in found], np.int32),
    )
