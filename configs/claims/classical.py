"""The classical losses at equal tuning on digits, over the benchmark of CRD (arXiv:1910.10699).

    python -m kd.claims classical

A ConvNet of width 32 has 1,200 labelled digits, students of width 8 have 200 of them. Every method
of `configs/vision/classical.py` is an arm, with the weights of that file times .1, 1 and 10; the
multiple and the learning rate are those of the best mean validation accuracy, and the test set is
read once. Students on labels alone, and SimKD, have no weight to tune and choose a learning rate
alone.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import callables, figures, metrics
from kd import config as kd_config
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.methods.vision.feature_kd import feature_kd
from kd.methods.vision.supervised import supervised
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.models.reused import ReusedHead
from kd.network import from_linen

MULTIPLES = (0.1, 1.0, 10.0)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
BATCH = 50
ENDS = ('block0/norm', 'block0', 'block1')
TITLES = {
    'hard': 'labels alone',
    'kd': 'softened outputs',
    'dkd': 'decoupled KD',
    'lskd': 'standardised logits',
    'wsld': 'weighted soft labels',
    'mlkd': 'multi-level logits',
    'fitnet': 'FitNets',
    'at': 'attention transfer',
    'sp': 'similarity preserving',
    'rkd': 'RKD, distance and angle',
    'pkt': 'PKT',
    'cckd': 'correlation congruence',
    'ickd': 'ICKD',
    'nst': 'NST',
    'vid': 'VID',
    'cwd': 'CWD',
    'ft': 'normalised factors',
    'mgd': 'MGD',
    'review': 'ReviewKD',
    'nce': 'InfoNCE',
    'crd': 'CRD',
    'ctkd': 'CTKD',
    'simkd': 'SimKD',
}
# What the multiple is of, where there are no terms.
WEIGHTS = {'crd': ('weight', 0.8), 'ctkd': ('soft_weight', 0.9)}
UNWEIGHTED = ('hard', 'simkd')


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has the arms of the checks, perceptrons and a few steps."""
    runs, steps, teacher_steps = (3, 4, 2) if smoke else (8, 600, 400)
    multiples = (1.0,) if smoke else MULTIPLES
    arms = ('hard', 'kd', 'rkd', 'crd') if smoke else tuple(TITLES)
    return Claim(
        paper='Tian et al. 2019 (Contrastive Representation Distillation), arXiv:1910.10699',
        statement='Softened outputs help, losses on relations of features do not reach them, and a '
        'contrastive loss goes beyond both.',
        setting='Digits, 200 labels; ConvNets of width 32 and 8, '
        f'{steps} steps of Adam with cosine in batches of {BATCH}, {runs} seeds; every arm takes '
        'its best of three learning rates and three multiples of its published weights by '
        'validation accuracy.',
        run=lambda say: run(say, arms, runs, steps, teacher_steps, multiples, smoke),
        checks=[
            Check('softened outputs over labels alone', 'accuracy', 'kd', 'hard'),
            Check('relations (RKD) over labels alone', 'accuracy', 'rkd', 'hard'),
            Check('softened outputs over relations (RKD)', 'accuracy', 'kd', 'rkd'),
            Check('a contrastive loss (CRD) over softened outputs', 'accuracy', 'crd', 'kd'),
        ],
        draw=draw,
        notes='The teacher is one network, so the intervals are over students of that teacher. '
        "CRD has 128 negatives and a bank of 200. SimKD's student has the teacher's head and a "
        'projector beside, more than the others. KDSVD, with a decomposition of every example, is '
        'left out. All but the four arms of the checks are for the figure.',
    )


