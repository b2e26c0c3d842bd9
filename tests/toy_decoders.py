"""Tiny decoders, and prompts with answers for them."""

import jax
import jax.numpy as jnp
import numpy as np

from kd.models.decoder import Decoder
from kd.network import from_linen

# Vocabulary, tokens of a prompt and of an answer, rows, and the end.
V, P, R, B, EOS = 12, 4, 3, 4, 2
PROMPTS = {
    'input': jax.ShapeDtypeStruct((P,), jnp.int32),
    'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
    'response': jax.ShapeDtypeStruct((R,), jnp.int32),
    'response_mask': jax.ShapeDtypeStruct((R,), bool),
}


def decoder(num_classes=V, length=P, **changes):
    """A network of rows of `length` tokens."""
    made = dict(width=16, depth=1, heads=2, mlp_hidden=24, max_length=32)
    module = Decoder(num_classes=num_classes, **{**made, **changes})
    return from_linen(module, jax.ShapeDtypeStruct((1, length), jnp.int32))


def drawn(network, seed):
    """Variables far from where they start, so that laws are far from uniform."""
    variables = jax.jit(network.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, variables)


def prompts():
    """A batch of `PROMPTS`, of all lengths."""
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= P - np.array([P, 2, 1, 3])[:, None]
    return {
        'input': np.where(mask, rng.integers(3, V, mask.shape), EOS).astype(np.int32),
        'prompt_mask': mask,
        'response': rng.integers(3, V, (B, R)).astype(np.int32),
        'response_mask': np.arange(R) < np.array([1, 2, 3, 3])[:, None],
    }


def odd_first(context):
    """A reward: 1 where the first token of an answer is odd; no verdict on 4."""

    def reward(tokens, mask, batch):
        return jnp.where(tokens[:, 0] == 4, jnp.nan, tokens[:, 0] % 2)

    return reward
