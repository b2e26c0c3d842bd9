"""What all losses promise: the number of an independent float64 computation, its derivative, finite
values and gradients at extreme logits, and the same under every transformation of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from classical_oracles import CLASSICAL, OF_LOGITS
from jax.sharding import PartitionSpec

from kd.losses import (
    OF_BATCH,
    classification,
    divergence,
    feature,
    relation,
    sequence,
    signal,
    token,
)

B, V, TEMPERATURE = 8, 6, 3.0
GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, V, B).astype(np.int32)
HEAD = GENERATOR.normal(size=(V, 5)) / 2


def log_softmax(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    possible = z.max(axis=-1, keepdims=True) > -np.inf
    return np.where(possible, scipy.special.log_softmax(np.where(possible, z, 0.0), axis=-1), z)


def kl(log_a, log_b):
    """KL of distributions given by logarithms, 0 log 0 = 0."""
    a = np.exp(log_a)
    with np.errstate(invalid='ignore'):
        return np.sum(np.where(a > 0, a * (log_a - log_b), 0.0), axis=-1)


def mixed(log_a, log_b, weight):
    return np.logaddexp(log_a + np.log(weight), log_b + np.log(1 - weight))


def jsd(s, t, beta):
    q, p = log_softmax(s), log_softmax(t)
    m = mixed(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(s, t, a, b):
    q, p = np.exp(log_softmax(s)), np.exp(log_softmax(t))
    inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inner.sum(-1) / (a * b)


def renyi(s, t, alpha):
    q, p = log_softmax(s), log_softmax(t)
    possible = np.isfinite(p)
    exponent = alpha * p[possible] + (1 - alpha) * q[possible]
    terms = np.full(p.shape, -np.inf)
    terms[possible] = exponent
    return scipy.special.logsumexp(terms, axis=-1) / (alpha - 1)


def cross_entropy(s, smoothing):
    q = log_softmax(s)
    kept = np.isfinite(q)
    uniform = np.where(kept, 1 / kept.sum(-1, keepdims=True), 0.0)
    smooth = -np.sum(uniform * np.where(kept, q, 0.0), axis=-1)
    return -(1 - smoothing) * q[np.arange(B), LABELS] + smoothing * smooth


def binary_kl(s, t):
    def binary(z):
        label = log_softmax(z)[np.arange(B), LABELS]
        rest = scipy.special.logsumexp(other_logits(log_softmax(z)), axis=-1)
        return np.stack([label, rest], axis=-1)

    return kl(binary(t), binary(s))


def other_logits(z):
    return np.stack([np.delete(row, label) for row, label in zip(z, LABELS, strict=True)])


def other_kl(s, t):
    return kl(log_softmax(other_logits(t)), log_softmax(other_logits(s)))


def mean_square(s, t, center):
    with np.errstate(invalid='ignore'):
        difference = s - t
    kept = np.isfinite(difference)
    if center:
        difference = difference - np.mean(difference, -1, keepdims=True, where=kept)
    return np.mean(difference**2, axis=-1, where=kept)


def correlations(a, b):
    return np.array([scipy.stats.pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)])


def attention(x):
    energy = (x.reshape(B, 3, 2) ** 2).sum(-1)
    return energy / np.linalg.norm(energy, axis=-1, keepdims=True)


def row_similarity(x):
    gram = x @ x.T
    return gram / np.linalg.norm(gram, axis=-1, keepdims=True)


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def ranking(s, t, k):
    values = []
    for row, preferred in zip(np.asarray(s, np.float64), np.asarray(t), strict=True):
        chosen = np.argsort(-row, kind='stable')[:k]
        chosen = chosen[np.isfinite(row[chosen])]
        scores = row[chosen[np.argsort(-preferred[chosen], kind='stable')]]
        rest = [scipy.special.logsumexp(scores[j:]) for j in range(len(scores))]
        values.append(np.sum(rest) - np.sum(scores))
    return np.array(values)


def of_label(z):
    return log_softmax(z)[np.arange(B), LABELS]


def squared_log_ratio(s, t):
    return token.k2(*(-classification.cross_entropy(z, jnp.asarray(LABELS)) for z in (s, t)))


def q_of(s):
    return np.exp(log_softmax(s))


def labelled(f, **options):
    return lambda s, t: f(s, t, jnp.asarray(LABELS), **options)


def as_maps(x):
    return jnp.reshape(x, (B, 3, 2))


def fused(s, t):
    head = jnp.asarray(HEAD, jnp.promote_types(s.dtype, jnp.float32))
    return sequence.fused_divergence(s, head, signal.HiddenHead(t, head), chunk=3)


def adaptive(s, t):
    log_q, log_p = log_softmax(s), log_softmax(t)
    gap = np.abs(np.exp(log_p) - np.exp(log_q))
    order = np.argsort(-log_p, axis=-1, kind='stable')
    held = np.cumsum(np.take_along_axis(np.exp(log_p), order, -1), -1)
    in_head = np.concatenate([np.zeros((B, 1)), held[:, :-1]], -1) < 0.5 * (1 - 1e-6)
    in_head[:, 0] = True
    total = gap.sum(-1)
    head = np.sum(np.take_along_axis(gap, order, -1), -1, where=in_head)
    share = np.divide(head, total, out=np.full(B, 0.5), where=total > 0)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


COUNTED, WEIGHTS = np.arange(B) % 3 > 0, np.arange(1.0, B + 1)
TOKENS = LABELS % HEAD.shape[1]


def fused_tokens(s, t):
    """Weights of tokens, and tokens that do not count."""

    def token_loss(logits, teacher, per_token):
        tokens, weights = per_token
        return weights * classification.cross_entropy(logits, tokens), ()

    head = jnp.asarray(HEAD, jnp.promote_types(s.dtype, jnp.float32))
    loss, _ = sequence.fused_token_loss(
        s,
        head,
        token_loss,
        per_token=(jnp.asarray(TOKENS), jnp.asarray(WEIGHTS, head.dtype)),
        valid=jnp.asarray(COUNTED),
        chunk=3,
        shards=2,
    )
    return loss


def unfused_tokens(s, t):
    return np.where(COUNTED, -WEIGHTS * log_softmax(s @ HEAD)[np.arange(B), TOKENS], 0.0)


# name: (loss, oracle), each of student [B, V] and teacher [B, V].
LOSSES = {
    'forward_kl': (divergence.forward_kl, lambda s, t: kl(log_softmax(t), log_softmax(s))),
    'forward_kl at temperature': (
        partial(divergence.forward_kl, temperature=TEMPERATURE),
        lambda s, t: kl(log_softmax(t, TEMPERATURE), log_softmax(s, TEMPERATURE)),
    ),
    'reverse_kl': (divergence.reverse_kl, lambda s, t: kl(log_softmax(s), log_softmax(t))),
    'generalized_jsd': (partial(divergence.generalized_jsd, beta=0.1), partial(jsd, beta=0.1)),
    'skew_kl': (
        divergence.skew_kl,
        lambda s, t: kl(log_softmax(t), mixed(log_softmax(t), log_softmax(s), 0.1)),
    ),
    'skew_reverse_kl': (
        divergence.skew_reverse_kl,
        lambda s, t: kl(log_softmax(s), mixed(log_softmax(s), log_softmax(t), 0.1)),
    ),
    'mixed_kl': (
        partial(divergence.mixed_kl, weight=0.3),
        lambda s, t: (
            0.3 * kl(log_softmax(t), log_softmax(s)) + 0.7 * kl(log_softmax(s), log_softmax(t))
        ),
    ),
    'adaptive_kl': (divergence.adaptive_kl, adaptive),
    'total_variation': (
        divergence.total_variation,
        lambda s, t: np.abs(q_of(s) - q_of(t)).sum(-1) / 2,
    ),
    'alpha_beta': (
        partial(divergence.alpha_beta, alpha=0.3, beta=0.5),
        partial(alpha_beta, a=0.3, b=0.5),
    ),
    'renyi below 1': (partial(divergence.renyi, alpha=0.5), partial(renyi, alpha=0.5)),
    'renyi above 1': (partial(divergence.renyi, alpha=2), partial(renyi, alpha=2)),
    'cross_entropy': (
        lambda s, t: classification.cross_entropy(s, jnp.asarray(LABELS), label_smoothing=0.1),
        lambda s, t: cross_entropy(s, 0.1),
    ),
    'soft_and_hard': (
        labelled(classification.soft_and_hard, temperature=TEMPERATURE, hard_weight=0.2),
        lambda s, t: (
            0.8 * 9 * kl(log_softmax(t, TEMPERATURE), log_softmax(s, TEMPERATURE))
            + 0.2 * cross_entropy(s, 0.0)
        ),
    ),
    'target_kl': (labelled(classification.target_kl), binary_kl),
    'non_target_kl': (labelled(classification.non_target_kl), other_kl),
    'decoupled_kd': (
        labelled(classification.decoupled_kd, alpha=2.0, beta=5.0),
        lambda s, t: 2 * binary_kl(s, t) + 5 * other_kl(s, t),
    ),
    'logit_mse': (classification.logit_mse, partial(mean_square, center=False)),
    'centred logit_mse': (
        partial(classification.logit_mse, center=True),
        partial(mean_square, center=True),
    ),
    'inter_class_correlation': (
        partial(relation.inter_class_correlation, eps=0.0),
        lambda s, t: 1 - correlations(q_of(s), q_of(t)),
    ),
    'intra_class_correlation': (
        partial(relation.intra_class_correlation, eps=0.0),
        lambda s, t: 1 - correlations(q_of(s).T, q_of(t).T),
    ),
    'entropy': (lambda s, t: token.entropy(s), lambda s, t: -kl(log_softmax(s), 0.0)),
    'list_mle': (partial(token.list_mle, k=4), partial(ranking, k=4)),
    'k2': (squared_log_ratio, lambda s, t: (of_label(s) - of_label(t)) ** 2 / 2),
    'hint': (feature.hint, lambda s, t: ((s - t) ** 2).sum(-1) / 2),
    'attention_transfer': (
        lambda s, t: feature.attention_transfer(as_maps(s), as_maps(t)),
        lambda s, t: ((attention(s) - attention(t)) ** 2).sum(-1),
    ),
    'similarity_preserving': (
        feature.similarity_preserving,
        lambda s, t: ((row_similarity(s) - row_similarity(t)) ** 2).sum(-1) / B,
    ),
    'linear_cka': (feature.linear_cka, cka),
    'fused_divergence': (
        fused,
        lambda s, t: kl(log_softmax(t @ HEAD), log_softmax(s @ HEAD)),
    ),
    'fused_token_loss': (fused_tokens, unfused_tokens),
    **CLASSICAL,
}
ON_FEATURES = (
    'hint',
    'attention_transfer',
    'similarity_preserving',
    'linear_cka',
    'fused_divergence',
    'fused_token_loss',
    *(name for name in CLASSICAL if name not in OF_LOGITS),
)
WEIGHT_HELD = ('adaptive_kl', 'weighted_soft_label')
each_loss = pytest.mark.parametrize('name', LOSSES)


def values_and_gradients(student, teacher, argnums=0):
    """Of all losses, in one compilation: the values and the gradients of their sums."""

    def summed(s, t, loss):
        value = loss(s, t)
        return jnp.sum(value), value

    results = {
        name: jax.grad(summed, argnums, has_aux=True)(student, teacher, loss)
        for name, (loss, _) in LOSSES.items()
    }
    return (
        {name: value for name, (_, value) in results.items()},
        {name: gradient for name, (gradient, _) in results.items()},
    )


@pytest.fixture(scope='module')
def logits():
    return np.random.default_rng(1).normal(size=(2, B, V)) * 2


@pytest.fixture(scope='module')
def in_float64(logits, quick_compilation):
    with jax.enable_x64(True), quick_compilation():
        values, gradients = jax.jit(values_and_gradients)(*map(jnp.asarray, logits))
    return jax.device_get((values, gradients))


@each_loss
def test_value_is_that_of_an_independent_float64_computation(name, logits, in_float64):
    value = in_float64[0][name]
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, LOSSES[name][1](*logits), rtol=1e-10, atol=1e-12)


# These hold their weights constant: see test_divergence and test_classical_losses.
@pytest.mark.parametrize('name', [name for name in LOSSES if name not in WEIGHT_HELD])
def test_gradient_is_the_finite_difference_of_the_oracle(name, logits, in_float64):
    oracle, step = LOSSES[name][1], 1e-5
    student, teacher = logits
    expected = np.zeros((B, V))
    for index in np.ndindex(B, V):
        shift = np.zeros((B, V))
        shift[index] = step
        difference = oracle(student + shift, teacher) - oracle(student - shift, teacher)
        expected[index] = np.sum(difference) / (2 * step)
    np.testing.assert_allclose(in_float64[1][name], expected, rtol=1e-6, atol=1e-8)


@each_loss
def test_what_compares_examples_with_each_other_is_known_as_of_the_batch(name, logits):
    student, teacher = logits
    shift = 0.5 * (np.arange(B) == 0)[:, None] * np.arange(V)
    before = LOSSES[name][1](student, teacher)
    after = LOSSES[name][1](student + shift, teacher - shift)
    apart = np.shape(before) == (B,) and np.array_equal(before[1:], after[1:])
    assert apart == (name not in {loss.__name__ for loss in OF_BATCH})


def extreme_logits():
    """Rows of both sides: agreement and opposition at +-1e4, and -inf in the same places."""
    student, teacher = np.random.default_rng(2).normal(size=(2, B, V)) * 3
    student[0], teacher[0] = 1e4, -1e4  # two uniform distributions
    student[1, :3], teacher[1, 3:] = 1e4, 1e4
    student[2, LABELS[2]], teacher[2, LABELS[2]] = 1e4, -1e4
    student[3, LABELS[3]], teacher[3, LABELS[3]] = -1e4, 1e4
    masked = np.zeros((B, V), bool)
    masked[4:] = np.arange(V) >= 4
    masked[7] = True
    masked[np.arange(B), LABELS] = False
    return student, teacher, masked


# One compilation for the next two fixtures.
compiled = jax.jit(partial(values_and_gradients, argnums=(0, 1)))


@pytest.fixture(scope='module')
def at_extremes():
    student, teacher, masked = extreme_logits()
    plain = compiled(jnp.asarray(student), jnp.asarray(teacher))
    student[masked], teacher[masked] = -np.inf, -np.inf
    inputs = (student, teacher)
    return plain, compiled(*map(jnp.asarray, inputs)), inputs, masked


@each_loss
def test_value_and_gradients_are_finite_at_extreme_logits(name, at_extremes):
    plain, with_mask, (student, teacher), masked = at_extremes
    for values, gradients in (plain,) if name in ON_FEATURES else (plain, with_mask):
        assert np.all(np.isfinite(values[name]))
        for gradient in gradients[name]:
            assert np.all(np.isfinite(gradient))
    if name in ON_FEATURES:
        return
    values, gradients = with_mask
    for gradient in gradients[name]:
        assert np.all(np.asarray(gradient)[masked] == 0)
    if 'correlation' not in name:  # scipy has no correlation of constants
        np.testing.assert_allclose(
            values[name], LOSSES[name][1](student, teacher), rtol=3e-5, atol=3e-5
        )


def test_optax_kl_divergence_is_not_finite_where_ours_is(at_extremes):
    student, teacher = map(jnp.asarray, at_extremes[2])

    @jax.jit
    def optax_kl(s, t):
        return jnp.sum(optax.losses.kl_divergence(jax.nn.log_softmax(s), jax.nn.softmax(t)))

    assert not np.all(np.isfinite(jax.grad(optax_kl, (0, 1))(student, teacher)[1]))
    assert not np.isfinite(optax_kl(student, teacher))
    assert np.all(np.isfinite(at_extremes[1][0]['forward_kl']))


@pytest.fixture(scope='module')
def transformed(quick_compilation):
    """Values and student gradients of 8 batches: one by one, and by each transformation at once."""
    batches = np.random.default_rng(3).normal(size=(2, 8, B, V)).astype(np.float32) * 2
    student, teacher = map(jnp.asarray, batches)
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = PartitionSpec('batch')
    by_name = {
        'vmap': jax.jit(jax.vmap(values_and_gradients)),
        'pmap': jax.pmap(values_and_gradients),
        'shard_map': jax.jit(
            jax.shard_map(
                lambda s, t: jax.tree.map(lambda x: x[None], values_and_gradients(s[0], t[0])),
                mesh=mesh,
                in_specs=over_batch,
                out_specs=over_batch,
            )
        ),
    }
    results = {'jit': jax.tree.map(lambda *x: np.stack(x), *map(compiled, student, teacher))}
    with quick_compilation():
        for name, f in by_name.items():
            results[name] = jax.device_get(f(student, teacher))
    return batches, results


@each_loss
def test_all_transformations_give_the_same_numbers(name, transformed):
    batches, results = transformed
    expected = np.stack([LOSSES[name][1](*pair) for pair in np.swapaxes(batches, 0, 1)])
    np.testing.assert_allclose(results['jit'][0][name], expected, rtol=2e-4, atol=2e-5)
    scale = np.abs(results['jit'][1][name][0]).max() + 1e-3
    for transformation in ('vmap', 'pmap', 'shard_map'):
        value, gradient = (tree[name] for tree in results[transformation])
        np.testing.assert_allclose(value, results['jit'][0][name], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(gradient, results['jit'][1][name][0], atol=2e-5 * scale)


@pytest.fixture(scope='module')
def in_bfloat16(logits, quick_compilation):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in logits]
    with quick_compilation():
        values = jax.jit(lambda s, t: {name: f(s, t) for name, (f, _) in LOSSES.items()})(*rounded)
    return [np.asarray(x, np.float64) for x in rounded], values


@each_loss
def test_bfloat16_input_is_computed_in_float32(name, in_bfloat16):
    rounded, values = in_bfloat16
    assert values[name].dtype == jnp.float32
    np.testing.assert_allclose(values[name], LOSSES[name][1](*rounded), rtol=1e-4, atol=1e-5)
