"""Robust active distillation: whom to ask a teacher about that may be wrong (arXiv:2210.01213).

A teacher answers for a number of examples in each round. Those that a student is least sure about
are those that its teacher gets wrong; RAD asks by a distribution that is worth most against the
worst choice of wrong answers, knowing only what share of them is right at least. Every round is two
stages, `ARM_query_N` and `ARM_N`, a student from scratch.

    python -m kd.main --config=configs/vision/robust_active_distillation.py:cpu --workdir=runs/rad

| variant | data | teacher, students | rounds | hardware |
|---|---|---|---|---|
| cpu | digits, 30 labels, 1,000 to ask about | perceptron of 80 labels; 64-64-64-10 | 4 of 40 \
| 2 cores, 2 minutes |
| cifar10, cifar100, svhn | 5,000 labels | ResNet-50; MobileNetV2 | 5 of 5,000 | GPUs, a day |
| imagenet (default) | 10 % labelled | ResNet-50; ResNet-18 | 5 of 64,000 | GPUs, weeks |

`cpu` has both games and the least margin. With seed 0 the teacher has .815 of the test set right,
the student of 30 labels .771, and with 160 answers students have .808 (RAD), .815 (the soft game)
and .822 (margin): of a teacher that is weak everywhere nobody learns much more than it knows, and
asking with care is worth nothing. The claim has one that is wrong where students are unsure.

Networks and data are the paper's as far as they are known; numbers of labels, rounds, queries and
steps, optimisers and rho are ours, and not the paper's numbers.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'cifar10', 'cifar100', 'svhn', 'imagenet')
METHOD = 'kd.methods.vision.robust_active_distillation'
SUPERVISED = 'kd.methods.vision.supervised.supervised'


def get_config(variant: str = 'imagenet'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'cifar10': lambda: small_images('cifar10', 45_000, 50_000),
            'cifar100': lambda: small_images('cifar100', 45_000, 50_000),
            'svhn': lambda: small_images('svhn_cropped', 68_000, 73_257),
            'imagenet': imagenet,
        },
    )()


def cpu():
    """Minutes on two cores."""
    adam = dict(name='adamw', lr=1e-2, weight_decay=1e-4)
    return recipe(
        data=dict(
            name='digits', labelled='train[:30]', train='train[30:1030]',
            validation='train[1110:]', test='test',
        ),
        teacher=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(64,)), optimizer=adam, steps=300,
            batch_size=80, data=dict(train='train[1030:1110]'),
        ),
        student=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(64, 64)), optimizer=adam, steps=300
        ),
        arms=('rad', 'rad_soft', 'margin'),
        labelled=30,
        count=40,
        rounds=4,
        # All that there is: the paper's loss, of two means.
        batch_size=None,
        asking=200,
    )  # fmt: skip


def small_images(name, pool, examples):
    """CIFAR and SVHN."""
    labelled, batch = 5_000, 128
    sgd = dict(
        name='sgd', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule='cosine'
    )
    augmentation = (('crop', 4),) if name == 'svhn_cropped' else ('flip', ('crop', 4))
    return recipe(
        data=dict(
            name=name, labelled=f'train[:{labelled}]', train=f'train[{labelled}:{pool}]',
            validation=f'train[{pool}:{examples}]', test='test',
        ),
        teacher=dict(
            network=dict(name='kd.models.resnet.ImageNetResNet', depth=50, stem='cifar'),
            optimizer=sgd, steps=200 * labelled // batch, batch_size=batch,
            data=dict(train=f'train[:{labelled}]'), augmentation=augmentation,
        ),
        student=dict(
            network=dict(name='kd.models.mobilenet.MobileNetV2', stem='cifar', dropout=0.0),
            optimizer=sgd, steps=20_000,
        ),
        arms=('rad',),
        labelled=labelled,
        count=5_000,
        rounds=5,
        batch_size=batch,
        asking=500,
        mesh=dict(data=-1),
    )  # fmt: skip


def imagenet():
    """ResNet-50 to ResNet-18."""
    labelled, pool, batch = 128_000, 1_231_167, 256
    sgd = dict(
        name='sgd', lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, schedule='cosine',
        warmup_steps=2_000,
    )  # fmt: skip
    return recipe(
        data=dict(
            name='imagenet_224', labelled=f'train[:{labelled}]',
            train=f'train[{labelled}:{pool}]', validation=f'train[{pool}:]', test='validation',
        ),
        teacher=dict(
            network=dict(name='kd.models.resnet.ImageNetResNet', depth=50), optimizer=sgd,
            steps=100 * labelled // batch, batch_size=batch,
            data=dict(train=f'train[:{labelled}]'), augmentation=('resized_crop', 'flip'),
        ),
        student=dict(
            network=dict(name='kd.models.resnet.ImageNetResNet', depth=18), optimizer=sgd,
            steps=100_000,
        ),
        arms=('rad',),
        labelled=labelled,
        count=64_000,
        rounds=5,
        batch_size=batch,
        asking=512,
        mesh=dict(data=-1),
    )  # fmt: skip


def recipe(
    *,
    data,
    teacher,
    student,
    arms,
    labelled,
    count,
    rounds,
    batch_size,
    asking,
    rho=0.6,
    **parallel,
):
    """Stages teacher, first, and of every arm ARM_query_1, ARM_1, ARM_query_2, ..."""
    splits = {name: split for name, split in data.items() if name != 'name'}
    cadence = dict(
        log_every=50,
        eval_every=student['steps'] // 3,
        checkpoint_every=1_000,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    teacher = dict(teacher)
    augmentation = teacher.pop('augmentation', ())
    supervised = dict(name=SUPERVISED, augmentation=augmentation)
    blocks = {
        'teacher': kd_config.stage(method=supervised, **teacher, **cadence),
        'first': kd_config.stage(
            method=supervised,
            data=dict(train=data['labelled']),
            batch_size=batch_size or labelled,
            **student,
            **cadence,
        ),
    }
    for arm in arms:
        for r in range(1, rounds + 1):
            blocks[f'{arm}_query_{r}'] = kd_config.stage(
                teacher='teacher',
                references={'student': f'{arm}_{r - 1}' if r > 1 else 'first'},
                method=dict(name='kd.methods.cache.nothing'),
                writers={
                    'query': dict(
                        name=f'{METHOD}.query', kind=arm, count=count, rho=rho,
                        before=f'{arm}_query_{r - 1}' if r > 1 else '',
                    )
                },
                batch_size=asking,
                steps=1,
            )  # fmt: skip
            source = dict(name='kd.data.columns.acquired', stage=f'{arm}_query_{r}')
            blocks[f'{arm}_{r}'] = kd_config.stage(
                method=dict(name=f'{METHOD}.acquired_kd', augmentation=augmentation),
                data=dict(splits, source=source),
                batch_size=batch_size or labelled + r * count,
                **student,
                **cadence,
            )
    rows = [
        (f'{arm.replace("_", " ")}, {r * count} answers', f'{arm}_{r}')
        for arm in arms
        for r in range(1, rounds + 1)
    ]
    config = kd_config.recipe(
        stages=tuple(blocks),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('labels alone', 'first'), *rows, ('teacher', 'teacher')),
            student=f'{arms[0]}_{rounds}',
        ),
        **parallel,
    )
    for name, block in blocks.items():
        config[name] = block
    return config
