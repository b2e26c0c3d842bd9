"""Class-conditional flow maps of MNIST (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/mnist.py:cpu,lsd --workdir=runs/mnist_lsd
    python -m kd.main --config=configs/flow/mnist.py:gpu,lmd --workdir=runs/mnist_lmd

The variant is a scale and, after a comma, an algorithm (see `configs/flow/checkerboard.py`).

| scale | network | hardware | Frechet distance at 1, 2, 4, 8, 16 steps |
|---|---|---|---|
| cpu | MLP 3x512 on 14x14 pixels, 6,000 steps of batch 128 | 2 cores, 2 min | 8.6 5.4 4.5 4.2 4.1 |
| gpu | UNet, 64 channels, 28x28 pixels, 50,000 steps of batch 256 | one GPU, about an hour | |

Samples are compared with the test images in the features of a classifier that the first stage
trains.
"""

from kd.methods.flow import recipes

VARIANTS = ('cpu,lsd', 'gpu,lmd')


def get_config(variant: str = 'gpu,lsd'):
    """The recipe of 'scale,algorithm'."""
    return recipes.parse(variant, {'cpu': cpu, 'gpu': gpu})


SPLITS = dict(train='train[:55000]', validation='train[55000:]', test='test')


def cpu(algorithm):
    """Half the resolution: there a perceptron suffices, which is fast on CPU."""
    small = dict(name='kd.data.transforms.mapped.resized', of='mnist', crop=28, size=14)
    return recipe(
        algorithm,
        dict(source=small, **SPLITS),
        run=dict(
            network=dict(
                name='kd.models.velocity_mlp.VelocityMLP',
                width=512,
                depth=3,
                data_scale=0.6,
                num_classes=10,
            ),
            optimizer=dict(
                name='radam',
                lr=1e-3 if algorithm in ('esd', 'emd') else 2e-3,
                clip_norm=10.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=1000),
            ),
            ema={'slow': 0.998},
            steps=6000,
            batch_size=128,
            log_every=500,
            checkpoint_every=3000,
        ),
        samples=1000,
        classifier=dict(depth=2, width=16, steps=600),
    )


def gpu(algorithm):
    """Enough for clean digits in one step."""
    return recipe(
        algorithm,
        dict(name='mnist', **SPLITS),
        run=dict(
            network=dict(
                name='kd.models.unet.UNet',
                channels=64,
                multipliers=(1, 2),
                blocks=2,
                attention=(14,),
                data_scale=0.6,
                num_classes=10,
                time_weight=128,
            ),
            optimizer=dict(
                name='radam',
                # High, but the weights are projected back to unit norm after each step.
                lr=1e-2,
                clip_norm=1.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=10_000),
            ),
            ema={'slow': 0.999},
            steps=50_000,
            batch_size=256,
            log_every=100,
            checkpoint_every=5000,
        ),
        samples=10_000,
        classifier=dict(depth=3, width=32, steps=1500),
    )


def recipe(algorithm, data, *, run, samples, classifier):
    """On images in [-1, 1]."""
    steps = classifier.pop('steps')
    return recipes.flow_map(
        algorithm,
        data=data,
        classifier=dict(
            network=dict(name='kd.models.convnet.ConvNet', **classifier),
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=dict(name='adamw', lr=1e-3, schedule='cosine', weight_decay=1e-4),
            evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
            steps=steps,
            batch_size=128,
        ),
        run=run,
        evaluators=lambda sampler: recipes.samples(
            sampler, weights='slow', samples=samples, batch=250, classifier='classifier'
        ),
        weights='slow',
        baseline=False,
    )
