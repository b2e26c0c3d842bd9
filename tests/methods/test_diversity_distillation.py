"""Hybrids of a base and a distilled generator, and generators that learn where a flow ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import pdist

from kd.claims import seeds
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.evaluators import fidelity
from kd.losses import schedule
from kd.methods.diffusion import end_points
from kd.models import adapters
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.sampling.generator import Generator
from kd.sampling.hybrid import Hybrid, hybrid, switch_index

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, LEVELS, B = schedule.edm(0.02, 5.0), (5.0, 2.4, 1.0, 0.41), 64
MIXTURE = mixtures.pairs()
EXACT = mixtures.exact_denoiser(MIXTURE, PATH)
# Another one, which stands for what has been distilled.
OTHER = mixtures.exact_denoiser(MIXTURE._replace(means=MIXTURE.means + 0.5), PATH)
LABEL = {'label': jnp.arange(B) % 4}
KEY = jax.random.key(3)


def drawn(made, *variables):
    return jax.jit(lambda key: made.sample(*variables, LABEL, key, (B, 2)))(KEY)


@pytest.mark.parametrize('step', [diffusion.restart(), diffusion.ddim(), diffusion.ddim(1.0)])
def test_a_student_alone_and_a_base_that_is_the_student(step):
    """Switch 0 is the student's own sampler; of two equal models every switch is."""
    base, student = (Generator(d, LEVELS, step) for d in (EXACT, OTHER))
    wanted = drawn(student, {})
    np.testing.assert_allclose(drawn(Hybrid(base, student, 0), {}, {}), wanted, atol=1e-6)
    for switch in (1, 3):
        same = drawn(Hybrid(student, student, switch), {}, {})
        np.testing.assert_allclose(same, wanted, atol=1e-5)
    assert np.abs(drawn(Hybrid(base, student, 1), {}, {}) - wanted).max() > 1e-3


def test_who_is_asked_at_which_time():
    asked = []

    def recorded(name, of):
        def apply(variables, x, t, condition, **rest):
            asked.append((name, len(x)))
            return of.apply(variables, x, t, condition, **rest)

        return of._replace(apply=apply)

    own = Generator(recorded('student', OTHER), LEVELS)
    plain, guided = (
        Generator(denoisers.guided(recorded('base', EXACT), scale), LEVELS) for scale in (1.0, 4.0)
    )
    condition = {'label': LABEL['label'][:4]}
    for base, switch, skip, wanted in (
        (plain, 1, False, [('base', 4)] + 3 * [('student', 4)]),
        (plain, 2, False, 2 * [('base', 4)] + 2 * [('student', 4)]),
        # Guidance is one call on twice the rows; none is one on the rows.
        (guided, 1, False, [('base', 8)] + 3 * [('student', 4)]),
        (plain, 1, True, 3 * [('student', 4)]),
    ):
        asked.clear()
        made = hybrid(base, own, switch, skip=skip, where='here')
        made.sample({}, {}, condition, KEY, (4, 2))
        assert asked == wanted
    # Without the first step there is noise at the student's second time.
    assert (made.first, made.steps) == (2.4, 0)


def test_the_released_grids_leave_the_base_no_step_and_equal_grids_leave_it_one():
    """DDIM's 'leading' times against those of LCM: 751 is already the nearest to 759."""
    lcm = [999, 759, 499, 259]
    stable = schedule.discrete()
    leading = times.spaced(stable, 4, 'leading')
    assert leading.tolist() == [751, 501, 251, 1]
    assert switch_index(leading, lcm, 1) == 0
    twenty = times.spaced(stable, 20, 'leading')
    assert (twenty[0], switch_index(twenty, lcm, 1)) == (951, 4)
    trailing = times.spaced(stable, 4, 'trailing')
    assert switch_index(trailing, lcm, 1) == 1
    for k in range(4):
        assert switch_index(lcm, lcm, k) == k
    # So the released default is to skip a step.
    leading = Generator(EXACT, (1.0, 0.5, 0.25, 0.1))
    student = Generator(OTHER, (5.0, 1.1, 0.5, 0.2))
    released, skipped = Hybrid(leading, student), Hybrid(leading, student, 1, 0)
    assert released.steps == 0
    np.testing.assert_array_equal(drawn(released, {}, {}), drawn(skipped, {}, {}))


def test_a_switch_that_is_not_there_and_two_schedules():
    student = Generator(OTHER, LEVELS)
    with pytest.raises(UserError, match=r'here\.switch=4: the generator has 4 times'):
        hybrid(student, student, 4, where='here')
    flow = Generator(mixtures.exact_denoiser(MIXTURE, schedule.flow()), (1.0, 0.5))
    with pytest.raises(UserError, match="two schedules of noise, 'flow' and 'edm'"):
        hybrid(flow, student, where='here')


