"""Graphs: files as published, computation trees, and sets that are frequent."""

import collections
import gzip
import itertools

import numpy as np
import pytest

from kd.config import Recipe
from kd.data import catalogue, graphs
from kd.data.builders import graph_files, motifs
from kd.data.builders.graph_files import Graph
from kd.data.computation_trees import Tree, Trees, forests
from kd.data.context import SourceContext
from kd.data.itemsets import frequent_sets
from kd.data.sources import DataError
from kd.errors import UserError


def context(split, folder=''):
    return SourceContext(split, Recipe(stages={}, data={}, data_dir=str(folder)))


def write_tu(folder, name, **columns):
    (folder / name).mkdir()
    for kind, lines in columns.items():
        (folder / name / f'{name}_{kind}.txt').write_text('\n'.join(lines) + '\n')


# A path of three nodes and an edge, and a node alone; classes -1, 1, 1.
TU = dict(
    A=['2, 1', '1, 2', '2, 3', '3, 2', '4, 5', '5, 4'],
    graph_indicator=['1', '1', '1', '2', '2', '3'],
    graph_labels=['1', '-1', '1'],
)
LABELS = dict(
    node_labels=['0', '1', '2', '1', '0', '2'], edge_labels=['0', '0', '3', '3', '1', '1']
)


def test_tu_files_are_read_as_published(tmp_path):
    write_tu(tmp_path, 'MUTAG', **TU, **LABELS)
    first, second, third = graph_files.tu(tmp_path / 'MUTAG')
    assert first.nodes.tolist() == [[0], [1], [2]]
    assert sorted(first.edges.tolist()) == [[0, 1, 0], [1, 0, 0], [1, 2, 3], [2, 1, 3]]
    assert second.edges.tolist() == [[0, 1, 1], [1, 0, 1]]
    assert (len(third.nodes), third.edges.shape) == (1, (0, 3))
    assert [first.label, second.label, third.label] == [1, 0, 1]
    assert first.degree.tolist() == [1.0, 2.0, 1.0]
    # Where nodes have no labels these are their degrees.
    write_tu(tmp_path, 'IMDB-BINARY', **TU)
    assert graph_files.tu(tmp_path / 'IMDB-BINARY')[0].nodes.tolist() == [[1], [2], [1]]
    whole = graphs.graphs(context('train+validation+test', tmp_path), of='MUTAG')
    assert sorted(whole.fetch(np.arange(3))['label']) == [0, 1, 1]
    assert sorted(len(graph.nodes) for graph in whole.graphs) == [1, 2, 3]


def test_ogb_files_are_read_as_published(tmp_path):
    folder = tmp_path / 'ogbg_molbace'
    rows = {
        'raw/num-node-list': ['2', '3'],
        'raw/num-edge-list': ['1', '2'],
        'raw/node-feat': [','.join(map(str, [k] + [0] * 8)) for k in (5, 7, 6, 5, 7)],
        'raw/edge': ['0,1', '0,1', '1,2'],
        'raw/edge-feat': ['0,0,0', '1,0,1', '2,0,0'],
        'raw/graph-label': ['1', '0'],
        'split/scaffold/train': ['1'],
        'split/scaffold/valid': ['0'],
        'split/scaffold/test': ['0', '1'],
    }
    for name, lines in rows.items():
        file = folder / f'{name}.csv.gz'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress('\n'.join(lines).encode()))
    found = graph_files.ogb(folder)
    (train,) = found['train']
    assert train.nodes[:, 0].tolist() == [6, 5, 7]
    assert sorted(train.edges.tolist()) == [
        [0, 1, 1, 0, 1], [1, 0, 1, 0, 1], [1, 2, 2, 0, 0], [2, 1, 2, 0, 0],
    ]  # fmt: skip
    assert [graph.label for graph in found['test']] == [1, 0]
    source = graphs.graphs(context('test', tmp_path), of='ogbg_molbace')
    assert source.fetch([0])['input'].shape == (1, 97, 9)
    (folder / 'raw/edge.csv.gz').write_bytes(gzip.compress(b'0,1'))
    with pytest.raises(DataError, match='are not of one data set'):
        graph_files.ogb(folder)
    (folder / 'raw/edge.csv.gz').write_bytes(b'no gzip')
    with pytest.raises(DataError, match='is damaged'):
        graph_files.ogb(folder)


