"""Flow maps of AFHQ at 64x64 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/afhq64.py:paper,lsd --workdir=runs/afhq64_lsd

The variant is 'paper' and, after a comma, an algorithm (see `configs/flow/checkerboard.py`). 204.8
million images in batches of 256: days on eight GPUs; `--config.mesh.data=8` uses them.

AFHQ is no data set of tfds: prepare `afhq_64` yourself, as array_record under TFDS_DATA_DIR, with
the features `image` uint8 [64, 64, 3] and `label` (cat, dog, wild). The Frechet distance reported
is in the features of a ResNet trained on these classes, not comparable with the numbers below.

| FID in the paper, by steps | 1 | 2 | 4 | 8 | 16 |
|---|---:|---:|---:|---:|---:|
| lsd | 11.19 | 7.78 | 7.00 | 5.89 | 5.61 |
| psd_midpoint | 18.86 | 14.75 | 14.40 | 13.26 | 11.07 |
| psd_uniform | 14.50 | 10.73 | 10.99 | 12.02 | 11.47 |
"""

from kd.methods.flow import recipes

VARIANTS = ('paper,lsd',)


def get_config(variant: str = 'paper,lsd'):
    """The recipe of 'paper,algorithm'."""
    return recipes.parse(variant, {'paper': paper})


def paper(algorithm):
    """Unconditional, without augmentation; the network computes in bfloat16."""
    return recipes.flow_map(
        algorithm,
        data=dict(name='afhq_64', train='train', validation='test'),
        classifier=dict(
            network=dict(name='kd.models.resnet.ResNet', depth=20),
            method=dict(
                name='kd.methods.vision.supervised.supervised',
                augmentation=('flip', ('crop', 8)),
            ),
            optimizer=dict(
                name='sgd', momentum=0.9, nesterov=True, lr=0.1, weight_decay=5e-4,
                schedule='cosine',
            ),
            evaluators={
                'validation': dict(name='kd.evaluators.classification.classification')
            },
            steps=10_000,
            batch_size=128,
        ),
        run=dict(
            network=dict(
                name='kd.models.unet.UNet',
                channels=128,
                multipliers=(1, 2, 3, 4),
                blocks=3,
                attention=(16, 8),
                data_scale=0.5,
                num_classes=None,
                time_weight=128,
                dtype='bfloat16',
            ),
            optimizer=dict(
                name='radam',
                lr=1e-2,
                clip_norm=1.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=35_000),
            ),
            ema={'fast': 0.999, 'slow': 0.9999},
            steps=800_000,
            batch_size=256,
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
