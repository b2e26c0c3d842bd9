"""Flow maps of AFHQ at 64x64 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/afhq64.py:paper,lsd --workdir=runs/afhq64_lsd

The variant is 'paper' and, after a comma, an algorithm (see `configs/flow/checkerboard.py`). 204.8
million images in batches of 256: days on eight GPUs; `--config.mesh.data=8` uses them.

AFHQ is no data set of tfds: prepare `afhq_64` yourself, as array_record under TFDS_DATA_DIR, with
the features `image` uint8 [64, 64, 3] and `label` (cat, dog, wild).

FID needs the weights of Inception-v3: `--config.map.evaluators.samples.inception=FILE`, see
`kd/evaluators/inception.py`. Without, samples are measured in the features of a ResNet
trained on these classes, which is not comparable with these numbers.

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
    return recipes.paper_images(
        algorithm,
        data=dict(name='afhq_64', train='train', validation='test'),
        classifier=recipes.judging_classifier(crop=8, steps=10_000),
        run=dict(
            network=dict(
                channels=128, multipliers=(1, 2, 3, 4), blocks=3, attention=(16, 8),
                dtype='bfloat16',
            ),
            steps=800_000,
            batch_size=256,
        ),
    )  # fmt: skip
