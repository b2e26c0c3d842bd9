"""Distillation from softened outputs (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).

A teacher is trained on labels, then the same small student twice: alone and from the teacher. In
`cpu` the teacher has 1,200 labelled digits and the students 200 of them: what a digit resembles,
which the teacher knows and labels do not say, is worth most where labels are few.

    python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=runs/digits
    python -m kd.main --config=configs/vision/logit_kd.py:mnist --workdir=runs/mnist
    python -m kd.main --config=configs/vision/logit_kd.py:cifar10 --workdir=runs/cifar10

| variant | data | teacher, student | hardware | expected test accuracy |
|---|---|---|---|---|
| cpu | 8x8 digits | ConvNet-2, MLP-64 | 2 cores, 1 min | 98; 83 alone, 89 distilled |
| mnist | MNIST | ConvNet-3, MLP-32-32 | 2 cores, 20 min; one GPU, 1 min | |
| cifar10 (default) | CIFAR-10 | ResNet-56, ResNet-20 | one GPU, hours | 94, student alone 92.5 |
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'mnist', 'cifar10')


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'mnist': mnist, 'cifar10': cifar10})()


def cpu():
    """Digits in about a minute on two cores, most of it for five seeds of everything."""
    adam = dict(name='adamw', lr=3e-3, schedule='cosine', warmup_steps=20, weight_decay=1e-4)
    run = dict(
        batch_size=64,
        log_every=50,
        eval_every=100,
        checkpoint_every=500,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    student = dict(name='kd.models.mlp.MLP', widths=(64,))
    few = dict(train='train[:200]')
    return recipe(
        data=dict(name='digits', train='train[:80%]', validation='train[80%:]', test='test'),
        seeds=5,
        notes='The teacher has learned from 1,200 labelled digits, the students from 200 of them.',
        teacher=kd_config.stage(
            network=dict(name='kd.models.convnet.ConvNet', depth=2, width=32),
            method=dict(
                name='kd.methods.vision.supervised.supervised', augmentation=(('crop', 1),)
            ),
            optimizer=adam,
            steps=400,
            **run,
        ),
        baseline=kd_config.stage(
            data=few,
            network=student,
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=adam,
            steps=1000,
            **run,
        ),
        student=kd_config.stage(
            data=few,
            network=student,
            teacher='teacher',
            method=dict(
                name='kd.methods.vision.logit_kd.logit_kd', temperature=4.0, soft_weight=0.9
            ),
            optimizer=adam,
            steps=1000,
            **run,
        ),
    )


def mnist():
    """MNIST from tfds; `--data_dir` or TFDS_DATA_DIR says where it lies."""
    adam = dict(name='adamw', lr=1e-3, schedule='cosine', warmup_steps=200, weight_decay=1e-4)
    run = dict(
        batch_size=128,
        log_every=100,
        eval_every=1000,
        checkpoint_every=1000,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    student = dict(name='kd.models.mlp.MLP', widths=(32, 32))
    return recipe(
        data=dict(name='mnist', train='train[:55000]', validation='train[55000:]', test='test'),
        teacher=kd_config.stage(
            network=dict(name='kd.models.convnet.ConvNet', depth=3, width=32),
            method=dict(
                name='kd.methods.vision.supervised.supervised', augmentation=(('crop', 2),)
            ),
            optimizer=adam,
            steps=3000,
            **run,
        ),
        baseline=kd_config.stage(
            network=student,
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=adam,
            steps=6000,
            **run,
        ),
        student=kd_config.stage(
            network=student,
            teacher='teacher',
            method=dict(
                name='kd.methods.vision.logit_kd.logit_kd', temperature=4.0, soft_weight=0.9
            ),
            optimizer=adam,
            steps=6000,
            **run,
        ),
    )


def cifar10():
    """ResNet-56 to ResNet-20, SGD with the usual CIFAR schedule of He et al. (2016)."""
    augmentation = ('flip', ('crop', 4))
    steps = 200 * 45_000 // 128
    sgd = dict(
        name='sgd',
        momentum=0.9,
        nesterov=True,
        lr=0.1,
        weight_decay=5e-4,
        schedule='step',
        schedule_args=dict(boundaries=(0.5, 0.75), factor=0.1),
    )
    run = dict(
        batch_size=128,
        steps=steps,
        optimizer=sgd,
        log_every=100,
        eval_every=2000,
        checkpoint_every=2000,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    student = dict(name='kd.models.resnet.ResNet', depth=20)
    return recipe(
        data=dict(name='cifar10', train='train[:45000]', validation='train[45000:]', test='test'),
        teacher=kd_config.stage(
            network=dict(name='kd.models.resnet.ResNet', depth=56),
            method=dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation),
            **run,
        ),
        baseline=kd_config.stage(
            network=student,
            method=dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation),
            **run,
        ),
        student=kd_config.stage(
            network=student,
            teacher='teacher',
            method=dict(
                name='kd.methods.vision.logit_kd.logit_kd',
                temperature=4.0,
                soft_weight=0.9,
                augmentation=augmentation,
            ),
            **run,
        ),
    )


def recipe(*, data, teacher, baseline, student, **report):
    """Teacher, student alone, student distilled; and the report that compares them."""
    config = kd_config.recipe(
        stages=('teacher', 'baseline', 'student'),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(
                ('student alone', 'baseline'),
                ('student distilled', 'student'),
                ('teacher', 'teacher'),
            ),
            **report,
        ),
    )
    config.teacher, config.baseline, config.student = teacher, baseline, student
    return config
