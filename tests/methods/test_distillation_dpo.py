"""Preferences in score distillation: directions by hand and by quadrature, a step, its controls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, stats

from kd.claims import seeds
from kd.data.builders import scenes
from kd.errors import UserError
from kd.losses import point_clouds, score_distillation
from kd.losses.schedule import discrete, local
from kd.methods.diffusion.distillation_dpo import distillation_dpo
from kd.models.denoiser import Denoised
from kd.models.point_net import PointNet
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, LR = 6, 0.5
SPEC = {
    'input': jax.ShapeDtypeStruct((4, 2), jnp.float32),
    'partial': jax.ShapeDtypeStruct((2, 2), jnp.float32),
}


def test_chamfer_against_loops_and_what_it_does_not_see():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 7, 2))
    apart = np.linalg.norm(a[:, :, None] - b[:, None], axis=-1)
    wanted = [(d.min(1).mean() + d.min(0).mean()) / 2 for d in apart]
    np.testing.assert_allclose(point_clouds.chamfer(jnp.asarray(a), b), wanted, rtol=1e-5)
    np.testing.assert_allclose(point_clouds.chamfer(jnp.asarray(b), a), wanted, rtol=1e-5)
    np.testing.assert_allclose(point_clouds.chamfer(a[:, ::-1], b), wanted, rtol=1e-5)
    point, step = jnp.asarray(a[0, :1]), jnp.array([[3.0, 4.0]])
    assert float(point_clouds.chamfer(point, point + step)) == pytest.approx(5, rel=1e-5)
    same, slope = jax.value_and_grad(point_clouds.chamfer)(point, point)
    assert float(same) == 0
    assert (np.asarray(slope) == 0).all()


def test_pairs_are_ranked_whichever_comes_first():
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 3, 2))
    cost = jnp.abs(x).sum((1, 2)), jnp.abs(y).sum((1, 2))
    winner, loser, won = point_clouds.rank_pair(x, y, cost)
    again = point_clouds.rank_pair(y, x, cost[::-1])
    np.testing.assert_array_equal(winner, again[0])
    np.testing.assert_array_equal(loser, again[1])
    assert (np.asarray(won) != np.asarray(again[2])).all()
    assert (jnp.abs(winner).sum((1, 2)) <= jnp.abs(loser).sum((1, 2))).all()
    assert 0 < won.sum() < 8


def test_where_generator_and_teacher_agree_the_released_sign_lowers_the_reward():
    """N(0, 1), the reward is x, the winner the larger of two: by quadrature."""
    phi, cumulative = stats.norm.pdf, stats.norm.cdf

    def mean(f):
        return integrate.quad(f, -9, 9)[0]

    # Scores less that of N(0, 1): the laws are 2 phi Phi and 2 phi (1 - Phi).
    winner = lambda x: phi(x) / cumulative(x)  # noqa: E731
    loser = lambda x: -phi(x) / cumulative(-x)  # noqa: E731
    pushed = mean(lambda x: -winner(x) * 2 * phi(x) * cumulative(x))
    assert pushed == pytest.approx(-1 / np.sqrt(np.pi), abs=1e-6)
    assert mean(lambda x: -loser(x) * 2 * phi(x) * cumulative(-x)) == pytest.approx(-pushed)
    # At sigma = 1 the noise is minus the score; samples move against the direction.
    x = np.linspace(-6, 6, 4001)
    eps = x, x - winner(x), x - loser(x)
    for gamma, wanted in ((0.0, 0.0), (1.0, 1.8064), (0.5, 0.9032)):
        against = -np.asarray(score_distillation.preferred(*map(jnp.asarray, eps), gamma))
        found = integrate.simpson(against * phi(x), x=x)
        assert found == pytest.approx(wanted, abs=2e-3)


def test_points_that_move_do_not_shrink_and_have_the_variance_of_the_schedule():
    path, ddpm = local(), discrete('linear', 3.5e-5, 0.007)
    x, e = jax.random.normal(jax.random.key(1), (2, 500, 8, 2))
    t = jnp.full(500, 700)
    apart = path.mix(x, e, t) - x
    assert float(apart.var()) == pytest.approx(float(1 - ddpm.alpha(700) ** 2), rel=0.02)
    assert float(ddpm.alpha(999) ** 2) == pytest.approx(0.0294, abs=2e-4)
    np.testing.assert_allclose(path.mix(x, 0 * e, t), x)


@pytest.fixture(scope='module')
def network():
    module = Denoised(PointNet(width=8, depth=1), local(), 'eps')
    return from_linen(module, *module.example_inputs(SPEC))


@pytest.fixture(scope='module')
def teacher(network):
    begun = jax.jit(network.init)(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), begun)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((B, *x.shape)), x.dtype)
            for name, x in SPEC.items()}  # fmt: skip


def method(network, **options):
    context = seeds.context(
        network=network, teacher=network, spec=SPEC, steps=4, tx=optax.sgd(LR)
    )  # fmt: skip
    given = dict(times=(999,), optimizer=dict(name='sgd', lr=0.0), updates=1)
    return distillation_dpo(context, **given | options)


def begun(made, teacher, moved=0.0):
    """A state whose assistants are not the teacher."""
    state = jax.jit(made.init)(jax.random.key(0), {'teacher': teacher})
    helpers = {
        name: jax.tree.map(lambda x, by=by: x + by * moved, tree)
        for (name, tree), by in zip(state.params['assistants'].items(), (2.0, 1.0), strict=True)
    }
    assert sorted(helpers) == ['loser', 'winner']
    return state.replace(params=state.params | {'assistants': helpers})


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_a_step_of_each_form_against_one_by_hand(network, teacher, batch):
    """Assistants have the rate 0, so that the generator's move stands alone."""
    path = local()
    made = {form: method(network, form=form, kappa=0.5) for form in ('preferred', 'repaired')}
    state = begun(made['preferred'], teacher, 0.05)
    keys = jax.random.split(jax.random.fold_in(state.step_key(), 1))

    def mu(params, x, t):
        return network.apply({'params': params}, t, x, partial=batch['partial']).logits

    def samples(params):
        z = jax.random.normal(jax.random.split(keys[0], 4)[0], (B, 4, 2))
        start, noise = jnp.repeat(batch['partial'], 2, axis=1), path.sigma(999) * z
        x, y = (mu(params, start + scale * noise, jnp.full(B, 999.0)) for scale in (1.0, 1.1))
        away = [
            jnp.linalg.norm(jax.lax.stop_gradient(c)[:, :, None] - batch['input'][:, None], axis=-1)
            for c in (x, y)
        ]
        first, second = ((d.min(1).mean(1) + d.min(2).mean(1)) / 2 for d in away)
        x_wins = (first <= second)[:, None, None]
        return jnp.where(x_wins, x, y), jnp.where(x_wins, y, x)

    time_key, noise_key = jax.random.split(keys[1])
    t = jnp.round(999 * jax.random.uniform(time_key, (B,)))
    noise = jax.random.normal(noise_key, (B, 4, 2))

    def loss(params, form):
        def eps(params, x):
            x_t = x + path.sigma(t)[:, None, None] * noise
            return (x_t - mu(params, x_t, t)) / path.sigma(t)[:, None, None]

        total = 0.0
        for x, name, sign in zip(samples(params), ('winner', 'loser'), (1, -0.5), strict=True):
            still = jax.lax.stop_gradient(x)
            real, w, l = (
                eps(p, still)
                for p in (teacher['params'], *(state.params['assistants'][n] for n in
                                               ('winner', 'loser')))
            )  # fmt: skip
            own = w if name == 'winner' else l
            d = real - (w + l) / 2 + w - l if form == 'preferred' else sign * (real - own)
            total += (jax.lax.stop_gradient(d) * x).mean((1, 2)).mean()
        return total

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    for form, each in made.items():
        after, _ = jax.jit(each.step)(state, batch)
        wanted = jax.tree.map(
            lambda x, g: x - LR * g, state.params['generator'],
            slope(state.params['generator'], form),
        )  # fmt: skip
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-4, atol=1e-4),
            after.params['generator'], wanted,
        )  # fmt: skip
        assert not same(after.params['generator'], state.params['generator'])
        assert same(after.params['assistants'], state.params['assistants'])

    # Assistants that are the teacher: no direction at all.
    still = begun(made['preferred'], teacher)
    step = jax.jit(made['preferred'].step)
    assert same(step(still, batch)[0].params['generator'], still.params['generator'])


