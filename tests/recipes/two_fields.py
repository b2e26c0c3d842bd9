"""A teacher, a cache of what it says, and a student, of a network that takes two fields."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd import config as kd_config
from kd.data import sources


class Joint(nn.Module):
    """A perceptron on the points and the side on which they lie."""

    num_classes: int
    width: int = 16
    fields = ('input', 'side')

    @nn.compact
    def __call__(self, x, side, *, train=False):
        del train
        x = jnp.concatenate([x, jax.nn.one_hot(side, 2)], -1)
        return nn.Dense(self.num_classes, name='head')(nn.relu(nn.Dense(self.width)(x)))


def sided(context):
    """The two moons with a field `side`: whether the first coordinate is positive."""
    moons = context.load('two_moons')

    def read(rows):
        batch = moons.fetch(rows)
        return {**batch, 'side': (batch['input'][:, 0] > 0).astype(np.int32)}

    spec = {**moons.spec, 'side': jax.ShapeDtypeStruct((), np.int32)}
    data = sources.DataSet('sided', {'all': len(moons)}, lambda _: read, spec, moons.num_classes)
    return sources.Source(data, 'all')


def get_config():
    config = kd_config.recipe(
        stages=('teacher', 'cache', 'student'),
        data=dict(
            source=dict(name='two_fields.sided'),
            **dict(train='train[:512]', validation='test[:256]', test='test[256:300]'),
        ),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('teacher', 'teacher'), ('student', 'student')),
        ),
    )
    run = dict(
        steps=20,
        batch_size=64,
        network=dict(name='two_fields.Joint'),
        optimizer=dict(name='adam', lr=1e-2),
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    config.teacher = kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'), **run
    )
    config.cache = kd_config.stage(
        method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(name='kd.methods.cache.teacher_outputs', form='dense',
                                 dtype='float32')},
        teacher='teacher', steps=1, batch_size=64,
    )  # fmt: skip
    config.student = kd_config.stage(
        method=dict(name='kd.methods.vision.logit_kd.logit_kd'),
        data=dict(source=dict(name='kd.data.transforms.cached.cached'), train='train[:512]',
                  validation='test[:256]'),
        **run,
    )  # fmt: skip
    return config
