"""Levels of push and a decoder that plays them."""

import jax
import jax.numpy as jnp
import numpy as np
from answering import sharp

from kd.claims import seeds
from kd.data import push
from kd.data.builders import push as world
from kd.data.builders.push import ACTIONS
from kd.models.decoder import Decoder
from kd.network import from_linen

H, G = 6, 4
WORLD = dict(name='kd.rewards.push.environment', horizon=H)
SAMPLING = dict(group=G, max_new=1, only=ACTIONS, environment=WORLD)
REWARD = dict(name='kd.rewards.push.push', of='completion')


def decoder():
    module = Decoder(num_classes=72, width=16, depth=1, heads=2, mlp_hidden=24, max_length=64)
    return from_linen(module, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def levels():
    """The four levels that take the fewest actions, as tasks 0 .. 3."""
    every = push.levels('train', 'full')
    optimum = world.ways().optimum[every['goal'], every['agent'], every['box']]
    chosen = np.argsort(optimum, kind='stable')[:4]
    return {name: x[chosen] for name, x in every.items()} | {'level': np.arange(4, dtype=np.int32)}


def context(network, **fields):
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in levels().items()}
    fields = {'optimizer': dict(name='sgd', lr=0.5), 'steps': 10, 'spec': spec, **fields}
    return seeds.context(network=network, batch_size=4, source=lambda split: None, **fields)


__all__ = ['ACTIONS', 'REWARD', 'SAMPLING', 'G', 'H', 'context', 'decoder', 'levels', 'sharp']
