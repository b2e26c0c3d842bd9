"""Networks of several fields: methods, caches, evaluators and reports pass them on unseen."""

import json

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import cache
from kd.network import from_linen
from kd.networks import build_network, trained_network
from kd.parallel.mesh import make_mesh
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/recipes')
        import two_fields

        yield two_fields


@pytest.fixture(scope='module')
def finished(recipes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('fields') / 'run'
    config = recipes.get_config()
    loop.run(config, workdir)
    recipe = kd_config.parse(config)
    test = recipes.sided(SourceContext('test[256:300]', recipe))
    trained = {
        name: trained_network(recipe, name, workdir, make_mesh({'data': 1}), test, where='test')
        for name in ('teacher', 'student')
    }
    return workdir, test, trained


def logits(trained, batch):
    """By hand, in NumPy."""
    params = jax.tree.map(np.asarray, trained.restore()['params'])
    x = np.concatenate([batch['input'], np.eye(2)[batch['side']]], -1)
    hidden = np.maximum(x @ params['Dense_0']['kernel'] + params['Dense_0']['bias'], 0)
    return hidden @ params['head']['kernel'] + params['head']['bias']


def test_reports_and_evaluators_see_every_field(finished):
    workdir, test, trained = finished
    batch = test.fetch(np.arange(len(test)))
    report = json.loads((workdir / 'report.json').read_text())
    for name in ('teacher', 'student'):
        correct = logits(trained[name], batch).argmax(-1) == batch['label']
        assert report[name]['accuracy'] == pytest.approx(correct.mean())


def test_a_cache_holds_what_the_teacher_says_of_all_fields(finished, recipes):
    workdir, _, trained = finished
    train = recipes.sided(SourceContext('train[:512]')).fetch([0, 200, 511])
    kept = cache.Cache(workdir / 'cache').fetch(np.array([0, 200, 511]))
    np.testing.assert_allclose(
        kept['teacher_logits'], logits(trained['teacher'], train), rtol=1e-5, atol=1e-5
    )


def test_a_network_whose_field_the_data_lacks_is_told(recipes):
    moons = SourceContext('train').load('two_moons')
    with pytest.raises(UserError, match=r"takes the fields \['input', 'side'\], and the data has"):
        build_network({'name': 'two_fields.Joint'}, moons, where='student.network')


def test_the_inputs_are_the_fields_in_the_order_of_the_arguments(recipes):
    shapes = (jax.ShapeDtypeStruct((1, 2), np.float32), jax.ShapeDtypeStruct((1,), np.int32))
    network = from_linen(recipes.Joint(num_classes=2), *shapes)
    batch = {'label': 1, 'side': 2, 'input': 3}
    assert network.of(batch) == (3, 2)
