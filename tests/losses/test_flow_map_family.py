"""Each relative of the flow-map losses against its own paper's formula, written in its notation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import flow_map as fm
from kd.losses import flow_map_algorithms as algorithms
from kd.losses import flow_map_family as family
from kd.losses import interpolant as interpolants

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B = 6


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def init_net(key):
    k1, k2 = jax.random.split(key)
    return {'w1': jax.random.normal(k1, (4, 16)), 'w2': jax.random.normal(k2, (16, 2)) / 3}


def net(params, s, t, x):
    s, t = (jnp.broadcast_to(time, x.shape[:1])[:, None] for time in (s, t))
    return jnp.tanh(jnp.concatenate([s, t, x], axis=1) @ params['w1']) @ params['w2']


def bind(params):
    return lambda s, t, x: net(params, s, t, x)


@pytest.fixture(name='batch')
def _batch():
    keys = jax.random.split(jax.random.key(1), 3)
    s, t = fm.sample_triangle(keys[0], B, dtype=jnp.float64)
    x0, x1 = jax.random.normal(keys[1], (2, B, 2))
    path = interpolants.linear()
    return s, t, path.point(s, x0, x1), path.velocity(s, x0, x1)


@pytest.fixture(name='params')
def _params():
    return init_net(jax.random.key(2))


@pytest.fixture(name='teacher')
def _teacher():
    return bind(init_net(jax.random.key(3)))


def assert_same_gradient(ours, theirs, params, rtol=1e-9):
    ours, theirs = jax.grad(ours)(params), jax.grad(theirs)(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


def test_meanflow_in_its_own_time(batch, params):
    s, t, x, dx = batch

    def ours(params):
        return jnp.sum(fm.squared_error(family.meanflow_residual(bind(params), s, t, x, dx)))

    def theirs(params):
        # arXiv 2505.13447, algorithm 1: time 1 is noise, r <= t, v = e - x, u(z, r, t).
        def u(z, r, t):
            return -net(params, 1 - t, 1 - r, z)

        r_, t_, v = 1 - t, 1 - s, -dx
        value, dudt = jax.jvp(u, (x, r_, t_), (v, jnp.zeros_like(r_), jnp.ones_like(t_)))
        target = v - (t_ - r_)[:, None] * dudt
        return jnp.sum((value - jax.lax.stop_gradient(target)) ** 2)

    np.testing.assert_allclose(ours(params), theirs(params), rtol=1e-12)
    assert_same_gradient(ours, theirs, params)


def test_meanflow_is_eulerian_self_distillation_with_more_stopped(batch, params):
    s, t, x, dx = batch

    def gradient(residual):
        return jax.grad(lambda p: jnp.sum(fm.squared_error(residual(bind(p)))))(params)

    meanflow = gradient(lambda v: family.meanflow_residual(v, s, t, x, dx))
    full = gradient(lambda v: fm.esd_residual(v, s, t, x))
    assert jnp.max(jnp.abs(meanflow['w2'] - full['w2'])) > 0.1

    def stopped_by_hand(v):
        # ESD with the sample for the field and d_s v stopped as well.
        _, ds = jax.jvp(lambda s: v(s, t, x), (s,), (jnp.ones_like(s),))
        residual = fm.esd_residual(v, s, t, x, teacher=family.sampled_velocity(dx))
        step = (t - s)[:, None]
        return residual - step * ds + jax.lax.stop_gradient(step * ds)

    by_hand = gradient(stopped_by_hand)
    for name in params:
        np.testing.assert_allclose(meanflow[name], by_hand[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', ['training', 'distillation'])
def test_continuous_consistency_follows_the_tangent_of_f(batch, params, teacher, kind):
    s, _, x, dx = batch
    direction = dx if kind == 'training' else teacher(s, s, x)

    def f(params, s, x):
        return x + (1 - s)[:, None] * net(params, s, 1.0, x)

    h = 1e-5
    tangent = (f(params, s + h, x + h * direction) - f(params, s - h, x - h * direction)) / (2 * h)

    def ours(params):
        if kind == 'training':
            r = family.consistency_training_residual(bind(params), s, x, dx)
        else:
            r = family.consistency_distillation_residual(bind(params), s, x, teacher=teacher)
        return 0.5 * jnp.sum((1 - s) * fm.squared_error(r))

    def theirs(params):
        # arXiv 2410.11081: grad E[f . sg(df/dt)]; the minus turns time toward data.
        return -jnp.sum(f(params, s, x) * tangent)

    assert_same_gradient(ours, theirs, params, rtol=1e-7)
    expected = 0.5 * jnp.sum((1 - s) * jnp.sum(tangent**2, axis=1))
    np.testing.assert_allclose(ours(params), expected, rtol=1e-7)


def test_consistency_trajectory_steps_become_the_eulerian_residual(batch, params, teacher):
    s, t, x, _ = batch
    h = 1e-6 * (t - s)
    x_u = x + h[:, None] * teacher(s, s, x)

    def discrete(params):
        r = family.consistency_trajectory_residual(bind(params), s, s + h, t, x, x_u)
        return jnp.sum(fm.squared_error(r) / (h * (t - s)))

    def continuous(params):
        r = family.align_your_flow_residual(bind(params), s, t, x, teacher=teacher)
        return jnp.sum(fm.squared_error(r))

    assert_same_gradient(discrete, continuous, params, rtol=1e-4)


def test_consistency_trajectory_ends(batch, params, teacher):
    s, t, x, _ = batch
    v, u = bind(params), 0.5 * (s + t)
    solved = x + (t - s)[:, None] * teacher(s, s, x)
    regression = family.consistency_trajectory_residual(v, s, t, t, x, solved)
    np.testing.assert_allclose(regression, fm.flow_map(v, s, t, x) - solved, atol=1e-12)
    own = family.consistency_trajectory_residual(v, s, u, t, x, fm.flow_map(v, s, u, x))
    progressive = (t - s)[:, None] * fm.psd_residual(v, s, t, x, 0.5)
    np.testing.assert_allclose(own, progressive, atol=1e-12)


def test_align_your_flow_eulerian_is_the_tangent_of_the_map(batch, params, teacher):
    s, t, x, _ = batch
    direction, h = teacher(s, s, x), 1e-5

    def f(params, s, x):
        return fm.flow_map(bind(params), s, t, x)

    tangent = (f(params, s + h, x + h * direction) - f(params, s - h, x - h * direction)) / (2 * h)

    def ours(params):
        r = family.align_your_flow_residual(bind(params), s, t, x, teacher=teacher)
        return 0.5 * jnp.sum((t - s) * fm.squared_error(r))

    # arXiv 2506.14603, AYF-EMD: grad E[f . sg(df/dt)] with time running to noise.
    assert_same_gradient(ours, lambda p: -jnp.sum(f(p, s, x) * tangent), params, rtol=1e-7)


def test_align_your_flow_lagrangian_is_the_limit_of_a_teacher_step(batch, params, teacher):
    s, t, x, _ = batch
    h = 1e-6

    def ours(params):
        r = family.align_your_flow_residual(
            bind(params), s, t, x, teacher=teacher, kind='lagrangian'
        )
        return 0.5 * jnp.sum((t - s) * fm.squared_error(r))

    short = fm.flow_map(bind(params), s, t - h, x)
    target = short + h * teacher(t - h, t - h, short)

    def theirs(params):
        # arXiv 2506.14603, AYF-LMD: the map to t against a teacher step after the map to t - h.
        return 0.5 * jnp.sum((fm.flow_map(bind(params), s, t, x) - target) ** 2) / h

    assert_same_gradient(ours, theirs, params, rtol=1e-4)
    with pytest.raises(ValueError, match="expected 'eulerian' or 'lagrangian'"):
        family.align_your_flow_residual(bind(params), s, t, x, teacher=teacher, kind='both')


def test_shortcut_target_is_the_mean_of_two_steps_of_size_d(params):
    s, t = family.sample_dyadic(jax.random.key(0), B, levels=6)
    x = jax.random.normal(jax.random.key(1), (B, 2))
    d = ((t - s) / 2)[:, None]

    def model(x, t, d):  # arXiv 2410.12557: s_theta(x, t, d)
        return net(params, t, t + d[:, 0], x)

    first = model(x, s, d)
    second = model(x + d * first, s + d[:, 0], d)
    wanted = model(x, s, 2 * d) - (first + second) / 2
    np.testing.assert_allclose(family.shortcut_residual(bind(params), s, t, x), wanted, atol=1e-12)
    # The shortest steps are read from the diagonal, d = 0.
    s, t = jnp.array([0.5]), jnp.array([0.5 + 1 / 64])
    d, x = jnp.array([[1 / 128]]), x[:1]
    first = model(x, s, 0 * d)
    second = model(x + d * first, s + 1 / 128, 0 * d)
    wanted = model(x, s, 2 * d) - (first + second) / 2
    np.testing.assert_allclose(family.shortcut_residual(bind(params), s, t, x), wanted, atol=1e-12)


def test_dyadic_times_are_aligned_and_cover_every_level():
    s, t = family.sample_dyadic(jax.random.key(0), 20_000, levels=7)
    level = -np.log2(np.asarray(t - s))
    np.testing.assert_array_equal(level, np.round(level))
    np.testing.assert_array_equal(np.asarray(s) * 2**level % 1, 0)
    assert float(jnp.max(t)) == 1.0
    share = np.bincount(level.astype(int), minlength=7) / 20_000
    np.testing.assert_allclose(share, 1 / 7, atol=5 * 0.35 / np.sqrt(20_000))


def test_progressive_distillation_matches_two_ddim_steps(batch, params, teacher):
    s, t, x, _ = batch

    def field(s, t, x):
        return net(params, s, s, x)

    # arXiv 2202.00512, algorithm 2, with alpha = s the signal and sigma = 1 - s the noise.
    def x_hat(time, z):
        return z + (1 - time)[:, None] * field(time, time, z)

    def ddim(z, start, stop):
        alpha, sigma = stop[:, None], (1 - stop)[:, None]
        ratio = sigma / (1 - start)[:, None]
        signal = x_hat(start, z)
        return alpha * signal + ratio * (z - start[:, None] * signal)

    middle = (s + t) / 2
    z = ddim(ddim(x, s, middle), middle, t)
    ratio = ((1 - t) / (1 - s))[:, None]
    target = (z - ratio * x) / (t[:, None] - ratio * s[:, None])
    prediction = x + (1 - s)[:, None] * teacher(s, t, x)
    wanted = (prediction - target) / (1 - s)[:, None]
    residual = family.progressive_residual(teacher, s, t, x, teacher=field)
    np.testing.assert_allclose(residual, wanted, atol=1e-9)


def test_two_step_progressive_matching_is_the_scaled_midpoint_residual(batch, params, teacher):
    s, t, x, _ = batch
    student = bind(params)
    ours = family.pfmm_residual(student, s, t, x, teacher=teacher, steps=2)
    scaled = (t - s)[:, None] * family.progressive_residual(student, s, t, x, teacher=teacher)
    np.testing.assert_allclose(ours, scaled, atol=1e-12)
    with pytest.raises(ValueError, match='steps=0, expected at least 1'):
        family.pfmm_residual(student, s, t, x, teacher=teacher, steps=0)


def test_map_distillation_gradients_reach_the_student_through_the_teacher(batch, params, teacher):
    s, t, x, _ = batch
    direction = init_net(jax.random.key(8))

    def moved(h):
        return bind(jax.tree.map(lambda p, d: p + h * d, params, direction))

    for residual in (family.lmd_residual, family.emd_residual):

        def loss(h, residual=residual):
            return jnp.sum(fm.squared_error(residual(moved(h), s, t, x, teacher=teacher)))

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(loss)(0.0), numeric, rtol=1e-7)


def test_plain_flow_matching_is_the_regression_of_data_minus_noise(params):
    x0, x1 = jax.random.normal(jax.random.key(4), (2, B, 2))
    error, s, t = algorithms.flow_map_errors(
        jax.random.key(5),
        bind(params),
        x0,
        x1,
        interpolant=interpolants.linear(),
        algorithm=algorithms.get_algorithm('lsd'),
        diagonal=B,
    )
    np.testing.assert_array_equal(s, t)
    t_ = t[:, None]
    wanted = net(params, t, t, (1 - t_) * x0 + t_ * x1) - (x1 - x0)
    np.testing.assert_allclose(error, jnp.sum(wanted**2, axis=1), rtol=1e-6)


@pytest.mark.parametrize('name', sorted(algorithms.ALGORITHMS))
def test_batch_loss_is_diagonal_errors_then_the_named_residual(name, params, teacher):
    needs = algorithms.ALGORITHMS[name].needs_teacher
    frozen = teacher if needs else None
    algorithm = algorithms.get_algorithm(name, teacher=needs)
    path = interpolants.trigonometric()
    x0, x1 = jax.random.normal(jax.random.key(4), (2, B, 2))
    other = bind(init_net(jax.random.key(7)))
    key = jax.random.key(5)
    error, s, t = algorithms.flow_map_errors(
        key,
        other,
        x0,
        x1,
        interpolant=path,
        algorithm=algorithm,
        diagonal=2,
        off_diagonal_vfn=bind(params),
        teacher=frozen,
    )
    assert error.shape == s.shape == t.shape == (B,)
    s, t, x0, x1 = s[2:], t[2:], x0[2:], x1[2:]
    # The START of the jump is on the path.
    x = jnp.cos(jnp.pi * s / 2)[:, None] * x0 + jnp.sin(jnp.pi * s / 2)[:, None] * x1
    dx = path.velocity(s, x0, x1)
    v = bind(params)
    fraction = jax.random.uniform(jax.random.split(key, 3)[2], s.shape, s.dtype)
    residual = {
        'lsd': lambda: fm.lsd_residual(v, s, t, x),
        'esd': lambda: fm.esd_residual(v, s, t, x),
        'psd_uniform': lambda: fm.psd_residual(v, s, t, x, fraction),
        'psd_midpoint': lambda: fm.psd_residual(v, s, t, x, 0.5),
        'lmd': lambda: family.lmd_residual(v, s, t, x, teacher=teacher),
        'emd': lambda: family.emd_residual(v, s, t, x, teacher=teacher),
        'pfmm': lambda: family.pfmm_residual(v, s, t, x, teacher=teacher, steps=2),
        'fmm': lambda: jnp.hstack(family.fmm_residuals(v, t, s, x, dx)),
        'meanflow': lambda: family.meanflow_residual(v, s, t, x, dx),
        'shortcut': lambda: family.shortcut_residual(v, s, t, x),
        'consistency': lambda: family.consistency_training_residual(v, s, x, dx),
    }[name]()
    np.testing.assert_allclose(error[2:], jnp.sum(residual**2, axis=1), rtol=1e-5)
    assert jnp.all(t == 1.0) == (name == 'consistency')
    assert jnp.any(t < s) == (name == 'fmm')


def test_algorithm_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="unknown algorithm 'ctm', expected one of"):
        algorithms.get_algorithm('ctm')
    with pytest.raises(ValueError, match="'lmd' distils a frozen flow: give a teacher"):
        algorithms.get_algorithm('lmd')
    with pytest.raises(ValueError, match="'meanflow' has no teacher"):
        algorithms.get_algorithm('meanflow', teacher=True)
    with pytest.raises(ValueError, match="'shortcut' fixes where the gradient stops"):
        algorithms.get_algorithm('shortcut', stop_gradient='none')
    assert algorithms.get_algorithm('lsd', stop_gradient='none').stop_gradient == 'none'
    x = jnp.zeros((B, 2))
    with pytest.raises(ValueError, match='diagonal=7, expected 0 to 6'):
        algorithms.flow_map_errors(
            jax.random.key(0),
            bind(init_net(jax.random.key(0))),
            x,
            x,
            interpolant=interpolants.linear(),
            algorithm=algorithms.get_algorithm('lsd'),
            diagonal=7,
        )
