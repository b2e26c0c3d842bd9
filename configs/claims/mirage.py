"""Frequent sets of computation trees in place of graphs (Mirage 2023, arXiv:2310.09486).

    python -m kd.claims mirage

Chains of triangles, stars and paths whose shares are the class. A GIN learns from all 600 graphs;
from the sets of trees of depth 2 that occur in half of a class; or from random whole graphs with at
least as many nodes. Each seed has graphs of its own. Without a check: the most frequent tree of
each class alone, sets drawn evenly in place of by support (what the released code comes to), four
times the random graphs, and the same sets for GCN, GraphSAGE and GAT.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data import graphs
from kd.data.builders import motifs
from kd.evaluators.ranking import roc_auc
from kd.methods.graph import mirage
from kd.methods.vision.supervised import supervised
from kd.models.gnn import GNN
from kd.network import from_linen

SIZE = graphs.SETS['motifs']
DEPTH, SUPPORT, WIDTH, BATCH, DRAWS = 2, 0.5, 32, 16, 1024
TITLES = {
    'full': 'all graphs',
    'sets': 'frequent sets',
    'random': 'random graphs, equal storage',
    'random_4': 'random graphs, 4 x storage',
    'one_tree': 'most frequent tree of each class',
    'uniform': 'frequent sets, drawn evenly',
}
KINDS = {'gcn': 'GCN', 'sage': 'GraphSAGE', 'gat': 'GAT'}
CHECKS = [
    Check('at most 0.03 below all graphs', 'auc', 'sets', 'full', margin=-0.03),
    Check('over random graphs of equal storage by 0.10', 'auc', 'sets', 'random', margin=0.10),
    Check('mining 600 graphs takes less than 10 s', 'mining_s', 'sets', 10.0, lower=True),
]


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few graphs and steps."""
    runs, train, test, steps = (3, 40, 20, 2) if smoke else (8, 600, 300, 600)
    kinds = () if smoke else tuple(KINDS)
    return Claim(
        paper='2023, arXiv:2310.09486',
        statement='Computation trees that often occur together teach as much as all graphs, and '
        'more than whole graphs of the same storage.',
        setting=f'{train} training and {test} test graphs of 4 to 7 motifs, new for each of '
        f'{runs} seeds. GIN of two layers, width {WIDTH}, mean over roots; {steps} steps of Adam '
        f'1e-3, decay 1e-2, batches of {BATCH}, for every arm. Sets of trees of depth {DEPTH} in '
        'at least half of the graphs of a class; storage counts all nodes of the forests, shared '
        'or not. The last step counts, in every run.',
        run=lambda say: run(say, 20 + np.arange(runs), train, test, steps, kinds),
        checks=CHECKS[2:] if smoke else CHECKS,
        draw=draw,
        notes='Other networks, random graphs of four times the storage, the most frequent tree '
        'alone and sets drawn evenly are reported and not asserted.',
    )


def run(say, seeds, train, test, steps, kinds):
    """Areas under the ROC curve of every arm, storage and seconds of mining."""
    arms: dict = {arm: [] for arm in TITLES}
    tests, stored, seconds = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        given, unseen = motifs.graphs(rng, train), motifs.graphs(rng, test)
        tests.append(padded(unseen))
        arms['full'].append(padded(given))
        began = time.monotonic()
        found = mirage.mined(given, DEPTH, SUPPORT)
        seconds.append(time.monotonic() - began)
        stored.append(int(found.unrolled.sum()))
        for arm, by in (('sets', 'support'), ('uniform', 'uniform')):
            arms[arm].append(drawn(found, by, seed))
        arms['one_tree'].append(drawn(most_frequent(given), 'support', seed))
        for arm, times in (('random', 1), ('random_4', 4)):
            chosen = mirage.equal_storage(given, times * stored[-1], int(seed))
            arms[arm].append(padded([given[i] for i in chosen]))
    say(f'{np.mean(stored):.0f} nodes in the sets, mined in {np.mean(seconds):.2f} s')
    measured = {}
    for kind in ('gin', *kinds):
        for arm in TITLES if kind == 'gin' else ('full', 'sets', 'random'):
            name = arm if kind == 'gin' else f'{arm}_{kind}'
            measured[name] = {'auc': areas(network(kind), arms[arm], tests, seeds, steps)}
            say(f'{name}: AUC {np.mean(measured[name]["auc"]):.3f}')
    measured['sets'] |= {'nodes': stored, 'mining_s': seconds}
    return measured


