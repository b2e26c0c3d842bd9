"""A method with parts beside the network, from its page to what later stages and exports see."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd import references
from kd.errors import UserError
from kd.files import read_json
from kd.io import safetensors
from kd.parallel.mesh import make_mesh
from kd.training import loop
from kd.training import step as step_lib
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = Path(__file__).parents[2]
# Of a student of 64 inputs, 64 hidden units and 10 classes.
PARAMETERS = 64 * 64 + 64 + 64 * 10 + 10
GOING_ON = """
from kd.losses import classification
from kd.method import Objective, minimize
from kd.methods import start
from kd.metrics import mean

def going_on(context):
    network = context.network

    def loss(params, state, batch, key):
        logits = network.apply(state.variables(params=params), batch['input']).logits
        return Objective(mean(classification.cross_entropy(logits, batch['label'])))

    return minimize(loss, context.tx, start.from_reference(network.init, context))
"""


@pytest.fixture(scope='module', autouse=True)
def mine(tmp_path_factory):
    """A folder on the path with the page's `hints.py` as it stands, and a method that goes on."""
    folder = tmp_path_factory.mktemp('mine')
    page = (ROOT / 'docs' / 'add_method.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.S)
    [code] = [block for block in blocks if 'def hint_kd' in block]
    (folder / 'hints.py').write_text(code)
    (folder / 'going_on.py').write_text(GOING_ON)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def a_recipe(**changes):
    """The quickstart, short: a teacher, a student with hints, and one that starts from its average.

    `changes` are fields of the student.
    """
    config = kd_config.load(f'{ROOT}/configs/vision/logit_kd.py:cpu')
    config.stages, config.report = ('teacher', 'student', 'after'), {}
    config.data.train = 'train[:64]'
    short = dict(steps=4, log_every=2, eval_every=4, batch_size=16)
    # With as many features as the quickstart's, and quicker to compile.
    config.teacher.network = dict(name='kd.models.mlp.MLP', widths=(128,))
    config.teacher.method = dict(name='kd.methods.vision.supervised.supervised')
    config.teacher.update(short)
    averages = {'slow': 0.5, 'both': dict(decay=0.9, of=('network', 'projector'))}
    student = {**config.student.to_dict(), **short, 'method': dict(name='hints.hint_kd')}
    student |= {'ema': averages, **changes}
    after = dict(
        method=dict(name='going_on.going_on'), ema={},
        teacher='student', teacher_weights='both', references={'start': 'student@slow'},
    )  # fmt: skip
    del config.baseline
    config.student = kd_config.stage(**student)
    config.after = kd_config.stage(**{**config.student.to_dict(), 'result': 'network', **after})
    return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'run'
    loop.run(a_recipe(), folder)
    return folder


def test_a_stage_leaves_its_network_behind_and_not_the_projector(workdir):
    done = read_json(workdir / 'student' / 'done.json', '')
    assert (done['result'], done['parameters']) == ('network', PARAMETERS)
    assert 0 < done['metrics']['validation/accuracy'] < 1
    variables = {w: safetensors.stage_variables(workdir / 'student', w) for w in ('final', 'slow')}
    for found in variables.values():
        shapes = {name: array.shape for name, array in safetensors.flatten(found).items()}
        assert shapes == {
            'params/hidden0/kernel': (64, 64), 'params/hidden0/bias': (64,),
            'params/head/kernel': (64, 10), 'params/head/bias': (10,),
        }  # fmt: skip
    final, slow = (v['params']['head']['kernel'] for v in variables.values())
    assert np.abs(final - slow).max() > 0
    with pytest.raises(UserError, match=r"no weights 'fast', only: \['final', 'both', 'slow'\]"):
        safetensors.stage_variables(workdir / 'student', 'fast')


def test_a_later_stage_starts_from_an_average_and_is_taught_by_another(workdir):
    recipe = kd_config.parse(a_recipe())
    stage = prepare(recipe, 'after', make_mesh({'data': 1}), workdir)
    slow, both = (safetensors.stage_variables(workdir / 'student', w) for w in ('slow', 'both'))
    begun = step_lib.initial_state(stage).variables()
    jax.tree.map(np.testing.assert_array_equal, begun, slow)
    jax.tree.map(np.testing.assert_array_equal, stage.frozen['teacher'], both)


def test_a_state_of_parts_is_restored_bit_for_bit(workdir):
    done = workdir / 'student' / 'done.json'
    before = read_json(done, '')
    done.unlink()
    loop.run(a_recipe(), workdir)
    after = read_json(done, '')
    assert after['weights'] == before['weights']
    names = {name for name in after['weights'] if '/projector/' in name}
    assert names == {
        f'{kind}/projector/{leaf}' for kind in ('params', 'ema/both') for leaf in ('kernel', 'bias')
    }


@pytest.mark.parametrize(
    ('stage', 'changes', 'message'),
    [
        (
            'student',
            dict(result='critic'),
            r"student\.result is 'critic', but the method trains \['network', 'projector'\]; set",
        ),
        (
            'after',
            dict(ema={'slow': dict(decay=0.5, of='projector'), 'both': 0.9}),
            r"after\.references\.start: there is no 'slow'; stage 'student' has: .'final', 'both'",
        ),
        ('student', dict(ema={'slow': 2.0}), r'student\.ema.* in \[0, 1\] or a block'),
    ],
)
def test_what_a_stage_does_not_have_is_named(stage, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(
            kd_config.parse(a_recipe(**changes)), stage, make_mesh({'data': 1})
        ).abstract_state()


def test_a_reference_names_a_stage_and_perhaps_an_average():
    split = references.split_reference
    assert split('teacher') == ('teacher', 'final')
    assert split('teacher@slow') == ('teacher', 'slow')
    assert split('runs/a@b/teacher') == ('runs/a@b/teacher', 'final')
    assert split('runs/a@b/teacher@slow') == ('runs/a@b/teacher', 'slow')
    assert split('hf:models@v2') == ('hf:models@v2', 'final')
