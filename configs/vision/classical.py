"""The classical losses on the usual pairs of CIFAR-100, one method and one pair at a time.

The pairs, schedule and weights of the benchmark that came with CRD (Tian et al. 2019,
arXiv:1910.10699) and that most later papers use: 240 epochs of batches of 64, SGD at .05 (.01 for
mobile students), divided by 10 after 150, 180 and 210, weight decay 5e-4. Weights are those of its
code, in the units of the losses here: per example, not per entry of a matrix of the batch.

    python -m kd.main --config=configs/vision/classical.py:rkd,pair=res56_res20 --workdir=runs/rkd
    python -m kd.main --config=configs/vision/classical.py:cpu --workdir=runs/rkd_digits

Stages are the teacher, the student on labels alone, and the student taught. The last checkpoint is
the result; none is chosen by the test set. 5,000 training images are held out for validation, on
which the benchmark trains too.

| variant | data | hardware | expected |
|---|---|---|---|
| METHOD,pair=digits | digits, 200 labels, ConvNets of width 32 and 8 | 2 cores | not tuned |
| cpu | rkd,pair=digits | | |
| METHOD,pair=PAIR | CIFAR-100 | one GPU, hours a stage | the table |

Published test accuracy (Tian et al. 2019, tables 1 and 2, means of 5 runs), from which ours, not
run, will differ: of 13 pairs there are 9, as VGG and ShuffleNetV2 do not stand here.

| pair | teacher | student | KD | RKD | CRD |
|---|---|---|---|---|---|
| wrn40x2_wrn16x2 | 75.61 | 73.26 | 74.92 | 73.35 | 75.48 |
| wrn40x2_wrn40x1 | 75.61 | 71.98 | 73.54 | 72.22 | 74.14 |
| res56_res20 | 72.34 | 69.06 | 70.66 | 69.61 | 71.16 |
| res110_res20 | 74.31 | 69.06 | 70.67 | 69.25 | 71.46 |
| res110_res32 | 74.31 | 71.14 | 73.08 | 71.82 | 73.48 |
| res32x4_res8x4 | 79.42 | 72.50 | 73.33 | 71.90 | 75.51 |
| res50_mobile | 79.34 | 64.60 | 67.35 | 64.43 | 69.11 |
| res32x4_shuffle1 | 79.42 | 70.50 | 74.07 | 72.28 | 75.11 |
| wrn40x2_shuffle1 | 75.61 | 70.50 | 74.83 | 72.21 | 76.05 |

Our networks are not theirs to the last layer: the stems of res32x4 and res8x4 have 16 channels and
not 32, MobileNetV2 at half width is that of `kd.models.mobilenet`, and shortcuts are projections
where shapes change. Weights of methods that the benchmark lacks (CWD, ICKD, CCKD, MLKD, MGD, LSKD,
WSLD, InfoNCE), and ReviewKD's, are ours.
"""

from kd import config as kd_config
from kd.errors import UserError

VARIANTS = ('cpu', 'rkd,pair=res56_res20')

BATCH, EPOCHS, EXAMPLES = 64, 240, 45_000
RELATION, MAPS = 'kd.losses.relation', 'kd.losses.feature_maps'
PROJECTORS = 'kd.models.projectors'

