"""What people look for in the log of a method that samples answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.method import Batch
from kd.metrics import Mean, Metrics, mean


def metrics(batch: Batch, entropy: jax.Array) -> Metrics:
    """Of answers and of the policy that has given them.

    | metric | |
    |---|---|
    | `reward`, `length`, `truncated`, `unjudged` | means over answers |
    | `entropy` | of the policy, nats, mean over tokens |
    | `sampling/fill` | tokens of answers, as a share of those that the loop went through |

    Args:
      batch: of answers, see `kd.methods.rl.common`.
      entropy: [B, R].
    """
    where = batch['mask']
    found = {
        'reward': mean(batch['rewards']),
        'length': mean(where.sum(1)),
        'truncated': mean(batch['truncated']),
        'unjudged': mean(batch['unjudged']),
        'entropy': mean(entropy, where),
        'sampling/fill': Mean(where.sum(dtype=jnp.float32), batch['decoded'].sum()),
    }
    return jax.lax.stop_gradient(found)