def test_what_is_said_along_the_way_is_the_posterior_mean_and_at_last_the_sample():
    """Of one Gaussian, on a variance-preserving path: mu + a S / (a^2 S + s^2) (x - a mu)."""
    path = schedule.discrete()
    mean, deviation = np.array([[0.7, -0.4]]), 0.3
    single = mixtures.Mixture(mean, deviation, np.zeros(1, int))
    denoise = mixtures.exact_denoiser(single, path).bind({})
    grid = times.spaced(path, 5, 'trailing')
    z = diffusion.noise(path, KEY, (B, 2), grid[0])
    states = diffusion.sample(path, denoise, z, grid, KEY, trajectory=True)
    said = diffusion.said(denoise, states, grid)
    np.testing.assert_allclose(said[-1], states[-1], atol=1e-6)
    for t, x, found in zip(grid, states[:-1], said, strict=True):
        a, s = float(path.alpha(t)), float(path.sigma(t))
        wanted = mean + a * deviation**2 / (a**2 * deviation**2 + s**2) * (x - a * mean)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    curve = fidelity.commitment(said, states[-1])
    by_hand = np.sqrt(((np.asarray(said) - np.asarray(states[-1])) ** 2).sum(-1)).mean(-1)
    np.testing.assert_allclose(curve, by_hand, atol=1e-6)
    assert curve[-1] < 1e-6 < curve[0]


def test_with_the_noise_that_was_drawn_the_clean_example_comes_back():
    path, x0 = schedule.discrete(), jax.random.normal(KEY, (6, 2))
    for t in (0, 500, 999):
        eps = jax.random.normal(jax.random.key(t), x0.shape)
        x_t = path.mix(x0, eps, jnp.full(6, t))
        found = schedule.convert(path, eps, x_t, jnp.full(6, t), 'eps', 'x0')
        np.testing.assert_allclose(found, x0, atol=5e-5)


def test_diversity_within_classes():
    rng = np.random.default_rng(0)
    x, label = rng.standard_normal((30, 3)), np.arange(30) % 3
    wanted = np.mean([pdist(x[label == c]).mean() for c in range(3)])
    assert fidelity.class_diversity(x, label) == pytest.approx(wanted)
    order = rng.permutation(30)
    assert fidelity.class_diversity(2 * x[order], label[order]) == pytest.approx(2 * wanted)
    assert fidelity.class_diversity(np.ones((4, 2)), np.zeros(4)) == 0


def test_an_adapter_moves_a_base_and_what_was_distilled_from_it_alike():
    """W + s A B: additive in s, none at 0, and the same change of a linear layer's output."""
    rng = np.random.default_rng(0)
    base, other, x = (
        jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((5, 4),) * 2 + ((3, 5),)
    )
    adapter = {
        'dense': {adapters.DOWN: jnp.ones((5, 2)), adapters.UP: jnp.asarray(rng.random((2, 4)))}
    }

    def with_it(kernel, *scales):
        tree = {'dense': {'kernel': kernel}}
        for scale in scales:
            tree = adapters.merged(tree, adapter, scale)
        return tree['dense']['kernel']

    np.testing.assert_array_equal(with_it(base, 0.0), base)
    np.testing.assert_allclose(with_it(base, 0.7, -1.5), with_it(base, -0.8), atol=1e-5)
    of_base, of_other = (x @ with_it(w, 2.0) - x @ w for w in (base, other))
    np.testing.assert_allclose(of_base, of_other, atol=1e-4)


def test_a_flow_is_solved_to_its_end_from_times_of_each_example():
    """Of one Gaussian the flow is known: mu + S / sqrt(S^2 + t^2) (x - mu)."""
    mean, deviation = np.array([[0.5, 0.1]]), 0.4
    single = mixtures.Mixture(mean, deviation, np.zeros(1, int))
    teacher = mixtures.exact_denoiser(single, PATH)
    t = jnp.asarray([5.0, 1.0, 0.41, 0.1])
    x = jnp.asarray(mean, jnp.float32) + t[:, None] * jax.random.normal(KEY, (4, 2))
    solve = end_points.solver_of(teacher, diffusion.heun(), 24)
    found = jax.jit(lambda x, t: solve({}, x, t, {}))(x, t)
    # Clean data has the deviation; what a denoiser says at the last time has a little less.
    wanted = mean + deviation / np.sqrt(deviation**2 + t[:, None] ** 2) * (x - mean)
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_the_regression_by_hand_and_what_stays_as_it_is():
    module = Denoised(VelocityMLP(width=8, depth=1), PATH, precondition='edm')
    spec = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
    network = from_linen(module, *module.example_inputs(spec))
    context = seeds.context(network=network, teacher=network, tx=optax.sgd(0.1), spec=spec, steps=4)
    made = end_points.end_points(context, times=LEVELS, solver_steps=1)
    teacher = jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(5)))
    state = jax.jit(made.init)(jax.random.key(0), {'teacher': teacher})
    batch = {'input': jax.random.normal(KEY, (B, 2))}
    found, metrics = jax.jit(made.step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, found.frozen['teacher'], teacher)
    # With one step the end is what the teacher says, and from the teacher nothing is to be learnt.
    at_end = state.replace(params={'network': teacher['params']})
    _, none = jax.jit(made.step)(at_end, batch)
    assert float(none['loss'].total) == pytest.approx(0, abs=1e-8)
    assert float(metrics['loss'].total) > 1e-3
    change = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), found.params, state.params)
    assert max(jax.tree.leaves(change)) > 0
