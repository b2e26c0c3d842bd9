"""The residuals against closed forms, finite differences and the bounds they come with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import flow_map as fm
from kd.losses import interpolant as interpolants
from kd.losses.flow_map_checks import check_times, check_velocity_function
from kd.losses.flow_map_family import emd_residual, fmm_residuals, lmd_residual, pfmm_residual

pytestmark = pytest.mark.usefixtures('compiled_quickly')

S0, S1, MEAN = 0.8, 0.35, jnp.array([1.3, -0.4])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def spread(t):
    return jnp.sqrt((1 - t) ** 2 * S0**2 + t**2 * S1**2)


def exact_velocity(s, t, x, mean=MEAN):
    """(X_{s,t}(x) - x) / (t - s) of the linear path from N(0, S0^2) to N(mean, S1^2)."""
    s, t = s[:, None], t[:, None]
    slope = ((t + s) * S1**2 - (2 - s - t) * S0**2) / (spread(s) * (spread(t) + spread(s)))
    return mean + slope * (x - s * mean)


def init_net(key, width=16, dim=2):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        'w1': jax.random.normal(k1, (dim + 2, width)),
        'w2': jax.random.normal(k2, (width, width)) / 4,
        'w3': jax.random.normal(k3, (width, dim)) / 4,
    }


def net(params, s, t, x):
    h = jnp.concatenate([s[:, None], t[:, None], x], axis=1)
    return jnp.tanh(jnp.tanh(h @ params['w1']) @ params['w2']) @ params['w3']


def bind(params):
    return lambda s, t, x: net(params, s, t, x)


@pytest.fixture(name='points')
def _points():
    keys = jax.random.split(jax.random.key(1), 3)
    s, t = fm.sample_triangle(keys[0], 12, dtype=jnp.float64)
    return s, t, jax.random.normal(keys[1], (12, 2)), jax.random.uniform(keys[2], (12,))


@pytest.fixture(name='params')
def _params():
    return init_net(jax.random.key(2))


# Closed forms.


@pytest.mark.parametrize('stop', ['none', 'convex', 'full', 'target'])
def test_every_residual_vanishes_on_the_exact_gaussian_map(points, stop):
    s, t, x, g = points
    residuals = {'esd': fm.esd_residual(exact_velocity, s, t, x, stop_gradient=stop)}
    if stop != 'full':
        residuals['lsd'] = fm.lsd_residual(exact_velocity, s, t, x, stop_gradient=stop)
    if stop in ('none', 'convex'):
        residuals['psd'] = fm.psd_residual(exact_velocity, s, t, x, g, stop_gradient=stop)
    for name, residual in residuals.items():
        assert jnp.max(jnp.abs(residual)) < 1e-10, name


def test_teacher_losses_vanish_on_the_exact_gaussian_map(points):
    s, t, x, _ = points
    field = exact_velocity(t, t, x)
    velocity, inverse = fmm_residuals(exact_velocity, s, t, x, field)
    residuals = [
        lmd_residual(exact_velocity, s, t, x, teacher=exact_velocity),
        emd_residual(exact_velocity, s, t, x, teacher=exact_velocity),
        pfmm_residual(exact_velocity, s, t, x, teacher=exact_velocity, steps=3),
        velocity,
        inverse,
        *fmm_residuals(exact_velocity, t, s, x, exact_velocity(s, s, x)),
    ]
    assert max(float(jnp.max(jnp.abs(r))) for r in residuals) < 1e-10


def test_exact_map_composes_and_transports_the_gaussian(points):
    s, t, x, g = points
    u = fm.psd_times(s, t, g)
    two = fm.flow_map(exact_velocity, u, t, fm.flow_map(exact_velocity, s, u, x))
    np.testing.assert_allclose(two, fm.flow_map(exact_velocity, s, t, x), atol=1e-12)
    end = fm.flow_map(exact_velocity, 0.0, 1.0, x)
    np.testing.assert_allclose(end, MEAN + S1 / S0 * x, atol=1e-12)


def test_zero_length_jump_is_exactly_the_identity(points, params):
    s, _, x, _ = points
    np.testing.assert_array_equal(fm.flow_map(bind(params), s, s, x), x)


# Any network, against finite differences.


def central(function, value, h=1e-5):
    return (function(value + h) - function(value - h)) / (2 * h)


def test_lagrangian_residual_is_the_time_derivative_minus_the_field(points, params):
    s, t, x, _ = points
    v = bind(params)
    end = fm.flow_map(v, s, t, x)
    wanted = central(lambda t: fm.flow_map(v, s, t, x), t) - v(t, t, end)
    for stop in ('none', 'convex', 'target'):
        residual = fm.lsd_residual(v, s, t, x, stop_gradient=stop)
        np.testing.assert_allclose(residual, wanted, atol=1e-8)


def test_eulerian_residual_is_the_derivative_along_the_flow(points, params):
    s, t, x, _ = points
    v = bind(params)
    field = v(s, s, x)
    wanted = central(lambda h: fm.flow_map(v, s + h, t, x + h * field), 0.0)
    _, along = jax.jvp(lambda s, x: v(s, t, x), (s, x), (jnp.ones_like(s), field))
    formula = field - v(s, t, x) + (t - s)[:, None] * along
    for stop in ('none', 'convex', 'full', 'target'):
        residual = fm.esd_residual(v, s, t, x, stop_gradient=stop)
        np.testing.assert_allclose(residual, wanted, atol=1e-8)
        np.testing.assert_allclose(residual, formula, atol=1e-12)


def test_progressive_residual_is_the_semigroup_defect_per_unit_time(points, params):
    s, t, x, g = points
    v = bind(params)
    u = g * s + (1 - g) * t
    np.testing.assert_allclose(fm.psd_times(s, t, g), u, atol=1e-15)
    np.testing.assert_allclose(u - s, (1 - g) * (t - s), atol=1e-15)
    defect = fm.flow_map(v, s, t, x) - fm.flow_map(v, u, t, fm.flow_map(v, s, u, x))
    residual = fm.psd_residual(v, s, t, x, g)
    np.testing.assert_allclose((t - s)[:, None] * residual, defect, atol=1e-10)


def test_midpoint_residual_of_a_time_free_linear_field_by_hand():
    # v = k x: one jump 1 + h k against two (1 + h k / 2)^2, so the defect is -(h k / 2)^2 x.
    k, x = 0.7, jnp.array([[2.0], [-1.0]])
    residual = fm.psd_residual(lambda s, t, x: k * x, 0.25, 0.75, x, 0.5)
    np.testing.assert_allclose(residual, -0.5 * k**2 / 4 * x, atol=1e-12)


def test_off_diagonal_residuals_vanish_linearly_with_the_jump(points, params):
    s, _, x, g = points
    s, v = 0.5 * s, bind(params)
    for residual in (fm.lsd_residual, fm.esd_residual, fm.psd_residual):
        extra = (g,) if residual is fm.psd_residual else ()
        norms = [float(jnp.linalg.norm(residual(v, s, s + h, x, *extra))) for h in (2e-3, 1e-3)]
        assert 1.9 < norms[0] / norms[1] < 2.1


# Where the gradient goes: against finite differences with the stopped parts held constant.


def stopped_copies(name, stop, v, old, s, t, x):
    """The residual with every stopped occurrence of the network replaced by its old copy."""
    step = (t - s)[:, None]

    def dt(f):
        return jax.jvp(lambda t: f(s, t, x), (t,), (jnp.ones_like(t),))[1]

    def ds(f):
        return jax.jvp(lambda s: f(s, t, x), (s,), (jnp.ones_like(s),))[1]

    def dx(f, direction):
        return jax.jvp(lambda x: f(s, t, x), (x,), (direction,))[1]

    if name == 'lsd':
        point = x + step * (v if stop == 'none' else old)(s, t, x)
        field = (v if stop == 'none' else old)(t, t, point)
        return v(s, t, x) + step * dt(old if stop == 'target' else v) - field
    if name == 'psd':
        u, w = 0.5 * (s + t), (v if stop == 'none' else old)
        first = w(s, u, x)
        return v(s, t, x) - 0.5 * (first + w(u, t, x + 0.5 * step * first))
    field = (v if stop == 'none' else old)(s, s, x)
    time_part = old if stop == 'target' else v
    space_part = old if stop in ('full', 'target') else v
    return field - v(s, t, x) + step * (ds(time_part) + dx(space_part, field))


@pytest.mark.parametrize(
    ('name', 'stop'),
    [
        *[('lsd', stop) for stop in ('none', 'convex', 'target')],
        *[('esd', stop) for stop in ('none', 'convex', 'full', 'target')],
        *[('psd', stop) for stop in ('none', 'convex')],
    ],
)
def test_gradient_flows_through_exactly_the_parts_not_stopped(points, params, name, stop):
    s, t, x, _ = points
    residual = {'lsd': fm.lsd_residual, 'esd': fm.esd_residual, 'psd': fm.psd_residual}[name]
    extra = (0.5,) if name == 'psd' else ()
    direction = init_net(jax.random.key(9))

    def moved(h):
        return bind(jax.tree.map(lambda p, d: p + h * d, params, direction))

    def loss(h):
        r = residual(moved(h), s, t, x, *extra, stop_gradient=stop)
        return jnp.sum(fm.squared_error(r))

    def reference(h):
        return jnp.sum(jnp.square(stopped_copies(name, stop, moved(h), moved(0.0), s, t, x)))

    np.testing.assert_allclose(jax.grad(loss)(0.0), central(reference, 0.0), rtol=1e-7)


@pytest.mark.parametrize('residual', [fm.lsd_residual, fm.esd_residual, fm.psd_residual])
def test_teacher_parameters_receive_exactly_zero(points, params, residual):
    s, t, x, g = points
    extra = (g,) if residual is fm.psd_residual else ()

    def loss(teacher_params):
        r = residual(bind(params), s, t, x, *extra, teacher=bind(teacher_params))
        return jnp.sum(fm.squared_error(r))

    value, gradient = jax.value_and_grad(loss)(init_net(jax.random.key(5)))
    assert value > 0
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ('residual', 'extra', 'stop'),
    [(fm.lsd_residual, (), 'full'), (fm.esd_residual, (), 'all'), (fm.psd_residual, (0.5,), 'x')],
)
def test_unknown_stop_gradient_is_refused_by_name(points, params, residual, extra, stop):
    s, t, x, _ = points
    with pytest.raises(ValueError, match=f'stop_gradient={stop!r}, expected one of'):
        residual(bind(params), s, t, x, *extra, stop_gradient=stop)


def test_residuals_and_gradients_are_the_same_on_a_mesh(points, params):
    arrays = points  # 12 examples on 4 devices
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ('data',), axis_types=auto, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec('data')

    def loss(params, s, t, x, g):
        v = bind(params)
        residuals = [
            *(fm.lsd_residual(v, s, t, x, stop_gradient=stop) for stop in ('convex', 'none')),
            *(fm.esd_residual(v, s, t, x, stop_gradient=stop) for stop in ('full', 'target')),
            fm.psd_residual(v, s, t, x, g),
        ]
        return sum(jnp.mean(fm.squared_error(r)) for r in residuals)

    sharded = jax.shard_map(
        lambda *a: jax.lax.pmean(loss(*a), 'data'),
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), spec, spec, spec, spec),
        out_specs=jax.sharding.PartitionSpec(),
    )
    value, gradient = jax.jit(jax.value_and_grad(sharded))(params, *arrays)
    wanted_value, wanted = jax.value_and_grad(loss)(params, *arrays)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-12)
    for name in params:
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-9, atol=1e-12)


# Weights, times, masks.


def test_uncertainty_weight_is_minimal_at_the_log_of_the_error():
    error = jnp.array([0.03, 1.0, 40.0])
    slope = jax.vmap(jax.grad(fm.uncertainty_weight, argnums=1))(error, jnp.log(error))
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    best = fm.uncertainty_weight(error, jnp.log(error))
    np.testing.assert_allclose(best, 1 + np.log(error), rtol=1e-12)
    for shift in (-0.1, 0.1):
        assert jnp.all(fm.uncertainty_weight(error, jnp.log(error) + shift) > best)


def test_triangle_times_are_uniform_below_the_diagonal():
    s, t = fm.sample_triangle(jax.random.key(3), 200_000)
    assert jnp.all((s >= 0) & (s <= t) & (t < 1))
    # Density 2 on the triangle: E s = 1/3, E t = 2/3, E st = 1/4; five standard errors.
    for value, mean, sd in ((s, 1 / 3, 0.24), (t, 2 / 3, 0.24), (s * t, 0.25, 0.22)):
        assert abs(float(jnp.mean(value)) - mean) < 5 * sd / np.sqrt(200_000)
    s, t = fm.sample_triangle(jax.random.key(3), 1000, end=0.5)
    assert jnp.max(t) < 0.5
    assert jnp.max(fm.sample_diagonal(jax.random.key(3), 1000, end=0.5)) < 0.5


def test_squared_error_sums_over_data_and_masks_infinities():
    r = jnp.array([[[1.0, 2.0]], [[jnp.inf, -3.0]]])
    where = jnp.isfinite(r)
    np.testing.assert_array_equal(fm.squared_error(r, where=where), [5.0, 9.0])
    gradient = jax.grad(lambda r: jnp.sum(fm.squared_error(r, where=where)))(r)
    np.testing.assert_array_equal(gradient, [[[2.0, 4.0]], [[0.0, -6.0]]])
    low = fm.squared_error(jnp.full((1, 3000), 0.1, jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, 3000 * float(jnp.bfloat16(0.1)) ** 2, rtol=1e-4)


# Flow matching finds the field, and the residuals bound the error of the map.


def test_flow_matching_alone_learns_the_field_of_the_gaussian():
    # Polynomials in t times (1, x), fitted by least squares: E[dI | I = x] is affine in x.
    n, key, path = 40_000, jax.random.key(4), interpolants.linear()
    k0, k1, kt = jax.random.split(key, 3)
    x0 = S0 * jax.random.normal(k0, (n, 1))
    x1 = 1.3 + S1 * jax.random.normal(k1, (n, 1))
    t = fm.sample_diagonal(kt, n, dtype=jnp.float64)

    def features(t, x):
        powers = jnp.cos(jnp.pi * jnp.arange(7) * t[:, None])
        return jnp.concatenate([powers, powers * x], axis=1)

    point, velocity = path.point(t, x0, x1), path.velocity(t, x0, x1)
    design = features(t, point)
    weights = jnp.zeros((design.shape[1], 1))

    def loss(weights):
        r = fm.diagonal_residual(lambda s, t, x: features(t, x) @ weights, t, point, velocity)
        return 0.5 * jnp.sum(fm.squared_error(r))

    # One Newton step on the flow-matching loss itself: the loss is quadratic in the weights.
    hessian = design.T @ design
    weights = weights - jnp.linalg.solve(hessian, jax.grad(loss)(weights))
    start = S0 * jax.random.normal(jax.random.key(5), (500, 1))
    x = start
    for step in range(100):
        now = jnp.full((500,), step / 100)
        x = x + features(now, x) @ weights / 100
    exact = 1.3 + S1 / S0 * start
    assert jnp.sqrt(jnp.mean(jnp.square(x - exact))) < 2e-2


NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(8)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


def perturbed(s, t, x):
    """An inexact map, affine in x, so that it keeps Gaussians Gaussian."""
    s_, t_ = s[:, None], t[:, None]
    wrong = 0.1 * jnp.sin(3 * s_ + t_) + 0.15 * jnp.cos(2 * t_ - s_) * x
    return exact_velocity(s, t, x, 1.3) + wrong


def slices(residual, at_start):
    """int E||r||^2 over the slice s = 0 (or t = 1), times by Gauss-Legendre, x by Gauss-Hermite."""
    times, weights = np.polynomial.legendre.leggauss(200)
    times, weights = 0.5 * (times + 1), 0.5 * weights
    grid, nodes = (a.ravel() for a in np.meshgrid(times, NODES, indexing='ij'))
    zero, one = jnp.zeros_like(grid), jnp.ones_like(grid)
    s, t = (zero, jnp.asarray(grid)) if at_start else (jnp.asarray(grid), one)
    x = (s * 1.3 + spread(s) * nodes)[:, None]
    energy = fm.squared_error(residual(s, t, x)).reshape(200, -1) @ NODE_WEIGHTS
    return float(energy @ weights)


def end_statistics():
    """E||X^ - X||^2 at data, and W2^2 of the two end distributions (both Gaussian)."""
    x = jnp.asarray(S0 * NODES)[:, None]
    end = fm.flow_map(perturbed, 0.0, 1.0, x)[:, 0]
    exact = 1.3 + S1 / S0 * x[:, 0]
    mean = end @ NODE_WEIGHTS
    sd = jnp.sqrt(jnp.square(end - mean) @ NODE_WEIGHTS)
    return float(jnp.square(end - exact) @ NODE_WEIGHTS), float((mean - 1.3) ** 2 + (sd - S1) ** 2)


def test_eulerian_distillation_residual_bounds_the_error_of_the_map():
    def residual(s, t, x):
        return emd_residual(perturbed, s, t, x, teacher=lambda *a: exact_velocity(*a, 1.3))

    error, w2 = end_statistics()
    bound = slices(residual, at_start=False)
    assert w2 <= error * (1 + 1e-9)  # equal here: both maps are increasing
    assert error <= 1.01 * bound
    assert bound < 20 * error  # the bound says something here


def test_lagrangian_distillation_residual_bounds_the_wasserstein_distance():
    def residual(s, t, x):
        return lmd_residual(perturbed, s, t, x, teacher=lambda *a: exact_velocity(*a, 1.3))

    grid = np.linspace(0, 1, 2001)
    lipschitz = np.abs(np.gradient(np.log(np.asarray(spread(jnp.asarray(grid)))), grid))
    growth = np.exp(1 + 2 * np.trapezoid(lipschitz, grid))
    _, w2 = end_statistics()
    assert w2 <= growth * slices(residual, at_start=True)


def test_self_distillation_bounds_hold_for_the_perturbed_map():
    def field_error(s, t, x):
        time = jnp.where(s > 0, s, t)
        return fm.diagonal_residual(perturbed, time, x, exact_velocity(time, time, x, 1.3))

    grid = jnp.linspace(0, 1, 401)
    slope = jax.vmap(jax.grad(lambda x, t: perturbed(t[None], t[None], x[None, None])[0, 0]))
    lipschitz = float(jnp.max(jnp.abs(slope(jnp.zeros_like(grid), grid))))
    diagonal = slices(field_error, at_start=False)
    lagrangian = slices(lambda *a: fm.lsd_residual(perturbed, *a), at_start=True)
    eulerian = slices(lambda *a: fm.esd_residual(perturbed, *a), at_start=False)
    _, w2 = end_statistics()
    assert w2 <= 4 * np.exp(1 + 2 * lipschitz) * (diagonal + lagrangian)
    assert w2 <= 2 * np.e * (1 + np.exp(2 * lipschitz)) * (diagonal + eulerian)


# Mistakes at build time.


def test_velocity_functions_that_are_not_two_time_fields_are_refused(params):
    x = jax.random.normal(jax.random.key(0), (2, 2))
    check_velocity_function(bind(params), x)
    # Zero output gain: every value is equal, yet both times are inputs.
    check_velocity_function(lambda s, t, x: 0.0 * net(params, s, t, x), x)
    # A look-up table swallows the NaN.
    table = jnp.arange(10.0)

    def look_up(s, t, x):
        row = (
            table[(10 * jnp.nan_to_num(s)).astype(int)]
            + table[(10 * jnp.nan_to_num(t)).astype(int)]
        )
        return x * row[:, None]

    check_velocity_function(look_up, x)
    with pytest.raises(ValueError, match='ignores its end time t'):
        check_velocity_function(lambda s, t, x: net(params, s, s, x), x)
    with pytest.raises(ValueError, match='ignores its start time s'):
        check_velocity_function(lambda s, t, x: net(params, t, t, x), x)
    check_velocity_function(lambda s, t, x: net(params, t, t, x), x, two_times=False)
    with pytest.raises(ValueError, match='ignores time altogether'):
        check_velocity_function(lambda s, t, x: x, x, two_times=False)
    with pytest.raises(ValueError, match=r'returned float64\[2, 1\] for an input float64\[2, 2\]'):
        check_velocity_function(lambda s, t, x: net(params, s, t, x)[:, :1], x)
    with pytest.raises(ValueError, match='not finite'):
        check_velocity_function(lambda s, t, x: x / (t - t)[:, None], x)


def test_times_outside_the_unit_interval_or_reversed_are_refused():
    check_times(np.array([0.0, 0.5]), np.array([0.0, 1.0]))
    check_times(0.9, 0.1, ordered=False)
    with pytest.raises(ValueError, match=r's = 0.9 > t = 0.1'):
        check_times(np.array([0.0, 0.9]), np.array([0.0, 0.1]))
    with pytest.raises(ValueError, match=r'time t = 1.25 lies outside \[0, 1\]'):
        check_times(0.5, 1.25)
    with pytest.raises(ValueError, match=r'time s = nan lies outside \[0, 1\]'):
        check_times(np.nan, 0.5)