def padded(given):
    """Arrays of graphs."""
    return graphs.padded(given, SIZE.nodes, SIZE.edges)


def drawn(found, by, seed):
    """Arrays of forests, drawn."""
    return mirage.batch_of(found, mirage.draws(found, DRAWS, by=by, seed=int(seed)))


def most_frequent(given):
    """The tree that is in the most graphs of a class, of each class."""
    found = mirage.mined(given, DEPTH, SUPPORT, max_size=1)
    first = np.array([np.flatnonzero(found.label == c)[0] for c in range(motifs.CLASSES)])
    return found._replace(
        items=np.concatenate([found.roots(i) for i in first]), ends=np.arange(1, len(first) + 1),
        **{name: getattr(found, name)[first] for name in ('support', 'label', 'unrolled')},
    )  # fmt: skip


def network(kind):
    """Two layers."""
    module = GNN(kind=kind, width=WIDTH, depth=DEPTH, pool='mean', columns=SIZE.columns)
    shapes = padded(motifs.graphs(np.random.default_rng(0), 1))
    return from_linen(
        module, *(jax.ShapeDtypeStruct(shapes[f].shape, shapes[f].dtype) for f in module.fields)
    )


def areas(net, given, tests, seeds, steps):
    """[R], of networks that each learn from their own graphs."""
    context = seeds_lib.context(
        network=net, num_classes=motifs.CLASSES, steps=steps,
        optimizer=dict(name='adam', lr=1e-3, weight_decay=1e-2),
    )  # fmt: skip
    state = seeds_lib.train(
        supervised(context), {}, seeds, steps=steps, batch_size=BATCH, per_run=stacked(given)
    )

    @jax.jit
    @jax.vmap
    def scores(params, batch):
        logits = net.apply({'params': params}, *net.of(batch)).logits
        return logits[:, 1] - logits[:, 0]

    batch = {name: jnp.asarray(x) for name, x in stacked(tests).items()}
    found = np.asarray(scores(state.params['network'], batch))
    return [roc_auc(s, one['label']) for s, one in zip(found, tests, strict=True)]


def stacked(given):
    """[R, N, ...] of sets of graphs: repeated to the same number, padded to the same size."""
    count = max(len(one['label']) for one in given)
    nodes = max(one['input'].shape[1] for one in given)
    edges = max(one['edges'].shape[1] for one in given)

    def whole(one):
        rows = np.resize(np.arange(len(one['label'])), count)
        none = one['edges'][:, :, :1] == one['input'].shape[1]
        one = {**one, 'edges': np.where(none, [[[nodes, 0]]], one['edges'])}
        size = {'input': nodes, 'roots': nodes, 'degree': nodes, 'edges': edges}
        fill = {'edges': [[[nodes, 0]]]}
        made = {'label': one['label'][rows]}
        for name, wanted in size.items():
            x = one[name][rows]
            room = np.broadcast_to(
                np.asarray(fill.get(name, 0), x.dtype),
                (len(rows), wanted - x.shape[1], *x.shape[2:]),
            )
            made[name] = np.concatenate([x, room], axis=1)
        return made

    each = [whole(one) for one in given]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def draw(measured):
    """Every seed, by arm; other networks beside."""
    rows = {arm: TITLES[arm] for arm in TITLES if arm in measured}
    rows |= {
        f'{arm}_{kind}': f'{KINDS[kind]}, {TITLES[arm]}'
        for kind in KINDS
        for arm in ('full', 'sets', 'random')
        if f'{arm}_{kind}' in measured
    }
    figure = figures.new_figure(8, 1.2 + 0.3 * len(rows))
    axis = figure.subplots()
    figures.dots(axis, {title: measured[arm]['auc'] for arm, title in rows.items()})
    axis.axvline(0.5, color='0.6', lw=1, ls='--')
    axis.set_xlabel('area under the ROC curve, test graphs')
    return figure
