"""Records from latents: every column, and the outcome, by its own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd.models.tabular import by_column
from kd.network import Network
from kd.state import PyTree


def sample_columns(key: jax.Array, logits: jax.Array, columns: Sequence[int]) -> jax.Array:
    """A category of each column from the softmax of its logits, [..., sum] to int32 [..., C]."""
    keys = jax.random.split(key, len(columns))
    drawn = [
        jax.random.categorical(k, part)
        for k, part in zip(keys, by_column(logits, columns), strict=True)
    ]
    return jnp.stack(drawn, -1).astype(jnp.int32)


def sample_records(
    key: jax.Array, network: Network, variables: PyTree, z: jax.Array, group: jax.Array
) -> dict[str, jax.Array]:
    """`input` int32 [n, C], `label` int32 [n] and `group` of latents [n, D] and groups [n].

    Columns are drawn from p(x | z, s), the outcome from that of a `kd.models.tabular.TabularVAE`.
    """
    column_key, label_key = jax.random.split(key)
    logits = network.apply(variables, z, group, method='decode').logits
    outcome = network.apply(variables, z, group, method='outcome').logits
    return {
        'input': sample_columns(column_key, logits, network.module.columns),
        'label': jax.random.categorical(label_key, outcome).astype(jnp.int32),
        'group': group,
    }
