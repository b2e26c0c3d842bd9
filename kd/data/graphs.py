"""Sources of labelled graphs, padded to one size: a set by its name.

    data=dict(source=dict(name='kd.data.graphs.graphs', of='MUTAG'), train='train', test='test')

Fields of an example, for networks as `kd.models.gnn.GNN`:

    input   int32 [n, F]       labels of the nodes, column by column
    edges   int32 [m, 2 + E]   (hears, is heard, labels); (n, 0, 0 ...) where there is none
    roots   bool [n]           nodes that are pooled
    degree  float32 [n]        of each node
    label   int32 []
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from kd.data import catalogue, sources
from kd.data.builders import graph_files, motifs
from kd.data.builders.graph_files import Graph
from kd.data.context import SourceContext
from kd.errors import did_you_mean

# Of a shuffle that no data set brings: every run has the same splits.
_SHUFFLE = 0
# Graphs of a split where only shapes count.
_DESCRIBED = 10_000_000


class Set(NamedTuple):
    """What is known of a set of graphs.

    Attributes:
      nodes, edges: of the largest graph; an undirected edge counts twice.
      columns, edge_columns: labels that there are, of each column.
      kind: 'tu', 'ogb' or 'motifs'.
    """

    nodes: int
    edges: int
    columns: tuple[int, ...]
    edge_columns: tuple[int, ...] = ()
    kind: str = 'tu'


ATOM, BOND = (119, 5, 12, 12, 10, 6, 6, 2, 2), (5, 6, 2)
SETS: Mapping[str, Set] = {
    'motifs': Set(28, 54, (motifs.LABELS,), kind='motifs'),
    'MUTAG': Set(28, 66, (7,), (4,)),
    'PROTEINS': Set(620, 2_098, (3,)),
    'DD': Set(5_748, 28_534, (89,)),
    'NCI1': Set(111, 238, (37,)),
    # Nodes have no labels: their degrees.
    'IMDB-BINARY': Set(136, 2_498, (136,)),
    'ogbg_molbace': Set(97, 202, ATOM, BOND, 'ogb'),
    'ogbg_molbbbp': Set(132, 290, ATOM, BOND, 'ogb'),
    'ogbg_molhiv': Set(222, 502, ATOM, BOND, 'ogb'),
}


class GraphSource(sources.Source):
    """A source that also has its graphs as they are.

    Attributes:
      graphs: of the split, in its order; () where only shapes are known.
    """

    graphs: Sequence[Graph] = ()


def graphs(context: SourceContext, *, of: str) -> GraphSource:
    """A split of a set of graphs with two classes.

    TU sets have no splits of their own: 'train', 'validation' and 'test' are the first 80, the next
    10 and the last 10 % of a fixed shuffle.

    Args:
      context: a split.
      of: a name in `SETS`. Its files lie in the data directory, in a folder of that name.

    Raises:
      DataError: no such set or file, or graphs that are not as `SETS` says.
    """
    if of not in SETS:
        raise sources.DataError(
            f"there is no set of graphs '{of}'.{did_you_mean(of, SETS)} Sets: {', '.join(SETS)}"
        )
    size = SETS[of]
    directory = context.recipe.data_dir
    if directory == catalogue.DESCRIBED and size.kind != 'motifs':
        sizes = dict.fromkeys(('train', 'validation', 'test'), _DESCRIBED)
        data = sources.DataSet(of, sizes, lambda _: lambda rows: {}, _spec(size), 2)
        return GraphSource(data, context.split)
    found = _read(of, size.kind, directory)
    _check(of, [graph for inside in found.values() for graph in inside], size)
    return of_graphs(of, context.split, found, size)


def of_graphs(
    name: str, split: str, found: Mapping[str, Sequence[Graph]], size: Set
) -> GraphSource:
    """A split of graphs that are at hand by named split, all padded to `size`."""

    def reader(base: str) -> sources.Reader:
        return lambda rows: padded([found[base][row] for row in rows], size.nodes, size.edges)

    sizes = {base: len(inside) for base, inside in found.items()}
    data = sources.DataSet(name, sizes, reader, _spec(size), 2)
    made = GraphSource(data, split)
    made.graphs = [
        graph
        for base, start, stop in sources.parse_split(split, sizes, name=name)
        for graph in found[base][start:stop]
    ]
    return made


def padded(
    given: Sequence[Graph],
    nodes: int,
    edges: int,
    *,
    roots: Sequence[np.ndarray] | None = None,
    degrees: Sequence[np.ndarray] | None = None,
) -> sources.Batch:
    """A batch of graphs, each with room for so many nodes and edges.

    Args:
      given: graphs.
      nodes, edges: n and m, no smaller than the largest graph's.
      roots: numbers of the nodes that are pooled, of each graph; all of them by default.
      degrees: of the nodes; those of the graphs by default.
    """
    columns, kinds = (given[0].nodes.shape[1], given[0].edges.shape[1]) if given else (1, 2)
    batch = {
        'input': np.zeros((len(given), nodes, columns), np.int32),
        'edges': np.zeros((len(given), edges, kinds), np.int32),
        'roots': np.zeros((len(given), nodes), bool),
        'degree': np.zeros((len(given), nodes), np.float32),
        'label': np.array([graph.label for graph in given], np.int32),
    }
    batch['edges'][:, :, 0] = nodes
    for i, graph in enumerate(given):
        count = len(graph.nodes)
        batch['input'][i, :count] = graph.nodes
        batch['edges'][i, : len(graph.edges)] = graph.edges
        batch['roots'][i, slice(count) if roots is None else roots[i]] = True
        batch['degree'][i, :count] = graph.degree if degrees is None else degrees[i]
    return batch


def _spec(size: Set) -> dict[str, jax.ShapeDtypeStruct]:
    nodes = size.nodes
    return {
        'input': jax.ShapeDtypeStruct((nodes, len(size.columns)), np.int32),
        'edges': jax.ShapeDtypeStruct((size.edges, 2 + len(size.edge_columns)), np.int32),
        'roots': jax.ShapeDtypeStruct((nodes,), np.bool_),
        'degree': jax.ShapeDtypeStruct((nodes,), np.float32),
        'label': jax.ShapeDtypeStruct((), np.int32),
    }


def _read(of: str, kind: str, directory: str) -> dict[str, list[Graph]]:
    if kind == 'motifs':
        rng = np.random.default_rng(_SHUFFLE)
        return {split: motifs.graphs(rng, count) for split, count in motifs.SIZES.items()}
    folder = catalogue.default_data_dir(directory or None)
    place = Path(folder) / of
    if kind == 'ogb':
        return graph_files.ogb(place)
    every = graph_files.tu(place)
    order = np.random.default_rng(_SHUFFLE).permutation(len(every))
    first, second = int(0.8 * len(every)), int(0.9 * len(every))
    parts = np.split(order, [first, second])
    names = ('train', 'validation', 'test')
    return {name: [every[i] for i in part] for name, part in zip(names, parts, strict=True)}


def _check(where: str, inside: Sequence[Graph], size: Set) -> None:
    """Graphs fit their sizes, and their labels the columns."""
    if not inside:
        raise sources.DataError(f'{where}: there are no graphs')
    nodes, edges = graph_files.largest(inside)
    if nodes > size.nodes or edges > size.edges:
        raise sources.DataError(
            f'{where}: the largest graph has {nodes} nodes and {edges} edges, and the set is known '
            f'to have {size.nodes} and {size.edges}; these are other files'
        )
    for kind, rows, columns in (
        ('node', np.concatenate([graph.nodes for graph in inside]), size.columns),
        ('edge', np.concatenate([graph.edges[:, 2:] for graph in inside]), size.edge_columns),
    ):
        if rows.shape[1] != len(columns):
            raise sources.DataError(
                f'{where}: {kind}s have {rows.shape[1]} labels, and {len(columns)} are known'
            )
        if rows.size and ((rows < 0) | (rows >= np.array(columns))).any():
            raise sources.DataError(f'{where}: a {kind} has a label outside of 0 .. {columns}')
