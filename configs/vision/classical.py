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
run, will differ.

| pair | teacher | student | KD | RKD | CRD |
|---|---|---|---|---|---|
| wrn40x2_wrn16x2 | 75.61 | 73.26 | 74.92 | 73.35 | 75.48 |
| wrn40x2_wrn40x1 | 75.61 | 71.98 | 73.54 | 72.22 | 74.14 |
| res56_res20 | 72.34 | 69.06 | 70.66 | 69.61 | 71.16 |
| res110_res20 | 74.31 | 69.06 | 70.67 | 69.25 | 71.46 |
| res110_res32 | 74.31 | 71.14 | 73.08 | 71.82 | 73.48 |
| res32x4_res8x4 | 79.42 | 72.50 | 73.33 | 71.90 | 75.51 |
| vgg13_vgg8 | 74.64 | 70.36 | 72.98 | 71.48 | 73.94 |
| vgg13_mobile | 74.64 | 64.60 | 67.37 | 64.52 | 69.73 |
| res50_mobile | 79.34 | 64.60 | 67.35 | 64.43 | 69.11 |
| res50_vgg8 | 79.34 | 70.36 | 73.81 | 71.50 | 74.30 |
| res32x4_shuffle1 | 79.42 | 70.50 | 74.07 | 72.28 | 75.11 |
| res32x4_shuffle2 | 79.42 | 71.82 | 74.45 | 73.21 | 75.65 |
| wrn40x2_shuffle1 | 75.61 | 70.50 | 74.83 | 72.21 | 76.05 |