STAGES = ('stage1', 'stage2', 'stage3')
SHUFFLE = ('block3', 'block11', 'block15')
MOBILE = ('block5', 'block12', 'block16')
# Of a network: its block, and the ends of its stages from fine to coarse.
NETWORKS = {
    **{
        f'res{depth}': (dict(name='kd.models.resnet.ResNet', depth=depth), STAGES)
        for depth in (20, 32, 56, 110)
    },
    'res8x4': (dict(name='kd.models.resnet.ResNet', depth=8, widen=4), STAGES),
    'res32x4': (dict(name='kd.models.resnet.ResNet', depth=32, widen=4), STAGES),
    **{
        f'wrn{depth}x{widen}': (
            dict(name='kd.models.resnet.WideResNet', depth=depth, widen=widen), STAGES,
        )
        for depth, widen in ((16, 2), (40, 1), (40, 2))
    },
    'res50': (
        dict(name='kd.models.resnet.ImageNetResNet', depth=50, stem='cifar'),
        ('stage2', 'stage3', 'stage4'),
    ),
    'mobile': (
        dict(name='kd.models.mobilenet.MobileNetV2', width=0.5, stem='cifar', dropout=0.0), MOBILE,
    ),
    'shuffle1': (
        dict(name='kd.models.shufflenet.ShuffleNet', groups=3, stem='cifar'), SHUFFLE,
    ),
    **{
        name: (
            dict(name='kd.models.convnet.ConvNet', depth=2, width=width, norm='batch'),
            ('block0/norm', 'block0', 'block1'),
        )
        for name, width in (('wide', 32), ('narrow', 8))
    },
}  # fmt: skip
PAIRS = {
    'digits': ('wide', 'narrow'),
    'wrn40x2_wrn16x2': ('wrn40x2', 'wrn16x2'),
    'wrn40x2_wrn40x1': ('wrn40x2', 'wrn40x1'),
    'res56_res20': ('res56', 'res20'),
    'res110_res20': ('res110', 'res20'),
    'res110_res32': ('res110', 'res32'),
    'res32x4_res8x4': ('res32x4', 'res8x4'),
    'res50_mobile': ('res50', 'mobile'),
    'res32x4_shuffle1': ('res32x4', 'shuffle1'),
    'wrn40x2_shuffle1': ('wrn40x2', 'shuffle1'),
}


def methods(student, teacher):
    """{method: keywords of `feature_kd`} between these ends of stages."""
    last, theirs = student[-1], teacher[-1]

    def projector(name, **rest):
        return dict(name=f'{PROJECTORS}.{name}', **rest)

    def at_each(loss, weight, **rest):
        return {
            f'{loss}{i}': dict(
                loss=f'{MAPS}.{loss}', student=s, teacher=t, weight=weight, resize='larger', **rest
            )
            for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        }

    def one(name, loss, weight, **rest):
        return {name: dict(loss=loss, weight=weight, **rest)}

    pooled = dict(student='features')
    logits = dict(student='logits')
    square = dict(
        loss=f'{MAPS}.hierarchical_context', levels=(), student=student[1], teacher=teacher[1],
        resize='larger', projector=projector('ConvNorm'),
    )  # fmt: skip
    end = dict(student=last, teacher=theirs, resize='larger')
    aligned = dict(end, projector=projector('ConvNorm'))
    terms = {
        'kd': {},
        'dkd': one('dkd', 'kd.losses.classification.decoupled_kd', 16.0, **logits, temperature=4.0),
        'lskd': one(
            'lskd', 'kd.losses.classification.standardised_kl', 36.0, **logits, temperature=2.0
        ),
        'wsld': one(
            'wsld', 'kd.losses.classification.weighted_soft_label', 9.0, **logits, temperature=2.0
        ),
        'mlkd': {
            'batch': dict(loss=f'{RELATION}.batch_correlation', temperature=4.0, **logits),
            'class': dict(loss=f'{RELATION}.class_correlation', temperature=4.0, **logits),
        },
        'fitnet': {'hint': dict(square, weight=100.0)},
        'at': {
            f'at{i}': dict(
                loss='kd.losses.feature.attention_transfer', student=s, teacher=t,
                weight=1000.0 / 4 ** (5 - i), resize='larger',
            )
            for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        },
        'sp': one(
            'sp', 'kd.losses.feature.similarity_preserving', 3000.0, student=last, teacher=theirs
        ),
        'rkd': {
            'distance': dict(loss=f'{RELATION}.rkd_distance', weight=25.0, **pooled),
            'angle': dict(loss=f'{RELATION}.rkd_angle', weight=50.0, **pooled),
        },
        'pkt': one('pkt', f'{RELATION}.probabilistic_transfer', 30_000.0 / BATCH, **pooled),
        'cckd': one('cckd', f'{RELATION}.correlation_congruence', 100.0, **pooled),
        'ickd': one('ickd', f'{RELATION}.channel_correlation', 2.5, **aligned),
        'nst': at_each('neuron_selectivity', 50.0),
        'vid': at_each('variational_information', 1.0, projector=projector('Gaussian')),
        'cwd': one('cwd', f'{MAPS}.channel_distributions', 50.0, temperature=4.0, **aligned),
        'ft': one('ft', f'{MAPS}.factor_transfer', 200.0 / 4096, **aligned),
        'mgd': one(
            'mgd', f'{MAPS}.hierarchical_context', 10.0, levels=(), **end,
            projector=projector('Masked'),
        ),
        'review': {
            **{
                f'review{i}': dict(
                    loss=f'{MAPS}.hierarchical_context', student=(student[i], student[i + 1]),
                    teacher=teacher[i], resize='larger', projector=projector('Fusion'),
                )
                for i in range(2)
            },
            'review2': dict(aligned, loss=f'{MAPS}.hierarchical_context', weight=1.0),
        },
        'nce': one(
            'nce', 'kd.losses.contrastive.info_nce', 0.8, **pooled,
            projector=projector('Linear'), temperature=0.1,
        ),
    }  # fmt: skip
    made = {name: dict(terms=term) for name, term in terms.items()}
    made['kd'] |= dict(hard_weight=0.1, soft_weight=0.9, temperature=4.0)
    return made


