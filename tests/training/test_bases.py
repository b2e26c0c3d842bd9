"""Recipes that others begin with: trained once, found by what they are."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kd import bases
from kd import config as kd_config
from kd.errors import UserError
from kd.io import safetensors
from kd.parallel.mesh import make_mesh
from kd.training import loop, step

pytestmark = pytest.mark.usefixtures('compiled_quickly')

BASE = """
from kd import config as kd_config

def get_config(steps='2'):
    config = kd_config.recipe(
        stages=('base',),
        mesh=dict(data=1),
        data=dict(source=dict(name='kd.data.builders.table.table', size=64, teacher='none'),
                  train='train', validation='validation'),
    )
    config.base = kd_config.stage(
        network=dict(name='kd.models.structured.BottleneckLM', width=4),
        method=dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0),
        optimizer=dict(name='adam', lr=1e-2),
        steps=int(steps), batch_size=8, log_every=1,
    )
    return config
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('base.py').write_text(BASE)
    yield
    bases.recipe.cache_clear()
    bases.directory.cache_clear()


def begins_with(config, stage='base'):
    base = bases.directory(config)
    made = kd_config.load(config)
    recipe = kd_config.recipe(
        stages=('student',), mesh=dict(data=1), data=made.data.to_dict(), bases={base: config}
    )
    recipe.student = kd_config.stage(
        **{**made.base.to_dict(), 'references': dict(start=f'{base}/{stage}'), 'steps': 1}
    )
    return recipe, Path(base)


def test_a_base_is_trained_once_and_its_weights_are_where_others_begin(capfd):
    recipe, base = begins_with('base.py:2')
    # Before it is there, what begins with it can be checked.
    step.check(kd_config.parse(recipe), 'student', make_mesh({'data': 1}))
    assert not base.exists()
    recipe.student.optimizer.lr = 0.0
    loop.run(recipe, 'one')
    assert (base / 'base' / 'done.json').is_file()
    written = (base / 'manifest.json').read_text()
    loop.run(recipe, 'two')
    assert (base / 'manifest.json').read_text() == written
    assert capfd.readouterr().err.count('base.py:2 is trained once') == 1
    trained = safetensors.stage_variables(base / 'base')
    for run in ('one', 'two'):
        own = safetensors.stage_variables(Path(run) / 'student')
        jax.tree.map(np.testing.assert_array_equal, own, trained)
    # A claim takes it from the same place.
    assert loop.provide('base.py:2') == base


def test_another_recipe_is_another_base(tmp_path):
    two, three = (bases.directory(f'base.py:{steps}') for steps in (2, 3))
    assert two.startswith('runs/bases/2-')
    assert two.rpartition('-')[2] != three.rpartition('-')[2]

    def changed(old, new):
        bases.recipe.cache_clear()
        bases.directory.cache_clear()
        Path('base.py').write_text(BASE.replace(old, new))
        return bases.directory('base.py:2')

    assert changed('', '') == two
    # What only looks at it decides nothing.
    assert changed('log_every=1', 'log_every=2, eval_every=1') == two
    assert changed('lr=1e-2', 'lr=1e-3') != two
    assert changed('log_every=1', 'log_every=2, final="best", best="-train/loss"') != two


def test_what_nobody_names_is_not_trained():
    recipe, base = begins_with('base.py:2')
    recipe.student.references = {}
    assert loop.needed_bases(kd_config.parse(recipe), ['student']) == []
    loop.run(recipe, 'alone')
    assert not base.exists()
    assert json.loads(Path('alone/config.json').read_text())['bases'] == {str(base): 'base.py:2'}


def test_a_stage_that_a_base_lacks_is_told():
    recipe, _ = begins_with('base.py:2', stage='bsae')
    with pytest.raises(UserError, match=r"has no stage 'bsae'\. Did you mean 'base'"):
        loop.run(recipe, 'run')
