"""Flow maps of CIFAR-10 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/cifar10.py:paper,lsd --workdir=runs/cifar10_lsd

The variant is 'paper' and, after a comma, an algorithm (see `configs/flow/checkerboard.py`). 204.8
million images in batches of 512: days on one GPU; `--config.mesh.data=8` uses eight.

| FID in the paper, by steps | 1 | 2 | 4 | 8 | 16 |
|---|---:|---:|---:|---:|---:|
| lsd | 8.10 | 4.37 | 3.34 | 3.33 | 3.57 |
| psd_midpoint | 12.81 | 8.43 | 5.96 | 5.07 | 4.64 |
| psd_uniform | 13.61 | 7.95 | 6.03 | 5.32 | 5.16 |

The Frechet distance reported here is in the features of a ResNet trained on the same data: it
orders samplers, and is not comparable with these numbers.
"""

from kd.methods.flow import recipes

VARIANTS = ('paper,lsd',)


def get_config(variant: str = 'paper,lsd'):
    """The recipe of 'paper,algorithm'."""
    return recipes.parse(variant, {'paper': paper})


def paper(algorithm):
    """Unconditional, without augmentation, float32."""
    return recipes.flow_map(
        algorithm,
        data=dict(name='cifar10', train='train', validation='test'),
        classifier=dict(
            network=dict(name='kd.models.resnet.ResNet', depth=20),
            method=dict(
                name='kd.methods.vision.supervised.supervised',
                augmentation=('flip', ('crop', 4)),
            ),
            optimizer=dict(
                name='sgd', momentum=0.9, nesterov=True, lr=0.1, weight_decay=5e-4,
                schedule='cosine',
            ),
            evaluators={
                'validation': dict(name='kd.evaluators.classification.classification')
            },
            steps=40_000,
            batch_size=128,
        ),
        run=dict(
            network=dict(
                name='kd.models.unet.UNet',
                channels=128,
                multipliers=(2, 2, 2),
                blocks=4,
                attention=(16,),
                dropout=0.13,
                data_scale=0.5,
                num_classes=None,
                time_weight=128,
            ),
            optimizer=dict(
                name='radam',
                lr=1e-2,
                clip_norm=1.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=35_000),
            ),
            ema={'fast': 0.999, 'slow': 0.9999},
            steps=400_000,
            batch_size=512,
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
        ),
        evaluators=lambda sampler: recipes.samples(
            sampler, weights='slow', samples=10_000, classifier='classifier', split='train'
        ),
        weights='slow',
        baseline=False,
    )  # fmt: skip
