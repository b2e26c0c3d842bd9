"""Inter-class feature compensators, INFER (Zhang et al. 2024, arXiv 2408.06927).

Networks with batch normalisation are trained on the real data; each gives every group of real
images, one per class, a single additive image. The images, with and without, are labelled once by
the networks, and a student is trained on them with MixUp.

    python -m kd.main --config=configs/dataset/infer_ufc.py:cpu --workdir=runs/infer
    python -m kd.main --config=configs/dataset/infer_ufc.py:cifar100,ipc=10 --workdir=runs/infer100

| variant | hardware | expected test accuracy, IPC 10 / 50 |
|---|---|---|
| cpu (pairs of digits, 100 classes), ipc = 2, 5 | 2 cores, 3 min | 0.950 at IPC 2 |
| cifar10, ipc = 10, 50 | one GPU, hours | 34.0 / 57.0 |
| cifar100, ipc = 10, 50, 100 | one GPU, hours | 41.0 / 53.8 / 57.0 |
| tiny, ipc = 10, 50 (64 pixels) | one GPU, a day | |

The numbers are the paper's for a ConvNet of width 128. Its networks are ResNet-18, MobileNetV2,
EfficientNet-B0 and ShuffleNet; ours are ResNets and ConvNets, so accuracies will differ. On pairs
of digits, random real images under the same soft labels reach 0.966.
"""

from kd import config as kd_config
from kd.errors import UserError
from kd.methods.dataset import recipes

VARIANTS = ('cpu,ipc=2', 'cifar10,ipc=10')
SIZES = {'cpu': (2, 5), 'cifar10': (10, 50), 'cifar100': (10, 50, 100), 'tiny': (10, 50)}


def convnet(depth, width):
    """A ConvNet with batch normalisation."""
    return recipes.convnet(depth, width) | dict(norm='batch')


def resnet(depth, widen):
    """A CIFAR ResNet."""
    return dict(name='kd.models.resnet.ResNet', depth=depth, widen=widen)


def get_config(argument: str = 'cifar100,ipc=10'):
    """The recipe of a data set and a budget, `name,ipc=N`."""
    name, ipc, _ = recipes.parse(argument)
    if ipc not in SIZES.get(name, ()):
        known = [f'{data},ipc={n}' for data, sizes in SIZES.items() for n in sizes]
        raise UserError(f"There is no variant '{argument}'. Variants: {', '.join(known)}.")
    return cpu(ipc) if name == 'cpu' else full(name, ipc)


def cpu(ipc):
    """Pairs of digits with three small ConvNets."""
    adam = dict(name='adam', lr=3e-3, schedule='cosine')
    return assembled(
        data=dict(
            source=dict(name='kd.data.pairs.digit_pairs'),
            train='train',
            validation='validation',
            test='test',
        ),
        networks=dict(narrow=convnet(2, 16), middle=convnet(2, 24), wide=convnet(2, 32)),
        training=dict(steps=900, batch_size=100, optimizer=adam, eval_every=900),
        infer=dict(images_per_class=ipc, statistics_weight=0.1, shift=1),
        optimizer=dict(name='adam', lr=0.05, b1=0.5, b2=0.9, schedule='cosine'),
        steps=250,
        student=convnet(2, 16),
        protocol=dict(epochs=80, temperature=4.0, gradient_scale=4.0, lr=3e-3),
    )


def full(name, ipc):
    """Four networks at full size; a and w of the paper's CIFAR script."""
    data = recipes.DATA[name]
    depth = 4 if name == 'tiny' else 3
    sgd = dict(
        name='sgd', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule='cosine'
    )
    augmentation = ('flip', ('crop', 4))
    return assembled(
        data=dict(name=data.of, train=data.train, validation=data.validation, test=data.test),
        networks=dict(
            resnet20=resnet(20, 2), resnet32=resnet(32, 2), resnet44=resnet(44, 1),
            convnet=convnet(depth, 128),
        ),
        training=dict(
            steps=200 * data.examples // 128, batch_size=128, optimizer=sgd, eval_every=10_000
        ),
        infer=dict(images_per_class=ipc, statistics_weight=1.0, shift=4),
        optimizer=dict(name='adam', lr=0.25, b1=0.5, b2=0.9, schedule='cosine'),
        steps=1000,
        student=convnet(depth, 128),
        protocol=dict(epochs=400, temperature=30.0, lr=1e-3, augmentation=augmentation),
        augmentation=augmentation,
    )  # fmt: skip


def assembled(
    *, data, networks, training, infer, optimizer, steps, student, protocol, augmentation=()
):
    """Networks on real data, the compensators, and the report."""
    config = kd_config.recipe(
        stages=(*networks, 'distilled'),
        data=data,
        report=dict(
            name='kd.reports.dataset.compensated_set',
            stage='distilled',
            network=student,
            protocol=protocol,
        ),
    )
    for name, network in networks.items():
        config[name] = kd_config.stage(
            method=dict(name='kd.methods.vision.supervised.supervised', augmentation=augmentation),
            network=network,
            evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
            **training,
        )
    config.distilled = kd_config.stage(
        method=dict(name='kd.methods.dataset.infer_ufc.infer_ufc', **infer),
        references={name: name for name in networks},
        optimizer=optimizer,
        steps=steps,
        batch_size=8,
        log_every=50,
        evaluators={
            'validation': dict(
                name='kd.evaluators.compensated_set.compensated_training',
                split='train',
                network=student,
                low=-1.0,
                high=1.0,
                **protocol,
            )
        },
    )
    return config
