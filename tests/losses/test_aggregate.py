"""Weights of tokens: each mode by hand, and what must change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import aggregate
from kd.metrics import mean

GENERATOR = np.random.default_rng(0)
B, R = 4, 6
LENGTHS = np.array([3, 6, 0, 1])
WHERE = np.arange(R) < LENGTHS[:, None]
LOSSES = GENERATOR.normal(size=(B, R)).astype(np.float32)
LONGEST = 8.0

SUMS = np.where(WHERE, LOSSES, 0.0).sum(1)
BY_HAND = {
    'token_mean': SUMS.sum() / 10,
    'sequence_mean': (SUMS[0] / 3 + SUMS[1] / 6 + SUMS[3]) / 3,
    'sequence_sum': SUMS.sum() / 3,
    'constant': SUMS.sum() / 3 / LONGEST,
}


def weights(where, mode, rows=None):
    constant = LONGEST if mode == 'constant' else None
    return aggregate.weights(where, mode, rows=rows, constant=constant)


def loss(losses, where, mode, rows=None):
    """As a method has it: the mean over the rows that count."""
    total, count = mean(aggregate.per_row(losses, weights(where, mode, rows)), rows)
    return total / count


each_mode = pytest.mark.parametrize('mode', aggregate.MODES)


@each_mode
def test_value_by_hand(mode):
    np.testing.assert_allclose(loss(LOSSES, WHERE, mode), BY_HAND[mode], rtol=1e-6)
    assert weights(WHERE, mode).dtype == jnp.float32


@each_mode
def test_pads_empty_rows_masked_rows_and_duplicates_change_nothing(mode):
    poison = np.full((B, 3), np.nan, np.float32)
    wide, nothing = np.concatenate([LOSSES, poison], 1), np.zeros((B, 3), bool)
    np.testing.assert_allclose(
        loss(wide, np.concatenate([WHERE, nothing], 1), mode), BY_HAND[mode], rtol=1e-6
    )
    left = loss(np.concatenate([poison, LOSSES], 1), np.concatenate([nothing, WHERE], 1), mode)
    np.testing.assert_allclose(left, BY_HAND[mode], rtol=1e-6)
    empty = np.concatenate([WHERE, np.zeros((5, R), bool)])
    more = np.concatenate([LOSSES, np.full((5, R), np.nan, np.float32)])
    np.testing.assert_allclose(loss(more, empty, mode), BY_HAND[mode], rtol=1e-6)
    # Rows that pad a batch are full of tokens, and the mean does not count them.
    padded, rows = np.concatenate([WHERE, np.ones((5, R), bool)]), np.arange(B + 5) < B
    np.testing.assert_allclose(loss(more, padded, mode, rows), BY_HAND[mode], rtol=1e-6)
    twice = loss(np.tile(LOSSES, (2, 1)), np.tile(WHERE, (2, 1)), mode)
    np.testing.assert_allclose(twice, BY_HAND[mode], rtol=1e-6)


@each_mode
def test_parts_of_the_batch_add_up_to_the_whole(mode):
    of_batch = np.asarray(weights(WHERE, mode))
    parts = [
        mean(aggregate.per_row(LOSSES[part], of_batch[part])) for part in ([0, 2], [1], [3])
    ]  # of unlike length: their own means would be other numbers
    total, count = (sum(x) for x in zip(*parts, strict=True))
    np.testing.assert_allclose(total / count, BY_HAND[mode], rtol=1e-6)


@each_mode
def test_the_gradient_is_the_weight_and_zero_where_nothing_counts(mode):
    slope = jax.grad(lambda x: loss(x, WHERE, mode))(jnp.asarray(LOSSES))
    np.testing.assert_allclose(slope, weights(WHERE, mode) / B, rtol=1e-6)
    assert np.all(np.asarray(slope)[~WHERE] == 0)
    np.testing.assert_allclose(np.sum(slope), {'token_mean': 1, 'sequence_mean': 1}.get(
        mode, 10 / 3 / (LONGEST if mode == 'constant' else 1)
    ), rtol=1e-6)  # fmt: skip


@each_mode
@pytest.mark.parametrize('rows', [None, np.zeros(B, bool)])
def test_a_batch_without_a_token_is_zero_with_zero_gradient(mode, rows):
    where = np.zeros((B, R), bool) if rows is None else np.ones((B, R), bool)

    def total(losses):
        return jnp.sum(aggregate.per_row(losses, weights(where, mode, rows)))

    value, slope = jax.value_and_grad(total)(jnp.full((B, R), jnp.nan))
    assert value == 0
    np.testing.assert_array_equal(slope, np.zeros((B, R)))


@pytest.mark.parametrize(
    ('arguments', 'options', 'message'),
    [
        ((WHERE, 'mean'), {}, r"one of token_mean, .*, constant; got 'mean'"),
        ((WHERE, 'constant'), {}, r'goes with mode constant alone; got None and mode constant'),
        ((WHERE, 'token_mean'), {'constant': 2.0}, r'got 2.0 and mode token_mean'),
        ((WHERE, 'constant'), {'constant': 0.0}, r'constant must be positive, got 0.0'),
        ((LOSSES, 'token_mean'), {}, r'where must be bool .* got float32 \(4, 6\)'),
        ((WHERE[0], 'token_mean'), {}, r'where must be bool \[B, R\] .* bool \(6,\)'),
        ((WHERE, 'token_mean'), {'rows': WHERE}, r'rows bool \[B\]; .* bool \(4, 6\)'),
    ],
)
def test_refusals_say_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        aggregate.weights(*arguments, **options)
