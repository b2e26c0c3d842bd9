"""Blocks that the recipes of dataset distillation have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd import config as kd_config
from kd.config import ConfigDict
from kd.errors import UserError, did_you_mean

SEGMENTS = 'kd.data.distilled.trajectories.segments'
SIAMESE = 'color_crop_cutout_flip_scale_rotate'
# Learning rates to choose from for real images, and for networks other than that of the recipe.
STEP_SIZES = (1e-3, 3e-3, 1e-2, 3e-2)
# Variants of `kd.methods.dataset.small_recipes`.
CPU = ('cpu', 'cpu_mnist')
SMALL = (*CPU, 'mnist')


class Data(NamedTuple):
    """A data set: splits, size of the training split, and the network that is used with it.

    Where channels are standardised, it is by `moments`, mean and deviation of pixels in [0, 1], or
    by those of the training split where there are none.
    """

    of: str
    train: str
    validation: str
    examples: int
    network: Mapping[str, Any]
    batch_size: int = 256
    experts: int = 100
    epochs: int = 50
    test: str = 'test'
    moments: tuple[Sequence[float], Sequence[float]] | None = None


def convnet(depth: int, width: int = 128) -> dict[str, Any]:
    """Block of a ConvNet with instance normalisation."""
    return dict(name='kd.models.convnet.ConvNet', depth=depth, width=width)


# What released code standardises by: on CIFAR-10 not the deviations of the pixels, which are a
# quarter larger; on Tiny ImageNet and others those of ImageNet.
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MLP = dict(name='kd.models.mlp.MLP', widths=(64, 64))
DATA = {
    'cpu': Data('digits', 'train[:1200]', 'train[1200:]', 1200, MLP, 60, 20, 20),
    'cpu_mnist': Data('mnist', 'train[:55000]', 'train[55000:]', 55_000, MLP, 250, 10, 12),
    'mnist': Data('mnist', 'train[:55000]', 'train[55000:]', 55_000, convnet(3, 64)),
    'cifar10': Data(
        'cifar10', 'train[:45000]', 'train[45000:]', 45_000, convnet(3), moments=CIFAR10
    ),
    'cifar100': Data('cifar100', 'train[:45000]', 'train[45000:]', 45_000, convnet(3)),
    'tiny': Data(
        'tiny_imagenet', 'train[:90000]', 'train[90000:]', 90_000, convnet(4), moments=IMAGENET
    ),
    'imagefruit': Data(
        'imagefruit', 'train[:12000]', 'train[12000:]', 12_000, convnet(5), moments=IMAGENET
    ),
    'imagenet': Data(
        'imagenet_resized/64x64', 'train[:1250000]', 'train[1250000:]', 1_250_000, convnet(4),
        experts=50, test='validation', moments=IMAGENET,
    ),
}  # fmt: skip


def parse(argument: str) -> tuple[str, int, int]:
    """`name`, `name,ipc=10` or `name,ipc=10,shards=8` as name, images per class and shards."""
    name, *rest = argument.split(',')
    options = {'ipc': 1, 'shards': 1}
    for item in rest:
        key, _, value = item.partition('=')
        if key not in options or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"'{argument}': '{item}' is not ipc=N or shards=N; write for example "
                'cifar10,ipc=10 or cifar10,ipc=50,shards=4.'
            )
        options[key] = int(value)
    return name, options['ipc'], options['shards']


def row(rows: Mapping[tuple[str, int], Any], name: str, ipc: int) -> Any:
    """The row of a paper's table; lists those that there are otherwise."""
    if (name, ipc) not in rows:
        known = [f'{data},ipc={count}' for data, count in rows]
        wanted = f'{name},ipc={ipc}'
        hint = did_you_mean(wanted, known) or did_you_mean(name, SMALL)
        raise UserError(
            f"There is no variant '{wanted}'.{hint} Variants: {', '.join([*SMALL, *known])}."
        )
    return rows[name, ipc]


def data_block(data: Data, standardise: str) -> dict[str, Any]:
    """The recipe's data, standardised by its training split or by given moments of its channels."""
    source: dict[str, Any] = dict(
        name='kd.data.transforms.standardised.standardised',
        of=data.of,
        kind=standardise,
        fit_on=data.train,
    )
    if standardise == 'channels' and data.moments:
        source |= dict(zip(('mean', 'deviation'), data.moments, strict=True))
    return dict(source=source, train=data.train, validation=data.validation, test=data.test)


