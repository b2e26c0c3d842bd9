"""A policy as its own teacher: blocks in prompts, and divergences against plain forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import EOS, SAMPLING, P, R, V, context, decoder, prompts, sharp
from scipy import special

from kd.errors import UserError
from kd.methods.rl import common, scoring, self_teacher
from kd.methods.rl.self_teacher import Comparison

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TEMPERATURE = 0.7
TAG, BAR = 7, 9


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def draw(network):
    sampling = common.Sampling(**SAMPLING, temperature=TEMPERATURE)
    return common.drawing(context(network), sampling)


@pytest.fixture(scope='module')
def batch():
    """Answers of 4, 3, 2 and 4 tokens, the last of which has come to no end."""
    rng = np.random.default_rng(3)
    lengths = np.array([4, 3, 2, 4])
    mask = np.arange(R) < lengths[:, None]
    tokens = np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32)
    tokens[np.arange(3), lengths[:3] - 1] = EOS
    truncated = np.array([False, False, False, True])
    return {**prompts(), 'tokens': tokens, 'mask': mask, 'truncated': truncated}


def block(batch):
    rows = len(batch['tokens'])
    return (
        self_teacher.tokens_of(TAG, rows),
        self_teacher.without_end(batch),
        self_teacher.tokens_of((BAR, BAR), rows),
    )


def texts(batch, name='input', mask='prompt_mask'):
    return [row[there].tolist() for row, there in
            zip(np.asarray(batch[name]), np.asarray(batch[mask]), strict=True)]  # fmt: skip


@pytest.mark.parametrize('after', [0, 1, 2, -1, None])
def test_a_block_stands_where_it_is_told_and_quotes_answers_without_their_end(batch, after):
    made = self_teacher.with_block(batch, *block(batch), after=after)
    said = texts(batch, 'tokens', 'mask')
    wanted = []
    for asked, answer, cut in zip(texts(batch), said, batch['truncated'], strict=True):
        quoted = [TAG, *(answer if cut else answer[:-1]), BAR, BAR]
        at = len(asked) if after is None else after % len(asked) if after < 0 else after
        wanted.append([*asked[:at], *quoted, *asked[at:]])
    assert texts(made) == wanted
    assert made['input'].shape == (4, P + 1 + R + 2)
    # Padding is on the left alone, and answers stay what they are.
    assert (np.diff(np.asarray(made['prompt_mask']).astype(int), axis=1) >= 0).all()
    assert made['tokens'] is batch['tokens']


def laws(network, variables, batch, prompt):
    """log p [B, R, V] of every token of the answers, by rows that begin in their first slot."""
    said = texts(batch, 'tokens', 'mask')
    found = np.zeros((*batch['tokens'].shape, V))
    whole = [[*p, *s] for p, s in zip(texts(prompt), said, strict=True)]
    text = np.zeros((len(whole), 24), np.int32)
    for row, ids in enumerate(whole):
        text[row, : len(ids)] = ids
    logits = np.array(jax.jit(lambda t: network.apply(variables, t).logits)(text), np.float64)
    logits[..., :2] = -np.inf
    log_p = special.log_softmax(logits / TEMPERATURE, -1)
    for row, answer in enumerate(said):
        begin = len(whole[row]) - len(answer) - 1
        found[row, : len(answer)] = log_p[row, begin : begin + len(answer)]
    return found


def numpy_divergence(how, log_q, log_p):
    """Of one position, by NumPy."""
    q, p = np.exp(log_q), np.exp(log_p)
    if how.top_k:
        chosen = np.argsort(-(p if how.favourites == 'teacher' else q))[: how.top_k]
        q, p = ([*x[chosen], 1 - x[chosen].sum()] for x in (q, p))
        if how.rest == 'renormalised':
            q, p = (np.array(x[:-1]) / sum(x[:-1]) for x in (q, p))
    q, p = np.asarray(q), np.asarray(p)
    kl = special.rel_entr
    if how.arguments.get('beta'):
        beta = how.arguments['beta']
        m = beta * p + (1 - beta) * q
        return (beta * kl(p, m) + (1 - beta) * kl(q, m)).sum()
    weight = how.arguments.get('weight', 0.0)
    return (weight * kl(p, q) + (1 - weight) * kl(q, p)).sum()


MIXED = dict(divergence='kd.losses.divergence.mixed_kl', arguments=dict(weight=0.3))


@pytest.mark.parametrize(
    'how',
    [
        Comparison(),
        Comparison(**MIXED, top_k=3, favourites='teacher', rest='renormalised'),
        Comparison('kd.losses.divergence.generalized_jsd', dict(beta=0.5), top_k=4),
        # More than there are: all of them.
        Comparison(**MIXED, top_k=64, favourites='teacher', rest='renormalised'),
    ],
)
def test_divergences_are_those_of_the_laws_that_answers_are_drawn_from(network, draw, batch, how):
    """The second copy of an answer is scored where the first is: by plain forward passes."""
    student, teacher = sharp(network, 1), sharp(network, 2)
    asked = self_teacher.with_block(batch, *block(batch), after=1)
    compare = self_teacher.comparison(draw, how)

    @jax.jit
    def found(student, teacher):
        return scoring.answer_losses(
            network, student, batch, draw, lambda said: (compare(said), ()), chunk=5,
            teacher=scoring.hidden(network, teacher, asked),
        ).losses  # fmt: skip

    log_q, log_p = laws(network, student, batch, batch), laws(network, teacher, batch, asked)
    wanted = np.zeros((4, R))
    for row, at in zip(*np.nonzero(batch['mask']), strict=True):
        one = dict(how=how, log_q=log_q[row, at], log_p=log_p[row, at])
        if how.top_k > V:
            one['how'] = Comparison(**MIXED)
        wanted[row, at] = numpy_divergence(**one)
    np.testing.assert_allclose(found(student, teacher), wanted, atol=1e-4)
    assert wanted.max() > 0.1


def test_a_teacher_with_the_same_prompt_and_weights_has_nothing_to_say(network, draw, batch):
    variables = sharp(network, 1)
    compare = self_teacher.comparison(draw, Comparison())

    def loss(student, teacher, asked):
        found = scoring.answer_losses(
            network, student, batch, draw, lambda said: (compare(said), ()), chunk=5,
            teacher=scoring.hidden(network, teacher, asked),
        )  # fmt: skip
        return found.losses.sum()

    value, slope = jax.jit(jax.value_and_grad(loss))(variables, variables, batch)
    assert float(value) == pytest.approx(0, abs=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) < 1e-5
    # With more in its prompt it has, and nothing flows to it.
    asked = self_teacher.with_block(batch, *block(batch))
    value, (own, of_teacher) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        variables, variables, asked
    )
    assert float(value) > 0.1
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(own)) > 1e-2
    assert not any(np.any(x) for x in jax.tree.leaves(of_teacher))


def test_an_argument_that_the_divergence_lacks_is_told(draw):
    with pytest.raises(UserError, match='beta'):
        self_teacher.comparison(draw, Comparison(arguments=dict(beta=0.5)))


def test_what_a_teacher_says_is_scored_in_the_same_pass_where_it_is_asked(network, draw, batch):
    variables = sharp(network, 2)
    asked = self_teacher.with_block(batch, *block(batch), after=1)

    @jax.jit
    def found(scored):
        hidden, scores = self_teacher.heard(
            network, variables, asked, draw, where=scored, chunk=5, parts=2
        )
        teacher = self_teacher.with_head(network, variables, hidden)
        return scores, teacher.logits(), scoring.score(network, variables, asked, draw)

    # Of two parts one is left out if the other has all that is asked for.
    for scored, left_out in (([1, 0, 1, 1], 0), ([0, 0, 1, 0], 2), ([0, 0, 0, 0], 4)):
        scored = np.array(scored, bool)
        scores, logits, wanted = found(scored)
        for mine, plain in zip(scores, wanted, strict=True):
            np.testing.assert_allclose(mine, np.where(scored[:, None], plain, 0), atol=1e-5)
        silent = ~np.asarray(logits).any((1, 2))
        assert silent.sum() == left_out
        assert not silent[scored].any()
        logits = np.array(logits, np.float64)
        logits[..., :2] = -np.inf
        law = special.log_softmax(logits / TEMPERATURE, -1)
        chosen = np.take_along_axis(law, batch['tokens'][..., None], -1)[..., 0]
        there = batch['mask'] & ~silent[:, None]
        np.testing.assert_allclose(chosen[there], np.asarray(wanted.log_probs)[there], atol=1e-5)
