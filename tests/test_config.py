"""Configs: every mistake is one line that says what and where; blocks become objects."""

import json
import math
import sys

import ml_collections
import pytest

from kd import callables
from kd import config as kd_config
from kd.errors import UserError, did_you_mean
from kd.overrides import override


def scale(x, *, factor=2.0, offset=0.0):
    """A callable that blocks can name."""
    if factor == 0:
        raise ValueError('factor must not be zero')
    return factor * x + offset


# The line in which it raises.
_REFUSES = scale.__code__.co_firstlineno + 3


def anything(**options):
    return options


def a_stage(**changes):
    evaluators = {'validation': {'name': 'kd.evaluators.classification.classification'}}
    return kd_config.stage(
        **{
            'method': {'name': f'{__name__}.scale', 'factor': 3.0},
            'network': {'name': 'kd.models.mlp.MLP', 'widths': (8,)},
            'optimizer': {'name': 'adam', 'lr': 0.1},
            'evaluators': evaluators,
            'steps': 10,
            'batch_size': 4,
            **changes,
        }
    )


@pytest.fixture
def config():
    config = kd_config.recipe(
        stages=('teacher', 'student'), data={'name': 'two_moons', 'train': 'train'}
    )
    config.teacher, config.student = a_stage(), a_stage(teacher='teacher')
    return config


# parse


