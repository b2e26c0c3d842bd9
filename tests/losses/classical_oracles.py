"""The classical losses with independent computations: {name: (loss, oracle)} of student and teacher
[8, 6], and a few of their parts."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import scipy.special

from kd.losses import classification, contrastive, feature_maps, numerics, relation, singular

B, V = 8, 6
GENERATOR = np.random.default_rng(11)
LABELS = np.random.default_rng(0).integers(0, V, B).astype(np.int32)
MARGIN = np.array([-0.7, -0.2])
LOG_SCALE = np.array([0.4, -1.3])
MEMORY = GENERATOR.normal(size=(2, 12, V))
MEMORY /= np.linalg.norm(MEMORY, axis=-1, keepdims=True)
ROWS = GENERATOR.permutation(12)[:B].astype(np.int32)
NEGATIVES = GENERATOR.integers(0, 12, (B, 5)).astype(np.int32)
SCALE = np.array([14.0, 11.0])


def maps(x, *shape):
    return x.reshape(len(x), *(shape or (3, 2)))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def huber(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def log_softmax(z, axis=-1):
    return scipy.special.log_softmax(np.asarray(z, np.float64), axis=axis)


def distances(x):
    d = np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in x] for a in x])
    return d / np.mean(d[d > 0])


def angles(x):
    n = len(x)
    cosine = np.zeros((n, n, n))
    for b, j, k in np.ndindex(n, n, n):
        to_j, to_k = x[j] - x[b], x[k] - x[b]
        length = np.linalg.norm(to_j) * np.linalg.norm(to_k)
        cosine[b, j, k] = to_j @ to_k / length if length else 0.0
    return cosine


def pkt(s, t):
    q, p = ((1 + unit(x) @ unit(x).T) / 2 for x in (s, t))
    q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
    return np.sum(p * np.log((p + 1e-7) / (q + 1e-7)), axis=1)


def congruence(s, t, gamma=0.4):
    def kernel(x):
        c = unit(x) @ unit(x).T
        return np.exp(-2 * gamma) * (1 + 2 * gamma * c + (2 * gamma * c) ** 2 / 2)

    return np.mean((kernel(s) - kernel(t)) ** 2, axis=1)


def ickd(s, t):
    def gram(x):
        channels = unit(np.swapaxes(maps(x), 1, 2))
        return channels @ np.swapaxes(channels, 1, 2)

    return np.sum((gram(s) - gram(t)) ** 2, axis=(1, 2)) / 2


def probabilities(z):
    return np.exp(log_softmax(z))


def across_examples(s, t):
    q, p = probabilities(s), probabilities(t)
    return np.sum((q @ q.T - p @ p.T) ** 2, axis=1)


def across_classes(s, t):
    q, p = probabilities(s), probabilities(t)
    return np.sum((q.T @ q - p.T @ p) ** 2, axis=1)


def fsp(s, t):
    def flow(x):
        return np.einsum('bpc,bpd->bcd', maps(x), maps(x)) / 3

    return np.sum((flow(s) - flow(t)) ** 2, axis=(1, 2))


def nst(s, t):
    values = []
    for a, b in zip(maps(s), maps(t), strict=True):
        a, b = unit(a.T), unit(b.T)
        k = lambda x, y: np.mean([(u @ v) ** 2 for u in x for v in y])  # noqa: E731
        values.append(k(a, a) + k(b, b) - 2 * k(a, b))
    return np.array(values)


def boundary(s, t, margin=0.5):
    off = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
    return np.sum(off + (s - margin) ** 2 * ((s <= margin) & (t > 0)), axis=1)


def ofd(s, t):
    s, t = maps(s), np.maximum(maps(t), MARGIN)
    return np.sum((s - t) ** 2 * ((s > t) | (t > 0)), axis=(1, 2))


def hcl(s, t):
    d = maps(s, 3, 2, 1) - maps(t, 3, 2, 1)
    rows = np.stack([d[:, 0:2].mean(1), d[:, 1:3].mean(1)], axis=1)  # windows of adaptive pooling
    whole, two, one = ((x**2).mean((1, 2, 3)) for x in (d, rows, d.mean((1, 2), keepdims=True)))
    return (whole + two / 2 + one / 4) / 1.75


def vid(s, t):
    variance = np.log1p(np.exp(LOG_SCALE)) + 1e-5
    value = (maps(t) - maps(s)) ** 2 / variance + np.log(variance)
    return value.mean((1, 2)) / 2


def cwd(s, t):
    q, p = (log_softmax(maps(x), axis=1) for x in (s, t))
    return np.mean(np.sum(np.exp(p) * (p - q), axis=1), axis=-1)


def svd(s, t):
    """Of the first singular vector of maps and of their squares."""

    def directions(s, t):
        u = np.linalg.svd(t)[2][0]
        u = u * np.sign(u[np.argmax(np.abs(u))])
        rows = np.linalg.svd(s, full_matrices=False)[2]
        cosine = rows @ u
        best = np.argmax(np.abs(cosine))
        return rows[best] * np.sign(cosine[best]), u

    values = []
    for a, b in zip(maps(s), maps(t), strict=True):
        (v_s, v_t), (w_s, w_t) = directions(a, b), directions(a**2, b**2)
        near = lambda v, w: np.exp(-((v[:, None] - w) ** 2) / 8)  # noqa: E731
        values.append(np.sum((near(v_s, w_s) - near(v_t, w_t)) ** 2))
    return np.array(values)


def nce(s, t):
    logits = unit(s) @ unit(t).T / 0.5
    return -np.diagonal(log_softmax(logits))


def crd(s, t):
    total = np.zeros(len(s))
    for anchors, memory, scale in ((s, MEMORY[1], SCALE[0]), (t, MEMORY[0], SCALE[1])):
        for b, anchor in enumerate(unit(anchors)):
            h = lambda row: np.exp(anchor @ memory[row]) / scale  # noqa: B023, E731
            noise = 5 / 12
            total[b] -= np.log(h(ROWS[b]) / (h(ROWS[b]) + noise + 1e-7))
            for row in NEGATIVES[b]:
                total[b] -= np.log(noise / (h(row) + noise + 1e-7))
    return total


def lskd(s, t):
    """Of logits in which some are -inf."""
    values = []
    for rows in zip(np.asarray(s, np.float64), np.asarray(t, np.float64), strict=True):
        kept = np.isfinite(rows[0])
        q, p = (x[kept] for x in rows)
        q, p = (
            log_softmax((x - x.mean()) / ((x.std(ddof=1) if len(x) > 1 else 0.0) + 1e-7))
            for x in (q, p)
        )
        values.append(np.sum(np.exp(p) * (p - q)))
    return np.array(values)


def wsld(s, t):
    values = []
    for b, rows in enumerate(zip(s, t, strict=True)):
        q, p = (log_softmax(x) for x in rows)
        kept = np.isfinite(p)
        weight = 1 - np.exp(-q[LABELS[b]] / (p[LABELS[b]] - 1e-7))
        values.append(weight * np.sum(np.exp(p[kept]) * (p[kept] - q[kept])))
    return np.array(values)


def crd_loss(s, t):
    dtype = numerics.accumulation_dtype(s)
    s, t = s.astype(dtype), t.astype(dtype)
    bank = contrastive.Bank(*(jnp.asarray(x, dtype) for x in (*MEMORY, SCALE)))
    s, t = (x / jnp.maximum(numerics.norm(x, axis=-1, keepdims=True), 1e-12) for x in (s, t))
    return contrastive.crd(bank, s, t, ROWS, NEGATIVES, temperature=1.0)[0]


def on_maps(loss, *shape):
    return lambda s, t: loss(maps(s, *shape), maps(t, *shape))


CLASSICAL = {
    'rkd_distance': (
        relation.rkd_distance,
        lambda s, t: huber(distances(s) - distances(t)).mean(1),
    ),
    'rkd_angle': (
        relation.rkd_angle,
        lambda s, t: huber(angles(s) - angles(t)).mean((1, 2)),
    ),
    'probabilistic_transfer': (relation.probabilistic_transfer, pkt),
    'correlation_congruence': (relation.correlation_congruence, congruence),
    'channel_correlation': (on_maps(relation.channel_correlation), ickd),
    'batch_correlation': (relation.batch_correlation, across_examples),
    'class_correlation': (relation.class_correlation, across_classes),
    'fsp': (
        lambda s, t: feature_maps.fsp((maps(s), maps(s)), (maps(t), maps(t))),
        fsp,
    ),
    'neuron_selectivity': (on_maps(feature_maps.neuron_selectivity), nst),
    'activation_boundary': (partial(feature_maps.activation_boundary, margin=0.5), boundary),
    'overhaul': (
        on_maps(partial(feature_maps.overhaul, margin=MARGIN)),
        ofd,
    ),
    'factor_transfer': (
        on_maps(feature_maps.factor_transfer),
        lambda s, t: np.abs(unit(s) - unit(t)).sum(1),
    ),
    'hierarchical_context': (
        on_maps(partial(feature_maps.hierarchical_context, levels=(4, 2, 1)), 3, 2, 1),
        hcl,
    ),
    'variational_information': (
        on_maps(lambda s, t: feature_maps.variational_information(s, LOG_SCALE, t)),
        vid,
    ),
    'channel_distributions': (on_maps(feature_maps.channel_distributions), cwd),
    'singular_vectors': (
        lambda s, t: singular.singular_vectors((maps(s), maps(s) ** 2), (maps(t), maps(t) ** 2)),
        svd,
    ),
    'info_nce': (partial(contrastive.info_nce, temperature=0.5), nce),
    'crd': (crd_loss, crd),
    'standardised_kl': (partial(classification.standardised_kl, temperature=1.0), lskd),
    'weighted_soft_label': (
        lambda s, t: classification.weighted_soft_label(s, t, jnp.asarray(LABELS)),
        wsld,
    ),
}
# Those that are of features, and not of logits some of which may be impossible.
OF_LOGITS = (
    'batch_correlation',
    'class_correlation',
    'standardised_kl',
    'weighted_soft_label',
)
