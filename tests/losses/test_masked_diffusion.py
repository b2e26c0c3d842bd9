"""Masking and its losses: against enumeration, Monte Carlo, closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from kd.losses import masked_diffusion as losses

pytestmark = pytest.mark.usefixtures('compiled_quickly')

K, MASK = 12, 12


@pytest.fixture(scope='module')
def rng():
    return np.random.default_rng(0)


def gaussian_visible(rng, token, r, size, count):
    """Whether `token` stays the largest coordinate of r e_k + noise, by the projection itself, at
    each of the signals to noise r; and which coordinate is the largest."""
    noise = rng.normal(size=(count, size))
    latent = [value * np.eye(size)[token] + noise for value in r]
    others = np.delete(np.arange(size), token)
    visible = np.stack([w[:, token] > w[:, others].max(1) for w in latent])
    return visible, np.stack([w.argmax(1) for w in latent])


def test_the_margin_law_is_that_of_monte_carlo_and_of_two_symbols(rng):
    for size in (2, 8, 27):
        noise = rng.normal(size=(400_000, size))
        margin = noise[:, 1:].max(1) - noise[:, 0]
        r = np.array([0.0, 1.0, 3.0])
        found = (margin[:, None] < r).mean(0)
        np.testing.assert_allclose(losses.margin_cdf(r, size), found, atol=3e-3)
        assert losses.margin_cdf(0.0, size) == pytest.approx(1 / size, abs=1e-12)
    np.testing.assert_allclose(losses.margin_cdf([0, 1, 3], 8), [0.125, 0.386, 0.918], atol=1e-3)
    r = np.linspace(-3, 6, 19)
    np.testing.assert_allclose(
        losses.margin_cdf(r, 2), special.ndtr(r / np.sqrt(2)), rtol=0, atol=1e-12
    )
    # At r = 6 a vocabulary of GPT-2 hides one symbol in twenty, one of 12 one in ten thousand.
    assert losses.margin_cdf(6.0, 50_257) == pytest.approx(0.955, abs=1e-3)


def test_its_inverse_is_one_and_refuses_what_no_gaussian_reaches():
    r = np.linspace(0, 6, 13)
    for size in (K, 50_257):
        back = losses.inverse_margin_cdf(losses.margin_cdf(r, size), size)
        np.testing.assert_allclose(back, r, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r'12 symbols a Gaussian path shows between 1 / 12 and 1'):
        losses.inverse_margin_cdf([0.5, 1 / 13], K)
    with pytest.raises(ValueError, match='shows between'):
        losses.inverse_margin_cdf(1.0, K)


def test_the_gaussian_path_and_one_uniform_have_one_law(rng):
    """Visibility at two times: marginals, thinning, and the joint table of both samplers."""
    alphas, count = np.array([0.6, 0.3]), 100_000
    r = losses.inverse_margin_cdf(alphas, K)
    tables = []
    for token in (0, 7):
        visible, largest = gaussian_visible(rng, token, r, K, count)
        error = 3 * np.sqrt(alphas * (1 - alphas) / count)
        assert (np.abs(visible.mean(1) - alphas) < error).all()
        # What is visible is the coordinate that is the largest.
        assert ((largest == token) == visible).all()
        assert (visible[1] <= visible[0]).all()
        tables.append([(visible[0] & visible[1]).sum(), (visible[0] & ~visible[1]).sum(),
                       (~visible[0]).sum()])  # fmt: skip
    tokens = rng.integers(0, K, (1, count))
    uniform = rng.random((1, count)).astype(np.float32)
    z_s, z_t = (losses.corrupt(uniform, tokens, alpha[None], MASK) for alpha in alphas)
    seen = [np.asarray(z != MASK)[0] for z in (z_s, z_t)]
    assert (seen[1] <= seen[0]).all()
    assert (np.asarray(z_s)[0][seen[0]] == tokens[0][seen[0]]).all()
    hidden = ~seen[1]
    thinning = (alphas[0] - alphas[1]) / (1 - alphas[1])
    error = 3 * np.sqrt(thinning * (1 - thinning) / hidden.sum())
    assert abs(seen[0][hidden].mean() - thinning) < error
    tables.append([(seen[0] & seen[1]).sum(), (seen[0] & ~seen[1]).sum(), (~seen[0]).sum()])
    assert stats.chi2_contingency(np.array(tables)).pvalue > 1e-3


def test_schedules_are_what_they_say_and_end_almost_hidden():
    t = np.linspace(0, 1, 11)
    for name in ('log_linear', 'cosine'):
        schedule = losses.schedule(name)
        alpha = schedule.alpha(t)
        assert float(alpha[0]) == 1
        assert float(alpha[-1]) == pytest.approx(1e-3, abs=1e-6)
        middle = (schedule.alpha(t + 1e-2) - schedule.alpha(t - 1e-2)) / 2e-2
        wanted = -middle[1:] / (1 - np.asarray(alpha[1:]))
        np.testing.assert_allclose(schedule.rate(t[1:]), wanted, rtol=3e-3, atol=3e-3)
    with pytest.raises(ValueError, match="'log_linear' or 'cosine', got 'linear'"):
        losses.schedule('linear')


def test_times_lie_one_in_each_part():
    t = np.asarray(losses.stratified(jax.random.key(0), 8, 0.2))
    assert (np.floor((t - 0.2) / 0.1 + 1e-6) == np.arange(8)).all()


def test_what_is_visible_is_certain_and_the_mask_is_never_said(rng):
    logits = rng.normal(size=(1, 4, K)).astype(np.float32)
    logits[0, 1, 3] = -np.inf
    z = np.array([[5, MASK, MASK, 0]])
    log_p = losses.carry_over(logits, z, MASK)
    np.testing.assert_array_equal(np.exp(log_p[0, 0]), np.eye(K)[5])
    np.testing.assert_array_equal(np.exp(log_p[0, 3]), np.eye(K)[0])
    np.testing.assert_allclose(log_p[0, 2], special.log_softmax(logits[0, 2]), rtol=1e-5)
    # Of a padded vocabulary the mask is an outcome, and none: 4 is the mask here.
    padded = losses.carry_over(logits, np.array([[5, 4, 4, 0]]), 4)
    assert np.asarray(padded)[0, 2, 4] == -np.inf
    kept = np.delete(logits[0, 2], 4)
    np.testing.assert_allclose(np.delete(padded[0, 2], 4), special.log_softmax(kept), rtol=1e-5)
    grad = jax.grad(lambda x: jnp.where(z[..., None] == MASK, losses.carry_over(x, z, MASK), 0.0)[
        0, 2].sum())(jnp.asarray(logits))  # fmt: skip
    assert np.isfinite(grad).all()


def test_the_bound_is_tight_for_a_network_that_knows_the_law(rng):
    """Independent symbols: E_t sum_i w(t) -log p(x_i) is exactly -log p(x), by quadrature."""
    log_p = special.log_softmax(rng.normal(size=5))
    x = np.array([0, 3, 2])
    schedule, total = losses.schedule('cosine', eps=0.0), 0.0
    t = (np.arange(4_000) + 0.5) / 4_000
    alpha, rate = np.cos(np.pi / 2 * t), schedule.rate(t)
    for hidden in itertools.product((False, True), repeat=3):
        weights = losses.elbo_weights(np.tile(hidden, (len(t), 1)), rate)
        chance = np.prod(np.where(hidden, 1 - alpha[:, None], alpha[:, None]), axis=1)
        total += (chance * (np.asarray(weights, np.float64) * -log_p[x]).sum(1)).mean()
    assert total == pytest.approx(-log_p[x].sum(), rel=1e-4)


def test_consistency_is_kl_with_the_teacher_where_it_is_not_shown_the_symbol(rng):
    logits, teacher = rng.normal(size=(2, 6, K)).astype(np.float32)
    labels, shown = rng.integers(0, K, 6), np.array([True, False] * 3)
    found = losses.consistency(logits, teacher, labels, shown, temperature=0.8)
    q, log_q = special.softmax(teacher / 0.8, -1), special.log_softmax(teacher / 0.8, -1)
    log_p = special.log_softmax(logits, -1)
    kl = (q * (log_q - log_p)).sum(-1)
    wanted = np.where(shown, -log_p[np.arange(6), labels], kl)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # Nothing is left to learn from oneself at the same time, and nothing flows to the teacher.
    same = losses.consistency(logits, logits, labels, np.zeros(6, bool))
    np.testing.assert_allclose(same, 0, atol=1e-6)
    of_teacher = jax.grad(
        lambda x: losses.consistency(logits, x, labels, shown, temperature=0.8).sum()
    )(teacher)
    assert not np.asarray(of_teacher).any()
    # Towards tau = 0 the target is the teacher's most probable symbol.
    sharp = losses.consistency(logits, teacher, labels, np.zeros(6, bool), temperature=1e-3)
    np.testing.assert_allclose(sharp, -log_p[np.arange(6), teacher.argmax(-1)], rtol=1e-4)
    # All of it shown is cross-entropy with the text; the reverse KL would be infinite there.
    all_shown = losses.consistency(logits, teacher, labels, np.ones(6, bool))
    np.testing.assert_allclose(all_shown, -log_p[np.arange(6), labels], rtol=1e-5)
    assert np.isfinite(losses.consistency(50 * logits, 50 * teacher, labels, shown)).all()


def test_a_block_is_drawn_for_each_row_and_its_two_copies_are_complements():
    starts, length, block = np.array([4, 4, 2] * 2_000), 14, 4
    draw = jax.jit(lambda key, tail: losses.block_mask(
        key, starts, length, block=block, tail=tail), static_argnums=1)  # fmt: skip
    active, complement, after = map(np.asarray, draw(jax.random.key(0), True))
    at = np.arange(length)
    for row in range(6):
        inside = active[row] | complement[row]
        assert not (active[row] & complement[row]).any()
        assert not (inside | after[row])[: starts[row]].any()
        begin = at[inside].min() if inside.any() else length
        assert (begin - starts[row]) % block == 0 or begin == length
        # The whole block, and everything behind it.
        assert (inside == ((at >= begin) & (at < begin + block))).all()
        assert (after[row] == (at >= begin + block)).all()
    # A response of 10 has two blocks and a rest of 2, drawn alike; of 12 the rest is empty.
    inside = active | complement
    first = inside.argmax(1)[starts == 4]
    np.testing.assert_allclose(np.bincount(first)[[4, 8, 12]] / len(first), 1 / 3, atol=0.03)
    empty = ~inside.any(1)
    assert empty[starts == 2].mean() == pytest.approx(1 / 4, abs=0.03)
    assert not empty[starts == 4].any()
    assert active.sum() / inside.sum() == pytest.approx(0.999 * 0.5 + 1e-3, abs=0.01)
    always = np.stack(draw(jax.random.key(1), False)[:2]).any(0)
    assert always.any(1).all()


def test_certainty_is_the_entropy_of_right_symbols_alone(rng):
    gap, temperature = 1.3, 0.5
    logits = np.array([[[gap, 0.0], [0.0, gap], [gap, 0.0]]])
    labels, where = np.zeros((1, 3), int), np.array([[True, True, False]])

    def entropy(d):
        p = special.expit(d / temperature)
        return special.entr(p) + special.entr(1 - p)

    value, grad = jax.value_and_grad(
        lambda x: losses.certainty(x, labels, where, temperature=temperature).sum()
    )(jnp.asarray(logits))
    assert float(value) == pytest.approx(entropy(gap), rel=1e-5)
    p = special.expit(gap / temperature)
    assert float(grad[0, 0, 0]) == pytest.approx(-gap / temperature**2 * p * (1 - p), rel=1e-4)
    # Neither a wrong position nor one that is not hidden.
    assert not np.asarray(grad)[0, 1:].any()
    wide = rng.normal(size=(1, 3, 7))
    best = wide.argmax(-1)
    flat = losses.certainty(wide, best, np.ones((1, 3), bool), temperature=1e6)
    assert float(flat[0]) == pytest.approx(np.log(7), abs=1e-5)
    assert float(losses.certainty(wide, best, np.ones((1, 3), bool), temperature=1e-3)[0]) < 1e-6
    same = losses.certainty(wide * 0.5, best, np.ones((1, 3), bool), temperature=0.5)
    np.testing.assert_allclose(
        same, losses.certainty(wide, best, np.ones((1, 3), bool), temperature=1.0), rtol=1e-5
    )


def test_certainty_goes_on_where_cross_entropy_is_done():
    """At p = .9 of two symbols |dCE/dd| is .1, and |dH_T/dd| (d / T^2) p_T (1 - p_T)."""
    gap = np.log(9.0)
    where, labels = np.ones((1, 1), bool), np.zeros((1, 1), int)
    logits = jnp.array([[[gap, 0.0]]])
    hard = jax.grad(lambda x: losses.masked_ce(x, labels, where).sum())(logits)
    soft = jax.grad(lambda x: losses.certainty(x, labels, where).sum())(logits)
    p = special.expit(gap / 0.5)
    assert float(hard[0, 0, 0]) == pytest.approx(-0.1, rel=1e-5)
    assert float(soft[0, 0, 0]) == pytest.approx(-gap / 0.25 * p * (1 - p), rel=1e-4)


def test_nothing_hidden_is_zero_with_zero_gradient(rng):
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    labels, where = np.argmin(logits, -1), np.zeros((2, 3), bool)
    for loss in (losses.certainty, losses.masked_ce):
        value, grad = jax.value_and_grad(lambda x, f=loss: f(x, labels, where).sum())(logits)
        assert float(value) == 0
        assert not np.asarray(grad).any()
    # All of it hidden, and nothing right.
    value, grad = jax.value_and_grad(
        lambda x: losses.certainty(x, labels, np.ones((2, 3), bool)).sum()
    )(logits)
    assert float(value) == 0
    assert not np.asarray(grad).any()


def test_each_example_is_averaged_by_itself(rng):
    logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
    labels, where = rng.integers(0, 5, (2, 4)), np.array([[True] * 4, [True] + [False] * 3])
    nll = -np.take_along_axis(special.log_softmax(logits, -1), labels[..., None], 2)[..., 0]
    np.testing.assert_allclose(
        losses.masked_ce(logits, labels, where), [nll[0].mean(), nll[1, 0]], rtol=1e-5
    )
