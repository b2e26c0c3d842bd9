"""Denoisers, guidance, samplers and rollouts: against closed forms, loops in NumPy and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.builders import mixtures
from kd.errors import UserError
from kd.losses import schedule
from kd.models.denoiser import denoiser as denoiser_module
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser, diffusion, generator, times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

MLP = dict(name='kd.models.velocity_mlp.VelocityMLP', width=16, depth=2)
SCHEDULES = {
    'edm': (schedule.edm, np.geomspace(20.0, 0.05, 80)),
    'flow': (schedule.flow, np.linspace(0.99, 0.01, 80)),
    'discrete': (schedule.discrete, np.arange(999, 0, -6)),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def gaussian(path, mean, deviation):
    """The denoiser of N(mean, deviation^2)."""
    one = mixtures.Mixture(np.full((1, 2), mean), deviation, np.zeros(1, int))
    return mixtures.exact_denoiser(one, path)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_exact_denoiser_is_the_gradient_of_the_log_density(name):
    """Tweedie: E[x0 | x_t] = (x_t + sigma^2 grad log p_t) / alpha, of each class and of all."""
    path, grid = SCHEDULES[name][0](), SCHEDULES[name][1]
    mixture = mixtures.pairs(3)
    exact = mixtures.exact_denoiser(mixture, path)
    t = jnp.asarray(grid[[10, 40, 70]], jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))
    for label in (0, 1, 3):
        inside = (mixture.labels == label) | (label == 3)

        def log_density(x, t, inside=inside):
            alpha, sigma = path.alpha(t), path.sigma(t)
            variance = (alpha * mixture.deviation) ** 2 + sigma**2
            square = jnp.sum((x - alpha * mixture.means[inside]) ** 2, -1)
            return jax.nn.logsumexp(-0.5 * square / variance)

        score = jax.vmap(jax.grad(log_density))(x, t)
        found = exact.apply({}, x, t, {'label': jnp.full(3, label)}).x0
        wanted = schedule.convert(path, score, x, t, 'score', 'x0')
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
    # Without a label it is the null class.
    np.testing.assert_allclose(exact.apply({}, x, t, {}).x0, found)


def test_draws_of_a_mixture_are_of_their_classes():
    mixture = mixtures.ring(8, classes=4)
    points, label = mixture.draw(np.random.default_rng(0), 4_000)
    nearest = np.argmin(((points[:, None] - mixture.means) ** 2).sum(-1), axis=1)
    assert (mixture.labels[nearest] == label).all()
    assert mixture.num_classes == 4
    np.testing.assert_allclose(np.linalg.norm(mixture.means, axis=1), 1.4)
    board = mixtures.grid(5, 2.0)
    assert len(board.means) == 25
    np.testing.assert_allclose(board.means.mean(0), 0, atol=1e-12)


def test_preconditioning_against_the_formula():
    made = denoiser_module(
        network=MLP,
        schedule=dict(name='kd.losses.schedule.edm'),
        precondition='edm',
        sigma_data=0.4,
    )
    inner = VelocityMLP(width=16, depth=2)
    network = from_linen(made, *made.example_inputs({'input': jax.ShapeDtypeStruct((2,), float)}))
    variables = jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(0)))
    # The variables are those of the network in it.
    own = inner.init(jax.random.key(0), jnp.ones(1), jnp.ones(1), jnp.ones((1, 2)))
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    x, t = jnp.asarray([[0.3, -1.0], [2.0, 5.0]]), jnp.asarray([0.5, 7.0])
    total = np.sqrt(np.asarray(t) ** 2 + 0.16)[:, None]
    told = np.log(t) / 4
    raw = inner.apply(variables, told, told, x / total)
    wanted = 0.16 / total**2 * x + t[:, None] * 0.4 / total * raw
    of = denoiser.of_network(network)
    found = of.apply(variables, x, t, {}, capture=('hidden0',))
    np.testing.assert_allclose(found.x0, wanted, rtol=1e-6)
    assert found.features['hidden0'].shape == (2, 16)
    assert of.null is None


def test_a_shifted_preconditioning_leaves_what_has_the_least_noise():
    made = denoiser_module(
        network=MLP, schedule=dict(name='kd.losses.schedule.edm'), precondition='edm_shifted'
    )
    network = from_linen(made, *made.example_inputs({'input': jax.ShapeDtypeStruct((2,), float)}))
    variables = jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(0)))
    x = jnp.asarray([[0.3, -1.0]])
    found = denoiser.of_network(network).apply(variables, x, jnp.asarray([0.002]), {}).x0
    np.testing.assert_allclose(found, x, rtol=1e-12)


def test_a_flow_is_a_denoiser():
    module = VelocityMLP(width=16, depth=2, data_scale=0.6, num_classes=3)
    spec = {'input': jax.ShapeDtypeStruct((2,), float)}
    network = from_linen(module, *module.example_inputs(spec))
    variables = jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(0)))
    of = denoiser.of_network(network, {'interpolant': 'linear'})
    x, t, label = jnp.ones((2, 2)), jnp.asarray([0.3, 0.8]), jnp.asarray([0, 2])
    velocity = module.apply(variables, 1 - t, 1 - t, x, label=label)
    # Straight: x_t = (1 - t) x0 + t e and velocity x0 - e.
    np.testing.assert_allclose(
        of.apply(variables, x, t, {'label': label}).x0, x + t[:, None] * velocity
    )
    assert of.null == {'label': 3}
    np.testing.assert_allclose(of.schedule.sigma(t), 0.6 * t)
    classifier = from_linen(_Plain(), jax.ShapeDtypeStruct((1, 2), float))
    with pytest.raises(UserError, match=r'_Plain is no denoiser: wrap it in kd\.models'):
        denoiser.of_network(classifier)


class _Plain(VelocityMLP):
    def __call__(self, x, train=False):
        return x


def test_guidance_is_one_call_on_twice_the_rows():
    path = schedule.edm()
    exact, rows = mixtures.exact_denoiser(mixtures.pairs(4), path), []

    def counted(variables, x, *rest, **how):
        rows.append(len(x))
        return exact.apply(variables, x, *rest, **how)

    counting = exact._replace(apply=counted)
    x, t, label = jnp.ones((3, 2)), jnp.full(3, 0.7), jnp.asarray([0, 1, 2])
    told = exact.apply({}, x, t, {'label': label}).x0
    untold = exact.apply({}, x, t, {}).x0
    found = denoiser.guided(counting, 3.0).apply({}, x, t, {'label': label}).x0
    np.testing.assert_allclose(found, untold + 3.0 * (told - untold), rtol=1e-12)
    assert rows == [6]
    each = jnp.asarray([0.0, 1.0, 5.0])
    found = denoiser.guided(counting, each).apply({}, x, t, {'label': label}).x0
    np.testing.assert_allclose(found[:2], jnp.stack([untold[0], told[1]]), rtol=1e-12)
    # A scale of 1 is the conditional denoiser itself, called once.
    assert denoiser.guided(counting, 1.0) is counting
    with pytest.raises(UserError, match='this one has no null condition; give it num_classes'):
        denoiser.guided(exact._replace(null=None), 2.0).apply({}, x, t, {'label': label})


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('step', ['ddim', 'ancestral', 'heun', 'dpm_pp_2m'])
def test_samplers_carry_a_gaussian_to_a_gaussian(name, step):
    """Deterministic ones by the map that is known, the others by their moments."""
    path, grid = SCHEDULES[name][0](), SCHEDULES[name][1]
    mean, deviation = 0.3, 0.5
    denoise = gaussian(path, mean, deviation).bind({})
    n = 20_000
    alpha, sigma = (float(f(jnp.float64(grid[0]))) for f in (path.alpha, path.sigma))
    total = np.hypot(alpha * deviation, sigma)
    z = jnp.asarray(np.random.default_rng(0).standard_normal((n, 2)))
    x = alpha * mean + total * z
    run = jax.jit(
        lambda x, key: diffusion.sample(path, denoise, x, grid, key, step=diffusion.STEPS[step]())
    )
    found = np.asarray(run(x, jax.random.key(0)))
    if step == 'ancestral':
        np.testing.assert_allclose(found.mean(), mean, atol=0.02)
        # What is said at the last time is a mean, a little narrower than the data.
        np.testing.assert_allclose(found.std(), deviation, rtol=0.05)
    else:
        tolerance = {'ddim': 0.03, 'heun': 2e-3, 'dpm_pp_2m': 4e-3}[step]
        last = float(path.noise_to_signal(jnp.float64(grid[-1])))
        # The flow ends at the last time; the denoiser takes what noise is left there.
        left = deviation / np.hypot(deviation, last)
        np.testing.assert_allclose(
            found, mean + deviation * left * np.asarray(z), atol=4 * tolerance
        )


@pytest.mark.parametrize('step', ['ddim', 'ancestral', 'heun', 'dpm_pp_2m', 'restart'])
def test_where_nothing_is_left_of_the_data_a_step_goes_to_the_mean_and_the_noise(step):
    """The first time of a flow, and of a schedule with zero terminal signal."""
    for path, grid in (
        (schedule.flow(), (1.0, 0.6, 0.3)),
        (schedule.discrete(zero_terminal=True), (999.0, 600.0, 300.0)),
    ):
        denoise = gaussian(path, 0.3, 0.5).bind({})
        z = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))
        found = diffusion.sample(
            path, denoise, z, grid, jax.random.key(0), step=diffusion.STEPS[step](),
            trajectory=True,
        )  # fmt: skip
        assert np.isfinite(found).all()
        if step in ('ddim', 'dpm_pp_2m'):
            t = jnp.float64(grid[1])
            np.testing.assert_allclose(found[1], path.alpha(t) * 0.3 + path.sigma(t) * z, rtol=1e-6)


def test_first_and_second_order():
    """Halving the steps multiplies the error by 2, and by 4."""
    path = schedule.edm()
    denoise = gaussian(path, 0.0, 0.5).bind({})
    x = jnp.ones((1, 2))

    def error(step, n):
        grid = times.grid(times.karras(0.05, 5.0), n)
        found = diffusion.sample(
            path, denoise, x, grid, jax.random.key(0), step=diffusion.STEPS[step]()
        )
        end = np.hypot(0.5, 0.05) / np.hypot(0.5, 5.0) * 0.25 / (0.25 + 0.0025)
        return abs(float(found[0, 0]) - end)

    for step, wanted in (('ddim', 2.0), ('heun', 4.0), ('dpm_pp_2m', 4.0)):
        assert error(step, 41) / error(step, 81) == pytest.approx(wanted, rel=0.25)


def test_fresh_noise_of_ddim_is_that_of_ddpm():
    """One step of eta = 1 against the posterior of DDPM, arXiv:2006.11239, eqs. 6 and 7."""
    path = schedule.discrete()
    t, to = jnp.float64(500), jnp.float64(499)
    x = jnp.full((100_000, 1), 0.8)

    def denoise(x, t):
        return jnp.full_like(x, 0.3)

    moved, _ = diffusion.ddim(1.0).move(path, denoise, x, t, to, jax.random.key(0), ())
    bar, before = float(path.alpha(t)) ** 2, float(path.alpha(to)) ** 2
    beta = 1 - bar / before
    mean = (
        np.sqrt(before) * beta / (1 - bar) * 0.3
        + np.sqrt(1 - beta) * (1 - before) / (1 - bar) * 0.8
    )
    np.testing.assert_allclose(moved.mean(), mean, atol=2e-3)
    np.testing.assert_allclose(moved.var(), (1 - before) / (1 - bar) * beta, rtol=0.02)


def test_states_on_the_way_and_times_that_do_not_decrease():
    path = schedule.edm()
    denoise = gaussian(path, 0.0, 0.5).bind({})
    x = jnp.ones((2, 2))
    states = diffusion.sample(path, denoise, x, (5.0, 0.8), jax.random.key(0), trajectory=True)
    assert states.shape == (3, 2, 2)
    np.testing.assert_allclose(states[0], x)
    np.testing.assert_allclose(states[2], denoise(states[1], jnp.float32(0.8)), rtol=1e-6)
    with pytest.raises(ValueError, match=r'times must decrease, got \[0.8, 5.0\]'):
        diffusion.sample(path, denoise, x, (0.8, 5.0), jax.random.key(0))
    drawn = diffusion.noise(path, jax.random.key(0), (5_000, 2), 5.0)
    np.testing.assert_allclose(drawn.std(), 5.0, rtol=0.03)


# Rollouts


GRID = (5.0, 2.0, 0.8, 0.3)


def line(theta):
    """A generator with one parameter."""
    return lambda x, t: theta * jnp.tanh(x) + 0.1 * jnp.reshape(t, (-1, 1))


@pytest.mark.parametrize('exit', range(4))
def test_a_rollout_is_its_own_steps_and_one_call_with_gradient(exit):
    path, z, key = schedule.edm(), jnp.asarray([[3.0, -4.0], [6.0, 1.0]]), jax.random.key(3)

    def run(theta):
        return generator.rollout(path, line(theta), GRID, z, key, jnp.int32(exit))

    found = run(0.7)
    x = z
    for i in range(exit):
        mean = line(0.7)(x, jnp.full(2, GRID[i]))
        x = mean + GRID[i + 1] * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    np.testing.assert_allclose(found.input, x, rtol=1e-6)
    np.testing.assert_allclose(found.time, np.full(2, GRID[exit]), rtol=1e-6)
    np.testing.assert_allclose(found.x, line(0.7)(x, found.time), rtol=1e-6)
    # The gradient is that of the last call alone, and the input depends on the generator.
    gradient = jax.grad(lambda theta: run(theta).x.sum())(0.7)
    np.testing.assert_allclose(gradient, jnp.tanh(x).sum(), rtol=1e-6)
    assert (exit == 0) == bool((run(0.9).input == found.input).all())


def test_examples_that_end_at_times_of_their_own():
    """Each row is what it would be if all ended there."""
    path, z, key = schedule.edm(), jnp.asarray([[3.0, -4.0], [6.0, 1.0], [2.0, 5.0]]), 4

    def run(exit):
        return generator.rollout(path, line(0.7), GRID, z, jax.random.key(key), exit)

    exits = jnp.int32([2, 0, 1])
    found, whole = run(exits), [run(exit) for exit in exits]
    for row, one in enumerate(whole):
        jax.tree.map(
            lambda x, y, row=row: np.testing.assert_array_equal(x[row], y[row]), found, one
        )


def test_all_exits_are_one_program_with_as_many_calls_as_they_need():
    path, z = schedule.edm(), jnp.ones((2, 2))
    calls, traces = [], []

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * x

    @jax.jit
    def run(exit):
        traces.append(1)
        return generator.rollout(path, counted, GRID, z, jax.random.key(0), exit).x

    for exit in range(4):
        calls.clear()
        jax.block_until_ready(run(jnp.int32(exit)))
        jax.effects_barrier()
        assert len(calls) == exit + 1
    assert len(traces) == 1