def get_config(argument: str = 'rkd,pair=res56_res20'):
    """The recipe of `METHOD,pair=PAIR`, or `cpu`."""
    method, _, rest = ('rkd,pair=digits' if argument == 'cpu' else argument).partition(',')
    pair = rest.removeprefix('pair=')
    if not rest.startswith('pair='):
        raise UserError(
            f"'{argument}' is no variant; METHOD,pair=PAIR is, with a pair of {', '.join(PAIRS)}."
        )
    teacher, student = kd_config.variant(pair, PAIRS)
    (teacher, theirs), (student, ours) = NETWORKS[teacher], NETWORKS[student]
    keywords = kd_config.variant(method, methods(ours, theirs))
    if method == 'dkd' and pair != 'digits':
        keywords |= dict(ramp_steps=20 * EXAMPLES // BATCH)
    return recipe(method, teacher, student, keywords, **(SMALL if pair == 'digits' else full(pair)))


def full(pair):
    """CIFAR-100 as the benchmark has it."""
    steps = EPOCHS * EXAMPLES // BATCH
    schedule = dict(
        name='sgd', momentum=0.9, weight_decay=5e-4, schedule='step',
        schedule_args=dict(boundaries=(150 / 240, 180 / 240, 210 / 240), factor=0.1),
    )  # fmt: skip
    mobile = pair.endswith(('mobile', 'shuffle1'))
    evaluator = dict(name='kd.evaluators.calibration.calibration')
    return dict(
        data=dict(
            name='cifar100', train='train[:45000]', validation='train[45000:]', test='test'
        ),
        few={},
        teaching=dict(optimizer=dict(schedule, lr=0.05), steps=steps),
        learning=dict(optimizer=dict(schedule, lr=0.01 if mobile else 0.05), steps=steps),
        run=dict(
            batch_size=BATCH, log_every=100, eval_every=10_000, checkpoint_every=10_000,
            evaluators={'validation': evaluator},
        ),
        augmentation=('flip', ('crop', 4)),
    )  # fmt: skip


ADAM = dict(name='adamw', lr=3e-3, schedule='cosine', warmup_steps=20, weight_decay=1e-4)
SMALL = dict(
    data=dict(name='digits', train='train[:80%]', validation='train[80%:]', test='test'),
    few=dict(train='train[:200]'),
    teaching=dict(optimizer=ADAM, steps=400),
    learning=dict(optimizer=ADAM, steps=600),
    run=dict(
        batch_size=64,
        log_every=50,
        eval_every=100,
        checkpoint_every=300,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    ),
    augmentation=(),
)


def recipe(method, teacher, student, keywords, *, data, few, teaching, learning, run, augmentation):
    """Teacher, student alone, student taught."""
    supervised = dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation)
    taught = dict(
        name='kd.methods.vision.feature_kd.feature_kd', augmentation=augmentation, **keywords
    )
    config = kd_config.recipe(
        stages=('teacher', 'baseline', 'student'),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(
                ('student alone', 'baseline'),
                (f'student, {method}', 'student'),
                ('teacher', 'teacher'),
            ),
        ),
    )
    config.teacher = kd_config.stage(network=teacher, method=supervised, **teaching, **run)
    config.baseline = kd_config.stage(
        data=few, network=student, method=supervised, **learning, **run
    )
    config.student = kd_config.stage(
        data=few, network=student, teacher='teacher', method=taught, **learning, **run
    )
    return config
