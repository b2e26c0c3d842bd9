"""A teacher and generators of points, trained in a few steps, measured, and their pictures."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd import config as kd_config
from kd import process, sample
from kd.errors import UserError
from kd.evaluators import distribution
from kd.io import safetensors
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import flow, velocity
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NETWORK = dict(
    name='kd.models.denoiser.denoiser',
    network=dict(name='kd.models.velocity_mlp.VelocityMLP', width=8, depth=1),
    schedule=dict(name='kd.losses.schedule.edm', low=0.02, high=5.0),
    precondition='edm',
)
PROBES = 'kd.evaluators.generator_samples'
MEASURED = dict(samples=40, batch=20)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data=dict(name='gaussian_mixture', train='train[:64]', validation='test[:60]'),
        report=dict(
            name='kd.reports.generation.generation',
            rows=(('teacher', 'teacher'), ('student', 'student')),
        ),
    )
    shared = dict(network=NETWORK, steps=2, batch_size=16)
    config.teacher = kd_config.stage(
        method=dict(name='kd.methods.diffusion.denoising.denoising', weight='edm'),
        optimizer=dict(name='adam', lr=1e-3),
        evaluators={
            'samples': dict(name=f'{PROBES}.denoiser_samples', steps=(1, 3), **MEASURED)
        },
        **shared,
    )  # fmt: skip
    config.student = kd_config.stage(
        teacher='teacher',
        result='generator',
        method=dict(
            name='kd.methods.diffusion.dmd.dmd', times=(5.0, 0.8), updates=2,
            optimizer=dict(name='adam', lr=1e-3),
        ),
        optimizer=dict(name='adam', lr=1e-3),
        evaluators={'samples': dict(name=f'{PROBES}.generator_samples', **MEASURED)},
        **shared,
    )  # fmt: skip
    place = tmp_path_factory.mktemp('run')
    loop.run(config, place)
    return place


def test_samples_are_measured_at_the_steps_that_there_are(run):
    results = json.loads((run / 'report.json').read_text())
    found = {
        title: {name.rpartition('_')[2] for name in values if 'diversity' in name}
        for title, values in results.items()
    }
    assert found == {'teacher': {'1', '3'}, 'student': {'2'}}
    names = [name for name in results['student'] if 'saturation' in name]
    assert 0 < results['student'][names[0]] < 2


def started(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['sample', *map(str, arguments)])
    return process.entry(sample.main)


def test_a_picture_of_a_generator_is_made_at_its_own_times(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'points.png'
    assert started(monkeypatch, f'--run={run}/student', f'--out={out}') == 0
    assert capsys.readouterr().out == f'{out}: 64 samples of {run}/student\n'
    with Image.open(out) as image:
        assert min(image.size) > 100
    assert started(monkeypatch, f'--run={run}/teacher', '--steps=3', f'--out={out}') == 0
    capsys.readouterr()
    hybrid = (f'--run={run}/student', f'--base={run}/teacher', f'--out={out}')
    assert started(monkeypatch, *hybrid) == 0
    assert capsys.readouterr().out == f'{out}: 64 samples of {run}/student\n'
    for arguments, message in (
        (['student', f'--base={run}/teacher', '--switch=2'], 'the generator has 2 times'),
        (['teacher', f'--base={run}/teacher'], '--run has no times of its own'),
        (['student', '--steps=4'], 'was trained at the times (5.0, 0.8), 2 steps, and has no'),
        (['student', '--guidance=2'], 'was distilled with its guidance; leave it out'),
        (['student', '--times=9,1'], "leaves the times of the schedule 'edm', 0.02 to 5"),
        (['pupil'], "pupil' is not the directory of a finished stage"),
    ):
        command = [f'--run={run}/{arguments[0]}', *arguments[1:], f'--out={out}']
        assert started(monkeypatch, *command) == 2
        assert message in capsys.readouterr().err


def test_flows_and_flow_maps_are_sampled_by_their_own_solvers():
    module = VelocityMLP(width=8, depth=1, data_scale=0.6)
    spec = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
    network = from_linen(module, *module.example_inputs(spec))
    variables = jax.tree.map(lambda x: x + 0.3, network.init(jax.random.key(0)))
    key, vfn = jax.random.key(1), velocity.velocity_function(network, variables)
    noise = flow.draw_noise(key, 5, (2,), scale=0.6)
    for name, solve in (
        ('kd.methods.flow.flow_map.flow_map', flow.flow_map_sample),
        ('kd.methods.flow.flow_map_distillation.flow_map_distillation', flow.flow_map_sample),
        ('kd.methods.flow.flow_matching.flow_matching', flow.heun_sample),
    ):
        draw = sample.sampler(network, dict(name=name), {}, steps=3)
        found = draw(variables, None, key, (5, 2))
        np.testing.assert_allclose(found, solve(vfn, noise, flow.time_grid(3)), rtol=1e-5)
    # Students of few steps at their own.
    half = 0.5 / (3.2 - 2.2 * 0.5)
    for block, solve, grid in (
        (dict(name='hyper_sd.tscd', phases=2), flow.euler_sample, flow.time_grid(2)),
        (dict(name='mdt_dist.mdt_dist'), flow.euler_sample, flow.time_grid(1)),
        (dict(name='slimflow.flow_guided_distillation'), flow.euler_sample, flow.time_grid(1)),
        (dict(name='arcflow.arcflow', shift=3.2), flow.flow_map_sample, np.array([0, half, 1])),
    ):
        block['name'] = f'kd.methods.flow.{block["name"]}'
        found = sample.sampler(network, block, {})(variables, None, key, (5, 2))
        np.testing.assert_allclose(found, solve(vfn, noise, grid), rtol=1e-5)
    # A generator that began as a flow knows its path by what taught it.
    student = sample.sampler(network, dict(name='x', times=(1.0,)), dict(interpolant='linear'))
    assert student(variables, None, key, (5, 2)).shape == (5, 2)
    with pytest.raises(UserError, match=r'this generator\.times must decrease'):
        sample.sampler(network, dict(name='x', times=(0.5, 1.0)), {})


def test_distances_of_a_report_are_those_of_its_samples(run):
    """The metric of a probe, from the picture's own sampler: other noise, the same law."""
    network, source, block, teacher = sample.load(run / 'student')
    variables = safetensors.stage_variables(run / 'student')
    draw = sample.sampler(network, block, teacher)
    found = np.asarray(draw(variables, None, jax.random.key(0), (2_000, 2)))
    real = source.fetch(np.arange(64))['input']
    results = json.loads((run / 'report.json').read_text())['student']
    name = next(name for name in results if 'sliced_wasserstein' in name)
    assert distribution.sliced_wasserstein(real, found) == pytest.approx(results[name], rel=0.5)
