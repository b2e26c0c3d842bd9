"""Stages trained anew from other seeds, and the report that compares their means."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from kd import config as kd_config
from kd import metrics
from kd.networks import trained_network
from kd.parallel.mesh import make_mesh
from kd.training import loop
from kd.training.repeats import repeats
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = Path(__file__).parents[2]
SEEDS = 3


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run whose report has three seeds; the student is compared with the teacher's stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tests' / 'recipes'))
        config = kd_config.load(f'{ROOT}/tests/recipes/moons.py')
        with config.unlocked():
            config.mesh.data = 1
            for name in config.stages:
                config[name].update(steps=20, eval_every=20, log_every=10, checkpoint_every=20)
            config.teacher.best = ''
            config.report.update(seeds=SEEDS, teacher='', notes='Small moons.')
        workdir = tmp_path_factory.mktemp('repeats') / 'run'
        report = loop.run(config, workdir)
        yield kd_config.parse(config), workdir, report


def test_the_runs_own_seed_ends_as_the_stage_did_and_others_elsewhere(finished):
    recipe, workdir, _ = finished
    mesh = make_mesh({'data': 1})
    stage = prepare(recipe, 'student', mesh, workdir)
    again, other = (state.variables() for state in repeats(stage, (recipe.seed, recipe.seed + 1)))
    source = stage.context.source('test')
    ended = trained_network(recipe, 'student', workdir, mesh, source, where='here').restore()
    jax.tree.map(np.testing.assert_array_equal, again, ended)
    kernels = [v['params']['hidden0']['kernel'] for v in (again, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


def test_the_report_has_means_over_seeds_with_intervals(finished):
    _, workdir, report = finished
    results, text = json.loads((workdir / 'report.json').read_text()), report.read_text()
    for title in ('teacher', 'student'):
        values = results[title]['seeds']['accuracy']
        assert len(values) == SEEDS
        assert values[0] == results[title]['accuracy']
        interval = scipy.stats.t.interval(0.95, SEEDS - 1, np.mean(values), scipy.stats.sem(values))
        half = (interval[1] - interval[0]) / 2
        assert f'| {title} | {np.mean(values):.4f} ± {half:.4f} |' in text
    ours, theirs = (np.asarray(results[t]['seeds']['accuracy']) for t in ('student', 'teacher'))
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    told = f'accuracy {(ours - theirs).mean():+.3f} [{low:+.3f}, {high:+.3f}], paired by seed'
    assert f'student against teacher: {told}' in text
    assert 'means over seeds 0 to 2' in text
    assert 'Small moons.' in text
    assert (workdir / 'figures' / 'comparison.png').stat().st_size > 5_000


def test_the_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).normal(size=7)
    mean, half = metrics.mean_interval(values)
    expected = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected, rel=1e-12)