def test_a_recipe_and_its_stages_as_built_are_valid(config):
    kd_config.parse(config)
    with config.unlocked():
        del config.seed
    with pytest.raises(UserError, match="lacks 'seed'"):
        kd_config.parse(config)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.update(sed=1), r"unknown key 'sed'\. Did you mean 'seed'\?"),
        (lambda c: c.update(extra=a_stage()), r"must be named in stages=\('teacher', 'student'\)"),
        (
            lambda c: c.__delitem__('mesh'),
            r"The config lacks 'mesh'; build it with kd\.config\.recipe",
        ),
        (lambda c: c.__delitem__('student'), "stages names 'student' but the config has no block"),
        (lambda c: c.update(stages=()), 'The config names no stages'),
        (lambda c: c.update(on_nonfinite='ignore'), "must be 'stop' or 'skip', got 'ignore'"),
        (lambda c: c.profile.update(stop=3), "keys 'start' and 'steps', not 'start', 'steps', 's"),
        (lambda c: c.student.update(step=1), r"key 'student\.step'\. Did you mean 'steps'\?"),
        (lambda c: c.student.__delitem__('keep'), "student lacks 'keep'"),
        (
            lambda c: c.student.update(steps=0),
            r'student\.steps must be an integer from 1 .*, got 0',
        ),
        (lambda c: c.student.update(batch_size=-8), r'student\.batch_size must .* got -8'),
        (
            lambda c: c.student.update(poisson=5),
            r'student\.poisson=5 examples are expected in a batch, which has student\.batch_size=4',
        ),
        (lambda c: c.teacher.update(final='first'), "final must be 'last' or 'best', got 'first'"),
        (lambda c: c.teacher.update(final='best'), r'teacher\.best must name a metric'),
        (
            lambda c: c.teacher.update(best='-validatoin/nll'),
            r"names no evaluator .* Did you mean 'validation'\? It has: 'validation'",
        ),
        (
            lambda c: c.teacher.update(teacher='student'),
            r"teacher\.teacher='student' must come before 'teacher'",
        ),
        (lambda c: c.student.update(teacher='student'), 'must come before'),
        (
            lambda c: c.teacher.references.update(base='student'),
            r"teacher\.references\.base='student' must come before 'teacher'",
        ),
        (lambda c: c.student.data.update(trian='x'), r"'trian', which .* Did you mean 'train'\?"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(config, change, message):
    change(config)
    with pytest.raises(UserError, match=message):
        kd_config.parse(config)


@pytest.mark.parametrize('value', [1e3, '100', None])
def test_steps_of_a_wrong_type_are_refused(value):
    config = kd_config.recipe(stages=('only',), data={})
    config.only = a_stage(steps=value)
    with pytest.raises(UserError, match=r'only\.steps must be an integer from 1'):
        kd_config.parse(config)


def test_a_best_metric_of_an_evaluator_or_of_training_is_accepted(config):
    config.teacher.update(best='validation/accuracy', final='best')
    config.student.update(best='-train/loss')
    kd_config.parse(config)
    config.student.update(best='validaton/accuracy')
    with pytest.raises(UserError, match='validaton'):
        kd_config.parse(config)


def test_defaults_are_filled_in_around_what_is_given():
    config = kd_config.recipe(stages=['a'], data={}, mesh={'fsdp': 2}, profile={'steps': 5})
    assert config.mesh.to_dict() == {'data': -1, 'fsdp': 2, 'tensor': 1}
    assert config.profile.to_dict() == {'start': 10, 'steps': 5}
    assert config.stages == ('a',)


# load and variant

CONFIG_FILE = """
from kd import config as kd_config

def get_config(variant='small'):
    stage = kd_config.variant(variant, {'small': 1, 'large': 2})
    return kd_config.recipe(stages=(str(stage),), data={'name': 'digits'})
"""


def test_a_config_file_is_called_with_its_argument(tmp_path):
    file = tmp_path / 'recipe.py'
    file.write_text(CONFIG_FILE)
    assert kd_config.load(str(file)).stages == ('1',)
    assert kd_config.load(f'{file}:large').stages == ('2',)
    with pytest.raises(UserError, match=r"'larg'\. Did you mean 'large'\? Variants: small, large"):
        kd_config.load(f'{file}:larg')


def test_a_missing_config_file_names_a_close_one(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'digits.py').write_text('x = 1')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config file .* Did you mean 'configs/digits.py'\?"):
        kd_config.load('configs/digit.py')
    with pytest.raises(UserError, match='has no function get_config'):
        kd_config.load('configs/digits.py')


# override


def test_fields_are_set_from_text_in_the_type_they_have(config):
    override(
        config,
        {
            'student.optimizer.lr': '1',
            'student.steps': '1e2',
            'student.network.widths': '[4, 4]',
            'student.teacher': '7',
            'data.train': 'train[:50%]',
            'mesh.data': '2',
        },
    )
    lr, steps = config.student.optimizer.lr, config.student.steps
    assert (lr, type(lr), steps, type(steps)) == (1.0, float, 100, int)
    assert config.student.network.widths == (4, 4)
    assert config.student.teacher == '7'
    assert (config.data.train, config.mesh.data) == ('train[:50%]', 2)
    # The other stage, made of an equal block, is left alone.
    assert config.teacher.optimizer.lr == 0.1


def test_an_argument_left_at_its_default_can_be_set(config):
    override(
        config,
        {
            'student.method.offset': '0.5',
            'student.optimizer.weight_decay': '1e-4',
            'student.evaluators.validation.split': 'test',
        },
    )
    assert config.student.method.offset == 0.5
    assert config.student.optimizer.weight_decay == 1e-4
    assert config.student.evaluators.validation.split == 'test'


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('student.optimizer.lrr', '1', r"no field 'student\.optimizer\.lrr'\. Did you mean 'lr'\?"),
        ('student.method.facter', '1', r"Did you mean 'factor'\?"),
        ('studnet.steps', '5', r"studnet is no block of the config\. Did you mean 'student'\?"),
        ('student.steps.now', '5', r'config\.student\.steps is no block'),
        ('student.steps', '1.5', r"takes a value of type int, such as 10; got '1\.5'"),
        ('student.steps', 'many', "takes a value of type int, such as 10; got 'many'"),
        ('student.steps', 'True', "takes a value of type int, such as 10; got 'True'"),
        ('student.optimizer.lr', 'fast', 'takes a value of type float'),
        ('student.network.widths', '4', 'takes a value of type tuple'),
        (
            'student.optimizer',
            '3',
            r'config\.student\.optimizer is a block; .*write --config\.student\.optimizer= ',
        ),
        ('steps', '3', "The config has no field 'steps'"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(config, path, text, message):
    before = config.to_json()
    with pytest.raises(UserError, match=message):
        override(config, {path: text})
    assert config.to_json() == before


def test_free_names_can_be_added_to_empty_blocks(config):
    override(
        config,
        {
            'student.ema.slow': '0.99',
            'student.references.base': 'teacher',
            'student.data.train': 'train[:10]',
            'student.evaluators.more.split': 'test',
            'student.evaluators.more.name': f'{__name__}.anything',
        },
    )
    stage = kd_config.parse(config).stages['student']
    assert (stage.ema, stage.references) == ({'slow': 0.99}, {'base': 'teacher'})
    assert stage.data == {'train': 'train[:10]'}
    assert stage.evaluators['more'] == {'name': f'{__name__}.anything', 'split': 'test'}


def test_an_emptied_block_is_none(config):
    config.report = {'name': f'{__name__}.anything'}
    override(config, {'report': '', 'teacher.evaluators.validation': ''})
    recipe = kd_config.parse(config)
    assert recipe.report == {}
    assert recipe.stages['teacher'].evaluators == {}


def test_another_name_keeps_the_arguments_that_it_takes(config):
    config.student.method = {'name': f'{__name__}.anything', 'factor': 2.0, 'other': 1}
    told = override(
        config, {'student.method.offset': '4.0', 'student.method.name': f'{__name__}.scale'}
    )
    scaled = {'name': f'{__name__}.scale', 'factor': 2.0, 'offset': 4.0}
    assert kd_config.parse(config).stages['student'].method == scaled
    assert told == [f'student.method: {__name__}.scale does not take other.']


# resolve and build


def test_a_block_is_called_with_its_arguments():
    block = ml_collections.ConfigDict({'name': f'{__name__}.scale', 'factor': 3.0})
    assert kd_config.build(block, 4.0, where='here') == 12.0
    assert kd_config.build(block, 4.0, where='here', offset=1.0) == 13.0
    assert block.name  # The block is not used up.


def test_lists_and_nested_dicts_arrive_as_tuples_and_dicts(config):
    config.report = {'name': f'{__name__}.anything', 'a': [1, [2, 3]], 'b': {'c': [4]}}
    built = kd_config.build(kd_config.parse(config).report, where='here')
    assert built == {'a': (1, (2, 3)), 'b': {'c': (4,)}}
    assert type(built['b']) is dict


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ({'factor': 1.0}, "here has no 'name'; it must be an import path"),
        ({'name': 'scale'}, "'scale' is not an import path such as"),
        ({'name': 'kd.model.mlp.MLP'}, r"'kd\.model\.mlp\.MLP': there is no module kd\.model\."),
        ({'name': 'math.sqr'}, r"math has no 'sqr'\. Did you mean 'sqrt'\?"),
        (
            {'name': f'{__name__}.scale', 'facter': 1.0},
            r"unknown key 'facter'\. Did you mean 'factor'\? scale takes: x, factor, offset",
        ),
        (
            {'name': f'{__name__}.scale', 'factor': 0},
            rf'^here: tests/test_config\.py, line {_REFUSES}: factor must not be zero$',
        ),
        ({'name': f'{__name__}.scale', 'x': 1}, '^here: .*multiple values for argument'),
    ],
)
def test_a_block_that_cannot_be_built_says_why(block, message):
    with pytest.raises(UserError, match=message):
        kd_config.build(block, 1.0, where='here')


