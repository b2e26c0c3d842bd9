"""Phases of the noise: the target without clean examples, the states of experts, and a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.evaluators import phase_samples
from kd.losses import schedule, score_distillation
from kd.methods.diffusion import phased_dmd as phased
from kd.methods.diffusion.distribution_matching import Views, noised
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser, times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH = schedule.flow()
S, T, N = 0.5, 0.8, 400_000


@pytest.fixture(scope='module')
def toy():
    """Points of {-1, 0, 1, 2}, their states at s, the noise between, and the states at t."""
    rng = np.random.default_rng(0)
    x0 = rng.integers(-1, 3, N).astype(float)
    x_s = (1 - S) * x0 + S * rng.standard_normal(N)
    eps = rng.standard_normal(N)
    a = (1 - T) / (1 - S)
    b = np.sqrt(T**2 - (a * S) ** 2)
    return x_s, eps, a * x_s + b * eps


def exact(x_t):
    """E[eps - x0 | x_t] of the four points."""
    values = np.arange(-1.0, 3.0)
    logits = -0.5 * ((x_t[:, None] - (1 - T) * values) / T) ** 2
    weight = np.exp(logits - logits.max(1, keepdims=True))
    mean = (weight * values).sum(1) / weight.sum(1)
    return (x_t - (1 - T) * mean) / T - mean


def test_the_minimiser_in_a_subinterval_is_the_velocity_of_the_whole(toy):
    """In bins of x_t the best constant is the exact velocity; of `eps - x_s` it is not."""
    x_s, eps, x_t = toy
    for centre in (-1.25, -0.35, 0.55, 1.2):
        inside = np.abs(x_t - centre) < 0.05
        of_bin = [jnp.asarray(y[inside, None], jnp.float32) for y in (x_s, eps)]
        low, high = (jnp.full(inside.sum(), y) for y in (S, T))

        def loss(u, of_bin=of_bin, low=low, high=high):
            constant = jnp.full_like(of_bin[0], u)
            return score_distillation.subinterval(constant, *of_bin, PATH, low, high).mean()

        # A parabola in u: its minimum from three values.
        left, middle, right = (float(loss(u)) for u in (-1.0, 0.0, 1.0))
        best = 0.5 * (left - right) / (left + right - 2 * middle)
        wanted = exact(x_t[inside]).mean()
        assert best == pytest.approx(wanted, abs=0.04)
        assert abs((eps - x_s)[inside].mean() - wanted) > 0.15


def test_from_clean_examples_it_is_the_squared_error_and_near_the_base_it_is_finite():
    rng = np.random.default_rng(1)
    u, x, eps = (jnp.asarray(rng.standard_normal((5, 3)), jnp.float32) for _ in range(3))
    zero, high = jnp.zeros(5), jnp.full(5, 0.6)
    found = score_distillation.subinterval(u, x, eps, PATH, zero, high)
    np.testing.assert_allclose(found, jnp.square(u - (eps - x)).mean(1), rtol=1e-5)
    near = score_distillation.subinterval(u, x, eps, PATH, high, high + 1e-6)
    assert np.isfinite(near).all()
    # Wherever the noise between has a variance of .1 the weight is not cut.
    low = jnp.full(5, 0.5)
    whole = score_distillation.subinterval(u, x, eps, PATH, low, high + 0.2, clamp=1e9)
    cut = score_distillation.subinterval(u, x, eps, PATH, low, high + 0.2)
    np.testing.assert_allclose(whole, cut)


def test_noise_between_two_times():
    rng = np.random.default_rng(2)
    x0, one, two = (jnp.asarray(rng.standard_normal((40_000, 1)), jnp.float32) for _ in range(3))
    x_s = PATH.mix(2 + 0 * x0, one, jnp.float32(S))
    x_t = noised(PATH, x_s, two, jnp.full(40_000, T), S)
    np.testing.assert_allclose(x_t.mean(), (1 - T) * 2, atol=0.02)
    np.testing.assert_allclose(x_t.std(), T, rtol=0.02)
    np.testing.assert_array_equal(
        noised(PATH, x0, two, jnp.full(40_000, T), None), PATH.mix(x0, two, jnp.float32(T))
    )


@pytest.mark.parametrize('base', [None, S])
def test_the_direction_is_a_difference_of_scores(base):
    """w (u_T - u_fake) = alpha_{t|s} (score_fake - score_T)."""
    real, fake = (
        mixtures.exact_denoiser(mixtures.pairs(2, deviation=d), PATH) for d in (0.25, 0.5)
    )
    x = jax.random.normal(jax.random.key(0), (6, 2))
    asked = []

    def said(of):
        def at(x_t, t, scale=1.0):
            asked.append((x_t, t))
            return of.apply({}, x_t, t, {}).x0

        return at

    views = Views(x, jnp.ones(6), {}, PATH, said(real), said(fake), None, base)
    law = times.uniform(times.even(PATH), base or 0.02, 0.98)
    g, _ = phased.velocities(law, 1.0)(views, jax.random.key(1))
    x_t, t = asked[0]
    scores = [
        schedule.convert(PATH, of.apply({}, x_t, t, {}).x0, x_t, t, 'x0', 'score')
        for of in (fake, real)
    ]
    share = 1 - t if base is None else (1 - t) / (1 - base)
    np.testing.assert_allclose(g, share[:, None] * (scores[0] - scores[1]), rtol=1e-3, atol=1e-4)
    assert (np.asarray(t) >= (base or 0.02)).all()


SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=8, depth=1), PATH, kind='flow')
    return from_linen(module, *module.example_inputs(SPEC))


def test_experts_hand_over_and_the_last_call_alone_has_a_gradient(network):
    own = denoiser.of_network(network)
    expert, mine = (
        jax.tree.map(lambda x, s=s: x + s, network.init(jax.random.key(0))) for s in (0.1, 0.2)
    )
    phase = phased.Phase(own, (0.8,), 0.4, [phased.Expert('first', own, (1.0, 0.9))])
    key = jax.random.key(5)

    def run(variables, frozen):
        return phase.rollout(variables, {}, key, (3, 2), True, {'first': frozen})

    found = run(mine, expert)
    noise_key = jax.random.split(key, 4)[0]
    x = jax.random.normal(noise_key, (3, 2))

    def euler(variables, x, t, to):
        mu = own.apply(variables, x, jnp.full(3, t), {}).x0
        noise = (x - (1 - t) * mu) / t
        return (1 - to) * mu + to * noise

    x = euler(expert, euler(expert, x, 1.0, 0.9), 0.9, 0.8)
    np.testing.assert_allclose(found.input, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.x, euler(mine, x, 0.8, 0.4), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda v: run(mine, v).x.sum())(expert)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))
    wanted = jax.grad(lambda v: euler(v, x, 0.8, 0.4).sum())(mine)
    one = jax.grad(lambda v: run(v, expert).x.sum())(mine)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, wanted)


def test_a_phase_begins_as_the_teacher_and_leaves_experts_alone(network):
    context = seeds.context(
        network=network, teacher=network, references={'first': network}, tx=optax.sgd(0.1),
        steps=4, spec=SPEC,
    )  # fmt: skip
    options = dict(times=(0.8,), optimizer=dict(name='sgd', lr=0.1), updates=2)
    method = phased.phased_dmd(context, end=0.4, before=(('first', (1.0, 0.9)),), **options)
    teacher, first = (
        jax.tree.map(lambda x, s=s: x + s, network.init(jax.random.key(0))) for s in (0.1, 0.3)
    )
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher, 'first': first})
    moved, metrics = jax.jit(method.step)(state, {'input': jnp.zeros((16, 2))})
    for part in ('generator', 'fake'):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], teacher['params'])
    # The critic being the teacher, the generator stays and the critic moves.
    jax.tree.map(np.testing.assert_array_equal, moved.params['generator'], teacher['params'])
    assert float(metrics['fake/grad_norm'].total) > 0
    jax.tree.map(np.testing.assert_array_equal, moved.frozen['first'], first)
    with pytest.raises(UserError, match=r"before names 'frist', and the stage's references are"):
        phased.phased_dmd(context, before=(('frist', (1.0,)),), **options)


def test_samples_go_by_euler_steps_from_expert_to_expert():
    """Of denoisers that scale what they see, by hand; the last says what is clean."""

    def scaled(factor):
        def apply(variables, x, t, condition, **how):
            return denoiser.Prediction(factor * variables * x, {})

        return denoiser.Denoiser(PATH, apply)

    asked = [('a', scaled(0.5), 1.0), ('a', scaled(0.5), 0.9), ('', scaled(0.25), 0.6)]
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    found = phase_samples.by_phases(asked)({'a': 1.6, '': 3.0}, x, {}, jax.random.key(0))
    wanted = x
    for factor, t, to in ((0.8, 1.0, 0.9), (0.8, 0.9, 0.6)):
        clean = factor * wanted
        noise = (wanted - (1 - t) * clean) / t
        wanted = (1 - to) * clean + to * noise
    np.testing.assert_allclose(found, 0.75 * wanted, rtol=1e-5)