def test_files_that_do_not_fit_are_said_in_a_line(tmp_path):
    with pytest.raises(DataError, match=r"no set of graphs 'MUTAGG'\. Did you mean 'MUTAG'"):
        graphs.graphs(context('train', tmp_path), of='MUTAGG')
    with pytest.raises(DataError, match=r'there is no file .*MUTAG_A.txt; name the folder'):
        graphs.graphs(context('train', tmp_path), of='MUTAG')
    write_tu(tmp_path, 'PROTEINS', **TU, node_labels=['0', '1', '2', '1', '0', '3'])
    with pytest.raises(DataError, match='a node has a label outside'):
        graphs.graphs(context('train+validation+test', tmp_path), of='PROTEINS')
    write_tu(tmp_path, 'MUTAG', **{**TU, 'graph_indicator': ['1', '1', '1', '1', '2', '3']})
    with pytest.raises(DataError, match='an edge to a node of another graph'):
        graph_files.tu(tmp_path / 'MUTAG')
    write_tu(tmp_path, 'NCI1', **{**TU, 'graph_labels': ['1', 'x', '1']})
    with pytest.raises(DataError, match='is no table of numbers'):
        graph_files.tu(tmp_path / 'NCI1')
    for number, (change, told) in enumerate((
        ({'A': ['2, 1', '1, 2', '7, 1']}, 'an edge to a node that is not there'),
        ({'A': ['2, 1', '1, 2', '0, 1']}, 'an edge to a node that is not there'),
        ({'graph_indicator': ['1', '2', '1', '2', '2', '3']}, 'are not of one data set'),
        ({'graph_labels': []}, 'graph_labels.txt is empty'),
    )):  # fmt: skip
        write_tu(tmp_path, f'odd{number}', **{**TU, **change})
        with pytest.raises(DataError, match=told):
            graph_files.tu(tmp_path / f'odd{number}')
    described = graphs.graphs(context('train', catalogue.DESCRIBED), of='DD')
    assert described.spec['edges'].shape == (28_534, 2)


def test_motifs_are_the_same_every_time_and_of_their_shares():
    first, again = (graphs.graphs(context('train'), of='motifs') for _ in range(2))
    for name, x in first.fetch(np.arange(600)).items():
        np.testing.assert_array_equal(x, again.fetch(np.arange(600))[name])
    assert len(first) == 600
    many = motifs.graphs(np.random.default_rng(1), 4000)
    stars = [
        np.mean([(g.nodes == 1).sum() for g in many if g.label == c]) / 5.5 for c in (0, 1)
    ]  # fmt: skip
    assert stars == pytest.approx([0.2, 0.45], abs=0.02)
    nodes, edges = graph_files.largest(many)
    assert nodes <= graphs.SETS['motifs'].nodes
    assert edges <= graphs.SETS['motifs'].edges


def test_frequent_sets_are_those_of_enumeration():
    rng = np.random.default_rng(0)
    for _ in range(40):
        items = int(rng.integers(3, 8))
        given = [
            [int(i) for i in np.flatnonzero(rng.random(items) < 0.5)] * 2
            for _ in range(int(rng.integers(3, 14)))
        ]
        support, longest = int(rng.integers(1, 5)), int(rng.integers(0, 4))
        wanted = {}
        for size in range(1, (longest or items) + 1):
            for chosen in itertools.combinations(range(items), size):
                count = sum(set(chosen) <= set(one) for one in given)
                if count >= support:
                    wanted[frozenset(chosen)] = count
        assert frequent_sets(given, support, max_size=longest) == wanted
    with pytest.raises(UserError, match='more than 100 sets are in at least 2 of 3 transactions'):
        frequent_sets([range(10)] * 3, 2, most=100)
    with pytest.raises(ValueError, match='support=0'):
        frequent_sets([[1]], 0)


