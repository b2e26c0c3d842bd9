"""Start epochs, targets, batch orders and weights of trajectory matching."""

import jax
import numpy as np
import pytest

from kd.losses import segments

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.mark.parametrize(('size', 'batch_size'), [(12, 4), (10, 4), (5, 8)])
def test_each_pass_uses_every_example_once(key, size, batch_size):
    per_pass = -(-size // batch_size)
    indices, mask = segments.inner_batches(key, size, batch_size, 3 * per_pass)
    assert indices.shape == mask.shape == (3 * per_pass, min(batch_size, size))
    passes = [
        np.asarray(indices)[i : i + per_pass][np.asarray(mask)[i : i + per_pass]]
        for i in range(0, 3 * per_pass, per_pass)
    ]
    for order in passes:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    assert not np.array_equal(passes[0], passes[1])
    # Places past the end hold examples of the same pass, not one example over and over.
    last = np.asarray(indices[per_pass - 1])
    assert len(set(last.tolist())) == len(last)


def test_batches_are_cut_at_the_number_of_steps(key):
    indices, mask = segments.inner_batches(key, 12, 4, 5)
    assert indices.shape == (5, 4)
    assert mask.all()
    assert segments.inner_batches(key, 12, 4, 0)[0].shape == (0, 4)


def test_start_epochs_cover_the_range_below_its_exclusive_end():
    draw = jax.vmap(lambda k: segments.start_epoch(k, epochs=6, max_start_epoch=4, expert_epochs=3))
    counts = np.bincount(draw(jax.random.split(jax.random.key(0), 400)))
    assert len(counts) == 4
    assert counts.min() > 70  # 100 +- 8.7


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((50, 20, 0), 'expert_epochs must be at least 1, got 0'),
        ((50, 0, 2), 'at least 1, got 0'),
        (
            (20, 20, 2),
            'end at 21, but the experts trained for 20 epochs; .* to 19 or less',
        ),
    ],
)
def test_segments_beyond_the_buffer_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        segments.check(*arguments)


def test_last_segment_may_end_with_the_buffer():
    segments.check(20, 19, 2)
    with pytest.raises(ValueError, match='20'):
        segments.check(20, 20, 2)


def test_intermediate_steps_and_weights():
    assert segments.target_steps(20, 3) == (6, 12)
    assert segments.target_steps(20, 1) == ()
    assert segments.target_steps(0, 1) == ()
    assert segments.target_weights('end', 3) == (0.0, 0.0, 1.0)
    assert segments.target_weights('all', 3) == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(segments.target_weights('rising', 4), (0.25, 0.5, 0.75, 1.0))
    with pytest.raises(ValueError, match='2 student steps cannot match 3 expert epochs'):
        segments.target_steps(2, 3)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        segments.target_steps(2, 0)
    with pytest.raises(ValueError, match="got 'middle'"):
        segments.target_weights('middle', 3)
    with pytest.raises(ValueError, match='positive size and batch size, got 0, 4, 2'):
        segments.inner_batches(jax.random.key(0), 0, 4, 2)


def test_balance_factor_at_its_published_values():
    factors = np.asarray(segments.balance_factor(np.arange(20), 20))
    np.testing.assert_allclose(factors[10], 1.29203, rtol=1e-5)
    np.testing.assert_allclose(factors[9], 0.73249, rtol=1e-5)
    np.testing.assert_allclose(factors[[0, 19]], [0.557, 1.760], atol=5e-4)
    assert (np.diff(factors) > 0).all()


def test_loss_ramp_rises_to_one():
    ramp = segments.loss_ramp(np.arange(12))
    np.testing.assert_allclose(ramp, [*np.arange(0.5, 1.0, 0.05), 1.0, 1.0], rtol=1e-6)
