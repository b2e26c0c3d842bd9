"""Flow maps of MNIST with a magnitude-preserving UNet (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/mnist.py:cpu,lsd --workdir=runs/mnist_lsd
    python -m kd.main --config=configs/flow/mnist.py:gpu,lmd --workdir=runs/mnist_lmd

The variant is a scale and, after a comma, an algorithm (see `configs/flow/checkerboard.py`).

| scale | network | hardware |
|---|---|---|
| cpu | UNet, 16 channels, 2 levels, 1,500 steps of batch 64 | 2 cores, tens of minutes |
| gpu | UNet, 64 channels, 2 levels, 50,000 steps of batch 256 | one GPU, about an hour |
"""

from kd.methods.flow import recipes

VARIANTS = ('cpu,lsd', 'gpu,lmd')


def get_config(variant: str = 'gpu,lsd'):
    """The recipe of 'scale,algorithm'."""
    return recipes.parse(variant, {'cpu': cpu, 'gpu': gpu})


def cpu(algorithm):
    """A small network and few steps."""
    network = dict(channels=16, multipliers=(1, 2), blocks=1, attention=())
    return recipe(
        algorithm, network, steps=1500, batch_size=64, decay=0.99, timescale=500, samples=1000
    )


def gpu(algorithm):
    """Enough for clean digits in one step."""
    network = dict(channels=64, multipliers=(1, 2), blocks=2, attention=(14,))
    return recipe(
        algorithm, network, steps=50_000, batch_size=256, decay=0.999, timescale=10_000,
        samples=10_000,
    )  # fmt: skip


def recipe(algorithm, network, *, steps, batch_size, decay, timescale, samples):
    """Class-conditional, on images in [-1, 1]."""
    return recipes.flow_map(
        algorithm,
        data=dict(name='mnist', train='train[:55000]', validation='train[55000:]', test='test'),
        classifier=dict(
            network=dict(name='kd.models.convnet.ConvNet', depth=3, width=32),
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=dict(name='adamw', lr=1e-3, schedule='cosine', weight_decay=1e-4),
            evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
            steps=1500,
            batch_size=128,
        ),
        run=dict(
            network=dict(
                name='kd.models.unet.UNet',
                data_scale=0.6,
                num_classes=10,
                time_weight=128,
                **network,
            ),
            optimizer=dict(
                name='radam',
                # High, but the weights are projected back to unit norm after each step.
                lr=1e-2,
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
