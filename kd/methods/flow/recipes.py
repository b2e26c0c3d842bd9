"""Recipes of flows and flow maps: the blocks that the configs in `configs/flow` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd import config as kd_config

SELF_DISTILLED = (
    'lsd', 'esd', 'psd_uniform', 'psd_midpoint', 'meanflow', 'shortcut', 'consistency', 'fmm',
)  # fmt: skip
DISTILLED = ('lmd', 'emd', 'pfmm')
STEPS = (1, 2, 4, 8, 16)

Block = Mapping[str, Any]


def parse(variant: str, scales: Mapping[str, Callable[[str], ConfigDict]]) -> ConfigDict:
    """The recipe of 'scale,algorithm'; without a comma the algorithm is lsd."""
    scale, _, algorithm = variant.partition(',')
    algorithm = algorithm or 'lsd'
    kd_config.variant(algorithm, dict.fromkeys((*SELF_DISTILLED, *DISTILLED)))
    return kd_config.variant(scale, scales)(algorithm)


def flow_map(
    algorithm: str,
    *,
    data: Block,
    run: Block,
    evaluators: Callable[[str], Mapping[str, Block]],
    weights: str,
    baseline: bool,
    classifier: Block | None = None,
) -> ConfigDict:
    """Stages 'classifier' (if any), 'flow' (if needed) and 'map', and their report.

    Args:
      algorithm: see `kd.methods.flow`; a distilled one makes the flow its teacher.
      data: of the recipe.
      run: arguments of the stages that train flows: network, optimizer, steps, ...
      evaluators: of a flow or map, given the sampler 'euler' or 'flow_map'.
      weights: 'final' or the average that teaches.
      baseline: whether to train the plain flow also where no map is distilled from it.
      classifier: arguments of a stage whose features measure the samples.
    """
    distilled = algorithm in DISTILLED
    stages = (
        *(('classifier',) if classifier else ()),
        *(('flow',) if baseline or distilled else ()),
        'map',
    )
    rows = (('flow, Euler', 'flow'), (f'flow map, {algorithm}', 'map'))
    config = kd_config.recipe(
        stages=stages,
        data=data,
        report=dict(
            name='kd.reports.generation.generation',
            rows=tuple(row for row in rows if row[1] in stages),
        ),
    )
    references = {'classifier': 'classifier'} if classifier else {}
    if classifier:
        config.classifier = kd_config.stage(**classifier)
    if 'flow' in stages:
        config.flow = kd_config.stage(
            method=dict(name='kd.methods.flow.flow_matching.flow_matching'),
            evaluators=evaluators('euler'),
            references=references,
            **run,
        )
    if distilled:
        method: dict[str, Any] = dict(
            name='kd.methods.flow.flow_map_distillation.flow_map_distillation',
            algorithm=algorithm,
            teacher_jumps='euler',
        )
        teacher: dict[str, Any] = dict(teacher='flow', teacher_weights=weights)
    else:
        method = dict(
            name='kd.methods.flow.flow_map.flow_map',
            algorithm=algorithm,
            # Flow map matching holds the diagonal by itself.
            diagonal_fraction=0.0 if algorithm == 'fmm' else 0.75,
        )
        teacher = {}
    config.map = kd_config.stage(
        method=method, evaluators=evaluators('flow_map'), references=references, **teacher, **run
    )
    return config


# A flow of points in minutes, and what its students share with it.
RING = dict(
    data=dict(name='gaussian_mixture', train='train', validation='test'),
    network=dict(
        name='kd.models.velocity_mlp.VelocityMLP', width=128, depth=3, data_scale=0.5,
        frequencies=(1,), num_classes=None,
    ),
    teacher=dict(optimizer=dict(name='adam', lr=2e-3, schedule='cosine'), steps=4_000),
    students=dict(
        optimizer=dict(name='adam', lr=1e-3, schedule='cosine'), steps=3_000,
        checkpoint_every=1_500,
    ),
    measured=dict(samples=20_000, batch=5_000),
)  # fmt: skip

# The same of CIFAR-10. Rates are high where weights are projected back to unit norm.
CIFAR10 = dict(
    data=dict(name='cifar10', train='train', validation='test'),
    network=dict(
        name='kd.models.unet.UNet', channels=128, multipliers=(2, 2, 2), blocks=4,
        attention=(16,), dropout=0.13, data_scale=0.5, num_classes=None,
    ),
    teacher=dict(
        optimizer=dict(
            name='radam', lr=1e-2, clip_norm=1.0, schedule='rsqrt',
            schedule_args=dict(timescale=35_000),
        ),
        steps=200_000, batch_size=512, checkpoint_every=10_000,
    ),
    students=dict(
        optimizer=dict(name='adam', lr=1e-3, clip_norm=1.0, warmup_steps=1_000),
        steps=20_000, batch_size=512, checkpoint_every=5_000,
    ),
    measured=dict(samples=10_000, split='train', inception=''),
    mesh=dict(data=-1),
)  # fmt: skip


def few_steps(
    students: Mapping[str, tuple[str, Block]],
    *,
    data: Block,
    network: Block,
    teacher: Block,
    measured: Block,
    weights: str = 'slow',
    **recipe: Any,
) -> ConfigDict:
    """Stages 'flow' and its students, which begin as it, and their report.

    Args:
      students: {stage: (title in the report, its fields)}; `evaluators` are further arguments of
        its samples and of their distances to the flow's, such as `steps` and `sampler`; `after` is
        the stage that it begins as, the flow if it is not given.
      data: of the recipe.
      network: of the flow, and of students without their own.
      teacher: further fields of the stage 'flow'.
      measured: arguments of `kd.evaluators.flow_samples.flow_samples` for all.
      weights: the flow's average that teaches.
      **recipe: further fields of the recipe.
    """
    rows = [('flow, Euler', 'flow'), *((title, name) for name, (title, _) in students.items())]
    config = kd_config.recipe(
        stages=('flow', *students),
        data=data,
        report=dict(name='kd.reports.generation.generation', rows=tuple(rows)),
        **recipe,
    )

    def evaluators(**arguments: Any) -> dict[str, Block]:
        probe = 'kd.evaluators.flow_samples.flow_samples'
        return {'samples': dict(name=probe, **{**measured, **arguments})}

    def of_student(**arguments: Any) -> dict[str, Block]:
        probe = 'kd.evaluators.flow_fidelity.flow_fidelity'
        return {**evaluators(**arguments), 'fidelity': dict(name=probe, **arguments)}

    shared: dict[str, Any] = dict(batch_size=256, log_every=250, checkpoint_every=2_000)
    config.flow = kd_config.stage(
        network=network,
        method=dict(name='kd.methods.flow.flow_matching.flow_matching'),
        ema={'slow': 0.998},
        evaluators=evaluators(sampler='euler', steps=(*STEPS, 64), weights=weights),
        **{**shared, **teacher},
    )
    for name, (_, fields) in students.items():
        fields = {**shared, 'network': network, **fields}
        started = {'start': f'{fields.pop("after", "flow")}@{weights}'}
        config[name] = kd_config.stage(
            teacher='flow',
            teacher_weights=weights,
            references=started,
            **{**fields, 'evaluators': of_student(**fields.get('evaluators', {}))},
        )
    return config


def paper_images(algorithm: str, *, data: Block, run: Block, **arguments: Any) -> ConfigDict:
    """The paper's setting for images: unconditional, learned weight, RAdam at 1e-2.

    The rate is high because weights are projected back to unit norm after each step. FID needs a
    file of weights: `--config.map.evaluators.samples.inception=FILE`, see
    `kd.evaluators.inception.inception_features`.

    Args:
      algorithm, data: as of `flow_map`.
      run: `network`, further fields of a UNet; `steps`; `batch_size`.
      **arguments: further ones of `flow_map`.
    """
    network = dict(
        name='kd.models.unet.UNet', data_scale=0.5, num_classes=None, time_weight=128,
        **run['network'],
    )  # fmt: skip
    classifier = 'classifier' if arguments.get('classifier') else ''
    return flow_map(
        algorithm,
        data=data,
        run=dict(
            optimizer=dict(
                name='radam',
                lr=1e-2,
                clip_norm=1.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=35_000),
            ),
            ema={'fast': 0.999, 'slow': 0.9999},
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            **{**run, 'network': network},
        ),
        evaluators=lambda sampler: samples(
            sampler,
            weights='slow',
            samples=10_000,
            split='train',
            classifier=classifier,
            inception='',
        ),
        weights='slow',
        baseline=False,
        **arguments,
    )


def judging_classifier(*, crop: int, steps: int) -> Block:
    """A stage that trains a ResNet-20 whose features measure samples."""
    return dict(
        network=dict(name='kd.models.resnet.ResNet', depth=20),
        method=dict(
            name='kd.methods.vision.supervised.supervised', augmentation=('flip', ('crop', crop))
        ),
        optimizer=dict(
            name='sgd', momentum=0.9, nesterov=True, lr=0.1, weight_decay=5e-4, schedule='cosine'
        ),
        evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
        steps=steps,
        batch_size=128,
    )


def samples(sampler: str, *, weights: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """The evaluators 'samples' and 'geometry' on the averaged weights."""
    probes = 'kd.evaluators.flow_samples'
    return {
        'samples': dict(
            name=f'{probes}.flow_samples',
            steps=STEPS,
            sampler=sampler,
            weights=weights,
            **arguments,
        ),
        'geometry': dict(name=f'{probes}.flow_geometry', weights=weights),
    }
