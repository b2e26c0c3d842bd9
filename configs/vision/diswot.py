"""A student chosen without training, then distilled (DisWOT 2023, arXiv:2303.15678).

    python -m kd.main --config=configs/vision/diswot.py:cpu --workdir=runs/diswot
    python -m kd.main --config=configs/vision/diswot.py:s1 --workdir=runs/diswot_s1
    python -m kd.main --config=configs/vision/diswot.py:s1,blocks=5-5-7 --workdir=runs/diswot_557

| variant | data | space | teacher | hardware |
|---|---|---|---|---|
| cpu | digits, 200 labels | 24 residual MLPs, see below | width 128 | 2 cores |
| s1 (default) | CIFAR-100 | 64 ResNets of 1, 3, 5 or 7 blocks a stage | ResNet-56 | one GPU |

MLPs of `cpu` have a width of 4 to 24 and 0 to 4 blocks. Stages: the search, which trains nothing
and leaves its table in `search/texts`; the teacher; and the chosen student, on labels alone and
distilled, by softened outputs with the relation and channel losses of the paper. What the search
has chosen is an argument, `width=24,depth=1` or `blocks=7-7-7`, as it has to be known before the
run; those here are what seed 0 chose of the MLPs, and of the ResNets the network that the paper
reports as the best on labels alone.

Weight 3,000 of the relation loss, epochs and optimiser of `s1` are the paper's; weight 2.5 of the
channel loss, the random starts of a score and the 5,000 images held out are ours, as are all
numbers of `cpu`.

`cpu` takes 40 s. The student that seed 0 chose, by the sum of ranks, has no block and 1,210
parameters: .818 on labels alone, .865 distilled, the teacher .953. One of a block and a width of 24
has .828 and .896: the sum does not find the best, see the claim.

Published for `s1`: 72.6 on labels alone and 74.4 distilled for 7-7-7, 74.9 distilled for 5-5-7. By
rank correlation the number of parameters tells the distilled accuracy of the 64 better than any
score here; the table has it beside the scores. NAS-Bench-201 and ImageNet are not here.
"""

from kd import config as kd_config
from kd.errors import UserError

VARIANTS = ('cpu', 's1')

EPOCHS, EXAMPLES, BATCH = 240, 45_000, 64


def get_config(argument: str = 's1'):
    """The recipe of a variant, with the chosen network after commas."""
    variant, *rest = argument.split(',')
    chosen = dict(part.split('=', 1) for part in rest if '=' in part)
    if len(chosen) != len(rest):
        raise UserError(f"'{argument}' is no variant: what was chosen is NAME=VALUE.")
    known = {'cpu': cpu, 's1': s1}
    return kd_config.variant(variant, known)(**chosen)


def cpu(width='16', depth='0'):
    """Digits, less than a minute."""
    adam = dict(name='adamw', lr=3e-3, schedule='cosine', weight_decay=1e-4)
    run = dict(
        optimizer=adam, batch_size=64, log_every=50, eval_every=100, checkpoint_every=200,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )  # fmt: skip
    block = dict(name='kd.models.mlp.ResidualMLP')
    return recipe(
        data=dict(name='digits', train='train[:80%]', validation='train[80%:]', test='test'),
        few=dict(train='train[:200]'),
        space=dict(
            network=block, choices=dict(width=(4, 6, 8, 12, 16, 24), depth=(0, 1, 2, 4)), inits=8
        ),
        teacher=dict(block, width=128, depth=4),
        student=dict(block, width=int(width), depth=int(depth)),
        feature='features',
        channels=False,
        steps=(400, 400),
        run=run,
        augmentation=(),
    )


def s1(blocks='7-7-7'):
    """CIFAR-100."""
    sgd = dict(
        name='sgd', momentum=0.9, lr=0.05, weight_decay=5e-4, schedule='step',
        schedule_args=dict(boundaries=(150 / 240, 180 / 240, 210 / 240), factor=0.1),
    )  # fmt: skip
    run = dict(
        optimizer=sgd, batch_size=BATCH, log_every=100, eval_every=10_000, checkpoint_every=10_000,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )  # fmt: skip
    counts = (1, 3, 5, 7)
    block = dict(name='kd.models.resnet.ResNet')
    every = tuple((a, b, c) for a in counts for b in counts for c in counts)
    steps = EPOCHS * EXAMPLES // BATCH
    return recipe(
        data=dict(
            name='cifar100', train='train[:45000]', validation='train[45000:]', test='test'
        ),
        few={},
        space=dict(network=block, choices=dict(blocks=every), feature='stage3', inits=3),
        teacher=dict(block, depth=56),
        student=dict(block, blocks=tuple(int(count) for count in blocks.split('-'))),
        feature='stage3',
        channels=True,
        steps=(steps, steps),
        run=run,
        augmentation=('flip', ('crop', 4)),
    )  # fmt: skip


def recipe(*, data, few, space, teacher, student, feature, channels, steps, run, augmentation):
    """Stages search, teacher, baseline, student."""
    taught = dict(
        relation=dict(
            loss='kd.losses.feature.similarity_preserving', student=feature, weight=3_000.0
        )
    )
    if channels:
        # Of maps: one vector has no channels that go together.
        taught['channel'] = dict(
            loss='kd.losses.relation.channel_correlation', student=feature, weight=2.5
        )
    supervised = dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation)
    config = kd_config.recipe(
        stages=('search', 'teacher', 'baseline', 'student'),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(
                ('chosen student, labels alone', 'baseline'),
                ('chosen student, distilled', 'student'),
                ('teacher', 'teacher'),
            ),
        ),
    )
    config.search = kd_config.stage(
        method=dict(name='kd.methods.cache.nothing'),
        evaluators={
            'scores': dict(name='kd.evaluators.train_free.score_space', teacher=teacher, **space)
        },
        steps=1,
        batch_size=BATCH,
    )
    config.teacher = kd_config.stage(network=teacher, method=supervised, steps=steps[0], **run)
    config.baseline = kd_config.stage(
        data=few, network=student, method=supervised, steps=steps[1], **run
    )
    config.student = kd_config.stage(
        data=few,
        network=student,
        teacher='teacher',
        method=dict(
            name='kd.methods.vision.feature_kd.feature_kd', terms=taught, hard_weight=0.1,
            soft_weight=0.9, temperature=4.0, augmentation=augmentation,
        ),
        steps=steps[1],
        **run,
    )  # fmt: skip
    return config
