"""ArcFlow: mixtures of momenta in closed form, and a student that imitates along its own path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import flow_world, seeds
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.losses import momentum
from kd.losses.interpolant import linear
from kd.losses.momentum import Momentum
from kd.methods.flow.arcflow import arcflow
from kd.sampling import times
from kd.sampling.denoiser import of_network
from kd.sampling.flow import flow_map_sample, time_grid
from kd.sampling.velocity import velocity_function

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, K = 3, 4


@pytest.fixture(name='wide')
def _x64():
    with jax.enable_x64(True):
        yield


def drawn(rates=1.0):
    rng = np.random.default_rng(0)
    return Momentum(
        jnp.asarray(rng.standard_normal((B, K, 2))),
        jnp.asarray(rng.standard_normal((B, K, 1))),
        jnp.asarray(rates * rng.standard_normal((B, K - 1, 1))),
    )


X = np.random.default_rng(1).standard_normal((B, 2))


def test_transport_is_the_integral_of_the_velocity(wide):
    m, source = drawn(), np.array([0.1, 0.2, 0.0])
    nodes, weights = np.polynomial.legendre.leggauss(24)
    t_a, t_b = source + 0.05, source + 0.6
    at = t_a + np.outer(nodes + 1, t_b - t_a) / 2
    moved = (
        0.5
        * (t_b - t_a)[:, None]
        * sum(w * momentum.velocity(m, source, t) for w, t in zip(weights, at, strict=True))
    )
    found = momentum.transport(m, source, t_a, t_b, X)
    np.testing.assert_allclose(found, X + moved, atol=1e-12)
    # And by NumPy, of one example.
    pi = np.exp(np.asarray(m.logits[0, :, 0]))
    pi /= pi.sum()
    g = np.concatenate([[0.0], np.asarray(m.rate[0, :, 0])])
    by_hand = (pi * np.exp(g * 0.05)) @ np.asarray(m.velocity[0])
    np.testing.assert_allclose(momentum.velocity(m, source, t_a)[0], by_hand, rtol=1e-12)


def test_parts_of_a_segment_compose_when_the_exponent_goes_from_its_start(wide):
    """Trap: counted from the current point the second part would be another curve."""
    m = drawn()
    half = momentum.transport(m, 0.0, 0.1, 0.3, X)
    whole = momentum.transport(m, 0.0, 0.1, 0.7, X)
    np.testing.assert_allclose(momentum.transport(m, 0.0, 0.3, 0.7, half), whole, atol=1e-12)
    assert np.abs(momentum.transport(m, 0.3, 0.3, 0.7, half) - whole).max() > 1e-2
    program = str(jax.make_jaxpr(lambda x: momentum.transport(m, 0.0, 0.1, 0.7, x))(X))
    assert 'scan' not in program
    assert 'while' not in program


def test_the_end_moves_with_the_velocity(wide):
    m, h = drawn(), 1e-6
    ends = [momentum.transport(m, 0.0, 0.1, 0.5 + d, X) for d in (-h, h)]
    np.testing.assert_allclose(
        (ends[1] - ends[0]) / (2 * h), momentum.velocity(m, 0.0, 0.5), atol=1e-8
    )


def test_without_rates_it_is_a_straight_line_and_there_they_have_a_gradient(wide):
    m, length = drawn(0.0), 0.5
    pi = jax.nn.softmax(m.logits, axis=1)
    straight = X + length * jnp.sum(pi * m.velocity, 1)
    np.testing.assert_allclose(momentum.transport(m, 0.2, 0.2, 0.7, X), straight, atol=1e-14)

    def end(rate):
        return momentum.transport(m._replace(rate=rate), 0.2, 0.2, 0.7, X).sum()

    # D^2 / 2 pi V, which a clamped quotient does not have.
    expected = length**2 / 2 * (pi * m.velocity)[:, 1:].sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.grad(end)(m.rate), expected, rtol=1e-10)


def test_the_ratio_and_its_slope_are_smooth_where_series_and_quotient_meet(wide):
    z = jnp.array([-3.0, -1.01e-2, -0.99e-2, -1e-6, 1e-6, 0.99e-2, 1.01e-2, 3.0])
    exact = np.expm1(z) / z
    np.testing.assert_allclose(momentum.expm1_ratio(z), exact, rtol=1e-12)
    slope = jax.vmap(jax.grad(momentum.expm1_ratio))(z)
    np.testing.assert_allclose(slope, (np.exp(z) - exact) / z, rtol=1e-9, atol=1e-9)
    assert float(jax.grad(momentum.expm1_ratio)(0.0)) == 0.5


def test_never_all_modes_are_left_out_and_the_rest_has_the_weights_of_a_smaller_mixture():
    m = Momentum(jnp.ones((4000, 2, 1)), jnp.zeros((4000, 2, 1)), jnp.zeros((4000, 1, 1)))
    found = np.asarray(momentum.drop_modes(jax.random.key(0), m, 0.5).logits[..., 0])
    kept = np.isfinite(found).sum(1)
    assert kept.min() == 1
    # One of two: in two of four cases; both dropped is both kept.
    assert abs((kept == 1).mean() - 0.5) < 0.03
    assert np.isfinite(
        momentum.velocity(m._replace(logits=jnp.asarray(found[..., None])), 0, 1)
    ).all()


def swirl(t, x):
    return jnp.stack([-x[:, 1], x[:, 0]], 1) * (1 + t[:, None])


def test_states_are_the_teachers_at_first_the_students_in_the_end_and_those_of_a_plain_loop(wide):
    m, key, tau = drawn(), jax.random.key(3), jnp.full(B, 0.5)

    def clock(tau):
        return times.moved(tau, 1 / 3.2)

    @jax.jit
    def found(share):
        return momentum.imitation_states(
            key, m, X, tau, 0.5, share, swirl, states=3, window=0.02, clock=clock
        )

    source = clock(tau)
    own, teachers, both = found(0.0), found(1.0), found(0.4)
    # On the student's path everywhere; the windows as long as they should be, in raw time.
    for i in range(3):
        exact = momentum.transport(m, source, source, own.t_a[i], X)
        np.testing.assert_allclose(own.x[i], exact, atol=1e-12)
    raw = [times.moved(t, 3.2) for t in (own.t_a, own.t_b)]
    np.testing.assert_allclose(raw[1] - raw[0], 0.02, atol=1e-12)
    # On the teacher's Euler path everywhere: the first state is the beginning itself.
    np.testing.assert_array_equal(teachers.x[0], X)
    x = X
    for i in range(2):
        x = x + (teachers.t_a[i + 1] - teachers.t_a[i])[:, None] * swirl(teachers.t_a[i], x)
        np.testing.assert_allclose(teachers.x[i + 1], x, atol=1e-12)
    # The teacher's gaps fill the segment but for the window.
    np.testing.assert_allclose(times.moved(teachers.t_b[-1], 3.2), 1.0, atol=1e-12)
    # A mixture of both, step by step.
    own_key, teacher_key = jax.random.split(key)
    gaps = 0.6 * 0.48 * jnp.diff(jnp.sort(jax.random.uniform(own_key, (B, 3))), prepend=0.0)
    cuts = jnp.sort(jax.random.uniform(teacher_key, (B, 2)))
    steps = 0.4 * 0.48 * jnp.diff(cuts, prepend=0.0, append=1.0)
    x, now = X, tau
    for i in range(3):
        to = now + gaps[:, i]
        x = momentum.transport(m, source, clock(now), clock(to), x)
        np.testing.assert_allclose(both.x[i], x, atol=1e-12)
        target = swirl(clock(to), x)
        np.testing.assert_allclose(both.target[i], target, atol=1e-12)
        now = to + steps[:, i]
        x = x + (clock(now) - clock(to))[:, None] * target


def test_shifted_times_are_what_sigma_of_the_paper_is():
    r = np.linspace(0, 1, 9)
    sigma = 3.2 * r / (1 + 2.2 * r)
    np.testing.assert_allclose(times.moved(1 - r, 1 / 3.2), 1 - sigma, atol=1e-7)


# The exact flow


def test_the_exact_velocity_is_that_of_the_exact_denoiser_and_ends_where_it_should():
    world = flow_world.World(np.arange(1))
    t = jnp.array([0.0, 0.3, 0.8, 0.99])
    x = jax.random.normal(jax.random.key(0), (4, 2))
    field = mixtures.exact_velocity(world.mixture, 0.5)
    path = of_network(world.teacher).schedule
    known = mixtures.exact_denoiser(world.mixture, path).apply({}, x, 1 - t, {}).x0
    np.testing.assert_allclose(linear().to_data(t, x, field(t, t, x)), known, atol=2e-5)
    # Where no noise is left it is what the data are, less the mean of the noise.
    np.testing.assert_allclose(field(jnp.ones(4), t, x), x, atol=1e-5)


# The method


@pytest.fixture(name='world', scope='module')
def _world():
    return flow_world.World(np.arange(1), **flow_world.SMALL)


def context_of(world, modes=3, **more):
    return seeds.context(
        network=world.network(modes), teacher=world.teacher, tx=optax.sgd(1.0),
        spec=flow_world.SPEC, **more,
    )  # fmt: skip


def test_a_step_follows_the_loss_by_hand_and_trains_every_mode(world):
    """Trap: dropout acts on the path alone, so that every V has a gradient."""
    context = context_of(world)
    method = arcflow(context, states=2, decay=4, mode_dropout=0.9, segments=2)
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': {}})
    noisy = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), state.params['network']
    )
    state = state.replace(params={'network': noisy}, step=jnp.int32(3))
    batch = {'input': jnp.asarray(world.data['input'][:32])}
    after, metrics = jax.jit(method.step)(state, batch)

    network, field = context.network, velocity_function(world.teacher, {})
    noise_key, _, key = jax.random.split(state.step_key(), 3)
    x = 0.5 * jax.random.normal(noise_key, (32, 2))

    def windows(params):
        """(source, states) of both segments, constants."""
        point, made = x, []
        for j in range(2):
            source = jnp.full(32, 0.5 * j)
            m = said(params, source, point)
            _, of_modes, of_states = jax.random.split(jax.random.fold_in(key, j), 3)
            found = momentum.imitation_states(
                of_states, momentum.drop_modes(of_modes, m, 0.9), point, source, 0.5, 0.25,
                lambda t, x: field(t, t, x), states=2, window=3 / 128,
            )  # fmt: skip
            made.append((source, point, found))
            point = momentum.transport(m, source, source, source + 0.5, point)
        return made

    def said(params, source, point):
        return network.apply({'params': params}, source, source, point, momenta=True).logits

    fixed = jax.jit(windows)(noisy)

    def loss(params):
        total = 0.0
        for source, point, found in fixed:
            m = said(params, source, point)
            for i in range(2):
                mean = momentum.mean_velocity(m, source, found.t_a[i], found.t_b[i])
                total += 0.5 * jnp.mean((mean - found.target[i]) ** 2) / 2 / 2
        return total

    value, slope = jax.jit(jax.value_and_grad(loss))(noisy)
    total, count = metrics['loss']
    np.testing.assert_allclose(total / count, value, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, noisy, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), moved, slope)
    by_mode = np.asarray(moved['out']['kernel']).reshape(8, 3, 2)
    assert (np.abs(by_mode).max((0, 2)) > 1e-4).all()


def test_a_head_begins_as_copies_of_a_flows_head_and_is_sampled_as_a_flow_map(world):
    flow = world.network()
    context = context_of(world, references={'start': flow})
    reference = jax.jit(flow.init)(jax.random.key(5))
    reference['params']['out']['kernel'] = jax.random.normal(jax.random.key(6), (8, 2))
    method = arcflow(context)
    frozen = {'teacher': {}, 'start': reference}
    params = jax.jit(method.init)(jax.random.key(0), frozen).params['network']
    kernel = np.asarray(params['out']['kernel']).reshape(8, 3, 2)
    for k in range(3):
        np.testing.assert_array_equal(kernel[:, k], reference['params']['out']['kernel'])
    spread = np.asarray(params['out']['bias']).reshape(3, 2)
    assert 1e-3 < np.abs(spread - spread[0]).max() < 0.3
    np.testing.assert_array_equal(
        params['hidden0']['kernel'], reference['params']['hidden0']['kernel']
    )
    np.testing.assert_allclose(params['rate']['bias'], np.log([0.2, 4.0]), rtol=1e-6)
    # Two calls, each of which goes to the end of its segment in closed form.
    network, x = context.network, world.noise[:5]
    vfn = velocity_function(network, {'params': params})
    found = jax.jit(lambda x: flow_map_sample(vfn, x, time_grid(2)))(x)
    for j in range(2):
        at = jnp.full(5, 0.5 * j)
        m = network.apply({'params': params}, at, at, x, momenta=True).logits
        x = momentum.transport(m, at, at, at + 0.5, x)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_with_data_it_begins_on_their_paths(world):
    method = arcflow(context_of(world), segments=4, data_free=False)
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': {}})
    one, metrics = jax.jit(method.step)(state, {'input': jnp.asarray(world.data['input'][:16])})
    assert set(metrics) == {'loss', 'grad_norm', 'error_0'}
    # Of the loss of noise alone data are no part.
    other, _ = jax.jit(method.step)(state, {'input': jnp.asarray(world.data['input'][16:32])})
    biases = [np.asarray(state.params['network']['out']['bias']) for state in (one, other)]
    assert np.abs(biases[0] - biases[1]).max() > 0


def test_mistakes_are_refused_when_the_method_is_built(world):
    plain = seeds.context(network=world.network(), teacher=world.teacher, tx=optax.sgd(1.0))
    with pytest.raises(UserError, match=r'arcflow trains a MomentumMLP or .* VelocityMLP says one'):
        arcflow(plain)
    with pytest.raises(UserError, match=r'window=0.5 leaves nothing of a segment, which has 0.5'):
        arcflow(context_of(world), window=0.5)
