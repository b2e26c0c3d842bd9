"""Masked samplers against enumeration; decoding against a loop in NumPy, alone and in batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from kd.losses import masked_diffusion as losses
from kd.models.decoder import Decoder
from kd.models.transformer import Transformer
from kd.network import from_linen
from kd.sampling import masked

pytestmark = pytest.mark.usefixtures('compiled_quickly')

K, MASK, S, BLOCK, LIMIT = 7, 7, 14, 4, 8
STARTS = np.array([3, 5, 2, 6])


@pytest.fixture(scope='module')
def network():
    module = Transformer(K, width=16, depth=1, heads=2, max_length=S, causal=False, extra_symbols=1)
    return from_linen(module, jax.ShapeDtypeStruct((1, S), jnp.int32))


@pytest.fixture(scope='module')
def variables(network):
    # Larger than they start, so that no law is uniform.
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, network.init(jax.random.key(0)))


@pytest.fixture(scope='module')
def prompts():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, S), 0, K))


def table(rng):
    """A law of two symbols at each of two positions, and a network that has it: [2, 3]."""
    scores = rng.normal(size=(2, 3)).astype(np.float32)
    return scores, lambda z, where=None, at=None: jnp.broadcast_to(scores, (*z.shape, 3))


def test_samples_have_the_law_of_a_network_that_is_right_and_no_mask():
    """Independent positions: any number of steps and both samplers draw from the product."""
    scores, logits = table(np.random.default_rng(0))
    law = special.softmax(scores.astype(np.float64), -1)
    joint = (law[0][:, None] * law[1]).ravel()
    schedule, count = losses.schedule(), 20_000
    for sample, steps in itertools.product((masked.ancestral, masked.deterministic), (1, 3)):
        said = sample(logits, jax.random.key(steps), (count, 2), steps, schedule=schedule, mask=3)
        assert int(said.max()) < 3
        seen = np.bincount(np.asarray(said[:, 0] * 3 + said[:, 1]), minlength=9)
        assert stats.chisquare(seen, joint * count).pvalue > 1e-3


def test_a_symbol_is_uncovered_at_the_rate_of_the_schedule():
    """The share that is hidden at the calls of the network is 1 - alpha, and nothing is hidden
    again; the path of the deterministic sampler is the same for every number of steps."""
    schedule, hidden = losses.schedule('cosine'), []

    def logits(z, where=None, at=None):
        jax.debug.callback(lambda share: hidden.append(float(share)), (z == 2).mean())
        return jnp.zeros((*z.shape, 2))

    for sample in (masked.ancestral, masked.deterministic):
        hidden.clear()
        sample(logits, jax.random.key(0), (2_000, 10), 4, schedule=schedule, mask=2)
        jax.effects_barrier()
        wanted = 1 - schedule.alpha(np.array([1.0, 0.75, 0.5, 0.25]))
        np.testing.assert_allclose(sorted(hidden, reverse=True), wanted, atol=0.012)
    of_table = table(np.random.default_rng(0))[1]
    paths = [
        masked.deterministic(of_table, jax.random.key(5), (50, 2), n, schedule=schedule, mask=3)
        for n in (1, 4)
    ]
    # This network says the same whatever it sees.
    assert (paths[0] == paths[1]).all()


def test_rare_symbols_are_as_rare_as_they_should():
    """Noise from one float32 uniform has 51 values above 12, and a million draws repeat some."""
    noise = np.asarray(masked.gumbel(jax.random.key(0), (8_000_000,)))
    tail = noise[noise > 12]
    wanted = 8_000_000 * -np.expm1(-np.exp(-12.0))
    assert abs(len(tail) - wanted) < 4 * np.sqrt(wanted)
    assert len(np.unique(tail)) == len(tail)
    assert np.isfinite(noise).all()


def said_by(network, variables, tokens, where):
    padding = jnp.asarray(~where)
    return np.asarray(network.apply(variables, jnp.asarray(tokens), padding=padding).logits)


def reference(logits, row, start, rule):
    """Tokens and calls of one row, position by position in NumPy."""
    row, at = row.copy(), np.arange(S)
    row[start:], there = MASK, at < start + LIMIT
    row[start + LIMIT :] = 0
    calls = 0
    while (row[there] == MASK).any():
        first = at[(row == MASK) & there].min()
        begin = start + (first - start) // BLOCK * BLOCK
        place = at[(row == MASK) & there & (at >= begin) & (at < begin + BLOCK)]
        found = logits(row[None], there[None])[0][place]
        row[place[rule(found)]] = found.argmax(-1)[rule(found)]
        calls += 1
    return row, calls


def by_entropy(threshold):
    def rule(found):
        entropy = special.entr(special.softmax(found, -1)).sum(-1)
        return (entropy <= threshold) | (np.arange(len(found)) == entropy.argmin())

    return rule


def by_confidence(count=None, threshold=2.0):
    def rule(found):
        confidence = special.softmax(found, -1).max(-1)
        rank = (-confidence).argsort(kind='stable').argsort()
        return rank < count if count else (confidence >= threshold) | (rank == 0)

    return rule


def decoded(network, variables, tokens, starts, rule, **changes):
    options = dict(mask=MASK, block=BLOCK, rule=rule, limit=LIMIT) | changes
    logits = masked.logits_function(network, variables, MASK)
    found = jax.jit(lambda t, p: masked.decode(logits, t, p, **options))(tokens, starts)
    return tuple(map(np.asarray, found))


def test_decoding_is_what_a_loop_over_positions_does_and_a_row_is_as_alone(
    network, variables, prompts
):
    call = jax.jit(lambda t, w: network.apply(variables, t, padding=~w).logits)

    def logits(tokens, where):
        return np.asarray(call(tokens, where))

    rules = {
        'entropy': (masked.entropy_below(1.0), by_entropy(1.0)),
        'one': (masked.one_by_one(), by_confidence(1)),
        'two': (masked.top(2), by_confidence(2)),
        'confidence': (masked.confidence_above(0.6), by_confidence(threshold=0.6)),
    }
    for name, (rule, wanted) in rules.items():
        tokens, calls = decoded(network, variables, prompts, STARTS, rule)
        for row, start in enumerate(STARTS):
            alone, count = reference(logits, prompts[row], start, wanted)
            np.testing.assert_array_equal(tokens[row], alone, err_msg=name)
            assert calls[row] == count, name
        assert (tokens != MASK).all()
        # One that is alone in its batch, and in one without its padding.
        if name == 'entropy':
            for row, start in enumerate(STARTS):
                short = prompts[row : row + 1, : start + LIMIT]
                alone, count = decoded(network, variables, short, STARTS[row : row + 1], rule)
                np.testing.assert_array_equal(alone[0], tokens[row, : start + LIMIT])
                assert count[0] == calls[row]


def test_thresholds_at_the_ends_commit_one_position_or_a_block_a_call(network, variables, prompts):
    for tau, wanted in ((-1.0, LIMIT), (np.log(K) + 1e-4, LIMIT // BLOCK)):
        rule = masked.entropy_below(tau)
        _, calls = decoded(network, variables, prompts, STARTS, rule)
        assert (calls == wanted).all()
    assert (decoded(network, variables, prompts, STARTS, masked.one_by_one())[1] == LIMIT).all()
    # The last block may be shorter.
    five = decoded(network, variables, prompts, STARTS, masked.entropy_below(9.0), block=5)
    assert (five[1] == 2).all()


def test_it_ends_and_never_says_the_mask_whatever_the_network_says(prompts):
    """All logits -inf, NaN, or in favour of the mask, which is an outcome of a padded network."""
    for value in (-jnp.inf, jnp.nan):
        tokens, calls = masked.decode(
            lambda z, where=None, at=None, v=value: jnp.full((*at.shape, K), v), prompts,
            STARTS, mask=MASK, block=BLOCK, rule=masked.entropy_below(0.1), limit=LIMIT,
        )  # fmt: skip
        assert (tokens != MASK).all()
        assert (calls <= LIMIT).all()
    decoder = Decoder(K + 1, width=16, depth=1, heads=2, causal=False, tied=False, max_length=S)
    network = from_linen(decoder, jax.ShapeDtypeStruct((1, S), jnp.int32))
    made = network.init(jax.random.key(0))
    made['params']['head'] = made['params']['head'].at[:, MASK].mul(1e3)
    plain = np.asarray(network.apply(made, jnp.full((1, S), MASK)).logits)
    assert (plain.argmax(-1) == MASK).any()
    tokens, _ = decoded(network, made, prompts, STARTS, masked.one_by_one())
    assert (tokens < MASK).all()
    said = masked.logits_function(network, made, MASK, forbidden=(0,))(prompts)
    assert (np.asarray(said)[..., [0, MASK]] == -np.inf).all()


def test_a_batch_costs_the_calls_of_its_slowest_row_and_nothing_leaves_the_device(
    network, variables, prompts
):
    happened = []

    def counted(z, where=None, at=None):
        jax.debug.callback(lambda: happened.append(1))
        return masked.logits_function(network, variables, MASK)(z, where, at)

    options = dict(mask=MASK, block=BLOCK, rule=masked.entropy_below(1.0), limit=LIMIT)
    _, calls = jax.jit(lambda t, p: masked.decode(counted, t, p, **options))(prompts, STARTS)
    jax.effects_barrier()
    assert len(happened) == int(calls.max()) < int(calls.sum())
    logits = masked.logits_function(network, variables, MASK)
    program = jax.jit(lambda t, p: masked.decode(logits, t, p, **options))
    text = program.lower(prompts, STARTS).compile().as_text()
    assert 'custom-call' not in text or 'callback' not in text
    # The loop is of a length that the compiler knows.
    assert f'"n":"{LIMIT}"' in text


def test_a_network_that_was_causal_gives_logits_one_place_early(network, variables, prompts):
    plain = masked.logits_function(network, variables, MASK)(prompts)
    shifted = masked.logits_function(network, variables, MASK, shift=True)(prompts)
    np.testing.assert_array_equal(shifted[:, 1:], plain[:, :-1])
    at = np.array([[2, 5]] * 4)
    np.testing.assert_allclose(
        masked.logits_function(network, variables, MASK)(prompts, None, at), plain[:, [2, 5]]
    )


def test_padding_changes_nothing_that_is_seen(network, variables, prompts):
    where = np.arange(S) < 9
    whole = said_by(network, variables, prompts, np.tile(where, (4, 1)))
    short = said_by(network, variables, prompts[:, :9], np.ones((4, 9), bool))
    np.testing.assert_allclose(whole[:, :9], short, atol=1e-5)
    changed = said_by(network, variables, np.where(where, prompts, 1), np.tile(where, (4, 1)))
    np.testing.assert_allclose(changed[:, :9], whole[:, :9], atol=1e-6)


def test_bad_input_is_told(network, prompts):
    logits = table(np.random.default_rng(0))[1]
    for changes, words in (
        (dict(limit=0), 'limit=0 and block=4 must be at least 1'),
        (dict(block=0), 'limit=8 and block=0 must be at least 1'),
        (dict(limit=S), 'an answer of 14 tokens leaves no room for a prompt in 14'),
    ):
        options = dict(mask=3, block=BLOCK, rule=masked.one_by_one(), limit=LIMIT) | changes
        with pytest.raises(ValueError, match=words):
            masked.decode(logits, prompts, STARTS, **options)
    assert masked.mask_of(network) == MASK
    inputs = jax.ShapeDtypeStruct((1, S), jnp.int32)
    with pytest.raises(ValueError, match='sees only what came before'):
        masked.mask_of(from_linen(Transformer(K), inputs))
    with pytest.raises(ValueError, match='no symbol for the mask; give it extra_symbols=1'):
        masked.mask_of(from_linen(Transformer(K, causal=False), inputs))
