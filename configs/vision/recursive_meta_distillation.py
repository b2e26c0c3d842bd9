"""Classifiers anchored to a base teacher (Flouro, Chadwick 2026, arXiv:2601.13100).

A small student is distilled from the base teacher; each further student, from scratch, from the
mixture of the one before it (weight 1 - lam) and of the base teacher (lam).

    python -m kd.main --config=configs/vision/recursive_meta_distillation.py:cpu --workdir=runs/meta

and likewise `:unanchored` and `:cifar10`.

| variant | data | teacher, students | lam | generations | hardware |
|---|---|---|---|---|---|
| cpu | digits | ConvNet-2, MLP-16 | 0.3 | 6 | 2 cores, 1-2 min |
| unanchored | digits | ConvNet-2, MLP-16 | 0 | 6 | 2 cores, 1-2 min |
| cifar10 (default) | CIFAR-10 | ResNet-56, ResNet-20 | 0.3 | 5 | one GPU, a day |

The paper has theory only and no numbers to compare with. To be expected is KL(T || S) of the last
generation: bounded with the anchor, growing without (column "KL to teacher" of the report).
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'unanchored', 'cifar10')


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    known = {'cpu': cpu, 'unanchored': unanchored, 'cifar10': cifar10}
    return kd_config.variant(variant, known)()


def cpu(lam: float = 0.3):
    """Digits."""
    run = dict(
        batch_size=64,
        steps=400,
        optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', warmup_steps=20),
        log_every=50,
        eval_every=200,
        checkpoint_every=200,
    )
    return recipe(
        data=dict(name='digits', train='train[:80%]', validation='train[80%:]', test='test'),
        teacher=dict(name='kd.models.convnet.ConvNet', depth=2, width=32),
        student=dict(name='kd.models.mlp.MLP', widths=(16,)),
        run=run,
        generations=6,
        lam=lam,
    )


def unanchored():
    """The control: every generation learns from the one before it alone."""
    return cpu(lam=0.0)


def cifar10():
    """ResNet-56 to ResNet-20, the schedule of He et al. (2016)."""
    run = dict(
        batch_size=128,
        steps=200 * 45_000 // 128,
        optimizer=dict(
            name='sgd',
            momentum=0.9,
            nesterov=True,
            lr=0.1,
            weight_decay=5e-4,
            schedule='step',
            schedule_args=dict(boundaries=(0.5, 0.75), factor=0.1),
        ),
        log_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    )
    return recipe(
        data=dict(name='cifar10', train='train[:45000]', validation='train[45000:]', test='test'),
        teacher=dict(name='kd.models.resnet.ResNet', depth=56),
        student=dict(name='kd.models.resnet.ResNet', depth=20),
        run=run,
        generations=5,
        lam=0.3,
        temperature=4.0,
        augmentation=('flip', ('crop', 4)),
    )


def recipe(*, data, teacher, student, run, generations, lam, temperature=1.0, augmentation=()):
    """Stages `teacher`, `generation_1` (plain distillation), `generation_2`, ..."""
    calibration = dict(name='kd.evaluators.calibration.calibration')
    agreement = dict(name='kd.evaluators.agreement.agreement')
    blocks = {
        'teacher': kd_config.stage(
            network=teacher,
            method=dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation),
            evaluators={'validation': calibration},
            **run,
        )
    }
    for t in range(1, generations + 1):
        blocks[f'generation_{t}'] = kd_config.stage(
            network=student,
            teacher='teacher',
            references=dict(student=f'generation_{t - 1}') if t > 1 else {},
            method=dict(
                name='kd.methods.recursive_meta_distillation.recursive_meta_distillation',
                lam=lam if t > 1 else 1.0,
                temperature=temperature,
                augmentation=augmentation,
            ),
            evaluators={'validation': calibration, 'agreement': agreement},
            **run,
        )
    rows = tuple((f'generation {t}', f'generation_{t}') for t in range(1, generations + 1))
    config = kd_config.recipe(
        stages=tuple(blocks),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=(*rows, ('teacher', 'teacher')),
            student=f'generation_{generations}',
        ),
    )
    for name, block in blocks.items():
        config[name] = block
    return config
