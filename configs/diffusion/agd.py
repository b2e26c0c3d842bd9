"""Guidance in one call: adapters beside a diffusion transformer (AGD, arXiv:2503.07274).

    python -m kd.main --config=configs/diffusion/agd.py:cpu --workdir=runs/agd

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 digits of scikit-learn, 1,500 | DiT of 0.1 M parameters | 2 cores |
| cifar10 (default) | CIFAR-10, in `--data_dir` | DiT of 36 M parameters | 8 GPUs or v5e-8 |

Stages: a classifier whose features measure samples, the teacher, its guided trajectories on disk,
and the adapters, which see these alone. The paper has DiT-XL/2 on ImageNet at 256 pixels, and
Stable Diffusion; this transformer on CIFAR-10 is a stand-in of ours, with the paper's optimiser,
adapters (width 256), scales (1 to 6) and 5,000 steps of 64 states. It was not run by us.

The report has the teacher without guidance and the adapters with the scale 2, and among the other
metrics the guided teacher, which is asked twice as often.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'cifar10')
SCALE = 2.0


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'cifar10': cifar10})()


def cpu():
    """Minutes on two cores."""
    return recipe(
        data=dict(name='digits', train='train', validation='test'),
        network=dict(patch=2, width=48, depth=3, heads=4),
        sigma_data=0.75,
        teacher=dict(steps=800, lr=2e-3, batch=128),
        trajectories=dict(steps=16, batch=250),
        adapters=dict(kind='offset', width=32, steps=600, lr=1e-3, batch=128),
        samples=1_000,
        steps=(4, 16),
        judge=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(64, 32)),
            optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', weight_decay=1e-3),
            steps=600,
        ),
    )


def cifar10():
    """A teacher from nothing, and its adapters, in a day on 8 GPUs."""
    return recipe(
        data=dict(name='cifar10', train='train[:49000]', validation='train[49000:]', test='test'),
        network=dict(patch=2, width=384, depth=12, heads=6, dtype='bfloat16'),
        sigma_data=0.5,
        teacher=dict(steps=400_000, lr=2e-4, batch=512),
        trajectories=dict(steps=64, batch=512),
        adapters=dict(kind='attention', width=256, steps=5_000, lr=1e-4, batch=64),
        samples=10_000,
        steps=(16, 64),
        judge=dict(
            network=dict(name='kd.models.convnet.ConvNet', depth=3, width=64),
            optimizer=dict(name='adamw', lr=1e-3, schedule='cosine', weight_decay=1e-4),
            steps=10_000,
        ),
        mesh=dict(data=-1),
    )


def recipe(
    *, data, network, sigma_data, teacher, trajectories, adapters, samples, steps, judge, **parallel
):
    """Stages classifier, teacher, trajectories, adapters."""

    def denoiser(inner):
        return dict(
            name='kd.models.denoiser.denoiser',
            network=inner,
            schedule=dict(name='kd.losses.schedule.edm'),
            precondition='edm',
            sigma_data=sigma_data,
        )

    base = dict(name='kd.models.dit.DiT', data_scale=1.0, **network)
    config = kd_config.recipe(
        stages=('classifier', 'teacher', 'trajectories', 'adapters'),
        data=data,
        report=dict(
            name='kd.reports.generation.generation',
            rows=(('teacher, unguided', 'teacher'), (f'AGD, scale {SCALE:g}', 'adapters')),
        ),
        **parallel,
    )
    config.classifier = kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
        batch_size=128,
        **judge,
    )
    measured = dict(
        name='kd.evaluators.generator_samples.denoiser_samples', steps=steps, samples=samples,
        batch=250, classifier='classifier',
    )  # fmt: skip
    config.teacher = kd_config.stage(
        network=denoiser(base),
        method=dict(
            name='kd.methods.diffusion.denoising.denoising',
            law=dict(name='kd.sampling.times.lognormal'),
            weight='edm',
        ),
        optimizer=dict(
            name='adam', lr=teacher['lr'], clip_norm=1.0, warmup_steps=teacher['steps'] // 50
        ),
        ema={'slow': dict(halflife=teacher['steps'] / 20, ramp=0.05)},
        references={'classifier': 'classifier'},
        evaluators={
            'samples': dict(weights='slow', split='train', **measured),
            'guided': dict(weights='slow', split='train', guidance=SCALE, **measured),
        },
        steps=teacher['steps'],
        batch_size=teacher['batch'],
        log_every=max(teacher['steps'] // 50, 1),
        checkpoint_every=teacher['steps'] // 2,
    )
    config.trajectories = kd_config.stage(
        teacher='teacher',
        teacher_weights='slow',
        method=dict(name='kd.methods.cache.nothing'),
        writers={
            'samples': dict(
                name='kd.methods.sampled.trajectories', steps=trajectories['steps'],
                guidance=(1.0, 6.0), dtype='float16',
            )
        },
        steps=1,
        batch_size=trajectories['batch'],
    )  # fmt: skip
    own = {name: adapters[name] for name in ('kind', 'width')}
    config.adapters = kd_config.stage(
        network=denoiser(dict(name='kd.models.guided.guided', base=base, **own)),
        references={'start': 'teacher@slow', 'classifier': 'classifier'},
        data=dict(
            source=dict(name='kd.data.sampled.states', stage='trajectories'),
            train='train_states',
            examples=data['train'],
        ),
        method=dict(name='kd.methods.diffusion.agd.agd', weight='edm'),
        optimizer=dict(
            name='adam', lr=adapters['lr'], schedule='cosine',
            warmup_steps=adapters['steps'] // 10,
        ),
        evaluators={'samples': dict(guidance=SCALE, split='examples', **measured)},
        steps=adapters['steps'],
        batch_size=adapters['batch'],
        log_every=max(adapters['steps'] // 50, 1),
        checkpoint_every=adapters['steps'] // 2,
    )  # fmt: skip
    return config
