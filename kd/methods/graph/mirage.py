"""Mirage: a training set of graphs as the trees that often occur together (arXiv 2310.09486).

    config.mined = stage(
        steps=1, batch_size=32, method=dict(name='kd.methods.cache.nothing'),
        writers={'forests': dict(name='kd.methods.graph.mirage.mine', depth=2, support=0.5)})

No network is trained for it. A later stage learns from the forests with
`data=dict(source=dict(name='kd.methods.graph.mirage.forests', stage='mined'), train='train')`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from kd import config as config_lib
from kd import files
from kd.context import Context, Writer
from kd.data import computation_trees, graphs, sources
from kd.data.builders.graph_files import Graph
from kd.data.computation_trees import Forests, Trees
from kd.data.context import SourceContext, source_loader
from kd.data.itemsets import frequent_sets
from kd.errors import UserError
from kd.io.progress import say
from kd.parallel import distributed
from kd.ranges import Count, Fraction, Seed, Size, SplitName, StageName

WRITER = 'kd.methods.graph.mirage.mine'
_FORESTS, _MANIFEST = 'forests.npz', 'forests.json'
# Shares of a class that are tried, from all of its graphs down, until a budget is used up.
_SHARES = np.geomspace(1.0, 0.005, 60)

Support = Fraction | Sequence[Count]


def mine(
    context: Context,
    *,
    depth: Count,
    support: Support = 0.5,
    split: SplitName = 'train',
    budget: Size = 0,
    max_size: Size = 0,
    degrees: bool = False,
) -> Writer:
    """Writes the frequent sets of computation trees of each class to the stage's folder.

    Args:
      context: the stage; its data are graphs.
      depth: L, layers of the networks that are to learn from it.
      support: theta, in how many graphs of its class a set must be: a share of the class, or a
        number for every class.
      split: whose graphs are mined.
      budget: nodes of all forests, nothing shared; the share is then the least that keeps to it,
        and `support` is not read. 0 for none.
      max_size: trees of a set; 0 for any number.
      degrees: tell leaves of different degrees apart, see `kd.data.computation_trees.Trees`.

    Raises:
      UserError: data that are no graphs; no frequent set of a class.
    """
    _graphs_of(context.source(split), context.stage)

    def write(state: Any, step: int, directory: Path) -> None:
        del state, step
        if not distributed.is_first() or (directory / _MANIFEST).exists():
            return
        source = context.source(split)
        given = _graphs_of(source, context.stage)
        began = time.monotonic()
        options: dict[str, Any] = dict(max_size=max_size, degrees=degrees)
        found = (
            mined_within(given, depth, budget, **options)
            if budget
            else mined(given, depth, support, **options)
        )
        seconds = time.monotonic() - began
        with files.replacing(directory / _FORESTS) as partial, partial.open('wb') as stream:
            np.savez(stream, **found._asdict())
        told = {
            'data': sources.fingerprint(source),
            'split': split,
            'depth': depth,
            'forests': found.number,
            'nodes': int(found.unrolled.sum()),
            'distinct nodes': len(found.nodes),
            'nodes of all graphs': sum(len(graph.nodes) for graph in given),
            'seconds': round(seconds, 2),
        }
        files.write_json(directory / _MANIFEST, told)
        say(
            context.stage,
            f'{found.number} forests of {told["nodes"]:,} nodes, {len(found.nodes):,} of them '
            f'distinct, for {len(given):,} graphs of {told["nodes of all graphs"]:,}; '
            f'{seconds:.1f} s',
        )

    return write


def mined(
    given: Sequence[Graph],
    depth: int,
    support: float | Sequence[int],
    *,
    max_size: int = 0,
    degrees: bool = False,
) -> Forests:
    """Every set of trees that occurs in at least `support` graphs of a class, with its count.

        F_c = {(S, f): f = #{G of class c: S within Tr(G)} >= theta_c}

    Tr(G) are the trees of depth L of the nodes of G, each once. Trees of a single node are left
    out. Sets lie in the order of their class, support and codes.

    Args:
      given: graphs of all classes.
      depth: L.
      support: theta_c as a share of the class, rounded up, or for every class.
      max_size: trees of a set; 0 for any number.
      degrees: of leaves, see `kd.data.computation_trees.Trees`.

    Raises:
      UserError: no set of a class is frequent, or too many are.
    """
    trees = Trees(degrees)
    return _found(trees, _transactions(trees, given, depth), given, support, max_size)


def mined_within(
    given: Sequence[Graph],
    depth: int,
    budget: int,
    *,
    max_size: int = 0,
    degrees: bool = False,
) -> Forests:
    """`mined` with the least share of a class whose forests have at most `budget` nodes in all.

    Raises:
      UserError: what is in all graphs of a class has more nodes.
    """
    trees = Trees(degrees)
    transactions = _transactions(trees, given, depth)
    best = None
    for share in _SHARES:
        try:
            # A set has at least two nodes.
            found = _found(trees, transactions, given, share, max_size, most=budget // 2)
        except UserError:
            if best is None:
                continue  # Nothing is in so many graphs.
            break
        if found.unrolled.sum() > budget:
            break
        best = found
    if best is None:
        raise UserError(f'no frequent trees have only {budget} nodes in all; raise the budget.')
    return best


def _transactions(trees: Trees, given: Sequence[Graph], depth: int) -> list[tuple[int, ...]]:
    """Distinct trees of each graph that are more than a node."""
    return [
        tuple(sorted({int(code) for code in trees.codes(graph, depth) if trees.size(code) > 1}))
        for graph in given
    ]


def _found(
    trees: Trees,
    transactions: Sequence[tuple[int, ...]],
    given: Sequence[Graph],
    support: float | Sequence[int],
    max_size: int,
    most: int = 100_000,
) -> Forests:
    labels = np.array([graph.label for graph in given])
    classes = range(int(labels.max()) + 1)
    if not isinstance(support, float | int) and len(support) != len(classes):
        raise UserError(f'support={tuple(support)} has not one number for each of {len(classes)}.')
    kept = []
    for label in classes:
        own = [transactions[i] for i in np.flatnonzero(labels == label).tolist()]
        if isinstance(support, float | int):
            least = max(int(np.ceil(support * len(own) - 1e-9)), 1)
        else:
            least = support[label]
        sets = frequent_sets(own, least, max_size=max_size, most=most)
        if not sets:
            raise UserError(
                f'no set of trees is in {least} of the {len(own)} graphs of class {label}; lower '
                'the support.'
            )
        ordered = sorted((-count, tuple(sorted(codes))) for codes, count in sets.items())
        kept += [(codes, -minus, label) for minus, codes in ordered]
    return computation_trees.forests(trees, kept, given[0].edges.shape[1] - 2)


def draws(
    found: Forests, count: int, *, by: Literal['support', 'uniform'] = 'support', seed: int = 0
) -> np.ndarray:
    """Numbers of forests, int [count]: classes in equal shares, within them by support.

        p(S | c) = f / sum f

    Every forest is there floor(count p) or ceil(count p) times (a systematic draw), so that an
    epoch is as near to p as may be.

    Args:
      found: forests.
      count: how many, at least one for every class.
      by: 'uniform' for equal shares, which is what the released code comes to: it overwrites what
        it has drawn by the plain list.
      seed: of the draw.
    """
    classes = int(found.label.max()) + 1
    weight = found.support.astype(float) if by == 'support' else np.ones(found.number)
    share = np.zeros(found.number)
    for label in range(classes):
        own = found.label == label
        share[own] = weight[own] / weight[own].sum() / classes
    places = (np.arange(count) + np.random.default_rng(seed).random()) / count
    return np.searchsorted(np.cumsum(share)[:-1], places, side='right')


def forests(
    context: SourceContext,
    *,
    stage: StageName,
    examples: Count = 4096,
    by: Literal['support', 'uniform'] = 'support',
    seed: Seed = 0,
) -> sources.Source:
    """Forests of a stage as graphs of which the roots alone are pooled; see `draws`.

    Of the split that the stage has mined, whole; others are those of the recipe's own data.

    Args:
      context: a split.
      stage: that has mined.
      examples: how often a forest is drawn for an epoch.
      by, seed: of the draw.

    Raises:
      UserError: no such stage, or forests of other data.
    """
    split, source = _mining(context, stage)
    if context.split != split:
        return _other(context, stage)
    if context.workdir is None:
        spec = {name: x for name, x in source.spec.items() if name != 'index'}
        # tfds takes most of a second to import.
        from kd.data.builders import described

        return described.of_spec(source.name, split, spec, source.num_classes)
    found = read(context.locate(stage), sources.fingerprint(source))
    arrays = batch_of(found, draws(found, examples, by=by, seed=seed))
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    data = sources.DataSet(
        source.name, {split: examples}, lambda _: sources.in_memory(arrays), spec,
        source.num_classes,
    )  # fmt: skip
    return sources.Source(data, split)


def batch_of(found: Forests, numbers: np.ndarray) -> sources.Batch:
    """Forests by number, padded to the largest of all."""
    every = [found.forest(number) for number in range(found.number)]
    nodes = max(len(graph.nodes) for graph, _, _ in every)
    edges = max(len(graph.edges) for graph, _, _ in every)
    whole = graphs.padded(
        [graph for graph, _, _ in every], nodes, edges,
        roots=[roots for _, roots, _ in every], degrees=[degree for _, _, degree in every],
    )  # fmt: skip
    return {name: x[numbers] for name, x in whole.items()}


def random_graphs(
    context: SourceContext, *, stage: StageName, examples: Count = 4096, seed: Seed = 0
) -> sources.Source:
    """Whole graphs that have as many nodes as the forests of a stage, to compare with.

    Args:
      context: a split, as of `forests`.
      stage: that has mined.
      examples: of an epoch, in which the graphs come again and again.
      seed: of the choice, see `equal_storage`.
    """
    split, source = _mining(context, stage)
    if context.split != split or context.workdir is None:
        return _other(context, stage)
    given = _graphs_of(source, stage)
    found = read(context.locate(stage), sources.fingerprint(source))
    chosen = equal_storage(given, int(found.unrolled.sum()), seed)
    repeated = np.resize(chosen, max(examples, len(chosen))).tolist()
    inside = {split: [given[i] for i in repeated]}
    return graphs.of_graphs(source.name, split, inside, graphs.SETS[source.name])


def equal_storage(given: Sequence[Graph], nodes: int, seed: int) -> list[int]:
    """Numbers of random graphs, classes in turn, until they have at least so many nodes.

    There is at least one graph of every class: nothing can be learned without.
    """
    rng = np.random.default_rng(seed)
    labels = np.array([graph.label for graph in given])
    order = [rng.permutation(np.flatnonzero(labels == c)) for c in range(labels.max() + 1)]
    chosen: list[int] = []
    stored = 0
    for row in range(max(map(len, order))):
        for own in order:
            if row < len(own) and (stored < nodes or row == 0):
                chosen.append(int(own[row]))
                stored += len(given[own[row]].nodes)
    return chosen


def read(directory: Path, data: str) -> Forests:
    """The forests in a stage's folder, held to the fingerprint of their data."""
    if not (directory / _MANIFEST).exists():
        raise UserError(f'{directory} has no forests; it must be a stage with the writer {WRITER}.')
    advice = f'delete {directory} and run its recipe again'
    told = files.read_json(directory / _MANIFEST, advice)
    if told.get('data') != data:
        raise UserError(f'the forests in {directory} are of other graphs; {advice}.')
    try:
        with np.load(directory / _FORESTS) as stored:
            return Forests(**{name: stored[name] for name in Forests._fields})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{directory / _FORESTS} is damaged: {error}; {advice}.') from error


def _data(context: SourceContext, stage: str) -> Mapping[str, Any]:
    return config_lib.data_of(context.recipe.data, context.recipe.stages[stage].data)


def _other(context: SourceContext, stage: str) -> sources.Source:
    """The split as the stage that mines has it."""
    data = {**_data(context, stage), 'this': context.split}
    return source_loader(data, context.recipe, context.workdir)('this')


def _mining(context: SourceContext, stage: str) -> tuple[str, sources.Source]:
    """Of a stage that mines: the split, as it is written, and its source."""
    if stage not in context.recipe.stages:
        raise UserError(
            f"data.source names the stage '{stage}', of {tuple(context.recipe.stages)}."
        )
    writers = context.recipe.stages[stage].writers.values()
    block = next((block for block in writers if block['name'] == WRITER), None)
    if block is None:
        raise UserError(f"stage '{stage}' has no writer {WRITER}.")
    data, name = _data(context, stage), block.get('split', 'train')
    return data[name], source_loader(data, context.recipe, context.workdir)(name)


def _graphs_of(source: sources.Source, stage: str) -> Sequence[Graph]:
    if not isinstance(source, graphs.GraphSource):
        raise UserError(f'{stage} mines graphs, and its data are none; see kd.data.graphs.')
    return source.graphs
