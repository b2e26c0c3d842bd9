"""Mirage: forests give roots what nodes have in their graphs, and are drawn by support."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd.claims import seeds
from kd.data import computation_trees, graphs
from kd.data.builders import motifs
from kd.data.builders.graph_files import Graph
from kd.data.computation_trees import Trees
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.methods.graph import mirage
from kd.models.gnn import GNN
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def network(kind, batch, **options):
    module = GNN(kind=kind, width=8, depth=2, columns=(5,), **options)
    return from_linen(
        module, *(jax.ShapeDtypeStruct(batch[f].shape, batch[f].dtype) for f in module.fields)
    )


@pytest.mark.parametrize('kind', ['gin', 'gcn', 'sage', 'gat'])
def test_a_root_has_the_embedding_of_its_node(kind):
    trees = Trees(degrees=kind == 'gcn')
    graph = motifs.graphs(np.random.default_rng(0), 1)[0]
    codes, deeper = trees.codes(graph, 2), trees.codes(graph, 3)
    given = [([int(code)], 1, 0) for code in codes] + [([int(code)], 1, 0) for code in deeper]
    found = computation_trees.forests(trees, given, 0)
    arrays = mirage.batch_of(found, np.arange(found.number))
    # One node pooled at a time: of the graph, of trees of depth 2, and of depth 3.
    count = len(codes)
    nodes = [np.array([v]) for v in range(count)]
    whole = graphs.padded([graph] * count, count, len(graph.edges), roots=nodes)
    net = network(kind, arrays)
    variables = net.init(jax.random.key(1))
    apply = jax.jit(lambda batch: net.apply(variables, *net.of(batch)).logits)
    wanted, told = apply(whole), np.asarray(apply(arrays))
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(told[:count], wanted, atol=1e-5)
    # What lies below depth 2 changes nothing. (Graph convolutions read the degrees of leaves.)
    np.testing.assert_allclose(told[count:], told[:count], atol=1e-6)


def test_leaves_of_unknown_degree_have_their_mean_and_convolutions_are_not_exact():
    trees = Trees()
    graph = motifs.graphs(np.random.default_rng(0), 1)[0]
    codes = trees.codes(graph, 1)
    found = computation_trees.forests(trees, [([int(code)], 1, 0) for code in codes], 0)
    for number, code in enumerate(codes):
        forest, roots, degree = found.forest(number)
        assert degree[roots[0]] == len(trees.tree(int(code)).children)
        for v in np.setdiff1d(np.arange(len(degree)), roots):
            same = graph.degree[graph.nodes[:, 0] == forest.nodes[v, 0]]
            assert degree[v] == pytest.approx(same.mean())


def brute_force(given, depth, least):
    """{codes: count} of one class, by enumeration of subsets of distinct trees."""
    trees = Trees()
    own = [{int(c) for c in trees.codes(g, depth) if trees.size(int(c)) > 1} for g in given]
    found = {}
    for size in range(1, 5):
        for chosen in itertools.combinations(sorted(set().union(*own)), size):
            count = sum(set(chosen) <= one for one in own)
            if count >= least:
                found[chosen] = count
    return found


def test_what_is_mined_is_what_enumeration_finds():
    rng = np.random.default_rng(4)
    given = motifs.graphs(rng, 24)
    found = mirage.mined(given, 1, (6, 7), max_size=4)
    for label, least in enumerate((6, 7)):
        own = [graph for graph in given if graph.label == label]
        wanted = brute_force(own, 1, least)
        counts = found.support[found.label == label]
        assert sorted(counts) == sorted(wanted.values())
        # By falling support, so that the first is the most frequent.
        assert list(counts) == sorted(counts, reverse=True)
    assert (np.diff(found.label) >= 0).all()
    # A set is in no more graphs than any of its parts.
    sets = {frozenset(found.roots(i)): found.support[i] for i in range(found.number)
            if found.label[i] == 0}  # fmt: skip
    for one, other in itertools.product(sets, repeat=2):
        if one < other:
            assert sets[other] <= sets[one]


def test_with_a_support_of_one_graph_every_graph_is_a_set():
    rng = np.random.default_rng(0)
    path = np.array([[0, 1], [1, 2], [2, 3]])
    both = np.concatenate([path, path[:, ::-1]])
    given = [Graph(rng.integers(4, size=(4, 1)), both, k % 2) for k in range(10)]
    found, trees = mirage.mined(given, 2, (1, 1)), Trees()
    for label in (0, 1):
        whole = {
            frozenset(map(int, trees.codes(graph, 2))) for graph in given if graph.label == label
        }
        told = set()
        for number in np.flatnonzero(found.label == label):
            forest, roots, _ = found.forest(number)
            told.add(frozenset(map(int, trees.codes(forest, 2)[roots])))
        assert whole <= told


def test_a_class_of_equal_graphs_keeps_its_logits_where_all_trees_differ():
    # A path of four different labels, one graph many times, and another class.
    path = np.array([[0, 1], [1, 2], [2, 3]])
    both = np.concatenate([path, path[:, ::-1]])
    given = [Graph(np.arange(4)[:, None], both, 0)] * 5 + [Graph(np.full((4, 1), 4), both, 1)] * 5
    found = mirage.mined(given, 2, 1.0)
    largest = int(
        np.argmax([len(found.roots(i)) * (found.label[i] == 0) for i in range(found.number)])
    )
    arrays = mirage.batch_of(found, np.array([largest]))
    net = network('gin', arrays, pool='mean')
    variables = net.init(jax.random.key(0))
    whole = graphs.padded(given[:1], 4, 6)
    np.testing.assert_allclose(
        net.apply(variables, *net.of(arrays)).logits, net.apply(variables, *net.of(whole)).logits,
        atol=1e-6,
    )  # fmt: skip


def test_forests_are_drawn_in_proportion_to_their_support():
    found = mirage.mined(motifs.graphs(np.random.default_rng(5), 60), 2, 0.4)
    for by in ('support', 'uniform'):
        counts = np.bincount(mirage.draws(found, 2_000, by=by, seed=3), minlength=found.number)
        for label in (0, 1):
            own = found.label == label
            weight = found.support[own] if by == 'support' else np.ones(own.sum())
            wanted = 1_000 * weight / weight.sum()
            assert np.abs(counts[own] - wanted).max() <= 1
    assert len(set(found.support[found.label == 0])) > 1


def test_a_budget_and_storage_that_is_equal_to_it():
    given = motifs.graphs(np.random.default_rng(6), 60)
    found = mirage.mined_within(given, 2, 60)
    assert 0 < found.unrolled.sum() <= 60
    more = mirage.mined_within(given, 2, 400)
    assert found.unrolled.sum() < more.unrolled.sum() <= 400
    with pytest.raises(UserError, match='no frequent trees have only 3 nodes'):
        mirage.mined_within(given, 2, 3)
    for seed in range(3):
        chosen = mirage.equal_storage(given, 100, seed)
        sizes = [len(given[i].nodes) for i in chosen]
        assert sum(sizes) - sizes[-1] < 100 <= sum(sizes)
        labels = [given[i].label for i in chosen]
        assert abs(labels.count(0) - labels.count(1)) <= 1
        assert len(set(chosen)) == len(chosen)
    assert {given[i].label for i in mirage.equal_storage(given, 1, 0)} == {0, 1}
    with pytest.raises(UserError, match='in 60 of the 30 graphs of class 0; lower the support'):
        mirage.mined(given, 2, (60, 60))
    with pytest.raises(UserError, match='has not one number for each of 2'):
        mirage.mined(given, 2, (5,))


def test_a_stage_writes_forests_that_another_reads(tmp_path):
    recipe = kd_config.parse(kd_config.load('configs/graph/mirage.py:cpu'))
    splits = {
        split: SourceContext(split, recipe, tmp_path).recipe_data(split) for split in ('train',)
    }
    stage = dataclasses.replace(
        seeds.context(source=splits.__getitem__), stage='mined', recipe=recipe
    )
    (tmp_path / 'mined').mkdir()
    write = mirage.mine(stage, depth=2, support=0.5)
    write(None, 0, tmp_path / 'mined')
    told = json.loads((tmp_path / 'mined/forests.json').read_text())
    found = mirage.mined(splits['train'].graphs, 2, 0.5)
    assert told['nodes'] == found.unrolled.sum() < told['nodes of all graphs'] / 100
    context = SourceContext('train', recipe, tmp_path)
    source = mirage.forests(context, stage='mined', examples=300)
    batch = source.fetch(np.arange(300))
    wanted = mirage.batch_of(found, mirage.draws(found, 300))
    for name, x in wanted.items():
        np.testing.assert_array_equal(batch[name], x)
        assert source.spec[name].shape == x.shape[1:]
    # Other splits are whole graphs, of the recipe.
    other = mirage.forests(dataclasses.replace(context, split='test'), stage='mined')
    assert (len(other), other.split) == (300, 'test')
    random = mirage.random_graphs(context, stage='mined', examples=50)
    assert len(random) == 50
    stored = sum({id(graph): len(graph.nodes) for graph in random.graphs}.values())
    assert told['nodes'] <= stored < told['nodes'] + 28
    unread = mirage.forests(SourceContext('train', recipe), stage='mined', examples=7)
    assert unread.spec['input'].shape == (28, 1)
    for change, message in (
        ({'stage': 'full'}, "stage 'full' has no writer"),
        ({'stage': 'more'}, "names the stage 'more'"),
    ):
        with pytest.raises(UserError, match=message):
            mirage.forests(context, **change)
    with pytest.raises(UserError, match='are of other graphs'):
        mirage.read(tmp_path / 'mined', 'another')
    with pytest.raises(UserError, match='has no forests; it must be a stage with the writer'):
        mirage.read(tmp_path, 'another')
    (tmp_path / 'mined/forests.npz').write_bytes(b'nothing')
    with pytest.raises(UserError, match=r'forests\.npz is damaged'):
        mirage.forests(context, stage='mined')


def test_variants_name_networks_and_released_supports():
    load = kd_config.load
    chosen = load('configs/graph/mirage.py:molbace,gat,released')
    assert chosen.sets.network.kind == 'gat'
    assert chosen.mined.writers.forests.support == (150, 104)
    assert load('configs/graph/mirage.py:dd,gcn').full.network.dropout == 0.4
    with pytest.raises(UserError, match=r"\['gins'\] is none of"):
        load('configs/graph/mirage.py:molbace,gins')