def test_keywords_the_caller_sets_are_not_the_blocks_to_set():
    block = {'name': f'{__name__}.scale', 'offset': 1.0}
    with pytest.raises(UserError, match=r"unknown key 'offset'\..* scale takes: x, factor\."):
        kd_config.build(block, 1.0, where='here', offset=2.0)


def test_a_module_that_fails_to_import_another_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / 'broken_recipe_module.py').write_text('import a_package_nobody_has\n')
    monkeypatch.syspath_prepend(tmp_path)
    message = r"^'broken_recipe_module\.thing': \S*broken_recipe_module\.py, line 1: ModuleNotFound"
    with pytest.raises(UserError, match=f"{message}.*'a_package_nobody_has'"):
        callables.resolve('broken_recipe_module.thing')
    sys.modules.pop('broken_recipe_module', None)


def test_resolve_gives_the_object_itself():
    assert callables.resolve('math.sqrt') is math.sqrt


# Comparison


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        ({}, None),
        ({'b': {'c': 3, 'd': [1, 2]}}, 'b.c was 2 and is 3'),
        ({'b': {'c': 2, 'd': [1, 3]}}, 'b.d was [1, 2] and is [1, 3]'),
        ({'e': 1}, 'e is only in the new config'),
        ({'b': 1}, "b was {'c': 2, 'd': [1, 2]} and is 1"),
        # The first in the order of the names.
        ({'a': 0, 'b': {}}, 'a was 1 and is 0'),
    ],
)
def test_the_first_difference_is_told(change, difference):
    old = {'a': 1, 'b': {'c': 2, 'd': [1, 2]}}
    assert kd_config.first_difference(old, {**old, **change}) == difference


def test_what_the_old_config_alone_has_is_told():
    assert kd_config.first_difference({'a': 1}, {}) == 'a is only in the old config'


def test_a_config_is_the_same_after_json(config):
    plain = kd_config.to_plain(config)
    again = json.loads(json.dumps(plain))
    assert kd_config.first_difference(json.loads(json.dumps(plain)), again) is None
    # Tuples and lists alike, the config that is built from it is the one it came from.
    assert kd_config.to_plain(ml_collections.ConfigDict(again)) == plain


def test_the_closest_word_is_suggested_or_none():
    assert did_you_mean('studnet', ['teacher', 'student']) == " Did you mean 'student'?"
    assert did_you_mean('xyz', ['teacher', 'student']) == ''


@pytest.mark.parametrize(
    ('field', 'value', 'where'),
    [
        ('student.teacher', 'gs://bucket/run/teacher', r'student\.teacher'),
        ('student.references', {'old': 's3://bucket/x'}, r'student\.references\.old'),
        ('data_dir', 'gs://bucket/data', 'data_dir'),
        ('pretrained', {'big': {'weights': 'hf:gs://bucket/x'}}, r'pretrained\.big\.weights: hf'),
    ],
)
def test_addresses_are_refused_in_every_field_that_is_a_path(field, value, where):
    made = kd_config.load('configs/vision/logit_kd.py:cpu')
    *block, name = field.split('.')
    with made.unlocked(), made.ignore_type():
        (made[block[0]] if block else made)[name] = value
    with pytest.raises(UserError, match=f"^{where}: '.*' is an address"):
        kd_config.parse(made)


def test_a_file_whose_function_returns_no_config_is_told(tmp_path):
    file = tmp_path / 'none.py'
    file.write_text('def get_config():\n    pass\n')
    with pytest.raises(UserError, match=r'none\.py: get_config returns NoneType instead of'):
        kd_config.load(str(file))
