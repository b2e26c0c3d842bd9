"""Samplers against exact flows, convergence orders and counted network calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.sampling import flow

pytestmark = pytest.mark.usefixtures('compiled_quickly')

S0, S1, MEAN = 0.8, 0.35, 1.3


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def exact(s, t, x):
    """Mean velocity of the linear path from N(0, S0^2) to N(MEAN, S1^2)."""
    s, t = s[:, None], t[:, None]
    a, b = (jnp.sqrt((1 - time) ** 2 * S0**2 + time**2 * S1**2) for time in (s, t))
    slope = ((t + s) * S1**2 - (2 - s - t) * S0**2) / (a * (a + b))
    return MEAN + slope * (x - s * MEAN)


@pytest.fixture(name='noise')
def _noise():
    return S0 * jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)


def calls(program, name):
    """Executions of the jitted function `name` in a traced program, loops multiplied out."""
    total = 0
    for equation in program.eqns:
        inner = [
            value.jaxpr if hasattr(value, 'jaxpr') else value
            for value in equation.params.values()
            if hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
        ]
        repeats = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
        if equation.params.get('name') == name:
            total += 1
        else:
            total += repeats * sum(calls(jaxpr, name) for jaxpr in inner)
    return total


@pytest.mark.parametrize('steps', [1, 2, 8])
def test_exact_map_reaches_data_in_any_number_of_steps(noise, steps):
    end = flow.flow_map_sample(exact, noise, flow.time_grid(steps))
    np.testing.assert_allclose(end, MEAN + S1 / S0 * noise, atol=1e-12)


@pytest.mark.parametrize('unroll', [1, True])
def test_steps_cost_the_stated_network_evaluations(noise, unroll):
    @jax.jit
    def network(s, t, x):
        return exact(s, t, x)

    for name, sampler in flow.SAMPLERS.items():
        for steps in (1, 4):
            program = jax.make_jaxpr(
                lambda x, sampler=sampler, steps=steps: sampler(
                    network, x, flow.time_grid(steps), unroll=unroll
                )
            )(noise)
            assert calls(program.jaxpr, 'network') == flow.network_evaluations(name, steps)
    assert flow.network_evaluations('flow_map', 1) == 1
    with pytest.raises(ValueError, match="unknown sampler 'rk4', expected one of"):
        flow.network_evaluations('rk4', 1)


def test_one_step_compiles_to_the_flops_of_one_network_call(noise):
    weight = jax.random.normal(jax.random.key(1), (64, 64))

    def network(s, t, x):
        hidden = jnp.tile(x, (1, 32)) + (s + t)[:, None]
        for _ in range(3):
            hidden = hidden @ weight
        return hidden[:, :2]

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()['flops']

    times = jnp.zeros(16)
    once = flops(network, times, times, noise)
    sampled = flops(lambda x: flow.flow_map_sample(network, x, flow.time_grid(1)), noise)
    assert abs(sampled / once - 1.0) < 0.02


def test_single_evaluation_is_the_one_run_by_the_compiled_sampler(noise):
    seen = []

    def network(s, t, x):
        jax.debug.callback(lambda s, t: seen.append((float(s), float(t))), s[0], t[0])
        return exact(s, t, x)

    jax.jit(lambda x: flow.flow_map_sample(network, x, flow.time_grid(1)))(noise)
    jax.effects_barrier()
    assert seen == [(0.0, 1.0)]


@pytest.mark.parametrize(('name', 'order'), [('euler', 1), ('heun', 2)])
def test_solvers_converge_at_their_order(noise, name, order):
    wanted = MEAN + S1 / S0 * noise
    errors = [
        float(jnp.max(jnp.abs(flow.SAMPLERS[name](exact, noise, flow.time_grid(n)) - wanted)))
        for n in (40, 80)
    ]
    assert 1.9**order < errors[0] / errors[1] < 2.2**order


def test_euler_step_by_hand():
    end = flow.euler_sample(
        lambda s, t, x: x * t[:, None], jnp.array([[2.0]]), np.array([0.5, 0.75, 1.0])
    )
    np.testing.assert_allclose(end, [[2.0 * (1 + 0.25 * 0.5) * (1 + 0.25 * 0.75)]])


def test_adaptive_solver_meets_its_tolerance_and_counts_evaluations(noise):
    seen = []

    def network(s, t, x):
        jax.debug.callback(lambda: seen.append(1))
        return exact(s, t, x)

    solve = jax.jit(lambda x: flow.adaptive_sample(network, x, rtol=1e-8, atol=1e-8))
    end, evaluations = solve(noise)
    jax.effects_barrier()
    np.testing.assert_allclose(end, MEAN + S1 / S0 * noise, atol=1e-6)
    assert int(evaluations) == len(seen)


def test_inversion_returns_the_noise(noise):
    data = MEAN + S1 / S0 * noise
    back, _ = flow.adaptive_sample(exact, data, start=1.0, end=0.0, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(back, noise, atol=1e-7)
    heun = flow.heun_sample(exact, data, flow.time_grid(200, start=1.0, end=0.0))
    np.testing.assert_allclose(heun, noise, atol=1e-4)


@pytest.mark.parametrize('name', sorted(flow.SAMPLERS))
def test_trajectory_holds_every_state(noise, name):
    sampler, times = flow.SAMPLERS[name], flow.time_grid(4)
    states = sampler(exact, noise, times, trajectory=True)
    assert states.shape == (5, 16, 2)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_allclose(states[2], sampler(exact, noise, times[:3]), atol=1e-12)
    np.testing.assert_allclose(states[4], sampler(exact, noise, times), atol=1e-12)


def test_guidance_extrapolates_from_the_null_class_in_one_call(noise):
    batches = []

    def conditional(s, t, x, told):
        batches.append(x.shape[0])
        # A field without a null stays what it is.
        np.testing.assert_array_equal(told['size'][:16], told['size'][16:])
        return x * told['label'][:, None] + s[:, None]

    label, null = jnp.arange(16) % 3, 3
    s = t = jnp.full(16, 0.25)
    for scale in (0.0, 1.0, 2.5, jnp.linspace(0, 2, 16)):
        v = flow.guided(conditional, {'label': label, 'size': noise}, scale, null={'label': null})
        weight = jnp.broadcast_to(jnp.asarray(scale), 16)[:, None]
        wanted = (1 - weight) * noise * null + weight * noise * label[:, None] + 0.25
        np.testing.assert_allclose(v(s, t, noise), wanted, atol=1e-12)
    assert batches == [32] * 4


def test_noise_depends_on_key_and_index_alone():
    key = jax.random.key(3)
    whole = flow.draw_noise(key, 6, (4, 2), scale=0.5)
    parts = [flow.draw_noise(key, 2, (4, 2), scale=0.5, first=k) for k in (0, 2, 4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    assert whole.dtype == jnp.float32
    assert not np.any(
        np.asarray(whole) == np.asarray(flow.draw_noise(jax.random.key(4), 6, (4, 2)))
    )
    many = flow.draw_noise(key, 20_000, (1,), scale=0.5)
    np.testing.assert_allclose([jnp.mean(many), jnp.std(many)], [0.0, 0.5], atol=0.02)


def test_bad_times_are_refused(noise):
    with pytest.raises(ValueError, match='steps=0, expected at least 1'):
        flow.time_grid(0)
    with pytest.raises(ValueError, match=r'time t = 1.5 lies outside \[0, 1\]'):
        flow.time_grid(4, end=1.5)
    with pytest.raises(ValueError, match=r's = 1.0 > t = 0.5: this jump runs from data to noise'):
        flow.flow_map_sample(exact, noise, flow.time_grid(2, start=1.0, end=0.0))
    with pytest.raises(ValueError, match=r'lies outside \[0, 1\]'):
        flow.adaptive_sample(exact, noise, end=-0.5)


@pytest.mark.parametrize('name', sorted(flow.SAMPLERS))
def test_states_of_bfloat16_are_carried_over_every_step_at_its_own_time(name):
    start = jnp.full((1, 2), 2.0, jnp.bfloat16)
    seen = []

    def field(s, t, x):
        assert x.dtype == jnp.bfloat16
        jax.debug.callback(lambda t: seen.append(float(t)), t[0])
        return jnp.broadcast_to(jnp.cos(s)[:, None], x.shape).astype(x.dtype)

    end = flow.SAMPLERS[name](field, start, flow.time_grid(500))
    jax.effects_barrier()
    assert end.dtype == jnp.bfloat16
    assert len(set(seen)) in (500, 501)
    # dx/dt = cos t from 2: with times and states of eight bits it stops at 2 + .73 or before.
    np.testing.assert_allclose(np.asarray(end, float), 2 + np.sin(1), rtol=2**-8)
    states = flow.SAMPLERS[name](field, start, flow.time_grid(500), trajectory=True)
    assert (states.dtype, states.shape) == (jnp.bfloat16, (501, 1, 2))


def test_adaptive_solver_of_bfloat16_states_meets_its_tolerance():
    def field(s, t, x):
        return jnp.broadcast_to(jnp.cos(t)[:, None], x.shape).astype(x.dtype)

    end, calls = flow.adaptive_sample(field, jnp.zeros((1, 2), jnp.bfloat16), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(np.asarray(end, float), np.sin(1), rtol=0.02)
    assert end.dtype == jnp.bfloat16
    assert int(calls) < 200
