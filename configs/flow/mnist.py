"""Class-conditional flow maps of MNIST (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/mnist.py:cpu,lsd --workdir=runs/mnist_lsd
    python -m kd.main --config=configs/flow/mnist.py:gpu,lmd --workdir=runs/mnist_lmd

The variant is a scale and, after a comma, an algorithm (see `configs/flow/checkerboard.py`).

| scale | network | hardware |
|---|---|---|
| cpu | DiT, 49 patches, width 64, 4 blocks, 2,000 steps of batch 64 | 2 cores, about 10 min |
| gpu | UNet, 64 channels, 2 levels, 50,000 steps of batch 256 | one GPU, about an hour |

Samples are compared with the test images in the features of a classifier that the first stage
trains.
"""

from kd.methods.flow import recipes

VARIANTS = ('cpu,lsd', 'gpu,lmd')


def get_config(variant: str = 'gpu,lsd'):
    """The recipe of 'scale,algorithm'."""
    return recipes.parse(variant, {'cpu': cpu, 'gpu': gpu})


def cpu(algorithm):
    """A transformer: on CPU its matrix products are faster than convolutions."""
    network = dict(name='kd.models.dit.DiT', patch=4, width=64, depth=4, heads=4)
    return recipe(
        algorithm, network, lr=2e-3, steps=2000, batch_size=64, decay=0.995, timescale=500,
        samples=1000, classifier=dict(depth=2, width=16, steps=600),
    )  # fmt: skip


def gpu(algorithm):
    """Enough for clean digits in one step."""
    network = dict(
        name='kd.models.unet.UNet', channels=64, multipliers=(1, 2), blocks=2, attention=(14,)
    )
    return recipe(
        # High, but the weights are projected back to unit norm after each step.
        algorithm, network, lr=1e-2, steps=50_000, batch_size=256, decay=0.999, timescale=10_000,
        samples=10_000, classifier=dict(depth=3, width=32, steps=1500),
    )  # fmt: skip


def recipe(algorithm, network, *, lr, steps, batch_size, decay, timescale, samples, classifier):
    """On images in [-1, 1]."""
    return recipes.flow_map(
        algorithm,
        data=dict(name='mnist', train='train[:55000]', validation='train[55000:]', test='test'),
        classifier=dict(
            network=dict(
                name='kd.models.convnet.ConvNet',
                depth=classifier['depth'],
                width=classifier['width'],
            ),
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=dict(name='adamw', lr=1e-3, schedule='cosine', weight_decay=1e-4),
            evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
            steps=classifier['steps'],
            batch_size=128,
        ),
        run=dict(
            network=dict(data_scale=0.6, num_classes=10, time_weight=128, **network),
            optimizer=dict(
                name='radam',
                lr=lr,
                clip_norm=1.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=timescale),
            ),
            ema={'slow': decay},
            steps=steps,
            batch_size=batch_size,
            log_every=100,
            checkpoint_every=min(steps, 5000),
        ),
        evaluators=lambda sampler: recipes.samples(
            sampler, weights='slow', samples=samples, batch=250, classifier='classifier'
        ),
        weights='slow',
        baseline=False,
    )
