"""A diffusion transformer as a generator of one step, by a discriminator alone (arXiv:2405.20750).

    python -m kd.main --config=configs/diffusion/innate_one_step.py:cpu --workdir=runs/innate

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 digits of scikit-learn, 1,500 | DiT of .1 M parameters | 2 cores |
| cifar10 (default) | CIFAR-10, in `--data_dir` | DiT of 36 M parameters | 8 GPUs or v5e-8 |

Stages: a classifier, whose layers the discriminator reads and whose features measure samples; the
teacher; the generator begun as the teacher (GDD); the same with the blocks' MLPs and projections
frozen (GDD-I).

The paper has the EDM UNet of CIFAR-10 (batches of 256, rates 1e-4, 5 M images, FID 1.56) and reads
VGG16 and EfficientNet-lite0, trained on ImageNet, at 224 pixels. Here a DiT of our own stands for
the first and a classifier of the same data for the second; rates, batch, images and gamma of
`cifar10` are the paper's, and it was not run by us.

`cpu` takes 4.5 minutes of one core. Frechet distances of one step were 186 by GDD and 24 by GDD-I
with one seed, where the teacher had 73, 5.9 and 1.9 in 1, 4 and 16: freezing helps a lot, and 400
moves against perceptrons' features do not make up for a teacher's steps.
"""

from pathlib import Path

from kd import config as kd_config

few_steps = kd_config.load_module(Path(__file__).with_name('mnist.py'))
VARIANTS = ('cpu', 'cifar10')
# MLPs and output projections of blocks; what adapts, queries, keys and both ends are trained.
FROZEN = r'block\d+/(mlp|projection)'


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'cifar10': cifar10})()


def cpu():
    """Minutes on two cores."""
    return recipe(
        **few_steps.DIGITS,
        teacher=dict(steps=1_200, lr=2e-3, batch_size=128),
        students=dict(steps=400, lr=2e-4, critic_lr=4e-4, gamma=1e-2, batch_size=128),
        samples=1_000,
        reads={'first': 'classifier/hidden0', 'second': 'classifier/hidden1'},
    )


def cifar10():
    """A teacher from nothing, and its generators, in a day on 8 GPUs."""
    return recipe(
        **few_steps.CIFAR10,
        teacher=dict(steps=400_000, lr=2e-4, batch_size=512),
        # 5 M images; gamma by the batch of one of four devices, see the method.
        students=dict(steps=20_000, lr=1e-4, critic_lr=1e-4, gamma=1e-4 / 64, batch_size=256),
        samples=10_000,
        reads={'first': 'classifier/block1', 'second': 'classifier/block2'},
        mesh=dict(data=-1),
    )


def recipe(*, teacher, students, samples, reads, **world):
    """Stages classifier, teacher, gdd, gdd_i."""
    network, probes = few_steps.denoiser(**world), few_steps.PROBES
    measured = dict(
        weights='slow', samples=samples, batch=250, classifier='classifier', split='train'
    )
    config = few_steps.begun(
        stages=('gdd', 'gdd_i'),
        rows=(('teacher', 'teacher'), ('GDD', 'gdd'), ('GDD-I', 'gdd_i')),
        teacher=teacher,
        evaluators={
            'samples': dict(name=f'{probes}.denoiser_samples', steps=(1, 4, 16), **measured)
        },
        **world,
    )
    head = dict(name='kd.models.discriminator.FeatureHead')
    for name, freeze in (('gdd', ''), ('gdd_i', FROZEN)):
        config[name] = kd_config.stage(
            network=network,
            result='generator',
            references={'start': 'teacher@slow', 'classifier': 'classifier'},
            method=dict(
                name='kd.methods.diffusion.innate_one_step.innate_one_step',
                times=(80.0,),
                optimizer=dict(name='adam', b1=0.0, b2=0.99, lr=students['critic_lr']),
                heads=dict.fromkeys(reads, head),
                reads=reads,
                gamma=students['gamma'],
                freeze=freeze,
            ),
            optimizer=dict(name='adam', b1=0.0, b2=0.99, lr=students['lr']),
            ema={'slow': dict(halflife=students['steps'] / 10, ramp=0.05)},
            evaluators={'samples': dict(name=f'{probes}.generator_samples', **measured)},
            steps=students['steps'],
            batch_size=students['batch_size'],
            log_every=max(students['steps'] // 30, 1),
            checkpoint_every=students['steps'] // 2,
        )
    return config
