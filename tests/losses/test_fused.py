"""The general fused loss: inputs per token, tokens that do not count, aux, shards; and what is made
of it, against whole logits in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import NamedSharding, PartitionSpec

from kd.aot import hlo
from kd.losses import divergence, numerics, sequence, signal

N, D, V = 24, 4, 9
GENERATOR = np.random.default_rng(3)
HIDDEN, HEAD = GENERATOR.normal(size=(N, D)), GENERATOR.normal(size=(D, V))
TEACHER, WEIGHTS, VARIED = (
    GENERATOR.normal(size=(N, V)),
    GENERATOR.uniform(0.5, 2, N),
    GENERATOR.normal(size=N),
)
ONES = np.ones(N)
TOKENS = GENERATOR.integers(0, V, N)
VALID = {
    'some': GENERATOR.permutation(np.arange(N) < 10),
    'none': np.zeros(N, bool),
    'all': np.ones(N, bool),
}


def token_loss(logits, teacher, weights):
    """A weighted divergence, and three kinds of aux."""
    log_q = numerics.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    aux = {'entropy': entropy, 'top': jnp.argmax(logits, axis=-1), 'two': logits[:, :2]}
    return weights * divergence.reverse_kl(logits, teacher), aux


@pytest.fixture(autouse=True)
def _float64(quick_compilation):
    with jax.enable_x64(True), quick_compilation():
        yield


def leading(mask, x):
    """[N] to meet [N, ...]."""
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def gradients(fused, *, masked=True, of_aux=0.0, poison=False, **options):
    """{(valid, cotangent): (loss, aux, to_hidden, to_head)} from one compilation."""

    @jax.jit
    def run(hidden, head, teacher, weights, valid, cotangent):
        def outputs(hidden, head):
            if fused:
                return sequence.fused_token_loss(
                    hidden,
                    head,
                    token_loss,
                    teacher=signal.Dense(teacher),
                    per_token=weights,
                    valid=valid if masked else None,
                    **options,
                )
            loss, aux = token_loss(hidden @ head, teacher, weights)
            return jax.tree.map(lambda x: jnp.where(leading(valid, x), x, 0), (loss, aux))

        def total(hidden, head):
            loss, aux = outputs(hidden, head)
            extra = of_aux * (jnp.sum(cotangent * aux['entropy']) + jnp.sum(aux['two'] ** 2))
            return jnp.sum(cotangent * loss) + extra, (loss, aux)

        slopes, (loss, aux) = jax.grad(total, (0, 1), has_aux=True)(hidden, head)
        return loss, aux, *slopes

    found = {}
    for name, valid in VALID.items():
        rows = [HIDDEN, TEACHER, WEIGHTS]
        if poison:
            rows = [np.where(leading(valid, x), x, np.nan) for x in rows]
        hidden, teacher, weights = map(jnp.asarray, rows)
        for kind, cotangent in {'alike': np.full(N, 0.3), 'varied': VARIED}.items():
            found[name, kind] = run(hidden, HEAD, teacher, weights, valid, cotangent)
    return jax.device_get(found)


@pytest.fixture(scope='module')
def dense():
    with jax.enable_x64(True):
        return {of_aux: gradients(False, of_aux=of_aux) for of_aux in (0.0, 0.7)}


def assert_same(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), got, expected)


@pytest.mark.parametrize(('chunk', 'shards'), [(5, 1), (7, 4), (1000, 2)])
def test_tokens_that_do_not_count_are_zero_whatever_they_hold(chunk, shards, dense):
    got = gradients(True, poison=True, chunk=chunk, shards=shards)
    assert_same(got, dense[0.0])


def test_without_valid_all_count_in_every_layout(dense):
    got = gradients(True, masked=False, chunk=5, shards=4)
    for kind in ('alike', 'varied'):
        assert_same(got['some', kind], dense[0.0]['all', kind])


def test_aux_is_differentiable_too(dense):
    got = gradients(True, of_aux=0.7, poison=True, chunk=5)
    assert_same(got, dense[0.7])


def slab_counter(**options):
    """Counts the slabs of six tokens, of 24, that a gradient evaluates."""
    seen = []

    def counted(logits, teacher, weights):
        jax.debug.callback(lambda: seen.append(1))
        loss, aux = token_loss(logits, teacher, weights)
        return loss, aux['entropy']

    fused = partial(sequence.fused_token_loss, token_loss=counted, chunk=6, **options)

    @jax.jit
    def gradient(hidden, head, cotangent, of_entropy, valid):
        def total(hidden, head):
            teacher = signal.Dense(jnp.asarray(TEACHER))
            loss, entropy = fused(hidden, head, teacher=teacher, per_token=WEIGHTS, valid=valid)
            return jnp.sum(cotangent * loss) + of_entropy * jnp.sum(entropy)

        return jax.grad(total, (0, 1))(hidden, head)

    def count(valid=None, cotangent=ONES, of_entropy=0.0):
        seen.clear()
        jax.block_until_ready(gradient(HIDDEN, HEAD, cotangent, of_entropy, valid))
        jax.effects_barrier()
        return len(seen)

    return count


def test_slabs_without_a_token_that_counts_are_skipped():
    half = np.arange(N) < N // 2
    count, in_two_parts = slab_counter(), slab_counter(shards=2)
    assert count() == 4  # the weights of tokens are inside: one sweep
    assert count(half) == count(half[::-1]) == 2
    assert count(half, VARIED * half) == 4
    assert count(half, of_entropy=1.0) == 4
    assert count(half & ~half) == 0
    # Each part is packed by itself, and the fullest decides.
    assert in_two_parts(half) == 4
    assert in_two_parts(np.arange(N) % 2 > 0) == 2


def test_the_logits_of_all_tokens_never_exist():
    def total(hidden, head, teacher, valid):
        teacher = signal.HiddenHead(teacher, head)
        loss, _ = sequence.fused_token_loss(
            hidden, head, token_loss, teacher=teacher, per_token=WEIGHTS, valid=valid, chunk=6
        )
        return jnp.sum(loss)

    arguments = (HIDDEN, HEAD, HIDDEN + 1, VALID['some'])
    lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments)
    text = lowered.as_text() + lowered.compile().as_text()
    assert '6x9xf64' in text  # a slab
    assert '24x9xf64' not in text
    assert '[24,9]' not in text


def test_a_head_that_is_an_embedding_has_the_same_loss_and_gradients():
    rng = np.random.default_rng(3)
    hidden, theirs = rng.normal(size=(2, 12, 5)).astype(np.float32)
    heads = rng.normal(size=(2, 9, 5)).astype(np.float32)
    valid, weights = np.arange(12) % 3 > 0, rng.normal(size=12).astype(np.float32)

    def total(hidden, embedding, tied):
        teacher = signal.HiddenHead(theirs, heads[1].T, tied=tied)
        losses = sequence.fused_divergence(
            hidden, embedding.T, teacher, chunk=4, valid=valid, tied=tied
        )
        # Weights from outside take the second sweep too.
        return jnp.sum(weights * losses)

    plain, tied = (jax.value_and_grad(total, (0, 1))(hidden, heads[0], x) for x in (False, True))
    np.testing.assert_allclose(tied[0], plain[0], rtol=1e-6)
    for one, other in zip(tied[1], plain[1], strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_an_embedding_is_not_copied():
    """Temporaries over the bytes of the head: its gradient, and slabs of 8 of 4,096 logits."""
    size, width, tokens = 4096, 32, 64

    def total(hidden, embedding, theirs, of_teacher):
        teacher = signal.HiddenHead(theirs, of_teacher.T, tied=True)
        valid = jnp.arange(tokens) % 2 == 0
        return jnp.sum(
            sequence.fused_divergence(hidden, embedding.T, teacher, chunk=8, valid=valid, tied=True)
        )

    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    rows = jax.ShapeDtypeStruct((size, width), jnp.float32)
    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    memory = run.lower(hidden, rows, hidden, rows).compile().memory_analysis()
    # With a copy of each head turned, 3.5.
    assert memory.temp_size_in_bytes < 1.7 * 4 * size * width


def test_devices_meet_once_however_many_slabs_there_are():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['data'], []))

    def total(hidden, head, teacher, weights, valid):
        loss, _ = sequence.fused_token_loss(
            hidden,
            head,
            token_loss,
            teacher=signal.Dense(teacher),
            per_token=weights,
            valid=valid,
            chunk=8,
            shards=8,
        )
        return jnp.sum(loss)

    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    placed = [
        jax.device_put(x, place)
        for x, place in (
            (HIDDEN, rows), (HEAD, whole), (TEACHER, rows), (WEIGHTS, rows), (VALID['some'], rows),
        )
    ]  # fmt: skip
    compiled = run.lower(*placed).compile()
    assert_same(compiled(*placed), run(HIDDEN, HEAD, TEACHER, WEIGHTS, VALID['some']))
    program = hlo.parse(compiled.as_text())
    assert program.loops_of_unknown_length() == 0
    assert {each.times for each in hlo.collectives(compiled.as_text())} == {1}


ALLOWED = np.arange(V) != 2


ALLOWED = np.arange(V) != 2
SOME_ALLOWED = (np.arange(N) % 3 > 0)[:, None] | ALLOWED


@pytest.mark.parametrize(
    ('temperature', 'where'),
    [(0.6, None), (np.linspace(0.5, 2.0, N), ALLOWED), (2.0, SOME_ALLOWED)],
    ids=['plain', 'temperatures', 'masks'],
)
def test_token_log_probs_and_entropy(temperature, where):
    tokens = np.where(TOKENS == 2, 3, TOKENS)

    def wanted(hidden, head):
        z = hidden @ head / np.reshape(temperature, (-1, 1))
        kept = np.broadcast_to(True if where is None else where, z.shape)
        log_q = scipy.special.log_softmax(np.where(kept, z, -np.inf), axis=-1)
        return log_q[np.arange(N), tokens], scipy.special.entr(np.exp(log_q)).sum(-1)

    def total(f, hidden, head):
        log_probs, entropy = f(hidden, head)
        return (VARIED * log_probs).sum() + 0.1 * (WEIGHTS * entropy).sum()

    ours = partial(
        sequence.token_log_probs, tokens=tokens, temperature=temperature, where=where, chunk=7
    )
    assert_same(jax.jit(ours)(HIDDEN, HEAD), wanted(HIDDEN, HEAD))
    slopes = jax.jit(jax.grad(partial(total, ours), (0, 1)))(HIDDEN, HEAD)
    towards = [np.random.default_rng(k).normal(size=x.shape) for k, x in enumerate((HIDDEN, HEAD))]
    for k in (0, 1):
        step = [1e-5 * (j == k) * x for j, x in enumerate(towards)]
        up = total(wanted, HIDDEN + step[0], HEAD + step[1])
        down = total(wanted, HIDDEN - step[0], HEAD - step[1])
        np.testing.assert_allclose(np.sum(slopes[k] * towards[k]), (up - down) / 2e-5, rtol=1e-7)


def test_a_token_that_cannot_be_is_infinitely_unlikely_unless_it_does_not_count():
    tokens = np.concatenate([[-100, V, 2], np.where(TOKENS == 2, 3, TOKENS)[3:]])

    @jax.jit
    def log_probs(hidden, valid):
        return sequence.token_log_probs(hidden, HEAD, tokens, where=ALLOWED, valid=valid)[0]

    np.testing.assert_array_equal(
        np.isneginf(log_probs(HIDDEN, np.ones(N, bool))), np.arange(N) < 3
    )
    counted = np.arange(N) >= 3
    value, slope = jax.value_and_grad(lambda h: jnp.sum(log_probs(h, counted)))(HIDDEN)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    assert (np.asarray(slope)[:3] == 0).all()


def test_sums_and_counts_of_sequences():
    log_probs = np.where(np.arange(4) < 3, -np.arange(8.0).reshape(2, 4), np.nan)
    where = np.array([[True, False, True, False], [False] * 4])
    sums, counts = sequence.sequence_log_probs(log_probs, where)
    np.testing.assert_array_equal(sums, [-2.0, 0.0])
    np.testing.assert_array_equal(counts, [2.0, 0.0])
    slope = jax.grad(lambda x: jnp.sum(sequence.sequence_log_probs(x, where)[0]))(log_probs)
    np.testing.assert_array_equal(slope, where.astype(float))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'valid': np.ones(N)}, r'valid must be bool \[24\], got float64 \(24,\)'),
        ({'valid': np.ones((N, 1), bool)}, r'valid must be bool \[24\], got bool \(24, 1\)'),
        ({'shards': 5}, r'24 tokens do not divide into shards=5 equal parts'),
        ({'per_token': np.ones(3)}, r'per_token needs the leading axis of the 24 tokens .* \(3,\)'),
        (
            {'token_loss': lambda z, t, w: (jnp.sum(z), ())},
            r'token_loss must return \(loss \[n\], aux\) .* n = 24 .* \(\(\), \(\)\)',
        ),
        (
            {'token_loss': lambda z, t, w: (z[:, 0], jnp.sum(z))},
            r'token_loss must return \(loss \[n\], aux\)',
        ),
    ],
)
def test_refusals_say_what_was_expected(options, message):
    arguments = {'hidden': HIDDEN, 'head': HEAD, 'token_loss': lambda z, t, w: (z[:, 0], ())}
    with pytest.raises(ValueError, match=message):
        sequence.fused_token_loss(**(arguments | options))