def rooted(parents, labels):
    """A tree whose parents hear their children."""
    edges = [(p, i) for i, p in enumerate(parents, 1)]
    return Graph(np.array(labels)[:, None], np.array(edges, np.int32).reshape(-1, 2), 0)


def isomorphic(one, other):
    """By trying: (label, children) against (label, children)."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    return any(
        all(isomorphic(a, b) for a, b in zip(one[1], order, strict=True))
        for order in itertools.permutations(other[1])
    )


def test_codes_are_equal_where_trees_are_isomorphic_and_nowhere_else():
    trees, plain = Trees(), []
    for size in range(1, 6):
        for parents in itertools.product(*(range(i) for i in range(1, size))):
            for labels in itertools.product(range(2), repeat=size):

                def nested(v, parents=parents, labels=labels):
                    return labels[v], [nested(i) for i, p in enumerate(parents, 1) if p == v]

                plain.append((nested(0), trees.codes(rooted(parents, labels), 5)[0]))
    by_code = collections.defaultdict(list)
    for tree, code in plain:
        by_code[code].append(tree)
    first = [group[0] for group in by_code.values()]
    # Rooted trees of at most five nodes in two colours: OEIS A000151 has 2, 4, 14, 52, 214.
    assert len(first) == 2 + 4 + 14 + 52 + 214
    for group in by_code.values():
        assert all(isomorphic(group[0], other) for other in group)
    for one, other in itertools.combinations(first[:80], 2):
        assert not isomorphic(one, other)


def test_codes_do_not_depend_on_the_order_of_nodes_and_know_labels_of_edges():
    trees, rng = Trees(), np.random.default_rng(0)
    for graph in motifs.graphs(rng, 10):
        order = rng.permutation(len(graph.nodes))
        moved = np.argsort(order)[graph.edges]
        shuffled = Graph(graph.nodes[order], rng.permutation(moved), 0)
        np.testing.assert_array_equal(
            trees.codes(shuffled, 3), trees.codes(graph, 3)[order]
        )  # fmt: skip
    nodes = np.zeros((2, 1), np.int32)
    codes = [trees.codes(Graph(nodes, np.array([[0, 1, k], [1, 0, k]]), 0), 1)[0] for k in (0, 1)]
    assert codes[0] != codes[1]


def test_a_forest_has_the_trees_that_it_is_made_of_and_shares_subtrees():
    trees, rng = Trees(), np.random.default_rng(3)
    graph = motifs.graphs(rng, 1)[0]
    codes = np.unique(trees.codes(graph, 3))
    found = forests(trees, [(codes, 7, 1), (codes[:2], 9, 1)], 0)
    for number, wanted in ((0, codes), (1, codes[:2])):
        forest, roots, degree = found.forest(number)
        np.testing.assert_array_equal(trees.codes(forest, 3)[roots], wanted)
        heard = np.bincount(forest.edges[:, 0], minlength=len(forest.nodes))
        np.testing.assert_array_equal(degree[heard > 0], heard[heard > 0])
    assert found.unrolled.tolist() == [sum(map(trees.size, c)) for c in (codes, codes[:2])]
    assert len(found.nodes) < found.unrolled[0] / 2
    path = Graph(np.array([[0], [1], [0]]), np.array([[0, 1], [1, 0], [1, 2], [2, 1]]), 0)
    middle = trees.tree(int(trees.codes(path, 2)[1]))
    # The parent is a child again.
    assert len(middle.children) == 2
    assert trees.size(int(trees.codes(path, 2)[1])) == 5
    told_apart = Trees(degrees=True)
    end = told_apart.tree(told_apart.tree(int(told_apart.codes(path, 1)[0])).children[0][1])
    assert end == Tree((1,), 2, ())
