"""Schedules and conversions against closed forms, published tables and the flows' own algebra."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import interpolant, schedule, score_distillation
from kd.sampling import times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SCHEDULES = {
    'edm': (schedule.edm, [0.01, 1.0, 30.0]),
    'flow': (schedule.flow, [0.1, 0.5, 0.95]),
    'sd': (schedule.discrete, [3.0, 400.0, 990.0]),
    'dit': (lambda: schedule.discrete('linear', 1e-4, 0.02), [3.0, 400.0, 990.0]),
    'cosine': (lambda: schedule.discrete('cosine'), [3.0, 400.0, 990.0]),
    'residual_shift': (schedule.residual_shift, [0.0, 7.0, 14.0]),
    'trigonometric': (lambda: schedule.of_interpolant('trigonometric', 0.6), [0.1, 0.5, 0.95]),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=SCHEDULES)
def made(request):
    build, t = SCHEDULES[request.param]
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 4, 2))
    # Equal arguments give one object, which networks are compared by.
    assert build() is build()
    return build(), jnp.asarray(t), x0, eps


def test_every_kind_becomes_every_other(made):
    s, t, x0, eps = made
    alpha, sigma = (np.asarray(f(t))[:, None, None] for f in (s.alpha, s.sigma))
    x_t = s.mix(x0, eps, t)
    np.testing.assert_allclose(x_t, alpha * x0 + sigma * eps, rtol=1e-12)
    kinds = {
        'x0': x0,
        'eps': eps,
        'v': alpha * eps - sigma * x0,
        'flow': eps - x0,
        'score': -eps / sigma,
    }
    assert set(kinds) == set(schedule.KINDS)
    for kind, prediction in kinds.items():
        for to, wanted in kinds.items():
            found = schedule.convert(s, prediction, x_t, t, kind, to)
            np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


def test_the_score_of_a_gaussian(made):
    s, t, x0, eps = made
    deviation = 0.7
    x_t = s.mix(deviation * x0, eps, t)
    alpha, sigma = (np.asarray(f(t))[:, None, None] for f in (s.alpha, s.sigma))
    variance = alpha**2 * deviation**2 + sigma**2
    mean = alpha * deviation**2 / variance * x_t
    score = schedule.convert(s, mean, x_t, t, 'x0', 'score')
    np.testing.assert_allclose(score, -x_t / variance, rtol=1e-9)


def test_guidance_is_the_same_in_every_kind(made):
    s, t, x0, eps = made
    x_t = s.mix(x0, eps, t)
    conditional, unconditional = x0 + 0.3, x0 - 0.1

    def guided(a, b):
        return b + 4.0 * (a - b)

    wanted = guided(conditional, unconditional)
    for kind in schedule.KINDS:
        a, b = (schedule.convert(s, x, x_t, t, 'x0', kind) for x in (conditional, unconditional))
        found = schedule.convert(s, guided(a, b), x_t, t, kind, 'x0')
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def test_half_precision_is_converted_in_single(made):
    s, t, x0, eps = made
    x_t = s.mix(x0, eps, t).astype(jnp.bfloat16)
    found = schedule.convert(s, jnp.asarray(eps, jnp.bfloat16), x_t, t, 'eps', 'x0')
    assert found.dtype == jnp.float64
    single = schedule.convert(s, x_t, x_t, t.astype(jnp.float32), 'eps', 'x0')
    assert single.dtype == jnp.float32


def test_noise_in_two_steps_is_noise_in_one(made):
    s, t, *_ = made
    low = t[:2]
    a, b = s.bridge(low, t[1:])
    np.testing.assert_allclose(a * s.alpha(low), s.alpha(t[1:]), rtol=1e-10)
    total = (a * s.sigma(low)) ** 2 + b**2
    np.testing.assert_allclose(total, s.sigma(t[1:]) ** 2, rtol=1e-10)


def test_published_tables():
    sd = schedule.discrete()
    # Stable Diffusion keeps .068 of the data at its noisiest.
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    wanted = np.exp(np.cumsum(np.log1p(-betas)))[[0, 499, 999]]
    np.testing.assert_allclose(wanted[-1] ** 0.5, 0.068, atol=5e-4)
    bar = np.asarray(sd.alpha(jnp.asarray([0.0, 499.0, 999.0]))) ** 2
    np.testing.assert_allclose(bar, wanted, rtol=1e-10)
    zero = schedule.discrete(zero_terminal=True)
    np.testing.assert_allclose(
        zero.alpha(jnp.asarray([0.0, 999.0])), [np.sqrt(0.99915), 0], atol=1e-12
    )
    with pytest.raises(ValueError, match="got 'quadratic'"):
        schedule.discrete('quadratic')


@pytest.mark.parametrize('name', interpolant.INTERPOLANTS)
def test_flows_of_this_library_run_the_other_way(name):
    path, s = interpolant.get_interpolant(name), schedule.of_interpolant(name, 0.6)
    rng = np.random.default_rng(0)
    x1, unit = rng.standard_normal((2, 3, 4))
    own = jnp.asarray([0.1, 0.5, 0.9])
    state, velocity = path.point(own, 0.6 * unit, x1), path.velocity(own, 0.6 * unit, x1)
    np.testing.assert_allclose(s.mix(x1, unit, 1 - own), state, rtol=1e-10)
    np.testing.assert_allclose(path.to_data(own, state, velocity), x1, rtol=1e-8)
    noise = path.to_noise(own, state, velocity)
    found = schedule.convert(s, x1, state, 1 - own, 'x0', 'eps')
    np.testing.assert_allclose(0.6 * found, noise, rtol=1e-8)
    np.testing.assert_allclose(s.condition(1 - own), own, rtol=1e-12)


def test_weights_of_denoising_are_squared_errors_of_each_kind(made):
    s, t, x0, eps = made
    x_t, guess = s.mix(x0, eps, t), x0 + 0.1 * eps**2
    for kind in ('x0', 'eps', 'v', 'flow'):
        one, other = (schedule.convert(s, x, x_t, t, 'x0', kind) for x in (x0, guess))
        wanted = np.mean(np.square(one - other), axis=(1, 2))
        found = score_distillation.denoising(guess, x0, s, t, kind)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # An EDM network computes (x0 - c_skip x_t) / c_out, whatever sigma_data is.
    if s.name == 'edm':
        sigma, data = np.asarray(t)[:, None, None], 0.4
        out = sigma * data / np.sqrt(sigma**2 + data**2)
        wanted = np.mean(np.square((guess - x0) / out), axis=(1, 2))
        found = score_distillation.denoising(guess, x0, s, t, 'edm', data)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    with pytest.raises(ValueError, match="got 'snr'"):
        score_distillation.denoising(guess, x0, s, t, 'snr')


# Clocks


def test_karras_sigmas_of_the_paper():
    clock = times.karras()
    i = np.arange(18)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times.grid(clock, 18), wanted, rtol=1e-10)
    np.testing.assert_allclose(times.grid(clock, 1), [80.0])
    with pytest.raises(ValueError, match='steps=0'):
        times.grid(clock, 0)


def test_a_rank_is_the_inverse_of_a_clock_and_a_shift_is_applied_once():
    u = jnp.linspace(0.0, 1.0, 11)
    for clock in (times.karras(0.02, 5.0), times.even(schedule.flow())):
        for shift in (1.0, 3.0):
            moved = times.shifted(clock, shift)
            np.testing.assert_allclose(moved.rank(moved.at(u)), u, atol=1e-9)
    # Wan and Self-Forcing: shift 5 of 1, .75, .5, .25.
    grid = times.grid(times.shifted(times.even(schedule.flow()), 5.0), 4, last=0.25)
    np.testing.assert_allclose(grid, [1, 0.9375, 0.8333333, 0.625], rtol=1e-6)


def test_laws_draw_what_they_say():
    clock, n = times.karras(0.02, 5.0), 40_000
    level = jnp.full(n, 0.8)
    key = jax.random.key(0)
    laws = {
        (0.02, 0.98): times.uniform(clock, 0.02, 0.98),
        (0.1, float(clock.rank(0.8))): times.cleaner(clock, 0.1),
        (float(clock.rank(0.8)), 0.9): times.noisier(clock, 0.9),
    }
    for (low, high), law in laws.items():
        u = np.sort(np.asarray(clock.rank(law(key, level))))
        wanted = low + (high - low) * (np.arange(n) + 0.5) / n
        # Kolmogorov and Smirnov at one in a thousand.
        assert np.abs(u - wanted).max() < 1.95 / np.sqrt(n) * (high - low)
    drawn = np.asarray(times.lognormal(-1.2, 1.2)(key, level))
    assert abs(np.log(drawn).mean() + 1.2) < 0.03
    assert abs(np.log(drawn).std() - 1.2) < 0.03
    chosen = np.asarray(times.among((5.0, 0.8))(key, level))
    np.testing.assert_allclose(np.unique(chosen), [0.8, 5.0], rtol=1e-6)
    assert abs((chosen > 1).mean() - 0.5) < 0.02
    # Integer times are integers, both ends among them.
    whole = np.asarray(times.uniform(times.even(schedule.discrete()), 0.02, 0.98)(key, level))
    assert (whole == whole.round()).all()
    assert (whole.min(), whole.max()) == (20, 979)


def test_grids_of_integer_times_are_those_of_diffusers():
    sd = schedule.discrete()
    assert list(times.spaced(sd, 4, 'leading')) == [751, 501, 251, 1]
    assert list(times.spaced(sd, 4, 'trailing')) == [999, 749, 499, 249]
    assert list(times.spaced(sd, 4, 'linspace')) == [999, 666, 333, 0]
    with pytest.raises(ValueError, match="got 'even'"):
        times.spaced(sd, 4, 'even')
    with pytest.raises(ValueError, match="'edm' are no integers"):
        times.spaced(schedule.edm(), 4)


# Of x0, eps, v, velocity and score, by whatever names: a line of each.
CONVERSIONS = {
    r'\(\w+ - \w+ \* \w+\) / \w+': 'eps = (x_t - alpha * x0) / sigma',
    r'\(\w+ - \(1 - \w+\) \* \w+\) / \w+': 'eps = (x - (1 - t) * data) / t',
    r'sqrt\(1(\.0)? ?- ?\w+\) \* \w*(eps|noise)': 'x = a * x0 + jnp.sqrt(1 - ab) * noise',
    r'\w+ \* \w*eps\w* - \w+ \* \w+': 'v = alpha * eps - sigma * x0',
    r'\w+ \* \w*x\w* - \w+ \* (v|\w*eps\w*)\b': 'x0 = alpha * x - sigma * v',
    r'(eps|noise) - (x0|data|clean)\b': 'u = noise - x0',
    r'\w+ - \w+ \* (u|velocity|flow)\b': 'x0 = x - t * u',
    r'-\w*(eps|noise)\w* / \w+': 'score = -eps / sigma',
}


def code_of(text):
    """Each expression in one way, without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, 'body', None), list):
            node.body = [
                each for each in node.body
                if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ] or [ast.Pass()]  # fmt: skip
    return ast.unparse(tree)


def test_no_other_conversion_stands_anywhere():
    """Of what networks say there is one table, beside the flows' own, which is held to it here."""
    for form, line in CONVERSIONS.items():
        assert re.search(form, code_of(line)), line
    package, found = Path(schedule.__file__).parents[1], {}
    for file in package.rglob('*.py'):
        code = code_of(file.read_text())
        hits = [hit[0] for form in CONVERSIONS for hit in re.finditer(form, code)]
        if hits:
            found[str(file.relative_to(package))] = hits
    assert set(found) == {'losses/schedule.py', 'losses/interpolant.py'}, found
