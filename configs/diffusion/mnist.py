"""A diffusion transformer of our own, distilled into 1, 2 and 4 steps (DMD2, arXiv:2405.14867).

    python -m kd.main --config=configs/diffusion/mnist.py:cpu --workdir=runs/few_steps
    python -m kd.sample --run=runs/few_steps/four --seed=0

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 digits of scikit-learn, 1,500 | DiT of 0.1 M parameters | 2 cores |
| cifar10 (default) | CIFAR-10, in `--data_dir` | DiT of 36 M parameters | 8 GPUs or v5e-8 |

Stages: a classifier whose features measure samples, the teacher, and generators of one, two and
four steps that begin as the teacher. Each of their steps is a move of the generator and five of its
critic; a discriminator on the critic's features sees data. The report has the Frechet distances by
steps and the samples beside each other.

`cpu` takes 18 minutes of one core. Expect Frechet distances of 3.3, 6.3 and 7.9 for one, two and
four steps, where the teacher has 59, 59 and 5.7 in as many, 1.3 in 16 and .9 in 64: the moves of a
generator are shared among its times, and 300 are few for four. Networks, rates and steps of
the other are ours, near those of DMD2 on ImageNet at 64 pixels, and it was not run by us.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'cifar10')
LEVELS = {'one': (80.0,), 'two': (80.0, 2.5), 'four': (80.0, 10.0, 2.5, 0.6)}
PROBES = 'kd.evaluators.generator_samples'
# Data, the network of the teacher, and a classifier that judges samples. Others of this room
# begin with them too.
DIGITS = dict(
    data=dict(name='digits', train='train', validation='test'),
    network=dict(patch=2, width=48, depth=3, heads=4),
    sigma_data=0.75,
    judge=dict(
        network=dict(name='kd.models.mlp.MLP', widths=(64, 32)),
        optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', weight_decay=1e-3),
        steps=600,
    ),
)
CIFAR10 = dict(
    data=dict(name='cifar10', train='train[:49000]', validation='train[49000:]', test='test'),
    network=dict(patch=2, width=384, depth=12, heads=6, dtype='bfloat16'),
    sigma_data=0.5,
    judge=dict(
        network=dict(name='kd.models.convnet.ConvNet', depth=3, width=64),
        optimizer=dict(name='adamw', lr=1e-3, schedule='cosine', weight_decay=1e-4),
        steps=10_000,
    ),
)


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'cifar10': cifar10})()


def cpu():
    """Minutes on two cores."""
    return recipe(
        **DIGITS,
        last='block2',
        teacher=dict(steps=2_500, lr=2e-3, batch_size=128),
        students=dict(steps=300, lr=2e-4, critic_lr=5e-4, gan=0.1),
        samples=1_500,
    )


def cifar10():
    """A teacher from nothing, and its students, in a day on 8 GPUs."""
    return recipe(
        **CIFAR10,
        last='block11',
        teacher=dict(steps=400_000, lr=2e-4, batch_size=512),
        students=dict(steps=40_000, lr=2e-6, critic_lr=2e-6, gan=3e-3),
        samples=10_000,
        mesh=dict(data=-1),
    )


def recipe(*, last, teacher, students, samples, **world):
    """Stages classifier, teacher, one, two, four."""
    network = denoiser(**world)
    measured = dict(samples=samples, batch=250, classifier='classifier', split='train')
    config = begun(
        stages=tuple(LEVELS),
        rows=(('teacher', 'teacher'), *((f'DMD2, {name}', name) for name in LEVELS)),
        teacher=teacher,
        evaluators={
            'samples': dict(
                name=f'{PROBES}.denoiser_samples', steps=(1, 2, 4, 16, 64), weights='slow',
                **measured,
            )
        },
        **world,
    )  # fmt: skip
    for name, times in LEVELS.items():
        config[name] = kd_config.stage(
            network=network,
            result='generator',
            teacher='teacher',
            teacher_weights='slow',
            references={'classifier': 'classifier'},
            method=dict(
                name='kd.methods.diffusion.dmd.dmd',
                times=times,
                weight='edm',
                optimizer=dict(name='adam', b1=0.0, lr=students['critic_lr'], clip_norm=10.0),
                gan=students['gan'],
                feature=last,
            ),
            optimizer=dict(
                name='adam', b1=0.0, lr=students['lr'], clip_norm=10.0,
                warmup_steps=students['steps'] // 20,
            ),
            ema={'slow': dict(halflife=students['steps'] / 20, ramp=0.05)},
            evaluators={
                'samples': dict(name=f'{PROBES}.generator_samples', weights='slow', **measured)
            },
            steps=students['steps'],
            batch_size=teacher['batch_size'],
            log_every=max(students['steps'] // 30, 1),
            checkpoint_every=students['steps'] // 2,
        )  # fmt: skip
    return config


def denoiser(network, sigma_data, inner=None, **world):
    """The teacher's network with EDM's preconditioning; `inner` takes the transformer's place."""
    del world
    return dict(
        name='kd.models.denoiser.denoiser',
        network=inner or transformer(network),
        schedule=dict(name='kd.losses.schedule.edm'),
        precondition='edm',
        sigma_data=sigma_data,
    )


def transformer(network):
    """A DiT of these sizes."""
    return dict(name='kd.models.dit.DiT', data_scale=1.0, **network)


def classifier(judge):
    """The stage whose features measure samples."""
    return kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
        batch_size=128,
        **judge,
    )


def begun(*, stages, rows, data, network, sigma_data, judge, teacher, evaluators, **parallel):
    """A recipe whose first stages are the classifier and the teacher.

    Args:
      stages: those that follow.
      rows: of the report, (title, stage).
      data, network, sigma_data, judge: as of `DIGITS`.
      teacher: its `steps`, `lr` and `batch_size`.
      evaluators: of the teacher.
      **parallel: of the recipe.
    """
    config = kd_config.recipe(
        stages=('classifier', 'teacher', *stages),
        data=data,
        report=dict(name='kd.reports.generation.generation', rows=rows),
        **parallel,
    )
    config.classifier = classifier(judge)
    config.teacher = kd_config.stage(
        network=denoiser(network, sigma_data),
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
        evaluators=evaluators,
        steps=teacher['steps'],
        batch_size=teacher['batch_size'],
        log_every=max(teacher['steps'] // 50, 1),
        checkpoint_every=teacher['steps'] // 2,
    )
    return config
