"""A decoder that learns rows of tokens, from a teacher and a start where a stage has them."""

import jax
import numpy as np

from kd import config as kd_config
from kd.data import sources
from kd.losses import classification, divergence
from kd.method import Objective, minimize
from kd.methods import start
from kd.metrics import mean

V, T = 40, 8


def rows(context, *, packed=False):
    """Rows of tokens that count upwards."""

    def read(indices):
        first = np.asarray(indices)[:, None]
        tokens = (first + np.arange(T)) % V
        return {'input': tokens.astype(np.int32), 'index': np.asarray(indices)}

    spec = {
        'input': jax.ShapeDtypeStruct((T,), np.int32),
        'index': jax.ShapeDtypeStruct((), np.int64),
    }
    if packed:
        spec |= dict.fromkeys(('positions', 'segments'), spec['input'])
    data = sources.DataSet('rows', {'train': 64}, lambda _: read, spec, V)
    return sources.Source(data, 'train')


def learn(context):
    """The next token, and what the teacher says of it."""
    network = context.network

    def loss(params, state, batch, key):
        logits = network.apply(state.variables(params=params), batch['input']).logits[:, :-1]
        losses = classification.cross_entropy(logits, batch['input'][:, 1:]).mean(-1)
        if 'teacher' in state.frozen:
            theirs = context.teacher.apply(state.frozen['teacher'], batch['input']).logits
            losses += divergence.forward_kl(logits, theirs[:, :-1, : logits.shape[-1]]).mean(-1)
        return Objective(mean(losses), {})

    return minimize(loss, context.tx, start.from_reference(network.init, context))


def get_config(network=None, pretrained=None, **stage):
    config = kd_config.recipe(
        stages=('student',),
        data=dict(source=dict(name='tokens.rows'), train='train'),
        pretrained=pretrained,
    )
    plain = dict(name='kd.models.decoder.Decoder', width=16, depth=2, heads=2)
    config.student = kd_config.stage(
        method=dict(name='tokens.learn'),
        network=network or plain,
        optimizer=dict(name='sgd', lr=1e-2),
        steps=2,
        batch_size=8,
        **stage,
    )
    return config