def run(say, arms, runs, steps, teacher_steps, multiples, smoke):
    """Trains all arms; returns test accuracy and NLL per seed, and what was chosen."""
    train, validation, test = (
        split.fetch(np.arange(len(split)))
        for split in (catalogue.load('digits', s) for s in ('train[:1200]', 'train[1200:]', 'test'))
    )
    shape = jax.ShapeDtypeStruct((1, *train['input'].shape[1:]), jnp.float32)
    teacher, student = (from_linen(convnet(width, smoke), shape) for width in (32, 8))
    say('training the teacher')
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, teacher_steps), weight_decay=1e-2)
    data = {name: train[name] for name in ('input', 'label')}
    method = supervised(seeds.context(network=teacher, tx=tx, num_classes=10))
    state = seeds.train_one(method, data, 0, steps=teacher_steps, batch_size=BATCH)
    frozen = {'teacher': state.variables()}
    logits = jax.jit(lambda x: teacher.apply(frozen['teacher'], x).logits)(test['input'])
    say(f'teacher: test accuracy {(logits.argmax(-1) == test["label"]).mean():.3f}')

    few = {name: value[:200] for name, value in data.items()} | {'index': np.arange(200)}
    held = {name: np.concatenate([validation[name], test[name]]) for name in data}

    @partial(jax.jit, static_argnums=0)
    def log_probs(network, variables):
        apply = jax.vmap(lambda variables: network.apply(variables, held['input']).logits)
        return jax.nn.log_softmax(apply(variables))

    def outcomes(network, method):
        """(test accuracy, test NLL, validation accuracy), each [learning rates, runs]."""
        log_p = np.asarray(log_probs(network, trained(method, few, frozen, runs, steps)))
        right = (log_p.argmax(-1) == held['label']).reshape(len(LEARNING_RATES), runs, -1)
        nll = -log_p[:, np.arange(len(held['label'])), held['label']].reshape(right.shape)
        validated, tested = np.split(right, [len(validation['label'])], axis=-1)
        return tested.mean(-1), nll[..., validated.shape[-1] :].mean(-1), validated.mean(-1)

    measured = {}
    for arm in arms:
        trials = []
        own = (1.0,) if arm in UNWEIGHTED else multiples
        for multiple in own:
            network = with_head(student) if arm == 'simkd' else student
            method = method_of(arm, network, teacher, steps, multiple)
            trials.append(outcomes(network, method))
        accuracy, nll, right = (np.concatenate(values) for values in zip(*trials, strict=True))
        best = metrics.best(right.mean(-1))
        rates = len(LEARNING_RATES)
        measured[arm] = {
            'accuracy': accuracy[best],
            'nll': nll[best],
            'multiple': np.full(runs, own[best // rates]),
            'lr': np.full(runs, LEARNING_RATES[best % rates]),
        }
        say(f'{TITLES[arm]}: {accuracy[best].mean():.3f}')
    return measured


def convnet(width, smoke):
    """Convolutions as products of matrices: in a loop they are many times slower on CPU."""
    if smoke:
        return MLP(widths=(width,), num_classes=10)
    return ConvNet(depth=2, width=width, num_classes=10, norm='batch', conv='matmul')


def with_head(student):
    """The student that ends in a projector and the teacher's head."""
    how = dict(feature='block1', pool='flatten', conv='matmul')
    return from_linen(ReusedHead(student.module, 32, 10, **how), *student.inputs)


def method_of(arm, student, teacher, steps, multiple):
    """The method of an arm with a multiple of its weights."""
    tx = optax.inject_hyperparams(
        lambda lr: optax.adam(lambda step: lr * 0.5 * (1 + jnp.cos(jnp.pi * step / steps)))
    )(lr=0.0)
    context = seeds.context(network=student, teacher=teacher, tx=tx, num_classes=10)
    if arm == 'hard':
        return supervised(context)
    recipes = kd_config.load_module(Path(__file__).parents[1] / 'vision' / 'classical.py')
    block = recipes.methods(ENDS, ENDS)[arm] | recipes.FEW.get(arm, {})
    if arm in WEIGHTS:
        name, weight = WEIGHTS[arm]
        block |= {name: multiple * weight} | ({'examples': 200} if arm == 'crd' else {})
    if 'terms' in block:
        block['terms'] = {
            label: in_a_loop({**term, 'weight': multiple * term.get('weight', 1.0)})
            for label, term in block['terms'].items()
        }
        block['soft_weight'] = multiple * block.get('soft_weight', 0.0)
        return feature_kd(context, **block)
    return callables.resolve(block.pop('name'))(context, **block)


def in_a_loop(term):
    """The term, with convolutions of its projector as products of matrices."""
    name = term.get('projector', {}).get('name', '').rpartition('.')[2]
    if name not in ('ConvNorm', 'Masked', 'Fusion'):
        return term
    return {**term, 'projector': {**term['projector'], 'conv': 'matmul'}}


def trained(method, data, frozen, runs, steps):
    """Variables of all learning rates and seeds, in this order on the leading axis."""
    grid_lr, grid_seed = np.meshgrid(LEARNING_RATES, np.arange(runs), indexing='ij')
    return seeds.train(
        method, data, grid_seed.ravel(), steps=steps, batch_size=BATCH, frozen=frozen,
        hyperparameters={'lr': grid_lr.ravel()},
    ).variables()  # fmt: skip


def draw(measured):
    """Test accuracy and NLL per arm, every seed a dot."""
    figure = figures.new_figure(9, 1.2 + 0.3 * len(measured))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in zip(
        axes, ('accuracy', 'nll'), ('test accuracy', 'test NLL (nats)'), strict=True
    ):
        figures.dots(axis, {TITLES[arm]: found[metric] for arm, found in measured.items()})
        axis.set(xlabel=label)
    return figure
