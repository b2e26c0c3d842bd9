"""Message passing against loops over nodes in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data import graphs
from kd.data.builders.graph_files import Graph
from kd.models import gnn
from kd.models.gnn import GNN
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

COLUMNS, EDGE_COLUMNS, WIDTH = (3, 2), (2, 3), 6


def random_graph(rng, count, label=0):
    """A graph with labelled edges, one of them twice."""
    nodes = np.stack([rng.integers(c, size=count) for c in COLUMNS], 1).astype(np.int32)
    pairs = [(i, j) for i in range(count) for j in range(i) if rng.random() < 0.5] + [(1, 0)]
    kinds = [tuple(int(rng.integers(c)) for c in EDGE_COLUMNS) for _ in pairs]
    both = [(i, j, *k) for (i, j), k in zip(pairs, kinds, strict=True)]
    both += [(j, i, *k) for i, j, *k in both]
    return Graph(nodes, np.array(both, np.int32), label)


def network(kind, **options):
    module = GNN(
        **dict(kind=kind, width=WIDTH, depth=2, columns=COLUMNS, edge_columns=EDGE_COLUMNS)
        | options
    )
    batch = graphs.padded([random_graph(np.random.default_rng(0), 4)], 9, 70)
    return from_linen(
        module, *(jax.ShapeDtypeStruct(batch[f].shape, batch[f].dtype) for f in module.fields)
    )


def variables_of(net, seed=0):
    """No parameter is at its beginning, where biases and eps are nothing."""
    given = jax.jit(net.init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), given)


def expected(kind, params, graph, heads=1, pool='sum'):
    """Node by node, edge by edge."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def embedded(row, table, columns):
        offsets = np.cumsum([0, *columns[:-1]])
        return sum(table[offset + label] for offset, label in zip(offsets, row, strict=True))

    def dense(name, layer, x):
        return x @ layer[name]['kernel'] + layer[name].get('bias', 0.0)

    def soft(x):
        return np.where(x > 0, x, 0.2 * x)

    h = [embedded(row, p['node_labels']['table'], COLUMNS) for row in graph.nodes]
    degree = [float((graph.edges[:, 0] == v).sum()) for v in range(len(h))]
    for i in range(2):
        layer, new = p[f'layer{i}'], []
        for v in range(len(h)):
            heard = [
                (int(u), np.maximum(h[u] + embedded(k, p[f'edge_labels{i}']['table'],
                                                    EDGE_COLUMNS), 0))
                for to, u, *k in graph.edges if to == v
            ]  # fmt: skip
            messages = [m for _, m in heard]
            if kind == 'gin':
                x = (1 + layer['eps']) * h[v] + sum(messages)
                new.append(dense('out', layer, np.maximum(dense('hidden', layer, x), 0)))
            elif kind == 'gcn':
                x = h[v] / (degree[v] + 1)
                for u, m in heard:
                    x = x + m / np.sqrt((degree[v] + 1) * (degree[u] + 1))
                new.append(dense('out', layer, x))
            elif kind == 'sage':
                average = sum(messages) / len(messages) if messages else np.zeros(WIDTH)
                new.append(dense('own', layer, h[v]) + dense('heard', layer, average))
            else:
                parts = []
                for k in range(heads):
                    cut = slice(k * WIDTH // heads, (k + 1) * WIDTH // heads)
                    values = [(x @ layer['values']['kernel'])[cut] for x in (h[v], *messages)]
                    scores = [
                        soft(values[0] @ layer['left'][k] + value @ layer['right'][k])
                        for value in values
                    ]
                    weights = np.exp(scores) / np.exp(scores).sum()
                    parts.append(sum(w * x for w, x in zip(weights, values, strict=True)))
                new.append(np.concatenate(parts) + layer['bias'])
        h = [np.maximum(x, 0) for x in new] if i == 0 else new
    pooled = sum(h) / (len(h) if pool == 'mean' else 1)
    return dense('head', p, pooled)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('gin', {}),
        ('gcn', {'pool': 'mean'}),
        ('sage', {}),
        ('gat', {'heads': 2, 'pool': 'mean'}),
    ],
)
def test_a_network_is_what_loops_over_nodes_compute(kind, options, monkeypatch):
    rng = np.random.default_rng(1)
    # The last node of the smallest graph hears nobody.
    alone = Graph(np.zeros((1, 2), np.int32), np.zeros((0, 4), np.int32), 0)
    given = [random_graph(rng, 4), random_graph(rng, 8), alone]
    batch = graphs.padded(given, 9, 70)
    net = network(kind, **options)
    variables = variables_of(net)
    found = jax.jit(lambda *x: net.apply(variables, *x).logits)(*net.of(batch))
    params = variables['params']
    wanted = [expected(kind, params, graph, **options) for graph in given]
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
    # By indices, as where graphs are large: the same, and so are the gradients.
    loss = lambda p: (net.apply({'params': p}, *net.of(batch)).logits ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    monkeypatch.setattr(gnn, 'DENSE', 0)
    again = jax.jit(jax.grad(lambda p: loss(p)))(params)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(again), strict=True):
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_padding_and_what_is_no_root_do_not_count():
    rng = np.random.default_rng(2)
    graph = random_graph(rng, 5)
    net = network('gat')
    variables = variables_of(net)
    apply = jax.jit(lambda *x: net.apply(variables, *x).logits)
    small, large = graphs.padded([graph], 5, 40), graphs.padded([graph], 9, 70)
    large['input'][0, 5:] = 1
    large['degree'][0, 5:] = 7.0
    np.testing.assert_allclose(apply(*net.of(small)), apply(*net.of(large)), rtol=1e-5)
    # The sum of the logits of single roots, without the bias of the head.
    bias = np.asarray(variables['params']['head']['bias'])
    each = graphs.padded([graph] * 5, 5, 40, roots=[np.array([v]) for v in range(5)])
    of_roots = np.asarray(apply(*net.of(each))) - bias
    np.testing.assert_allclose(apply(*net.of(small))[0] - bias, of_roots.sum(0), rtol=1e-4)


def test_what_does_not_fit_is_said():
    for options, told in (
        (dict(kind='gnn'), 'kind'),
        (dict(pool='max'), 'pool'),
        (dict(width=6, heads=4), 'width=6 does not divide among heads=4'),
    ):
        with pytest.raises(ValueError, match=told):
            GNN(**options)
    net = network('gin', columns=(3,))
    with pytest.raises(ValueError, match='the data have 2 columns of labels, and node_labels'):
        jax.eval_shape(net.init, jax.random.key(0))
