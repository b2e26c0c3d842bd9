"""Which student of a space would learn best from a teacher, told by untrained networks (DisWOT)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.losses import train_free
from kd.network import Network, feature_shape, operations, parameter_count
from kd.networks import build_network
from kd.ranges import Count, Size
from kd.search.regularised import evolve

SCORES = ('relation', 'semantic', 'sum')
Block = Mapping[str, Any]


def score_space(
    context: Context,
    *,
    network: Block,
    choices: Mapping[str, Sequence[Any]],
    teacher: Block,
    feature: str = 'features',
    teacher_feature: str = '',
    inits: Count = 3,
    examples: Count = 64,
    most_parameters: Size = 0,
    search: str = '',
    population: Count = 36,
    steps: Count = 500,
) -> Probe:
    """Scores networks against a teacher at their random starts; see `kd.losses.train_free`.

    Reports a table of the best with parameters and operations beside the scores, figures of the
    scores over parameters, and the `relation` and `semantic` score of the network that is chosen:
    the one with the largest sum of ranks, or of a search the one with the largest score. The
    semantic score of all is by class where the width of one of them is not the teacher's. Nothing
    is trained; a recipe that trains the winner has its block.

    Args:
      context: the stage, whose training data, of classes, give the batch.
      network: block of the students, but for what is chosen.
      choices: {attribute: values}; the space is their product.
      teacher: block of the teacher.
      feature: of the students, before the last pooling.
      teacher_feature: of the teacher; '' for the same name.
      inits: random starts of both sides that a score is the mean of.
      examples: of the batch, the first of the training split.
      most_parameters: networks with more are left out; 0 for no budget.
      search: 'relation' or 'semantic' for regularised evolution by that score, where a space is
        too large to be scored whole; '' for all of it.
      population, steps: of the search.
    """
    classes = context.num_classes
    if classes is None:
        raise UserError('score_space needs data with class labels.')
    if search not in ('', *SCORES[:2]):
        raise UserError(f"search must be '', 'relation' or 'semantic', got {search!r}.")
    if empty := [name for name, values in choices.items() if not values]:
        raise UserError(f'score_space: choices.{empty[0]} has no values.')
    source = context.recipe_source('train')
    names = tuple(choices)

    def built(block: Block, where: str) -> Network:
        made = build_network(dict(block), source, where=where)
        assert made is not None
        return made

    def run(state: Any, batches: Any) -> dict[str, Any]:
        del state, batches
        batch = source.fetch(np.arange(min(examples, len(source))))
        named = teacher_feature or feature
        judge = built(teacher, 'teacher')
        reference = views(judge, named, batch, inits, seed=1)
        known: dict[tuple, dict[str, float]] = {}

        def student_of(choice: tuple) -> Network:
            block = {**network, **dict(zip(names, choice, strict=True))}
            return built(block, f'network {choice}')

        # The two semantic scores are not of one scale, so all networks have the same one.
        every = [student_of(choice) for choice in _around(choices)]
        by_class = len({feature_shape(of, 'features').shape for of in (judge, *every)}) > 1

        def measured(choice: tuple) -> dict[str, float]:
            if choice not in known:
                student = student_of(choice)
                count = parameter_count(jax.eval_shape(student.init, jax.random.key(0)))
                found: dict[str, float] = {'parameters': count}
                if not most_parameters or count <= most_parameters:
                    seen = views(student, feature, batch, inits)
                    found |= scores(seen, reference, by_class=by_class)
                    found['operations'] = operations(student)
                known[choice] = found
            return known[choice]

        if search:
            _searched(choices, lambda c: measured(c).get(search, -np.inf), population, steps)
        else:
            for choice in itertools.product(*choices.values()):
                measured(choice)
        table = {choice: found for choice, found in known.items() if 'relation' in found}
        if not table:
            raise UserError(f'no network of the space has at most {most_parameters} parameters.')
        summed = sum_of_ranks([[of[name] for of in table.values()] for name in SCORES[:2]])
        for found, total in zip(table.values(), summed, strict=True):
            found['sum'] = float(total)
        order = sorted(table, key=lambda choice: table[choice][search or 'sum'], reverse=True)
        best = table[order[0]]
        return {
            'relation': best['relation'],
            'semantic': best['semantic'],
            'parameters': best['parameters'],
            'networks': len(table),
            'table': _text(names, order, table),
            'scores': _figure(table),
        }

    return Probe(run)


def views(
    network: Network, feature: str, batch: Mapping[str, np.ndarray], inits: int, *, seed: int = 0
) -> list[tuple[jax.Array, jax.Array]]:
    """(features, gradient of the classifier) at each random start, see `kd.losses.train_free`.

    Layers of one name and shape start alike from one seed: teacher and students have two.
    """

    @jax.jit
    def view(key: jax.Array, inputs: tuple[jax.Array, ...], labels: jax.Array):
        variables = network.init(key)
        capture = tuple(dict.fromkeys((feature, 'features')))
        output = network.apply(variables, *inputs, train=True, key=key, capture=capture)
        pooled = output.features['features']
        gradient = train_free.classifier_gradient(pooled, output.logits, labels)
        return output.features[feature], gradient

    inputs = network.of({name: jnp.asarray(x) for name, x in batch.items()})
    keys = jax.random.split(jax.random.key(seed), inits)
    return [view(key, inputs, jnp.asarray(batch['label'])) for key in keys]


def _around(choices: Mapping[str, Sequence[Any]]) -> list[tuple]:
    """The first network of a space, and those that differ from it in one attribute."""
    first = tuple(values[0] for values in choices.values())
    found = [first]
    for place, (_, *others) in enumerate(choices.values()):
        found += [(*first[:place], value, *first[place + 1 :]) for value in others]
    return found


@partial(jax.jit, static_argnames='by_class')
def _scores(student: Any, teacher: Any, by_class: bool) -> tuple[jax.Array, jax.Array]:
    semantic = train_free.class_semantic_score if by_class else train_free.semantic_score
    return train_free.relation_score(student[0], teacher[0]), semantic(student[1], teacher[1])


def scores(
    student: Sequence[Any], teacher: Sequence[Any], *, by_class: bool = False
) -> dict[str, float]:
    """Means over random starts of both sides.

    Args:
      student, teacher: as of `views`, as many of each.
      by_class: whether the semantic score is `class_semantic_score`, as where widths differ. It has
        another scale; networks that are ranked together have one of the two.
    """
    each = [_scores(s, t, by_class=by_class) for s, t in zip(student, teacher, strict=True)]
    relation, semantic = np.mean(np.asarray(each, np.float64), axis=0)
    return {'relation': float(relation), 'semantic': float(semantic)}


def sum_of_ranks(columns: Sequence[Sequence[float]]) -> np.ndarray:
    """Of scores [k][n], whose units differ, [n]; ranks count from 0 for the worst."""
    return np.sum([np.argsort(np.argsort(column)) for column in columns], axis=0)


def _searched(
    choices: Mapping[str, Sequence[Any]],
    score: Callable[[tuple], float],
    population: int,
    steps: int,
) -> None:
    """Scores what a search comes by; every candidate is kept where it was scored."""

    def draw(rng: np.random.Generator) -> tuple:
        return tuple(values[int(rng.integers(len(values)))] for values in choices.values())

    def mutate(rng: np.random.Generator, parent: tuple) -> tuple:
        place = int(rng.integers(len(parent)))
        values = list(choices.values())[place]
        return (*parent[:place], values[int(rng.integers(len(values)))], *parent[place + 1 :])

    size = min(8, population)
    evolve(
        np.random.default_rng(0), score, draw, mutate,
        population=population, tournament=size, parents=min(5, size), steps=steps,
    )  # fmt: skip


def _text(names: Sequence[str], order: Sequence[tuple], table: Mapping[tuple, Any]) -> str:
    columns = ('relation', 'semantic', 'sum', 'parameters', 'operations')
    lines = ['| ' + ' | '.join((*names, *columns)) + ' |', '|---' * len(names) + '|---:' * 5 + '|']
    for choice in order[:20]:
        found = table[choice]
        cells = [*map(str, choice), f'{found["relation"]:.3g}', f'{found["semantic"]:.3g}']
        cells += [f'{found[name]:,.0f}' for name in columns[2:]]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _figure(table: Mapping[tuple, Mapping[str, float]]) -> Any:
    figure = figures.new_figure(8, 3.4)
    parameters = [found['parameters'] for found in table.values()]
    for axis, name in zip(figure.subplots(1, 2), SCORES[:2], strict=True):
        axis.plot(parameters, [found[name] for found in table.values()], 'o', ms=4)
        axis.set(xscale='log', xlabel='parameters', ylabel=f'{name} score')
        axis.grid(alpha=0.3)
    return figure