The networks are those of the benchmark's code and of mdistiller, to the number of parameters; how
they begin is of the modules. MGD's weight is that of its ImageNet classifiers; ReviewKD's lies
within what its authors give to these pairs, .6 to 8; SimKD has no weight. Those of other methods
that the benchmark lacks (CWD, ICKD, CCKD, MLKD, LSKD, WSLD, InfoNCE) are ours.
"""

from kd import config as kd_config
from kd.errors import UserError

VARIANTS = ('cpu', 'rkd,pair=res56_res20')

BATCH, EPOCHS, EXAMPLES = 64, 240, 45_000
RELATION, MAPS = 'kd.losses.relation', 'kd.losses.feature_maps'
PROJECTORS = 'kd.models.projectors'
METHODS = 'kd.methods.vision'

STAGES = ('stage1', 'stage2', 'stage3')
SHUFFLE = ('block3', 'block11', 'block15')
VGG = ('stage2', 'stage3', 'stage5')
MOBILE = ('block5', 'block12', 'block16')
# Of a network: its block, and the ends of its stages from fine to coarse.
NETWORKS = {
    **{
        f'res{depth}': (dict(name='kd.models.resnet.ResNet', depth=depth), STAGES)
        for depth in (20, 32, 56, 110)
    },
    **{
        f'res{depth}x4': (
            dict(name='kd.models.resnet.ResNet', depth=depth, widen=4, stem_width=32), STAGES,
        )
        for depth in (8, 32)
    },
    **{f'vgg{depth}': (dict(name='kd.models.vgg.VGG', depth=depth), VGG) for depth in (8, 13)},
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
        dict(name='kd.models.mobilenet.MobileNetV2', width=0.5, stem='benchmark', dropout=0.0),
        MOBILE,
    ),
    'shuffle1': (
        dict(name='kd.models.shufflenet.ShuffleNet', groups=3, stem='cifar'), SHUFFLE,
    ),
    'shuffle2': (dict(name='kd.models.shufflenet.ShuffleNetV2', stem='cifar'), SHUFFLE),
    **{
        name: (
            dict(name='kd.models.convnet.ConvNet', depth=2, width=width, norm='batch'),
            ('block0/norm', 'block0', 'block1'),
        )
        for name, width in (('wide', 32), ('narrow', 8))
    },
}  # fmt: skip
# Channels of the maps that a teacher pools.
MAP_WIDTHS = {
    'wide': 32, 'res56': 64, 'res110': 64, 'res32x4': 256, 'wrn40x2': 128, 'vgg13': 512,
    'res50': 2048,
}  # fmt: skip
# Of 200 digits.
FEW = {
    'crd': dict(negatives=128), 'ctkd': dict(curriculum_steps=25), 'simkd': dict(teacher='block1'),
}  # fmt: skip
PAIRS = {
    'digits': ('wide', 'narrow'),
    'wrn40x2_wrn16x2': ('wrn40x2', 'wrn16x2'),
    'wrn40x2_wrn40x1': ('wrn40x2', 'wrn40x1'),
    'res56_res20': ('res56', 'res20'),
    'res110_res20': ('res110', 'res20'),
    'res110_res32': ('res110', 'res32'),
    'res32x4_res8x4': ('res32x4', 'res8x4'),
    'vgg13_vgg8': ('vgg13', 'vgg8'),
    'vgg13_mobile': ('vgg13', 'mobile'),
    'res50_mobile': ('res50', 'mobile'),
    'res50_vgg8': ('res50', 'vgg8'),
    'res32x4_shuffle1': ('res32x4', 'shuffle1'),
    'res32x4_shuffle2': ('res32x4', 'shuffle2'),
    'wrn40x2_shuffle1': ('wrn40x2', 'shuffle1'),
}


def methods(student, teacher):
    """{method: block} between these ends of stages; `feature_kd` has no name here."""
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
            'mgd', f'{MAPS}.hierarchical_context', 7e-5 * 512 * 7 * 7, levels=(), **end,
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
        'kdsvd': {
            f'kdsvd{i}': dict(
                loss='kd.losses.singular.singular_vectors', student=student[i : i + 2],
                teacher=teacher[i : i + 2], projector=projector('Pair'),
            )
            for i in range(2)
        },
    }  # fmt: skip
    made = {name: dict(terms=term) for name, term in terms.items()}
    made['kd'] |= dict(hard_weight=0.1, soft_weight=0.9, temperature=4.0)
    made['crd'] = dict(name=f'{METHODS}.crd.crd')
    made['ctkd'] = dict(name=f'{METHODS}.ctkd.ctkd', curriculum_steps=10 * EXAMPLES // BATCH)
    made['simkd'] = dict(name=f'{METHODS}.simkd.simkd')
    return made


def get_config(argument: str = 'rkd,pair=res56_res20'):
    """The recipe of `METHOD,pair=PAIR`, or `cpu`."""
    method, _, rest = ('rkd,pair=digits' if argument == 'cpu' else argument).partition(',')
    pair = rest.removeprefix('pair=')
    if not rest.startswith('pair='):
        raise UserError(
            f"'{argument}' is no variant; METHOD,pair=PAIR is, with a pair of {', '.join(PAIRS)}."
        )
    names = kd_config.variant(pair, PAIRS)
    (teacher, theirs), (student, ours) = (NETWORKS[name] for name in names)
    keywords = kd_config.variant(method, methods(ours, theirs))
    if method == 'dkd' and pair != 'digits':
        keywords |= dict(ramp_steps=20 * EXAMPLES // BATCH)
    if pair == 'digits':
        keywords |= FEW.get(method, {})
    made = recipe(method, teacher, student, keywords, **(SMALL if pair == 'digits' else full(pair)))
    if method == 'simkd':
        how = dict(pool='flatten', feature=ours[-1]) if pair == 'digits' else {}
        made.student.network = dict(
            name='kd.models.reused.reused_head', network=student, width=MAP_WIDTHS[names[0]], **how
        )
    return made


def full(pair):
    """CIFAR-100 as the benchmark has it."""
    steps = EPOCHS * EXAMPLES // BATCH
    schedule = dict(
        name='sgd', momentum=0.9, weight_decay=5e-4, schedule='step',
        schedule_args=dict(boundaries=(150 / 240, 180 / 240, 210 / 240), factor=0.1),
    )  # fmt: skip
    mobile = pair.endswith(('mobile', 'shuffle1', 'shuffle2'))
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
    taught = dict(name=f'{METHODS}.feature_kd.feature_kd', augmentation=augmentation) | keywords
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
