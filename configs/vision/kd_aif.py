"""Distillation by weights of influence, KD-AIF (Wu, Luo, Liu, Deng 2025, arXiv:2501.02705).

Examples are weighed by what they do to the loss on a few clean labels: those that a teacher is
wrong about harm, and count less. A student is trained with the weights so far, examples are weighed
by it, and the next student begins anew.

    python -m kd.main --config=configs/vision/kd_aif.py:cpu --workdir=runs/aif
    python -m kd.main --config=configs/vision/kd_aif.py:cifar10_4k --workdir=runs/aif_4k

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | digits, 100 labels, 600 outputs of which 20 % are wrong | perceptrons | 2 cores, 1 minute |
| clean | the same, no output made wrong | | |
| cifar100 (default) | CIFAR-100, 2,500 images held out | ResNet-56 to ResNet-20 | a GPU, a day |
| cifar10_4k, svhn_1k | 4,000 or 1,000 labels, the rest without | WRN-28-2, both | a GPU, days |

`weights_N/weights.json` has the mean weight of each class, and the examples that harm most;
`wrong/roc_auc` of the last student how well a low weight tells that the teacher is wrong. Beside
them stand the student without weights, and one that has the 40 clean labels alone: where a teacher
is wrong about much they are worth more than all of its outputs.

With seed 0 `cpu` has .596 of the test set right without weights, .663 with them, .697 from the
clean labels alone, and an area of .71; the teacher, whose outputs are not rolled there, has .835.

In `cifar10_4k` and `svhn_1k` the labelled images serve as validation, teacher and student learn
together, and the teacher is told which of its pseudo-labels have helped.

The formulas of the paper were not at hand in full, nor its settings: rounds, kappa, damping, the
rows of the network that count (the last layer, at full scale) and all schedules are ours. Nothing
at full scale was run by us.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'clean', 'cifar100', 'cifar10_4k', 'svhn_1k')
METHOD = 'kd.methods.vision.adapted_weight'
SUPERVISED = 'kd.methods.vision.supervised.supervised'


def get_config(variant: str = 'cifar100'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'clean': lambda: cpu(wrong=0.0),
            'cifar100': cifar100,
            'cifar10_4k': lambda: few_labels('cifar10', 4_000, 45_000, 50_000),
            'svhn_1k': lambda: few_labels('svhn_cropped', 1_000, 70_000, 73_257),
        },
    )()


def cpu(wrong: float = 0.2):
    """A minute on two cores."""
    adam = dict(name='adamw', lr=1e-2, weight_decay=1e-4)
    cached = dict(name='kd.data.transforms.cached.cached', stage='cache')
    noise = dict(
        name='kd.data.transforms.label_noise.wrong_outputs', of=cached, fraction=wrong, seed=1
    )
    return recipe(
        data=dict(
            name='digits', labelled='train[:100]', train='train[100:700]',
            validation='train[700:740]', held='train[740:]', test='test',
        ),
        teacher=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(128,)), optimizer=adam, steps=300,
            batch_size=100, data=dict(train='train[:100]'),
        ),
        noise=noise,
        student=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(32,)), optimizer=adam, batch_size=600
        ),
        # Of a round, and of the last student.
        steps=(100, 400),
        rounds=5,
        distilled=dict(temperature=1.0, soft_weight=1.0),
        weighing=dict(damping=0.1, iterations=60),
        alone=dict(steps=200, batch_size=40, data=dict(train='train[700:740]')),
        evaluated='held',
    )  # fmt: skip


def cifar100():
    """ResNet-56 to ResNet-20 in 240 epochs, after four rounds of 60."""
    epoch = 47_500 // 64
    sgd = dict(
        name='sgd', lr=0.05, momentum=0.9, weight_decay=5e-4, schedule='step',
        schedule_args=dict(boundaries=(0.625, 0.75, 0.875), factor=0.1),
    )  # fmt: skip
    augmentation = ('flip', ('crop', 4))
    run = dict(optimizer=sgd, batch_size=64)
    return recipe(
        data=dict(
            name='cifar100', train='train[:47500]', validation='train[47500:]', test='test'
        ),
        teacher=dict(
            run, network=dict(name='kd.models.resnet.ResNet', depth=56), steps=240 * epoch,
            augmentation=augmentation,
        ),
        noise=None,
        student=dict(run, network=dict(name='kd.models.resnet.ResNet', depth=20)),
        steps=(60 * epoch, 240 * epoch),
        rounds=4,
        distilled=dict(temperature=4.0, soft_weight=0.9, augmentation=augmentation),
        weighing=dict(damping=0.1, iterations=100, only='^head/', curvature=4_096),
        alone=None,
        evaluated='validation',
        mesh=dict(data=-1),
    )  # fmt: skip


def recipe(
    *,
    data,
    teacher,
    noise,
    student,
    steps,
    rounds,
    distilled,
    weighing,
    alone,
    evaluated,
    **parallel,
):
    """Stages teacher, (cache,) uniform, student_0, weights_1, student_1, ..., student."""
    splits = {name: split for name, split in data.items() if name != 'name'}
    evaluator = dict(name='kd.evaluators.calibration.calibration', split=evaluated)
    measured = {evaluated: evaluator}
    cadence = dict(log_every=50, eval_every=steps[0], checkpoint_every=steps[0])
    blocks = {}
    teacher = dict(teacher)
    augmentation = teacher.pop('augmentation', ())
    blocks['teacher'] = kd_config.stage(
        method=dict(name=SUPERVISED, augmentation=augmentation), evaluators=measured, **cadence,
        **teacher,
    )  # fmt: skip
    said: dict = {'teacher': 'teacher'}
    if noise:
        blocks['cache'] = kd_config.stage(
            teacher='teacher',
            method=dict(name='kd.methods.cache.nothing'),
            writers={
                'teacher': dict(
                    name='kd.methods.cache.teacher_outputs', form='dense', dtype='float32'
                )
            },
            batch_size=student['batch_size'],
            steps=1,
        )
        said = {}

    def source(stage):
        """Data with the weights of a stage, '' for none."""
        if stage:
            joined = dict(name='kd.data.columns.joined', stage=stage)
            return dict(splits, source=dict(joined, of=noise) if noise else joined)
        return dict(splits, source=noise) if noise else {}

    def learning(weights, steps, **evaluators):
        return kd_config.stage(
            data=source(weights),
            method=dict(
                name=f'{METHOD}.weighted_kd', weight='weight' if weights else '', **distilled
            ),
            evaluators={**measured, **evaluators},
            steps=steps,
            **said,
            **student,
            **cadence,
        )

    options = {name: x for name, x in distilled.items() if name != 'augmentation'}
    blocks['uniform'] = learning('', steps[1])
    if alone:
        blocks['held_labels'] = kd_config.stage(
            method=dict(name=SUPERVISED), evaluators=measured, **cadence, **{**student, **alone}
        )
    blocks['student_0'] = learning('', steps[0])
    for r in range(1, rounds + 1):
        before = f'weights_{r - 1}' if r > 1 else ''
        blocks[f'weights_{r}'] = kd_config.stage(
            data=source(before),
            references={'student': f'student_{r - 1}'},
            method=dict(name='kd.methods.cache.nothing'),
            writers={
                'weights': dict(
                    name=f'{METHOD}.influence_weights', weight='weight' if before else '',
                    **options, **weighing,
                )
            },
            batch_size=student['batch_size'],
            steps=1,
            **said,
        )  # fmt: skip
        last = r == rounds
        told = {}
        if noise:
            told['wrong'] = dict(
                name='kd.evaluators.ranking.fields', score='weight', positive='wrong', lower=True,
                split='train',
            )  # fmt: skip
        name = 'student' if last else f'student_{r}'
        blocks[name] = learning(f'weights_{r}', steps[last], **told)
    rows = [('without weights', 'uniform'), ('weights of influence', 'student')]
    if alone:
        rows.insert(1, ('clean labels alone', 'held_labels'))
    config = kd_config.recipe(
        stages=tuple(blocks),
        data=data,
        report=dict(
            name='kd.reports.classification.classification', rows=(*rows, ('teacher', 'teacher'))
        ),
        **parallel,
    )
    for name, block in blocks.items():
        config[name] = block
    return config


def few_labels(name, labels, pool, examples):
    """A teacher of the labels, and then both together."""
    steps, batch = 300_000, 128
    wide = dict(name='kd.models.resnet.WideResNet', depth=28, widen=2)
    sgd = dict(
        name='sgd', lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule='cosine',
        warmup_steps=5_000,
    )  # fmt: skip
    augmentation = (('crop', 4),) if name == 'svhn_cropped' else ('flip', ('crop', 4))
    data = dict(
        name=name, labelled=f'train[:{labels}]', train=f'train[{labels}:{pool}]',
        validation=f'train[{pool}:{examples}]', test='test',
    )  # fmt: skip
    splits = {key: split for key, split in data.items() if key != 'name'}
    evaluators = {'validation': dict(name='kd.evaluators.calibration.calibration')}
    run = dict(
        network=wide, batch_size=batch, log_every=100, eval_every=5_000, checkpoint_every=5_000,
        evaluators=evaluators,
    )  # fmt: skip
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('student', 'student'), ('teacher of the labels', 'teacher')),
        ),
        mesh=dict(data=-1),
    )
    config.teacher = kd_config.stage(
        data=dict(train=data['labelled']), optimizer=sgd, steps=20_000,
        method=dict(name=SUPERVISED, augmentation=augmentation), **run,
    )  # fmt: skip
    config.student = kd_config.stage(
        data=dict(
            splits, source=dict(name='kd.data.columns.beside', split=data['labelled'])
        ),
        teacher='teacher',
        optimizer=sgd,
        steps=steps,
        method=dict(
            name='kd.methods.vision.teacher_feedback.teacher_feedback', only='^head/',
            iterations=20, augmentation=augmentation,
        ),
        **run,
    )  # fmt: skip
    return config
