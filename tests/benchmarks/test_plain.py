"""Peers written plainly compute what ours compute, and what is measured is what it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from kd.benchmarks import condensation, flow_map
from kd.benchmarks.plain import flow_map as plain
from kd.models.velocity_mlp import VelocityMLP

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.mark.parametrize('algorithm', plain.LOSSES)
def test_plain_losses_of_flow_maps_have_our_values_and_gradients(algorithm, monkeypatch):
    """At random weights: those of the network begin with a velocity of zero."""
    network = VelocityMLP(width=8, depth=1)
    drawn = network.init

    def init(*arguments):
        flat, unravel = ravel_pytree(drawn(*arguments))
        return unravel(0.5 * jax.random.normal(jax.random.key(7), flat.shape))

    object.__setattr__(network, 'init', init)
    given = lambda *of: plain.loss(algorithm, network, flow_map.TimeWeight(), 6, *of)  # noqa: E731
    sides = [flow_map.make_step(algorithm, network, (2,), 8, of) for of in (None, given)]
    ours, theirs = (ravel_pytree(side.run(3))[0] for side in sides)
    assert float(jnp.abs(theirs).max()) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('method', ['DC', 'DM', 'MTT'])
def test_gradients_of_condensation_are_those_of_its_loss(method, tmp_path):
    """By a difference of the loss along the gradient."""
    case = condensation.Case(method, 1, 4, 4, 1, 2 if method == 'MTT' else 0, 1.0)
    file = tmp_path / 'arrays.npz'
    condensation.write(case, file)
    condensation.prepare(str(file), list(case))
    value, *gradient = condensation.gradient()
    trained, *rest = condensation._HELD['given']
    images, step_size = trained
    slope = np.array(gradient).reshape(images.shape)
    length = 1e-2 / np.linalg.norm(slope)
    run = condensation._HELD['step']
    up, down = (
        float(run((images + sign * length * slope, step_size), *rest)[0]) for sign in (1, -1)
    )
    assert value == pytest.approx((up + down) / 2, rel=1e-2)
    assert (up - down) / 2 / length == pytest.approx(np.sum(slope**2), rel=2e-2)
    told = condensation.step()
    assert told['cpu_s'] > 0


def test_convolutions_are_chosen_where_there_are_loops():
    chosen = {c.method: condensation.module(c).conv for c in condensation.CASES if c.depth}
    assert chosen == {'DC': 'matmul', 'DM': 'auto', 'MTT': 'matmul'}