def expert_stage(
    data: Data, *, together: int, optimizer: Mapping[str, Any], **method: Any
) -> ConfigDict:
    """The stage that trains the experts and writes their trajectories."""
    count, epochs = data.experts, data.epochs
    per_epoch = math.ceil(data.examples / data.batch_size)
    return kd_config.stage(
        method=dict(
            name='kd.methods.dataset.expert_trajectories.expert_trajectories',
            experts=count,
            together=together,
            epochs=epochs,
            **method,
        ),
        network=data.network,
        optimizer=optimizer,
        steps=count // together * epochs * per_epoch,
        batch_size=data.batch_size,
        writers={
            'snapshots': dict(
                name='kd.methods.dataset.expert_trajectories.snapshots', every=per_epoch
            )
        },
        evaluators={
            'validation': dict(name='kd.methods.dataset.expert_trajectories.expert_accuracy')
        },
        eval_every=epochs * per_epoch,
        checkpoint_every=5 * per_epoch,
        log_every=per_epoch,
        keep=1,
    )


def segments(data: Data, max_start_epoch: int, expert_epochs: int) -> dict[str, Any]:
    """The data of a matching stage."""
    source = dict(
        name=SEGMENTS,
        network=dict(data.network),
        max_start_epoch=max_start_epoch,
        expert_epochs=expert_epochs,
    )
    return dict(source=source, train='train')


def assembled(
    data: Data,
    *,
    standardise: str,
    ipc: int,
    shards: int,
    distilled: ConfigDict,
    protocol: Mapping[str, Any],
    step_sizes: Sequence[float],
    experts: ConfigDict | None = None,
    average: str = '',
    networks: Mapping[str, Any] | None = None,
    full_epochs: int = 0,
) -> ConfigDict:
    """Experts, the distilled set, subsets of real images for comparison, and the report.

    `full_epochs` are those of networks on all real images; by default as many as an expert's.
    """
    sharded = (
        # The images and what the optimiser keeps of them; then the stacked experts.
        (r'images$', ('tensor',)),
        (r'^(params|opt_state|extra/start)/', (('data', 'tensor'),)),
    )
    subsets = ('random', 'kmeans')
    config = kd_config.recipe(
        stages=(*(('experts',) if experts else ()), *subsets, 'distilled'),
        data=data_block(data, standardise),
        mesh=dict(data=1, fsdp=1, tensor=shards),
        sharding=sharded if shards > 1 else (),
        report=dict(
            name='kd.reports.dataset.dataset_distillation',
            rows=(
                *((kind, kind, '') for kind in subsets),
                ('distilled', 'distilled', ''),
                *((('distilled, averaged', 'distilled', average),) if average else ()),
            ),
            network=dict(data.network),
            networks=dict(networks or {}),
            step_sizes=tuple(step_sizes),
            protocol=dict(protocol),
            full_epochs=full_epochs or data.epochs,
            baseline='random',
        ),
    )
    config.distilled = distilled
    if experts:
        config.experts = experts
    for kind in subsets:
        config[kind] = kd_config.stage(
            method=dict(name='kd.methods.dataset.coreset.coreset', images_per_class=ipc, kind=kind),
            steps=1,
            # Not looked at, but spread over the devices.
            batch_size=data.batch_size,
            evaluators={},
        )
    return config


def matching_stage(
    data: Data,
    *,
    method: Mapping[str, Any],
    ipc: int,
    segment: tuple[int, int],
    steps: int,
    optimizer: Mapping[str, Any],
    protocol: Mapping[str, Any],
    eval_every: int,
    average: str = '',
) -> ConfigDict:
    """The stage that trains the synthetic set; `segment` is (bound of start epochs, M)."""
    evaluators = {'validation': judged(**protocol)}
    if average:
        evaluators['averaged'] = judged(average=average, images=False, **protocol)
    return kd_config.stage(
        method=dict(images_per_class=ipc, **method),
        data=segments(data, *segment),
        optimizer=optimizer,
        steps=steps,
        batch_size=1,
        evaluators=evaluators,
        eval_every=eval_every,
        checkpoint_every=eval_every,
        best='validation/accuracy',
        final='best',
    )


def judged(**protocol: Any) -> dict[str, Any]:
    """The evaluator that trains networks on the set of a stage; arguments are its own."""
    return dict(name='kd.evaluators.fresh_training.fresh_training', split='train', **protocol)


