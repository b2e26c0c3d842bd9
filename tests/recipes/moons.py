"""A teacher and a student on two moons, small enough to be killed many times.

Arguments: `plain`, or `poison=N` for data that makes the student's loss NaN at step N. Where the
file that MOONS_HOLD names says `probe` or `report`, the probe or the report waits until it is gone.
"""

import os
import time
from pathlib import Path

import jax.numpy as jnp
import jax.random

from kd import config as kd_config
from kd.context import Probe
from kd.losses import classification, divergence
from kd.method import Objective, minimize
from kd.metrics import mean, scalar
from kd.reports import classification as report_lib

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


def _wait(where: str) -> None:
    hold = Path(os.environ.get('MOONS_HOLD', ''))
    if hold.is_file() and hold.read_text() == where:
        print(f'waiting in the {where}', flush=True)
        while hold.is_file():
            time.sleep(0.02)


def watched(context):
    """A probe that may wait."""
    del context

    def run(state, batches):
        del batches
        _wait('probe')
        return {'steps': float(state.step)}

    return Probe(run)


def report(context, **arguments):
    """The report of classifiers, which may wait."""
    _wait('report')
    return report_lib.classification(context, **arguments)


def get_config(argument: str = 'plain'):
    poison = int(argument.removeprefix('poison=')) if argument.startswith('poison=') else -1
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data=dict(name='two_moons', train='train', validation='test[:256]', test='test[256:512]'),
        report=dict(
            name='moons.report',
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
        evaluators={
            'validation': dict(name='kd.evaluators.calibration.calibration'),
            'watched': dict(name='moons.watched'),
        },
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
