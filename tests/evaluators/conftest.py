"""A linear network, a linear teacher, and 21 examples in batches of 8 with a poisoned padding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.config import StageConfig
from kd.context import Context
from kd.network import from_linen
from kd.state import State

EXAMPLES, BATCH, FEATURES, CLASSES = 21, 8, 4, 5


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(CLASSES, use_bias=False)(x)


def variables(seed):
    kernel = np.random.default_rng(seed).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    return {'params': {'Dense_0': {'kernel': kernel}}}


@pytest.fixture(scope='session')
def context():
    network = from_linen(Linear(), jax.ShapeDtypeStruct((1, FEATURES), jnp.float32))
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Context))
    return Context(
        **{
            **fields,
            'stage': 'student',
            'num_classes': CLASSES,
            'optional_network': network,
            'optional_teacher': network,
            'config': StageConfig(method={}, steps=1, batch_size=BATCH, ema={'slow': 0.9}),
        }
    )


@pytest.fixture(scope='session')
def state():
    """The student's parameters, an average of them, and the teacher's."""
    return State.create(
        jax.random.key(0),
        variables(1),
        ema={'slow': {'network': variables(2)['params']}},
        frozen={'teacher': variables(3)},
    )


@pytest.fixture(scope='session')
def examples():
    """Inputs and labels, and the float64 logits of the student, its average and the teacher."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    logits = {
        name: x.astype(np.float64) @ variables(seed)['params']['Dense_0']['kernel']
        for name, seed in (('final', 1), ('slow', 2), ('teacher', 3))
    }
    return x, rng.integers(0, CLASSES, EXAMPLES), logits


@pytest.fixture(scope='session')
def evaluate(state, examples):
    """`evaluate(evaluator, batch_size) -> scalars` as the loop does it: jitted and summed."""
    x, labels, _ = examples

    def run(evaluator, batch_size=BATCH):
        update, sums = jax.jit(evaluator.update), None
        for start in range(0, EXAMPLES, batch_size):
            count = min(batch_size, EXAMPLES - start)
            # Padding that would show in any sum it got into.
            batch = {
                'input': np.full((batch_size, FEATURES), np.nan, np.float32),
                'label': np.zeros(batch_size, np.int32),
                'mask': np.arange(batch_size) < count,
            }
            batch['input'][:count] = x[start : start + count]
            batch['label'][:count] = labels[start : start + count]
            new = update(state, batch)
            sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        return evaluator.finish(jax.device_get(sums))

    return run
