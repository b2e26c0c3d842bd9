"""What all losses promise: the number of an independent float64 computation, its derivative, finite
values and gradients at extreme logits, and the same under every transformation of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
import scipy.stats
from promises import *  # noqa: F403
from promises import LABELS, B, V

from kd.losses import (
    classification,
    divergence,
    feature,
    relation,
    sequence,
    signal,
    token,
)

TEMPERATURE = 3.0
GENERATOR = np.random.default_rng(0)
assert np.array_equal(GENERATOR.integers(0, V, B), LABELS)
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
}
ON_FEATURES = (
    'hint',
    'attention_transfer',
    'similarity_preserving',
    'linear_cka',
    'fused_divergence',
    'fused_token_loss',
)
WEIGHT_HELD = ('adaptive_kl',)  # see test_divergence


def test_optax_kl_divergence_is_not_finite_where_ours_is(at_extremes):
    student, teacher = map(jnp.asarray, at_extremes[2])

    @jax.jit
    def optax_kl(s, t):
        return jnp.sum(optax.losses.kl_divergence(jax.nn.log_softmax(s), jax.nn.softmax(t)))

    assert not np.all(np.isfinite(jax.grad(optax_kl, (0, 1))(student, teacher)[1]))
    assert not np.isfinite(optax_kl(student, teacher))
    assert np.all(np.isfinite(at_extremes[1][0]['forward_kl']))
