"""How far a student carries noise from where its teacher does."""

import dataclasses

import jax
import numpy as np
import pytest

from kd.claims import flow_world, seeds
from kd.errors import UserError
from kd.evaluators.flow_fidelity import flow_fidelity
from kd.method.base import initial

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(name='world', scope='module')
def _world():
    return flow_world.World(np.arange(1), **{**flow_world.SMALL, 'steps': 64})


def probed(world, network, **options):
    context = seeds.context(
        network=network, teacher=world.teacher, spec=flow_world.SPEC, ema={'slow': 0.9}
    )
    state = jax.jit(lambda key: initial(network.init, key, {'teacher': {}}))(jax.random.key(0))
    # The exact flow has no parameters.
    state = state.replace(params={'network': state.params.get('network', {})})
    probe = flow_fidelity(context, samples=200, solver_steps=64, seed=1, **options)
    return probe.run(state, [])


def test_a_student_that_does_not_move_is_as_far_as_the_teacher_goes(world):
    found = probed(world, world.network(), steps=(1, 2), sampler='euler')
    noise, end = world.noise[:200], world.paths[-1][:200]
    away = np.asarray(end - noise) / 0.5
    rmse = np.sqrt((away**2).mean())
    assert found['end_rmse_1'] == pytest.approx(rmse, rel=1e-4)
    assert found['end_rmse_2'] == pytest.approx(rmse, rel=1e-4)
    median = np.median(np.sqrt((away**2).mean(1)))
    assert found['end_median_1'] == pytest.approx(median, rel=1e-4)
    middles = np.stack([world.paths[i][:200] - noise for i in (16, 48)]) / 0.5
    assert found['middle_rmse_2'] == pytest.approx(np.sqrt((middles**2).mean()), rel=1e-4)


def test_the_teacher_itself_by_euler_steps_is_off_by_their_order(world):
    found = probed(world, world.teacher, steps=(16, 32), sampler='euler')
    assert 0 < found['end_median_32'] < 0.6 * found['end_median_16']


def test_what_is_not_there_is_refused(world):
    context = seeds.context(network=world.network(), teacher=world.teacher, spec=flow_world.SPEC)
    context = dataclasses.replace(context, stage='one')
    with pytest.raises(UserError, match=r"one\.ema has no 'slow'"):
        flow_fidelity(context, weights='slow')
    with pytest.raises(UserError, match="sampler must be 'flow_map' or 'euler', got 'heun'"):
        flow_fidelity(context, sampler='heun')