class Schedule(NamedTuple):
    """What the papers' tables of trajectory matching have in common.

    Attributes:
      student_steps, expert_epochs: N and M.
      start_epochs: bound of the epoch that a segment starts from.
      inner_batch: synthetic examples per student step; 0 for all.
      image_lr, step_size_lr: of SGD with momentum 0.5.
      step_size: the student's, before it is trained.
    """

    student_steps: int
    expert_epochs: int
    start_epochs: int
    inner_batch: int
    image_lr: float
    step_size_lr: float
    step_size: float


def full_matching(
    of: str,
    ipc: int,
    shards: int,
    schedule: Schedule,
    *,
    standardise: str,
    experts: Mapping[str, Any],
    method: Mapping[str, Any],
    protocol: Mapping[str, Any] | None = None,
    step_sizes: Sequence[float] = STEP_SIZES,
    steps: int = 5_000,
    eval_every: int = 500,
    average: str = '',
) -> ConfigDict:
    """A row of a paper's table: siamese augmentation throughout, SGD on images and step size.

    `of` names the data; `experts`, `method` and `protocol` are what the paper adds.
    """
    data, together = shared_out(DATA[of], 10, shards)
    protocol = dict(epochs=1000, augmentation=SIAMESE, **(protocol or {}))
    return assembled(
        data,
        standardise=standardise,
        ipc=ipc,
        shards=shards,
        experts=expert_stage(data, together=together, augmentation=SIAMESE, **experts),
        distilled=matching_stage(
            data,
            method=dict(
                student_steps=schedule.student_steps,
                step_size=schedule.step_size,
                inner_batch=schedule.inner_batch,
                step_size_optimizer=dict(name='sgd', lr=schedule.step_size_lr, momentum=0.5),
                augmentation=SIAMESE,
                **method,
            ),
            ipc=ipc,
            segment=(schedule.start_epochs, schedule.expert_epochs),
            steps=steps,
            optimizer=dict(name='sgd', lr=schedule.image_lr, momentum=0.5),
            protocol=protocol,
            eval_every=eval_every,
            average=average,
        ),
        protocol=protocol,
        step_sizes=step_sizes,
        average=average,
        networks=cross_architecture(),
    )


def condensed_data(name: str) -> Data:
    """Data of the papers on condensation, all with a ConvNet of depth 3 and width 128."""
    known = ('mnist', 'cifar10', 'cifar100')
    if name not in known:
        raise UserError(
            f"There is no variant '{name}'.{did_you_mean(name, known)} Variants: "
            f'{", ".join((*CPU, *known))}.'
        )
    return DATA[name]._replace(network=convnet(3))


def condensation(
    data: Data,
    ipc: int,
    shards: int,
    *,
    standardise: str,
    method: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    steps: int,
    batch_size: int,
    protocol: Mapping[str, Any],
    step_sizes: Sequence[float],
    eval_every: int,
    networks: Mapping[str, Any] | None = None,
    full_epochs: int = 0,
) -> ConfigDict:
    """A set that is matched to real images class by class, without experts.

    A batch holds `batch_size` real images of every class. The set has no step size of its own: that
    of the networks that judge it is the best of `step_sizes` on the validation split.
    """
    distilled = kd_config.stage(
        # The network is that of single images, not of the stage's groups of them.
        method=dict(images_per_class=ipc, network=data.network, **method),
        data=dict(source=dict(name='kd.data.distilled.groups.one_of_each_class'), train=data.train),
        optimizer=optimizer,
        steps=steps,
        batch_size=batch_size,
        evaluators={
            'validation': judged(network=data.network, step_sizes=tuple(step_sizes), **protocol)
        },
        eval_every=eval_every,
        checkpoint_every=eval_every,
        best='validation/accuracy',
        final='best',
    )
    return assembled(
        data,
        standardise=standardise,
        ipc=ipc,
        shards=shards,
        distilled=distilled,
        protocol=protocol,
        step_sizes=step_sizes,
        networks=networks,
        full_epochs=full_epochs,
    )


def cross_architecture() -> dict[str, Any]:
    """Further architectures that a synthetic set is tested on."""
    return {
        'ResNet-20': dict(name='kd.models.resnet.ResNet', depth=20, norm='instance'),
        'MLP': dict(name='kd.models.mlp.MLP', widths=(256, 256)),
        'ViT': dict(name='kd.models.vit.ViT', patch=4, width=192, depth=6, heads=3),
    }


def shared_out(data: Data, together: int, shards: int) -> tuple[Data, int]:
    """About `together` experts at once, a multiple of `shards`; and as many in all as fill rounds.

    On 8 devices 100 experts, 10 together, become 104 experts, 8 together.
    """
    together = max(round(together / shards), 1) * shards
    return data._replace(experts=math.ceil(data.experts / together) * together), together
