"""Soft targets against hard labels on MNIST-1D (Hinton et al. 2015, arXiv:1503.02531).

    python -m kd.claims logit_kd            about 3 minutes on two cores

A convolutional teacher and a small MLP student, which lacks the teacher's shift equivariance and is
thus a student that a teacher can help. Arms: hard labels, label smoothing, soft targets at several
temperatures, decoupled KD (Zhao et al. 2022, arXiv:2203.08679). Every arm picks its learning rate
from the same grid by its mean validation accuracy, and is then read once on the test set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures, metrics
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.methods.vision.decoupled_kd import decoupled_kd
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.supervised import supervised
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.network import from_linen

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
BATCH = 100
TITLES = {'hard': 'hard labels', 'smoothing': 'label smoothing 0.1'}
TITLES |= {f'kd_{t:g}': f'soft targets, T = {t:g}' for t in TEMPERATURES}
TITLES |= {'dkd': 'decoupled KD, T = 4'}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` shortens it to a few steps."""
    runs, steps, teacher_steps = (3, 20, 20) if smoke else (8, 3000, 2000)
    return Claim(
        paper='Hinton et al. 2015, arXiv:1503.02531',
        statement='A small network learns more from softened teacher outputs than from labels.',
        setting=f'MNIST-1D; ConvNet teacher, MLP student of 64 units, {steps} steps of Adam, '
        f'{runs} seeds; each arm takes its best of three learning rates by validation accuracy.',
        run=lambda say: run(say, runs, steps, teacher_steps),
        checks=[
            Check('soft targets (T = 4) over hard labels', 'accuracy', 'kd_4', 'hard'),
            Check('soft targets (T = 4) over label smoothing', 'accuracy', 'kd_4', 'smoothing'),
        ],
        draw=draw,
        notes='The teacher is one network, so the intervals are over students of that teacher.',
    )


def run(say, runs, steps, teacher_steps):
    """Trains all arms; returns test accuracy and NLL per seed."""
    train, validation, test = (
        split.fetch(np.arange(len(split)))
        for split in (
            catalogue.load('mnist1d', s) for s in ('train[:3000]', 'train[3000:]', 'test')
        )
    )
    shape = jax.ShapeDtypeStruct((1, 40, 1), jnp.float32)
    teacher = from_linen(ConvNet(depth=3, width=32, num_classes=10), shape)
    say('training the teacher')
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, teacher_steps), weight_decay=1e-2)
    labels_only = {'input': train['input'], 'label': train['label']}
    method = supervised(seeds.context(network=teacher, tx=tx, num_classes=10))
    state = seeds.train_one(method, labels_only, 0, steps=teacher_steps, batch_size=BATCH)
    logits = jax.jit(lambda x: teacher.apply(state.variables(), x).logits)
    accuracy = (logits(test['input']).argmax(-1) == test['label']).mean()
    say(f'teacher: test accuracy {accuracy:.3f}')
    data = labels_only | {'teacher_logits': np.asarray(logits(train['input']))}

    student = from_linen(MLP(widths=(64,), num_classes=10), shape)
    measured = {}
    for arm in TITLES:
        say(TITLES[arm])
        measured[arm] = train_arm(arm, student, data, validation, test, runs, steps)
    return measured


def train_arm(arm, student, data, validation, test, runs, steps):
    """All seeds and learning rates of an arm at once; the best rate by validation accuracy."""
    tx = optax.inject_hyperparams(
        lambda lr: optax.adam(lambda step: lr * 0.5 * (1 + jnp.cos(jnp.pi * step / steps)))
    )(lr=0.0)
    context = seeds.context(network=student, tx=tx, num_classes=10)
    if arm.startswith('kd_'):
        method = logit_kd(context, temperature=float(arm.removeprefix('kd_')), soft_weight=0.9)
    elif arm == 'dkd':
        method = decoupled_kd(context, alpha=1.0, beta=2.0, temperature=4.0)
    else:
        method = supervised(context, label_smoothing=0.1 if arm == 'smoothing' else 0.0)
    grid_lr, grid_seed = np.meshgrid(LEARNING_RATES, np.arange(runs), indexing='ij')
    state = seeds.train(
        method, data, grid_seed.ravel(), steps=steps, batch_size=BATCH,
        hyperparameters={'lr': grid_lr.ravel()},
    )  # fmt: skip

    def log_probs(split):
        apply = jax.vmap(lambda params: student.apply({'params': params}, split['input']).logits)
        return np.asarray(jax.nn.log_softmax(jax.jit(apply)(state.variables()['params'])))

    def per_run(split):
        log_p = log_probs(split)
        right = (log_p.argmax(-1) == split['label']).mean(-1)
        nll = -log_p[:, np.arange(len(split['label'])), split['label']].mean(-1)
        return right.reshape(grid_lr.shape), nll.reshape(grid_lr.shape)

    best = metrics.best(per_run(validation)[0].mean(-1))
    accuracy, nll = per_run(test)
    return {'accuracy': accuracy[best], 'nll': nll[best], 'lr': grid_lr[best]}


def draw(measured):
    """Test accuracy and NLL per arm, every seed a dot."""
    figure = figures.new_figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in zip(
        axes, ('accuracy', 'nll'), ('test accuracy', 'test NLL (nats)'), strict=True
    ):
        figures.dots(axis, {title: measured[arm][metric] for arm, title in TITLES.items()})
        axis.set(xlabel=label)
    return figure
