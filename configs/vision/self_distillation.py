"""Generations of self-distillation with ground truth (Borup, Andersen 2021, arXiv:2102.13088).

A generation is trained on the labels and on the outputs of the one before it. The weight of the
labels, alpha, is computed from two trainings: the first generation and a student of the teacher
alone (stages `pure_t`). It is in the metrics as `train/alpha`.

    python -m kd.main --config=configs/vision/self_distillation.py:cpu --workdir=runs/self_digits
    python -m kd.main --config=configs/vision/self_distillation.py:fixed --workdir=runs/self_fixed
    python -m kd.main --config=configs/vision/self_distillation.py:cifar10 --workdir=runs/self_cifar

| variant | data | network | hardware | expected |
|---|---|---|---|---|
| cpu | 300 digits, 30 % of the labels drawn anew | MLP-64 | 2 cores, 1-2 min | generations gain |
| fixed | the same, alpha = 0.35 throughout | MLP-64 | 2 cores, 1 min | |
| cifar10 (default) | CIFAR-10 | ResNet-20, 4 times as wide | one GPU, about a day | |

The official code trains torchvision's ResNet-18 with Adam at 1e-4, batches of 16, 75 epochs, five
generations after the first and alpha = 0.6, on all 50,000 images; alpha needs held-out images, so
5,000 are kept back here. The wide ResNet-20 has 4.3 million parameters against its 11.2.
On labels without noise little gain is to be expected.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'fixed', 'cifar10')


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'fixed': fixed, 'cifar10': cifar10})()


def cpu(alpha='auto', noise: float = 0.3):
    """Noisy digits; `noise` is the fraction of training and validation labels drawn anew."""
    data = dict(
        name='digits',
        source=dict(
            name='kd.data.transforms.label_noise.noisy_labels', dataset='digits', fraction=noise
        ),
        train='train[:300]',
        validation='train[300:700]',
        test='test',
    )
    run = dict(
        network=dict(name='kd.models.mlp.MLP', widths=(64,)),
        optimizer=dict(name='adam', lr=1e-3),
        steps=1000,
        batch_size=50,
        log_every=100,
        eval_every=250,
        checkpoint_every=500,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    return recipe(data=data, run=run, generations=3, alpha=alpha)


def fixed():
    """The same with one weight throughout: one training per generation."""
    return cpu(alpha=0.35)


def cifar10():
    """CIFAR-10 at the optimiser, batch and length of the official code."""
    run = dict(
        network=dict(name='kd.models.resnet.ResNet', depth=20, widen=4),
        optimizer=dict(name='adam', lr=1e-4),
        steps=75 * 45_000 // 16,
        batch_size=16,
        log_every=500,
        eval_every=10_000,
        checkpoint_every=10_000,
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
    )
    data = dict(name='cifar10', train='train[:45000]', validation='train[45000:]', test='test')
    augmentation = ('flip', ('crop', 4))
    return recipe(data=data, run=run, generations=6, alpha='auto', augmentation=augmentation)


def recipe(*, data, run, generations, alpha, augmentation=()):
    """Stages `generation_1`, then for every t `pure_t` (if alpha is automatic), `generation_t`."""

    def method(**options):
        name = 'kd.methods.vision.self_distillation.self_distillation'
        return dict(name=name, penalty=1e-4, augmentation=augmentation, **options)

    blocks = {'generation_1': kd_config.stage(method=method(alpha=1.0), **run)}
    for t in range(2, generations + 1):
        teacher, references = f'generation_{t - 1}', {}
        if alpha == 'auto':
            pure = kd_config.stage(method=method(alpha=0.0), teacher=teacher, **run)
            blocks[f'pure_{t}'] = pure
            references = dict(first='generation_1', pure=f'pure_{t}')
        blocks[f'generation_{t}'] = kd_config.stage(
            method=method(alpha=alpha), teacher=teacher, references=references, **run
        )
    last = f'generation_{generations}'
    rows = tuple((f'generation {t}', f'generation_{t}') for t in range(1, generations + 1))
    config = kd_config.recipe(
        stages=tuple(blocks),
        data=data,
        report=dict(
            name='kd.reports.classification.classification',
            rows=rows,
            student=last,
            teacher='generation_1',
        ),
    )
    for name, block in blocks.items():
        config[name] = block
    return config
