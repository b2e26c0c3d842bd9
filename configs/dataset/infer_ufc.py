"""Inter-class feature compensators, INFER (Zhang et al. 2024, arXiv 2408.06927).

Networks with batch normalisation are trained on the real data; each gives every group of real
images, one per class, a single additive image. The images, with and without, are labelled once by
the networks, and a student is trained on them with MixUp.

    python -m kd.main --config=configs/dataset/infer_ufc.py:cpu,ipc=2 --workdir=runs/infer
    python -m kd.main --config=configs/dataset/infer_ufc.py:cifar100,ipc=10 --workdir=runs/infer100

With `,dynamic` after the variant, the networks label every augmented and mixed image anew, and the
student takes 1 / (M + 1) of the epochs.

| variant | M | hardware | student | test accuracy at IPC 10 / 50 | dynamic |
|---|---|---|---|---|---|
| cpu, ipc = 2, 5 (pairs of digits) | 3 | 2 cores, 3 min | ConvNet | 94.5 at IPC 2 | 34.0 |
| cpu_mnist, ipc = 10, 20 | 3 | 2 cores, 10 min | ConvNet | 92.2 at IPC 10 | |
| cifar10, ipc = 10, 50 | 4 | one GPU, a day | ConvNet | 34.0 / 57.0 | |
| | | | ResNet-18 | 32.0 / 60.4 | |
| cifar100, ipc = 10, 50, 100 | 4 | one GPU, a day | ConvNet | 41.0 / 53.8 | 37.2 / 50.7 |
| | | | ResNet-18 | 45.2 / 62.8 | 53.4 / 68.9 |
| tiny, ipc = 10, 50 (64 pixels) | 4 | one GPU, days | ResNet-18 | 32.0 / 52.9 | 41.0 / 54.6 |
| imagenet, ipc = 10, 50 (224 pixels) | 3 | 8 GPUs, days | ResNet-18 | 28.7 / 51.8 | 36.3 / 55.6 |

All numbers but those of `cpu` and `cpu_mnist` are the paper's, and the times of the others are
guesses; on CIFAR-100 the ConvNet has 57.0 at IPC 100, 53.4 with dynamic labels. On pairs of digits,
random real images under the same soft labels reach 96.2, on MNIST 95.7; a quarter of the epochs is
140 steps for pairs of digits, too few for dynamic labels, which have 95.6 in all 80.

The networks have the names of the paper's: ResNet-18, MobileNetV2, EfficientNet-B0 and, but for
ImageNet, ShuffleNet-G2. For small images MobileNetV2 and EfficientNet are ours: those of their own
papers with fewer strides, where the released code has other CIFAR networks under these names. The
paper takes those of ImageNet as they are distributed; here they are trained, all by the schedule of
ResNets with batches of 1024. Its schedule for students on ImageNet is not known to us: here it is
that of CIFAR in batches of 256. Ours too: part of the training images, 5,000 of CIFAR's 50,000, is
held out for validation (the release trains on all).

`imagenet_224` and `tiny_imagenet` are folders of these names that you prepare in the format of
tfds, with `image`, uint8 [224, 224, 3] or [64, 64, 3], and `label`; the former with the splits
`train` and `validation`. A group of ImageNet is 1000 images, whose classes lie spread over the
devices: on eight of them a step takes 9 GiB each (by XLA's analysis of it, compiled for CPUs).
Evaluation holds the whole set, 36 or 196 images of 0.6 MB per class, on the host.
"""

from kd import config as kd_config
from kd.errors import UserError, did_you_mean
from kd.methods.dataset import recipes

VARIANTS = ('cpu,ipc=2', 'cpu_mnist', 'cifar10,ipc=10', 'tiny,ipc=10,dynamic', 'imagenet,ipc=10')
SIZES = {
    'cpu': (2, 5),
    'cpu_mnist': (10, 20),
    'cifar10': (10, 50),
    'cifar100': (10, 50, 100),
    'tiny': (10, 50),
    'imagenet': (10, 50),
}
DATA = recipes.DATA | {
    'imagenet': recipes.Data(
        'imagenet_224', 'train[:1276167]', 'train[1276167:]', 1_276_167, {}, test='validation'
    )
}
# The paper's rate of 0.25 is for standardised pixels: the deviations that its code divides by, for
# pixels in [-1, 1].
DEVIATION = {'cifar10': 0.40, 'cifar100': 0.53, 'tiny': 0.46, 'imagenet': 0.45}
# Groups computed at a time, so that one GPU holds them.
TOGETHER = {'cifar10': 0, 'cifar100': 8, 'tiny': 1, 'imagenet': 1}


def convnet(depth, width):
    """A ConvNet with batch normalisation."""
    return recipes.convnet(depth, width) | dict(norm='batch')


def resnet(depth, stem):
    """A ResNet with four stages."""
    return dict(name='kd.models.resnet.ImageNetResNet', depth=depth, stem=stem)


def ensemble(stem):
    """The networks that images are trained on."""
    networks = dict(
        resnet18=resnet(18, stem),
        mobilenet=dict(name='kd.models.mobilenet.MobileNetV2', stem=stem),
        efficientnet=dict(name='kd.models.efficientnet.EfficientNet', stem=stem),
    )
    if stem == 'cifar':
        networks['shufflenet'] = dict(name='kd.models.shufflenet.ShuffleNet', groups=2, stem=stem)
    return networks


def data_of(name):
    """Block of a data set as it is."""
    data = DATA[name]
    return dict(name=data.of, train=data.train, validation=data.validation, test=data.test)