def test_the_released_form_has_a_loss_that_moves_and_no_gradient(network, teacher, batch):
    made = method(network, form='released', optimizer=dict(name='sgd', lr=0.1), updates=2)
    state = begun(made, teacher, 0.05)
    step = jax.jit(made.step)
    seen = []
    for _ in range(2):
        after, metrics = step(state, batch)
        assert same(after.params['generator'], state.params['generator'])
        assert float(metrics['generator/grad_norm'].total) == 0
        seen.append(float(metrics['generator/loss'].total))
        # Two moves, each on pairs of its own.
        assert float(metrics['assistants/winner'].count) == 2 * B
        assert not same(after.params['assistants'], state.params['assistants'])
        state = after
    assert seen[0] != seen[1] != 0


def test_spirals_lie_on_their_curve_and_boxes_are_seen_from_the_origin():
    drawn = scenes.make('spiral', 'test', count=500)
    curve = scenes.on_spiral(np.linspace(0, 1, 2000))
    away = np.linalg.norm(drawn['input'] - curve, axis=-1).min(1)
    assert np.sqrt(np.mean(away**2)) == pytest.approx(0.05, rel=0.15)
    assert (drawn['partial'] - drawn['input']).std() == pytest.approx(scenes.NOISE, rel=0.06)
    boxes = scenes.make('boxes', 'test', count=4)
    whole, seen = boxes['input'], boxes['partial']
    assert whole.shape == (4, 128, 2)
    assert seen.shape == (4, 32, 2)
    for cloud, part in zip(whole, seen, strict=True):
        # What is seen are points of the scene, the nearest of all among them.
        assert (np.abs(part[:, None] - cloud).sum(-1).min(1) == 0).all()
        assert np.linalg.norm(part, axis=1).min() == np.linalg.norm(cloud, axis=1).min()
    with pytest.raises(Exception, match=r"scenes are \['spiral', 'boxes'\]"):
        scenes.make('cubes', 'test')


def test_clouds_that_do_not_repeat(network, teacher, batch):
    made = method(network)
    state = begun(made, teacher)
    with pytest.raises(UserError, match='whole clouds have 4 points, partial ones 3'):
        made.step(state, batch | {'partial': jnp.zeros((B, 3, 2))})
