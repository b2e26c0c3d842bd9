"""Flow maps of CelebA at 64x64 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/celeba64.py:paper,lsd --workdir=runs/celeba64_lsd

The variant is 'paper' and, after a comma, an algorithm (see `configs/flow/checkerboard.py`). 204.8
million images in batches of 512: days on eight GPUs; `--config.mesh.data=8` uses them.

Images are the central 140x140 pixels, resized by area. CelebA has attributes and no classes, so
there is no classifier to take features from: samples are judged by sliced Wasserstein distance, and
by FID where you have the weights of Inception-v3: `--config.map.evaluators.samples.inception=FILE`,
see `kd/evaluators/inception.py`.

| FID in the paper, by steps | 1 | 2 | 4 | 8 | 16 |
|---|---:|---:|---:|---:|---:|
| lsd | 12.22 | 5.74 | 3.18 | 2.18 | 1.96 |
| psd_midpoint | 19.64 | 11.75 | 7.89 | 6.06 | 5.09 |
| psd_uniform | 18.81 | 11.02 | 7.47 | 6.00 | 5.63 |
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
        data=dict(
            source=dict(name='kd.data.transforms.mapped.resized', of='celeb_a', crop=140, size=64),
            train='train',
            validation='validation',
        ),
        run=dict(
            network=dict(
                channels=128, multipliers=(1, 2, 3, 4), blocks=3, attention=(16, 8),
                dtype='bfloat16',
            ),
            steps=400_000,
            batch_size=512,
        ),
    )  # fmt: skip
