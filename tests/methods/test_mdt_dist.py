"""MDT-dist: velocity matching is consistency distillation, velocity distillation a surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import flow_world, seeds
from kd.data.builders.mixtures import Mixture, exact_velocity
from kd.errors import UserError
from kd.losses import flow_map as fm
from kd.losses.flow_map_family import consistency_distillation_residual
from kd.losses.interpolant import linear
from kd.methods.flow import mdt_dist as module
from kd.methods.flow.mdt_dist import distribution_loss, mdt_dist

pytestmark = pytest.mark.usefixtures('compiled_quickly')

MEAN, DEVIATION, SCALE, B = 0.7, 0.4, 0.5, 64
GAUSSIAN = Mixture(np.array([[MEAN, -0.3]]), DEVIATION, np.array([0]))
S = np.linspace(0.0, 0.95, B)


@pytest.fixture(name='wide')
def _x64():
    with jax.enable_x64(True):
        yield


def exact_mean(deviation=DEVIATION, mean=(MEAN, -0.3)):
    """The mean velocity from s to data of the flow to N(mean, deviation^2)."""

    def vfn(s, t, x):
        s = s[:, None]
        spread = jnp.sqrt((s * deviation) ** 2 + ((1 - s) * SCALE) ** 2)
        away = x - s * jnp.asarray(mean)
        return (jnp.asarray(mean) + deviation / spread * away - x) / (1 - s)

    return vfn


def points():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((B, 2)))


def residual(vfn=None, **options):
    vfn = vfn or exact_mean()
    teacher = exact_velocity(GAUSSIAN, SCALE)
    return consistency_distillation_residual(vfn, S, points(), teacher=teacher, **options)


def test_the_exact_mean_velocity_is_where_nothing_is_left_to_match(wide):
    assert float(jnp.abs(residual()).max()) < 1e-8
    # With a difference the residual is of its order, and the loss of the square.
    loss = [float(jnp.mean(residual(step=h)[:40] ** 2)) for h in (0.01, 0.005)]
    assert loss[0] < 1e-3
    assert loss[0] / loss[1] == pytest.approx(4.0, rel=0.1)
    # And velocity distillation has no gradient.
    z = points()
    drawn = distribution_loss(
        exact_mean(), z, S, 0.1 * z, exact_velocity(GAUSSIAN, SCALE), linear().point, None, None
    )
    assert float(jnp.abs(drawn).max()) < 1e-14


def test_differences_tend_to_the_derivative(wide):
    vfn = exact_mean(0.2)
    exact = residual(vfn)
    off = [float(jnp.abs(residual(vfn, step=h) - exact)[:40].max()) for h in (0.004, 0.002)]
    assert off[0] / off[1] == pytest.approx(2.0, rel=0.15)


def test_it_is_the_regression_of_the_released_trainer_in_its_own_notation(wide):
    """phi to sg[v_T - t dphi], noise at 1, and the gradient that of the regression."""
    h, sigma, x = 0.01, 1 - S, points()

    def phi(a, x, sigma):
        return -jnp.tanh(a * x + sigma[:, None])

    field = exact_velocity(GAUSSIAN, SCALE)
    v_teacher = -field(S, S, x)

    def released(a):
        said = phi(a, x, sigma)
        before = phi(a, x - h * v_teacher, sigma - h)
        change = (said - before) / h
        change /= jnp.linalg.norm(change, axis=1, keepdims=True) + 0.1
        target = jax.lax.stop_gradient(v_teacher - sigma[:, None] * change)
        return jnp.mean((said - target) ** 2)

    def ours(a):
        vfn = lambda s, t, x: -phi(a, x, 1 - s)  # noqa: E731
        return jnp.mean(residual(vfn, step=h, constant=0.1) ** 2)

    for found, expected in zip(
        jax.value_and_grad(ours)(0.8), jax.value_and_grad(released)(0.8), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_normalised_derivatives_and_that_they_move_the_fixed_point(wide):
    d = 10.0 * points()
    norm = np.linalg.norm(d, axis=1, keepdims=True)
    np.testing.assert_allclose(fm.normalised(d, constant=0.1), d / (norm + 0.1), rtol=1e-12)
    assert np.linalg.norm(fm.normalised(d, constant=0.1), axis=1).max() < 1
    np.testing.assert_allclose(
        np.linalg.norm(fm.normalised(d, constant=0.0), axis=1), 1.0, rtol=1e-12
    )
    # Trap: the exact map is no fixed point of it.
    assert float(jnp.mean(residual(constant=0.1) ** 2)) > 1e-2
    # An infinite constant leaves the teacher's velocity as the target.
    vfn, field = exact_mean(0.2), exact_velocity(GAUSSIAN, SCALE)
    left = field(S, S, points()) - vfn(S, S, points())
    np.testing.assert_allclose(residual(vfn, constant=1e12), left, atol=1e-9)
    with pytest.raises(ValueError, match="step and constant are of stop_gradient='target'"):
        fm.esd_residual(vfn, S, S, points(), step=0.1)


def test_distillation_reaches_the_sample_alone_with_twice_the_residual(wide):
    """Traps: factor 2 of the released surrogate; none through the student at the noised sample."""
    z, noise = points(), 0.5 * points()[::-1]
    field = exact_velocity(GAUSSIAN, SCALE)

    def loss(shift, elsewhere):
        def vfn(s, t, x):
            # A shift of the call that makes samples, and one of all other calls.
            first = (s == 0)[:, None] & jnp.all(x == z, axis=1, keepdims=True)
            return exact_mean(0.2)(s, t, x) + jnp.where(first, shift, elsewhere)

        later = jnp.maximum(S, 0.05)
        return distribution_loss(vfn, z, later, noise, field, linear().point, None, None)

    zero = jnp.zeros((B, 2))
    value = loss(zero, zero)
    by_sample, by_rest = jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1))(zero, zero)
    x1 = z + exact_mean(0.2)(jnp.zeros(B), None, z)
    later = jnp.maximum(S, 0.05)
    x_s = linear().point(later, noise, x1)
    r = consistency_distillation_residual(exact_mean(0.2), later, x_s, teacher=field)
    np.testing.assert_allclose(value, jnp.mean(r**2, axis=1), rtol=1e-10)
    np.testing.assert_allclose(by_sample, -2 * r / 2, rtol=1e-10)
    np.testing.assert_array_equal(by_rest, 0.0)


def test_a_step_of_distillation_widens_samples_that_are_too_narrow_and_narrows_wide_ones(wide):
    field = exact_velocity(Mixture(np.zeros((1, 2)), DEVIATION, np.array([0])), SCALE)
    z, noise = SCALE * points(), SCALE * points()[::-1]

    def loss(deviation):
        vfn = exact_mean(deviation, (0.0, 0.0))
        return distribution_loss(vfn, z, S, noise, field, linear().point, None, None).mean()

    slope = jax.grad(loss)
    assert slope(0.2) < 0 < slope(0.7)


def test_ends_of_phases_lie_beyond_the_step():
    """Below t - h, not below t: t = .505, h = .01 and four phases end at .25 of noise."""
    ends = []
    vfn = lambda s, t, x: jnp.zeros_like(x)  # noqa: E731

    def record(vfn, s, u, end, x_s, x_u):
        ends.append(np.asarray(end))
        return x_s

    original = module.consistency_trajectory_residual
    module.consistency_trajectory_residual = record
    try:
        s = jnp.array([1 - 0.505, 0.1, 0.8, 0.985])
        module._consistency(vfn, s, jnp.zeros((4, 2)), vfn, 0.01, 4)
    finally:
        module.consistency_trajectory_residual = original
    np.testing.assert_allclose(ends[0], [0.75, 0.25, 1.0, 1.0])


# The method


@pytest.fixture(name='world', scope='module')
def _world():
    return flow_world.World(np.arange(1), **flow_world.SMALL)


def context_of(world, **more):
    return seeds.context(
        network=world.network(), teacher=world.teacher, tx=optax.sgd(1.0), spec=flow_world.SPEC,
        **more,
    )  # fmt: skip


def test_a_step_is_the_mean_of_both_terms_and_consistency_agrees_where_the_step_is_small(world):
    found = {}
    network = world.network()
    start = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape),
        jax.jit(network.init)(jax.random.key(0)),
    )
    batch = {'input': jnp.asarray(world.data['input'][:64])}
    arms = {
        'both': dict(distribution=0.5),
        'velocity': dict(distribution=0.0, step=1e-3),
        'consistency': dict(target='consistency', distribution=0.0, step=1e-3),
    }
    for name, options in arms.items():
        method = mdt_dist(context_of(world), **options)
        state = jax.jit(method.init)(jax.random.key(0), {'teacher': {}})
        state = state.replace(params={'network': start['params']})
        after, metrics = jax.jit(method.step)(state, batch)
        moved = jax.tree.map(lambda a, b: a - b, start['params'], after.params['network'])
        found[name] = {key: float(x.total / x.count) for key, x in metrics.items()}, moved
    values = found['both'][0]
    expected = values['matching'] + 0.5 * values['distribution']
    assert values['loss'] == pytest.approx(expected, rel=1e-5)
    # |X(x_s) - sg X(x_u)|^2 is h^2 times the square of the residual of velocities.
    ratio = found['consistency'][0]['loss'] / found['velocity'][0]['loss']
    assert ratio == pytest.approx(1e-6, rel=0.2)


def test_mistakes_are_refused_when_the_method_is_built(world):
    with pytest.raises(UserError, match="phases=4 are of target='consistency'"):
        mdt_dist(context_of(world), phases=4)
    with pytest.raises(UserError, match='guidance needs a teacher with num_classes'):
        mdt_dist(context_of(world), distribution_guidance=101.0)
