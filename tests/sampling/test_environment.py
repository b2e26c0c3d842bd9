"""Episodes of a toy world, against a world and plain forward passes of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.models.decoder import Decoder
from kd.sampling.autoregressive import sampler
from kd.sampling.environment import Environment, Player

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, P, H, A, STOP, LIMIT = 12, 5, 4, 2, 3, 17
ONLY = (3, 5, 7, 8)


def counter(horizon=H):
    """Counts up by what is said; shows where it is in two tokens; over from `LIMIT` on."""
    return Environment(
        horizon=horizon,
        start=lambda batch: {'at': batch['first']},
        observe=lambda state: jnp.stack([jnp.full_like(state['at'], 10), state['at'] % 10], 1),
        act=lambda state, said, mask: {'at': state['at'] + jnp.where(mask, said - 3, 0).sum(1)},
        over=lambda state: state['at'] >= LIMIT,
    )


@pytest.fixture(scope='module')
def decoder():
    return Decoder(num_classes=V, width=16, depth=2, heads=2, mlp_hidden=24, max_length=64)


@pytest.fixture(scope='module')
def variables(decoder):
    made = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, made)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= P - np.array([P, 3, 1, 4, 2, 2])[:, None]
    return {
        'input': np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32),
        'prompt_mask': mask,
        'first': np.array([0, -30, 2, 0, 15, LIMIT], np.int32),
    }


@pytest.fixture(scope='module')
def player(decoder):
    draw = sampler(decoder, max_new=A, temperature=0.7, stop=(STOP,), only=ONLY, block=1)
    return Player(draw, counter())


@pytest.fixture(scope='module')
def said(player, variables, batch):
    made = jax.jit(player.of)(variables, batch, jax.random.key(2))
    return jax.tree.map(np.asarray, made)


def test_the_environment_answers_what_was_said(said, batch):
    turns = [x.reshape(6, H, 2 + A) for x in (said.tokens, said.mask, said.there)]
    for row in range(6):
        at = batch['first'][row]
        for tokens, mask, there in zip(*(x[row] for x in turns), strict=True):
            if at >= LIMIT:
                assert not there.any()
                assert not tokens.any()
                continue
            assert tokens[:2].tolist() == [10, at % 10]
            assert there[:2].all()
            assert not mask[:2].any()
            stopped = tokens[2] == STOP
            assert mask[2:].tolist() == [True, not stopped]
            np.testing.assert_array_equal(there[2:], mask[2:])
            assert set(tokens[2:][mask[2:]]) <= set(ONLY)
            at += (tokens[2:][mask[2:]] - 3).sum()
        assert said.truncated[row] == (at < LIMIT)
    # All there is to see: one that never begins, some that end early, some that do not.
    assert not said.there[5].any()
    assert 0 < said.truncated.sum() < 5


def test_log_probs_are_those_of_rows_without_holes(decoder, variables, said, batch):
    never = np.setdiff1d(np.arange(V), ONLY)
    width = P + H * (2 + A)
    texts, where = np.zeros((6, width), np.int32), []
    for row in range(6):
        asked = batch['input'][row][batch['prompt_mask'][row]]
        text = [*asked, *said.tokens[row][said.there[row]]]
        texts[row, : len(text)] = text
        # The slots before those that the policy has said.
        where.append(len(asked) - 1 + np.flatnonzero(said.mask[row][said.there[row]]))
    logits = np.array(jax.jit(decoder.apply)(variables, texts), np.float64)
    logits[..., never] = -np.inf
    log_q = special.log_softmax(logits / 0.7, -1)
    for row in range(6):
        tokens = said.tokens[row][said.mask[row]]
        found = said.log_probs[row][said.mask[row]]
        np.testing.assert_allclose(found, log_q[row, where[row], tokens], atol=1e-4)
        assert not said.log_probs[row][~said.mask[row]].any()


def test_an_episode_depends_on_its_row_alone(player, variables, batch, said):
    """Not on other rows, nor on padding."""
    rows = np.array([4, 2, 1])
    some = {name: x[rows] for name, x in batch.items()}
    some['input'] = np.pad(some['input'], ((0, 0), (2, 0)), constant_values=7)
    some['prompt_mask'] = np.pad(some['prompt_mask'], ((0, 0), (2, 0)))
    found = jax.jit(player.of)(variables, some, jax.random.key(2), rows=rows)
    for name in ('tokens', 'mask', 'there', 'truncated'):
        np.testing.assert_array_equal(getattr(found, name), getattr(said, name)[rows], name)


def test_turns_are_new_draws_and_the_loop_is_one_program(player, variables, batch, said):
    # The same observation does not make the same action at every turn.
    still = Player(player.draw, counter()._replace(act=lambda state, said, mask: state))
    found = jax.jit(still.of)(variables, batch, jax.random.key(3))
    first = np.asarray(found.tokens).reshape(6, H, 2 + A)[:5, :, 2]
    assert (np.ptp(first, axis=1) > 0).any()
    text = str(jax.make_jaxpr(player.of)(variables, batch, jax.random.key(0)))
    assert 'callback' not in text
    assert f'length={H}' in text
    # Tokens that the loop has gone through: of each turn as many as its longest answer has.
    said_of = said.mask.reshape(6, H, 2 + A)[..., 2:]
    longest = said_of.sum(-1).max(0)
    assert int(player.turns(said.mask)) == np.maximum(longest, 1).sum()
    assert player.max_new == H * A


def test_only_some_tokens_and_forbidden_ones_exclude_each_other(decoder):
    with pytest.raises(ValueError, match='where `only` some tokens may be said'):
        sampler(decoder, max_new=1, only=(3,), forbidden=(1,))
    with pytest.raises(ValueError, match='only token 12 is outside the vocabulary of 12'):
        sampler(decoder, max_new=1, only=(12,))
    allowed = sampler(decoder, max_new=1, only=ONLY).allowed(14)
    assert np.flatnonzero(allowed).tolist() == list(ONLY)
