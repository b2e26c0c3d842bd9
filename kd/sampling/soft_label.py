"""Classes between classes: a network's embedding of a label, mixed with others and with noise."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.sampling.denoiser import Condition, Denoiser, Prediction
from kd.state import PyTree

__all__ = ['Form', 'clean_share', 'embeddings', 'mixed', 'told_embeddings']

Form = Literal['released', 'paper']


def clean_share(t: jax.Array, high: float, low: float) -> jax.Array:
    """a_t = clip((high - t) / (high - low), 0, 1): 0 from `high` on, 1 up to `low`."""
    return jnp.clip((high - t) / (high - low), 0.0, 1.0)


def mixed(
    key: jax.Array,
    own: jax.Array,
    other: jax.Array,
    t: jax.Array,
    *,
    high: float,
    low: float,
    noise: float,
    semantic: float,
    form: Form = 'released',
) -> jax.Array:
    """Embeddings of soft labels, with the mean and the deviation of `own` over all its entries.

    | form | before that | n |
    |---|---|---|
    | released | sqrt(a) e_own + sqrt(1 - a) (noise n + semantic e_other [t <= high]) | U(0, 1) |
    | paper | sqrt(a) e_own + (1 - sqrt(a)) (noise n + semantic e_other) | N(0, 1) |

    with a of `clean_share`. Where a is 1 it is `own` itself, to the bit, which rounding would
    change in one entry of six. Above `high` the released form is noise alone, and its weight
    cancels.

    Args:
      key: of n; a fresh one for every call of the network.
      own: [..., d]. The released code gives both rows of guidance, that of the class and that of
        none, which are mixed alike and measured together.
      other: [..., d], of a class that is another.
      t: scalar, in the schedule's times.
      high, low: times of a; not the steps by which windows of guidance count.
      noise, semantic: beta_n and beta_s. beta_n is absolute: compare it with the deviation of the
        embeddings, which is small in a large network and may be about 1 in one of our own.
      form: see above.

    Source: DMGD, arXiv:2605.03877.
    """
    a = clean_share(t, high, low)
    if form == 'released':
        n = jax.random.uniform(key, own.shape, own.dtype)
        rest = noise * n + semantic * other * (t <= high)
        e = jnp.sqrt(a) * own + jnp.sqrt(1 - a) * rest
    else:
        n = jax.random.normal(key, own.shape, own.dtype)
        e = jnp.sqrt(a) * own + (1 - jnp.sqrt(a)) * (noise * n + semantic * other)
    square = jnp.mean(jnp.square(e - e.mean()))
    # Of what is constant there is no direction to keep.
    deviation = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    e = (e - e.mean()) / deviation * own.std() + own.mean()
    return jnp.where(a >= 1, own, e)


def embeddings(
    denoiser: Denoiser,
    variables: PyTree,
    x: jax.Array,
    t: jax.Array,
    label: jax.Array,
    name: str,
) -> jax.Array:
    """What a network embeds of labels int [n], [n, d]: the feature `name`.

    Args:
      denoiser: of a network that has this feature, see `kd.network.feature_names`.
      variables: its own.
      x: an example, for its shape.
      t: a time.
      label: classes, or the null class.
      name: of the module: 'label' in our own networks, 'emb/class_embedder' in DiT as released.
    """
    rows = jnp.broadcast_to(x, (len(label), *x.shape))
    times = jnp.broadcast_to(jnp.asarray(t, x.dtype), (len(label),))
    said = denoiser.apply(variables, rows, times, {'label': label}, capture=(name,))
    return said.features[name].astype(jnp.promote_types(x.dtype, jnp.float32))


def told_embeddings(
    denoiser: Denoiser,
    variables: PyTree,
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    rows: jax.Array,
    name: str,
    **how: bool,
) -> Prediction:
    """What a denoiser says when it embeds its labels as `rows` [B, d], whatever they are."""

    def instead(next_function, args, kwargs, context):
        said = next_function(*args, **kwargs)
        if context.method_name == '__call__' and '/'.join(context.module.path) == name:
            return rows.astype(said.dtype)
        return said

    with nn.intercept_methods(instead):
        return denoiser.apply(variables, x, t, condition, **how)
