"""The two parts of guided score distillation, each at its own time, against both by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.builders import mixtures
from kd.losses import schedule, score_distillation
from kd.methods.diffusion.decoupled_dmd import decoupled, shield
from kd.methods.diffusion.distribution_matching import Views
from kd.sampling import denoiser, times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, GUIDANCE = 512, 4.0
PATH, CLOCK = schedule.edm(0.02, 5.0), times.karras(0.02, 5.0)
TEACHER = mixtures.exact_denoiser(mixtures.pairs(), PATH)
FAKE = mixtures.exact_denoiser(mixtures.pairs(deviation=0.6), PATH)


class Asked(list):
    """What was asked of teacher and fake: ('real' or 'both' or 'fake', x_t, t)."""


@pytest.fixture(name='asked')
def _asked():
    return Asked()


def seen(asked, level=0.8, fake=FAKE):
    """Views of samples that a generator made at a level."""
    x = jax.random.normal(jax.random.key(1), (B, 2))
    condition = {'label': jnp.arange(B) % 4}

    def real(x_t, t, scale=1.0):
        asked.append(('real', x_t, t))
        return denoiser.guided(TEACHER, scale).apply({}, x_t, t, condition).x0

    def both(x_t, t):
        asked.append(('both', x_t, t))
        given = (condition, denoiser.without(TEACHER, condition))
        return denoiser.branches(TEACHER, {}, x_t, t, given)

    def said(x_t, t):
        asked.append(('fake', x_t, t))
        return fake.apply({}, x_t, t, condition).x0

    return Views(x, jnp.full(B, level), condition, PATH, real, said, both)


KEY = jax.random.key(0)


def test_at_one_time_it_is_dmd_with_guidance(asked):
    views = seen(asked)
    g, metrics = decoupled(CLOCK, 'shared', GUIDANCE)(views, KEY)
    (_, x_t, t), (_, again, same), *_ = asked
    np.testing.assert_array_equal(x_t, again)
    np.testing.assert_array_equal(t, same)
    guided, fake = views.real(x_t, t, GUIDANCE), views.fake(x_t, t)
    # Over the residual of the conditional denoiser, not of the guided one.
    scale = jnp.abs(views.x - views.real(x_t, t)).mean(1, keepdims=True)
    np.testing.assert_allclose(g, (fake - guided) / scale, rtol=2e-4, atol=2e-4)
    assert set(metrics) == {'augmentation', 'matching', 'lag'}
    ratio = float(metrics['matching'].total / metrics['augmentation'].total)
    assert float(metrics['lag'].total) == pytest.approx(ratio, rel=1e-5)


def test_without_guidance_nothing_is_added(asked):
    g, metrics = decoupled(CLOCK, 'hybrid', 1.0, matching=0.0)(seen(asked), KEY)
    assert (np.asarray(g) == 0).all()
    assert set(metrics) == {'augmentation'}


def test_the_augmentation_does_not_ask_the_critic_and_has_no_fixed_point(asked):
    augmented = decoupled(CLOCK, 'independent', GUIDANCE, matching=0.0)
    g, _ = augmented(seen(asked), KEY)
    assert [name for name, *_ in asked] == ['both']
    other, _ = augmented(seen(asked, fake=TEACHER), KEY)
    np.testing.assert_array_equal(g, other)
    # Where generator and data agree, matching is none and the augmentation stays.
    matched, _ = decoupled(CLOCK, 'independent', GUIDANCE, augmentation=0.0)(
        seen(asked, fake=TEACHER), KEY
    )
    assert (np.asarray(matched) == 0).all()
    assert np.abs(g).mean() > 0.1


@pytest.mark.parametrize(
    ('levels', 'augmented', 'matched'),
    [
        ('independent', (0.02, 0.98), (0.02, 0.98)),
        ('constrained', (0.02, None), (0.02, None)),
        ('hybrid', (0.02, None), (0.02, 0.98)),
    ],
)
def test_times_of_each_part(asked, levels, augmented, matched):
    """Evenly between ranks of the clock; None is the rank of the generator's own level."""
    decoupled(CLOCK, levels, GUIDANCE)(seen(asked), KEY)
    found = {name: np.sort(np.asarray(CLOCK.rank(t))) for name, _, t in asked}
    own = float(CLOCK.rank(0.8))
    for name, (low, high) in (('both', augmented), ('fake', matched)):
        high = own if high is None else high
        wanted = low + (high - low) * (np.arange(B) + 0.5) / B
        assert np.abs(found[name] - wanted).max() < 1.95 / np.sqrt(B) * (high - low)
    # Draws of their own.
    assert not np.array_equal(found['both'], found['fake'])


def test_the_augmentation_pushes_outward(asked):
    """At every time a sample is moved further from the origin, towards its class and beyond it."""
    views = seen(asked)
    outward = mixtures.pairs().means[:4] + mixtures.pairs().means[4:]
    direction = outward[np.arange(B) % 4] / np.linalg.norm(outward[0])
    for t in (0.3, 1.0, 3.0):
        x_t = views.x + t * jax.random.normal(KEY, views.x.shape)
        told, untold = views.both(x_t, jnp.full(B, t))
        g = score_distillation.augmentation(told, untold, GUIDANCE)
        assert -(np.asarray(g) * direction).sum(1).mean() > 0.1


def test_moments_of_examples_and_of_a_batch():
    x = jax.random.normal(KEY, (64, 3, 3)) * 2 + 1
    views = Views(x, jnp.zeros(64), {}, PATH, None, None, None)
    each = shield((1.0, 4.0), 1.0).loss(views, {}, KEY)
    np.testing.assert_allclose(each, score_distillation.mean_variance_kl(x, 1.0, 4.0))
    over = shield((1.0, 4.0), 1.0, over_batch=True).loss(views, {}, KEY)
    assert over.shape == (64,)
    wanted = score_distillation.mean_variance_kl(x, 1.0, 4.0, axes=(0,)).mean()
    np.testing.assert_allclose(over, wanted, rtol=1e-6)
