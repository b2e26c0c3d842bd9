"""A teacher and a student on two moons, small enough to be killed many times.

Arguments: `plain`, or `poison=N` for data that makes the student's loss NaN at step N.
"""

import jax.numpy as jnp
import jax.random

from kd import config as kd_config
from kd.losses import classification, divergence
from kd.method import Objective, minimize
from kd.metrics import mean, scalar

STEPS = 240


def traced(context, *, poison: int = -1, dropout: float = 0.1):
    """Supervised or distilled training whose metrics betray the order of the data."""

    def loss(params, state, batch, key):
        noise = dropout * jax.random.normal(key, batch['input'].shape)
        variables = state.variables(params=params)
        logits = context.network.apply(variables, batch['input'] + noise, train=True).logits
        losses = classification.cross_entropy(logits, batch['label'])
        if state.frozen:
            teacher_logits = context.teacher.apply(state.frozen['teacher'], batch['input']).logits
            losses += divergence.forward_kl(logits, teacher_logits)
        losses = jnp.where(state.step == poison, jnp.nan, losses)
        # Changes with any exchange of two examples.
        order = jnp.dot(batch['index'].astype(jnp.float32), jnp.arange(len(batch['index'])) % 97.0)
        return Objective(mean(losses), {'order': scalar(order)})

    return minimize(loss, context.tx, context.network.init)


def get_config(argument: str = 'plain'):
    poison = int(argument.removeprefix('poison=')) if argument.startswith('poison=') else -1
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data=dict(name='two_moons', train='train', validation='test[:256]', test='test[256:512]'),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('teacher', 'teacher'), ('student', 'student')),
        ),
    )
    run = dict(
        steps=STEPS,
        batch_size=64,
        log_every=15,
        eval_every=60,
        checkpoint_every=20,
        optimizer=dict(name='adam', lr=1e-2, schedule='cosine'),
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    config.teacher = kd_config.stage(
        method=dict(name='moons.traced'),
        network=dict(name='kd.models.mlp.MLP', widths=(32, 32)),
        ema={'slow': 0.9},
        best='validation/accuracy',
        **run,
    )
    config.student = kd_config.stage(
        method=dict(name='moons.traced', poison=poison),
        network=dict(name='kd.models.mlp.MLP', widths=(8,)),
        teacher='teacher',
        **run,
    )
    return config
