"""Features of a larger autoencoder on the patches that are seen (DMAE 2022, arXiv:2208.12256).

    python -m kd.claims dmae

A masked autoencoder of width 64 is trained on 1,200 digits without labels; students of width 32 and
4 blocks get 400 updates, on pixels alone or with its features, and are judged by a logistic
regression on their mean tokens. Two arms are controls: a teacher that sees other patches
than the student, which is what two masks drawn apart would do, and one that was never trained.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.evaluators import linear_probe
from kd.methods.vision.dmae import dmae
from kd.methods.vision.masked_autoencoder import masked_autoencoder
from kd.models.masked_autoencoder import Encoder
from kd.network import from_linen

BATCH, SHOTS = 128, 5
DECODER = dict(width=32, depth=1, heads=4)
# Share of hidden patches, weight of the features, whose they are.
ARMS = {
    'random': None,
    'mae': (0.75, 0.0, ''),
    'dmae': (0.75, 1.0, 'teacher'),
    'dmae_5': (0.75, 5.0, 'teacher'),
    'mae_875': (0.875, 0.0, ''),
    'dmae_875': (0.875, 1.0, 'teacher'),
    'two_masks': (0.75, 1.0, 'other patches'),
    'untrained': (0.75, 1.0, 'untrained'),
}
TITLES = {
    'random': 'not trained',
    'mae': 'pixels, 75 % hidden',
    'dmae': 'DMAE, 75 %',
    'dmae_5': 'DMAE, 75 %, weight 5',
    'mae_875': 'pixels, 87.5 %',
    'dmae_875': 'DMAE, 87.5 %',
    'two_masks': 'DMAE, another mask for the teacher',
    'untrained': 'DMAE, teacher not trained',
    'teacher': 'teacher',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has the arms of the checks, a few steps and small networks."""
    runs, steps, teacher_steps = (3, 2, 2) if smoke else (4, 400, 2_500)
    return Claim(
        paper='DMAE 2022, arXiv:2208.12256',
        statement='Features of a larger masked autoencoder, on the patches that are seen, make a '
        'better encoder than pixels alone, under extreme masking too.',
        setting=f'Digits of scikit-learn, 1,200 without labels to train on and 597 to test; 2x2 '
        f'patches; encoders of 4 blocks, 64 and 32 wide, {teacher_steps} and {steps} updates in '
        f'batches of {BATCH}, {runs} seeds of the students of one teacher. Logistic regression on '
        'mean tokens, from all labels or 5 of each class (10 draws).',
        run=lambda say: run(say, runs, steps, teacher_steps, smoke),
        checks=[
            Check('DMAE over pixels alone by .02', 'accuracy', 'dmae', 'mae', margin=0.02),
            Check('with 5 labels a class by .04', 'shots', 'dmae', 'mae', margin=0.04),
            Check(
                '87.5 % hidden, over pixels alone at 75 % by .01',
                'accuracy', 'dmae_875', 'mae', margin=0.01,
            ),
            Check('one mask over two', 'accuracy', 'dmae', 'two_masks'),
            Check('a trained teacher over one that is not', 'accuracy', 'dmae', 'untrained'),
        ],
        draw=draw,
        notes='The teacher is one network, so intervals are over students of that teacher. All '
        'arms have one optimiser and one number of updates. Not checked: longer training, which '
        'by the paper narrows the distance.',
    )  # fmt: skip


