"""TSD-KD: its three terms and their tokens against plain computations over whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoders as toys
from scipy import special

from kd.claims import seeds
from kd.methods.lm.distillation import distillation
from kd.methods.lm.tsd_kd import DIRECT, OPENER, UNCERTAIN, token_weights, tsd_kd
from kd.models.structured import BottleneckLM
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, B, T, LR = 14, 4, 9, 0.3
SHAPE = jax.ShapeDtypeStruct((1, T), jnp.int32)


def decoder(num_classes=V, **changes):
    return toys.decoder(num_classes, T, **changes)


@pytest.fixture(scope='module')
def student():
    return decoder()


@pytest.fixture(scope='module')
def teacher():
    # Of one tokenizer, and padded to another size.
    return decoder(num_classes=V + 3)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    begins, ends = np.array([[2], [4], [1], [3]]), np.array([[9], [7], [6], [5]])
    slots = np.arange(T)
    return {
        'input': rng.integers(0, V, (B, T)).astype(np.int32),
        'segments': (slots < ends).astype(np.int32),
        'response_mask': (slots >= begins) & (slots < ends),
    }


def context(student, teacher=None, spec=None):
    return seeds.context(
        network=student, teacher=teacher, tx=optax.sgd(LR), num_classes=V, spec=spec
    )


@pytest.fixture(scope='module')
def variables(student, teacher):
    return toys.drawn(student, 0), toys.drawn(teacher, 1)


def stepped(method, batch, variables):
    own, theirs = variables
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': theirs})
    return jax.jit(method.step)(state.with_params(own['params']), batch)


def close(one, two, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), one, two)


def laws(student, teacher, batch, variables):
    """log q, log p [B, T - 1, V] of the shared outcomes, and the positions that count."""
    own, theirs = (
        np.asarray(jax.jit(network.apply)(v, batch['input']).logits, np.float64)
        for network, v in zip((student, teacher), variables, strict=True)
    )
    where = batch['response_mask'][:, 1:] & (batch['segments'][:, 1:] > 0)
    return own[:, :-1], theirs[:, :-1, :V], where


def by_hand(own, said, where, *, weights=(0.05, 0.3), gate_temperature=0.7, k=5):
    """The loss as the paper writes it, from whole logits, token by token."""
    log_q, log_p = special.log_softmax(own, -1), special.log_softmax(said, -1)
    q, p = np.exp(log_q), np.exp(log_p)
    h_q, h_p = -(q * log_q).sum(-1), -(p * log_p).sum(-1)
    m = 0.9 * p + 0.1 * q
    jsd = 0.9 * (p * np.log(p / m)).sum(-1) + 0.1 * (q * np.log(q / m)).sum(-1)
    direct = (special.expit((h_q - h_p) / gate_temperature) * jsd)[where].mean()
    ranked, opener = [], np.zeros_like(where)
    for b in range(len(own)):
        places = np.flatnonzero(where[b])
        reached = np.cumsum(h_q[b, places]) >= 0.4 * h_q[b, places].sum() * (1 - 1e-6)
        opener[b, places[: reached.argmax() + 1]] = True
        for t in places[: reached.argmax() + 1]:
            best = np.argsort(-own[b, t])[:k]
            scores = own[b, t][best[np.argsort(-said[b, t][best])]]
            ranked.append(-sum(scores[j] - special.logsumexp(scores[j:]) for j in range(k)))
    least = np.sort(h_q[where])[::-1][int(np.ceil(0.3 * where.sum())) - 1]
    unsure = where & (h_q >= least)
    loss = direct + weights[0] * np.mean(ranked) + weights[1] * h_q[unsure].mean()
    return loss, opener, unsure


OPTIONS = dict(
    gate_temperature=0.7, ranking_weight=0.05, candidates=5, opener=0.4, entropy_weight=0.3,
    uncertain=0.3,
)  # fmt: skip


def test_the_loss_is_as_the_paper_writes_it_and_a_mean_over_the_tokens_of_the_batch(
    student, teacher, batch, variables
):
    # More padding, in which anything may stand, every row twice, and two micro-batches.
    wide = {name: np.pad(x, ((0, 0), (0, 2))) for name, x in batch.items()}
    twice = {name: np.concatenate([x, x]) for name, x in wide.items()}
    method = tsd_kd(context(student, teacher), chunk=8, micro_batches=2, **OPTIONS)
    after, metrics = stepped(method, twice, variables)
    loss, opener, unsure = by_hand(*laws(student, teacher, batch, variables))
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(loss, rel=1e-4)
    assert metrics['ranking'].count == 2 * opener.sum() < metrics['direct'].count
    assert metrics['uncertain'].count == 2 * unsure.sum()
    assert float(metrics['length'].total) == 2 * batch['response_mask'].sum()
    # A small step goes downhill by the square of the gradient's length: the gate and the choice of
    # tokens are constants to the gradient, and move little.
    params = variables[0]['params']
    step = jax.tree.map(jnp.subtract, params, after.params['network'])
    small = {'params': jax.tree.map(lambda x, d: x - 1e-3 * d, params, step)}
    moved, *_ = by_hand(*laws(student, teacher, batch, (small, variables[1])))
    slope = float(optax.tree.norm(step)) ** 2 / LR
    assert loss - moved == pytest.approx(1e-3 * slope, rel=0.15)


def table(width=8):
    """A student of one token and contexts with what the teacher says of them."""
    shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    network = from_linen(BottleneckLM(num_classes=6, width=width), shape)
    rng = np.random.default_rng(2)
    batch = {
        'input': rng.integers(0, 6, (5, 2)).astype(np.int32),
        'label': np.zeros(5, np.int32),
        'teacher_logits': 2 * rng.normal(size=(5, 6)).astype(np.float32),
    }
    return network, batch


def test_without_gate_ranking_and_entropy_it_is_gkd():
    network, batch = table()
    plain = tsd_kd(context(network), gate=False, ranking_weight=0.0, entropy_weight=0.0)
    gkd = distillation(
        context(network), divergence='kd.losses.divergence.generalized_jsd', beta=0.9
    )
    found = []
    for method in (plain, gkd):
        state = jax.jit(method.init)(jax.random.key(0))
        found.append(jax.jit(method.step)(state, batch))
    close(found[0][0].params, found[1][0].params)
    soft = float(found[1][1]['soft_loss'].total)
    assert float(found[0][1]['direct'].total) == pytest.approx(soft, rel=1e-5)


def test_weights_are_of_the_tokens_of_the_whole_batch():
    entropies = np.array([[1.0, 1.0, 2.0, 0.0], [5.0, 1.0, 9.0, 9.0]])
    where = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    found = token_weights(jnp.asarray(entropies), jnp.asarray(where), 0.5, 0.3)
    # The mean over two rows of sum_t w_t l_t is a mean over so many tokens.
    np.testing.assert_allclose(found[DIRECT], 2 * where / 6)
    np.testing.assert_allclose(found[OPENER], np.array([[1, 1, 0, 0], [1, 0, 0, 0]]) * 2 / 3)
    np.testing.assert_allclose(found[UNCERTAIN], np.array([[0, 0, 1, 0], [1, 0, 0, 0]]) * 2 / 2)
    # Answers of one token are their own openers.
    found = token_weights(jnp.ones(4), jnp.ones(4, bool), 0.1, 0.1)
    np.testing.assert_allclose(found[OPENER], np.ones(4))


def test_a_ranking_follows_the_teacher_and_a_reversed_one_does_not():
    """One context: from equal logits the student's order becomes the teacher's, or its reverse."""
    network, batch = table(width=4)
    batch = {name: x[:1] for name, x in batch.items()}
    said = batch['teacher_logits']
    for ranking, sign in (('teacher', 1), ('reversed', -1)):
        method = tsd_kd(
            context(network), gate=True, ranking_weight=100.0, ranking=ranking, candidates=6,
            entropy_weight=0.0,
        )  # fmt: skip
        state = jax.jit(method.init)(jax.random.key(0))
        step = jax.jit(method.step)
        for _ in range(60):
            state = step(state, batch)[0]
        logits = network.apply(state.variables(), batch['input']).logits
        np.testing.assert_array_equal(np.argsort(logits), np.argsort(sign * said))


def test_it_learns_from_its_own_answers(student, teacher, variables):
    """The most probable token after each prompt, as plain forward passes have it."""
    rng = np.random.default_rng(1)
    lengths = np.array([4, 3, 2, 4])
    prompts = {
        'input': rng.integers(3, V, (B, 4)).astype(np.int32),
        'prompt_mask': np.arange(4) >= 4 - lengths[:, None],
    }
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in prompts.items()}
    method = tsd_kd(
        context(student, teacher, spec),
        rollout=dict(max_new=1, temperature=0.0, stop=(2,)),
        **OPTIONS,
    )
    _, metrics = stepped(method, prompts, variables)
    rows = np.zeros((B, 5), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = prompts['input'][row, 4 - length :]
    said = np.asarray(jax.jit(student.apply)(variables[0], rows).logits)
    last = np.arange(5) == lengths[:, None]
    rows[last] = said[np.arange(B), lengths - 1].argmax(-1)
    text = {'input': rows, 'segments': np.ones_like(rows), 'response_mask': last}
    loss, *_ = by_hand(*laws(student, teacher, text, variables))
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(loss, rel=1e-4)
    assert metrics['length'].total == B