def get_config(argument: str = 'cifar100,ipc=10'):
    """The recipe of a data set and a budget, `name,ipc=N` or `name,ipc=N,dynamic`.

    Without `ipc` the smallest budget; the storage of one image per class holds no group.
    """
    variant = argument.removesuffix(',dynamic')
    name, ipc, shards = recipes.parse(variant)
    if shards > 1:
        raise UserError(f"'{argument}': there are no shards here; use --config.mesh.data=N.")
    if 'ipc=' not in variant:
        ipc = min(SIZES.get(name, (ipc,)))
    if ipc not in SIZES.get(name, ()):
        known = [f'{data},ipc={n}' for data, sizes in SIZES.items() for n in sizes]
        raise UserError(
            f"There is no variant '{argument}'.{did_you_mean(variant, known)} Variants, each also "
            f"with ',dynamic' after it: "
            f'{", ".join(known)}.'
        )
    labels = 'static' if variant == argument else 'dynamic'
    if name == 'imagenet':
        return imagenet(ipc, labels)
    return (cpu if name in recipes.CPU else small)(name, ipc, labels)


def cpu(name, ipc, labels):
    """Pairs of digits, or MNIST, with three small ConvNets."""
    if name == 'cpu':
        data = dict(
            source=dict(name='kd.data.transforms.pairs.digit_pairs'),
            train='train',
            validation='validation',
            test='test',
        )
    else:
        data = data_of(name)
    adam = dict(name='adam', lr=3e-3, schedule='cosine')
    return assembled(
        data=data,
        networks=dict(narrow=convnet(2, 16), middle=convnet(2, 24), wide=convnet(2, 32)),
        training=dict(steps=900, batch_size=100, optimizer=adam, eval_every=900),
        infer=dict(images_per_class=ipc, statistics_weight=0.1, shift=1),
        optimizer=dict(name='adam', lr=0.05, b1=0.5, b2=0.9, schedule='cosine'),
        steps=250,
        students=dict(ConvNet=convnet(2, 16)),
        protocol=dict(epochs=80, temperature=4.0, gradient_scale=4.0, lr=3e-3, labels=labels),
    )


def small(name, ipc, labels):
    """CIFAR and Tiny ImageNet: a, w and the schedules of the paper's CIFAR script."""
    data = DATA[name]
    sgd = dict(
        name='sgd', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule='cosine'
    )
    augmentation = ('flip', ('crop', 4))
    return assembled(
        data=data_of(name),
        networks=ensemble('cifar'),
        training=dict(
            steps=200 * data.examples // 128, batch_size=128, optimizer=sgd, eval_every=10_000
        ),
        infer=dict(images_per_class=ipc, statistics_weight=1.0, shift=4, together=TOGETHER[name]),
        optimizer=dict(name='adam', lr=0.25 * DEVIATION[name], b1=0.5, b2=0.9, schedule='cosine'),
        steps=1000,
        students=dict(
            ConvNet=convnet(4 if name == 'tiny' else 3, 128), ResNet18=resnet(18, 'cifar')
        ),
        protocol=dict(
            epochs=400, temperature=30.0, lr=1e-3, augmentation=augmentation, labels=labels
        ),
        augmentation=augmentation,
    )


def imagenet(ipc, labels):
    """All 1000 classes in a group, cropped, resized and flipped alike before the shift."""
    data = DATA['imagenet']
    sgd = dict(
        name='sgd', lr=0.4, momentum=0.9, nesterov=True, weight_decay=1e-4, schedule='cosine',
        warmup_steps=5 * data.examples // 1024,
    )  # fmt: skip
    shared = {'shared': True}
    augmentation = ('resized_crop', 'flip')
    return assembled(
        data=data_of('imagenet'),
        networks=ensemble('imagenet'),
        training=dict(
            steps=90 * data.examples // 1024, batch_size=1024, optimizer=sgd, eval_every=10_000
        ),
        infer=dict(
            images_per_class=ipc,
            statistics_weight=0.01,
            shift=32,
            augmentation=(('resized_crop', shared), ('flip', shared)),
            together=TOGETHER['imagenet'],
        ),
        optimizer=dict(
            name='adam', lr=0.25 * DEVIATION['imagenet'], b1=0.5, b2=0.9, schedule='cosine'
        ),
        steps=2000,
        students=dict(
            ResNet18=resnet(18, 'imagenet'),
            ResNet50=resnet(50, 'imagenet'),
            ResNet101=resnet(101, 'imagenet'),
        ),
        protocol=dict(
            epochs=400, temperature=30.0, lr=1e-3, batch_size=256, augmentation=augmentation,
            labels=labels, repeats=1,
        ),
        augmentation=augmentation,
        sharding=((r'groups$', (None, 'data')),),
    )  # fmt: skip


def assembled(
    *,
    data,
    networks,
    training,
    infer,
    optimizer,
    steps,
    students,
    protocol,
    augmentation=(),
    sharding=(),
):
    """Networks on real data, the compensators, and the report."""
    protocol = dict(protocol)
    repeats = protocol.pop('repeats', 5)
    first, *others = students
    config = kd_config.recipe(
        stages=(*networks, 'distilled'),
        data=data,
        sharding=sharding,
        report=dict(
            name='kd.reports.dataset.compensated_set',
            stage='distilled',
            network=students[first],
            networks={title: students[title] for title in others},
            protocol=protocol,
            repeats=repeats,
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
                network=students[first],
                repeats=repeats,
                low=-1.0,
                high=1.0,
                **protocol,
            )
        },
    )
    return config
