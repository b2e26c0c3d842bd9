"""Numbers of a recipe: what a declaration admits, and that everything a recipe can name has one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import numpy as np
import pytest

from kd import ranges
from kd.config import build
from kd.errors import UserError
from kd.ranges import Count, Decay, Finite, Fraction, NonNegative, Positive, Seed, Size, Whole
from kd.training import optimizer

NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
    ('hint', 'fit', 'unfit', 'words'),
    [
        (Positive, (1e-30, 4, np.float32(2)), (0, -4.0, NAN, INF, True, '1', None, 10**400),
         'a number above 0'),
        (NonNegative, (0, 0.0, 1e30), (-1e-9, -INF, NAN), 'a number from 0'),
        (Finite, (-1e30, 0), (INF, NAN, 'auto'), 'a number that is finite'),
        (Fraction, (0, 1, 0.5), (-0.1, 1.01), 'a number in [0, 1]'),
        (Decay, (0, 0.999), (1, 1.0, -0.1), 'a number in [0, 1)'),
        (Count, (1, 2**31 - 1, np.int64(3)), (0, -1, 1.0, 1e30, True, 2**31, 10**30),
         'an integer from 1 to 2147483647'),
        (Size, (0, 5), (-1, 0.5), 'an integer from 0 to 2147483647'),
        (Whole, (-3, 0), (1.5, None), 'an integer from -2147483647 to 2147483647'),
        (Seed, (0, 2**32 - 1), (-1, 2**32), 'an integer from 0 to 4294967295'),
        (Positive | None, (None, 1), (0, 'x'), 'a number above 0 or None'),
        (Count | bool, (True, 3), (0, 1.5), 'an integer from 1 to 2147483647 or a bool'),
        (Finite | Literal['auto'], ('auto', -2), ('manual', INF),
         "a number that is finite or 'auto'"),
        (tuple[Count, ...], ((), (1, 2), [3]), ((0,), (1, 2.5)),
         'a sequence, each an integer from 1 to 2147483647'),
        (Sequence[Positive], ((), [0.1]), ((1, -1),), 'a sequence, each a number above 0'),
        (tuple[Fraction, Fraction], ((0, 1),), ((0, 2),),
         'a sequence of 2, each a number in [0, 1]'),
        (tuple[Fraction, Fraction], (), ((0, 1, 1),), 'a sequence of 2'),
        (tuple[Count, ...], (), (4, 'ab'), 'a sequence'),
        (Mapping[str, Decay], ({}, {'slow': 0.9}), ({'slow': 1.5},), 'a number in [0, 1)'),
        (Mapping[str, Decay], (), (0.9,), 'a block'),
        # What declares no range may be anything.
        (int, ('x', -1), (), ''),
        (str | None, (3,), (), ''),
    ],
)  # fmt: skip
def test_a_declaration_admits_its_numbers_and_names_what_it_wanted(hint, fit, unfit, words):
    for value in fit:
        ranges.check_value(hint, value, where='x')
    for value in unfit:
        with pytest.raises(UserError) as caught:
            ranges.check_value(hint, value, where='student.x')
        assert str(caught.value) == f'student.x must be {words}, got {value!r}.'


def scaled(*, factor: Positive = 1.0, others: int = 0):
    return factor


def test_blocks_are_held_before_anything_is_built():
    block = {'name': 'tests.test_ranges.scaled', 'factor': 2.0, 'others': -1}
    assert build(block, where='a.b') == 2.0
    with pytest.raises(UserError, match=r'^a\.b\.factor must be a number above 0, got -2\.0\.$'):
        build({**block, 'factor': -2.0}, where='a.b')
    network = {'name': 'kd.models.mlp.MLP', 'widths': (8, 0)}
    with pytest.raises(UserError, match=r'^net\.widths must be a sequence, each an integer from 1'):
        build(network, where='net')


@pytest.mark.parametrize(
    ('arguments', 'field'),
    [
        ({'lr': -1}, 'lr'),
        ({'lr': INF}, 'lr'),
        ({'clip_norm': -1}, 'clip_norm'),
        ({'warmup_steps': -5}, 'warmup_steps'),
        ({'weight_decay': NAN}, 'weight_decay'),
        ({'b1': 1.0}, 'b1'),
        ({'eps': -1e-8}, 'eps'),
        ({'name': 'sgd', 'momentum': -0.9}, 'momentum'),
        ({'name': 'rmsprop', 'initial_scale': INF}, 'initial_scale'),
        ({'schedule': 'step', 'schedule_args': {'boundaries': (0.5, 2)}}, 'boundaries'),
        ({'schedule': 'rsqrt', 'schedule_args': {'timescale': 0}}, 'timescale'),
        ({'schedule': 'cosine', 'schedule_args': {'end': -1}}, 'end'),
    ],
)
def test_numbers_of_optimisers_and_schedules_are_held(arguments, field):
    with pytest.raises(UserError, match=f'^{field} must be '):
        optimizer.optimizer(10, **{'lr': 1e-3, **arguments})
    optimizer.optimizer(10, name='sgd', lr=0.0, momentum=None)


@pytest.mark.parametrize(
    ('hint', 'value', 'expected'),
    [
        (ranges.StageName, 'a', [('stage', 'a')]),
        (Literal[''] | ranges.StageName, 'a', [('stage', 'a')]),
        (Literal[''] | ranges.StageName, '', []),
        (ranges.SplitName | None, None, []),
        (
            Sequence[tuple[str, ranges.StageName]],
            (('A', 'a'), ('B', 'b')),
            [('stage', 'a'), ('stage', 'b')],
        ),
        (tuple[ranges.SplitName, ...], ('x', 'y'), [('split', 'x'), ('split', 'y')]),
        (str, 'a', []),
    ],
)
def test_names_of_things_of_a_recipe_are_found_in_arguments(hint, value, expected):
    assert list(ranges.names(hint, value)) == expected


def test_an_argument_without_known_names_is_left_alone():
    def local(x: Unknown = 0):  # noqa: F821
        return x

    ranges.check(local, {'x': -1}, where='')


def named_by_recipes():
    """Every method, evaluator, writer, source, report and network of the package."""
    found = {}
    for package in ('methods', 'evaluators', 'reports', 'data', 'models'):
        root = importlib.import_module(f'kd.{package}')
        for module in pkgutil.walk_packages(root.__path__, f'{root.__name__}.'):
            for name, value in vars(importlib.import_module(module.name)).items():
                if getattr(value, '__module__', None) != module.name or name.startswith('_'):
                    continue
                if inspect.isfunction(value):
                    parameters = list(inspect.signature(value).parameters.values())
                    if parameters and parameters[0].name == 'context':
                        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
                        found[f'{module.name}.{name}'] = value, keywords
                elif inspect.isclass(value) and issubclass(value, nn.Module):
                    fields = value.__dataclass_fields__
                    own = [f for f in fields if f not in ('parent', 'name')]
                    defaults = [
                        f for f in own if fields[f].default is not fields[f].default_factory
                    ]
                    # A part of a network has fields that the network gives it.
                    if len(defaults) == len(own):
                        found[f'{module.name}.{name}'] = value, own
    return found


def bare_numbers(hint):
    """Whether a hint admits an int or a float without saying which."""
    if hint in (int, float):
        return True
    if typing.get_origin(hint) is typing.Annotated or typing.get_origin(hint) is Literal:
        return False
    return any(bare_numbers(part) for part in typing.get_args(hint))


def test_every_number_that_a_recipe_can_set_is_declared():
    named = named_by_recipes()
    assert len(named) > 40
    assert {'kd.methods.vision.logit_kd.logit_kd', 'kd.models.mlp.MLP'} <= set(named)
    undeclared = [
        f'{path}.{name}'
        for path, (value, names) in named.items()
        for name in names
        if bare_numbers(ranges.hints(value).get(name))
    ]
    assert not undeclared