def run(say, runs, steps, teacher_steps, smoke):
    """Trains the teacher and all arms; accuracy of probes for every seed."""
    splits = (catalogue.load('digits', s) for s in ('train[:1200]', 'train[1200:]', 'test'))
    train, *rest = (split.fetch(np.arange(len(split))) for split in splits)
    test = {name: np.concatenate([part[name] for part in rest]) for name in ('input', 'label')}
    mean, deviation = train['input'].mean(), train['input'].std()
    train, test = (
        {'input': (of['input'] - mean) / deviation, 'label': of['label']} for of in (train, test)
    )
    shape = jax.ShapeDtypeStruct((1, *train['input'].shape[1:]), jnp.float32)
    wide, narrow, depth = (16, 8, 1) if smoke else (64, 32, 4)
    teacher, student = (
        from_linen(Encoder(patch=2, width=width, depth=depth, heads=4), shape)
        for width in (wide, narrow)
    )
    pixels = {'input': train['input']}
    method = masked_autoencoder(context(teacher, teacher, teacher_steps), decoder=DECODER)
    state = seeds.train_one(method, pixels, 0, steps=teacher_steps, batch_size=BATCH)
    trained = state.variables()
    untrained = teacher.init(jax.random.key(99))
    probe = probes(train, test, smoke)
    measured = {'teacher': repeated(probe(teacher, [trained]), runs)}
    say(told('teacher', measured))
    checked = ('mae', 'dmae', 'dmae_875', 'two_masks', 'untrained')
    for arm in checked if smoke else ARMS:
        setting = ARMS[arm]
        frozen = untrained if setting and setting[2] == 'untrained' else trained
        states = students(student, teacher, frozen, pixels, setting, runs, steps)
        measured[arm] = probe(student, states)
        say(told(arm, measured))
    return measured


def context(network, teacher, steps):
    """Of the card's optimiser."""
    return seeds.context(
        network=network, teacher=teacher, steps=steps, batch_size=BATCH, spec={},
        optimizer=dict(
            name='adamw', lr=2e-3, b2=0.95, weight_decay=0.05, schedule='cosine',
            warmup_steps=steps // 10,
        ),
    )  # fmt: skip


def students(student, teacher, frozen, data, setting, runs, steps):
    """Variables of the students of an arm, one after the other."""
    if setting is None:
        return [student.init(jax.random.key(seed)) for seed in range(runs)]
    ratio, weight, of = setting
    made = context(student, teacher, steps)
    if of == 'other patches':
        made = context(student, elsewhere(teacher), steps)
    if weight:
        method = dmae(made, mask_ratio=ratio, weight=weight, decoder=DECODER)
    else:
        method = masked_autoencoder(made, mask_ratio=ratio, decoder=DECODER)
    each = seeds.train_each(
        method, data, range(runs), steps=steps, batch_size=BATCH, frozen={'teacher': frozen}
    )
    return [state.variables() for state in each]


def elsewhere(teacher):
    """A teacher that is shown as many patches of each image, drawn apart, of a grid of 16."""

    def other(keep):
        number = jnp.sum(keep * 16 ** jnp.arange(len(keep)))
        key = jax.random.fold_in(jax.random.key(0), number)
        return jax.random.permutation(key, 16)[: len(keep)]

    def apply(variables, images, *, keep, **options):
        return teacher.apply(variables, images, keep=jax.vmap(other)(keep), **options)

    return teacher._replace(apply=apply)


def probes(train, test, smoke):
    """`probe(network, variables) -> {'accuracy': [...], 'shots': [...]}`."""
    draws = 1 if smoke else 10
    if smoke:
        train, test = ({name: x[:100] for name, x in of.items()} for of in (train, test))

    def probe(network, each):
        pooled = jax.jit(lambda variables, x: linear_probe.pool(network.apply(variables, x).logits))
        found = {'accuracy': [], 'shots': []}
        for variables in each:
            fitted, held = (
                (np.asarray(pooled(variables, of['input'])), of['label']) for of in (train, test)
            )
            found['accuracy'].append(linear_probe.accuracy(fitted, held, 10))
            found['shots'].append(linear_probe.few_shot(fitted, held, 10, SHOTS, draws=draws))
        return found

    return probe


def repeated(found, runs):
    """One network's values for every seed."""
    return {name: values * runs for name, values in found.items()}


def told(arm, measured):
    """A line of progress."""
    found = measured[arm]
    return (
        f'{TITLES[arm]}: {np.mean(found["accuracy"]):.3f}, '
        f'{np.mean(found["shots"]):.3f} with {SHOTS} labels a class'
    )


def draw(measured):
    """Accuracy of both probes, every seed a dot."""
    figure = figures.new_figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in zip(
        axes, ('accuracy', 'shots'),
        ('accuracy, all labels', f'accuracy, {SHOTS} labels a class'), strict=True,
    ):  # fmt: skip
        found = {title: measured[arm] for arm, title in TITLES.items() if arm in measured}
        figures.dots(axis, {title: values[metric] for title, values in found.items()})
        axis.set(xlabel=label)
    return figure
