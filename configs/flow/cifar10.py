"""Flow maps of CIFAR-10 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/cifar10.py:paper,lsd --workdir=runs/cifar10_lsd

The variant is 'paper' and, after a comma, an algorithm (see `configs/flow/checkerboard.py`). 204.8
million images in batches of 512: days on one GPU; `--config.mesh.data=8` uses eight.

| FID in the paper, by steps | 1 | 2 | 4 | 8 | 16 |
|---|---:|---:|---:|---:|---:|
| lsd | 8.10 | 4.37 | 3.34 | 3.33 | 3.57 |
| psd_midpoint | 12.81 | 8.43 | 5.96 | 5.07 | 4.64 |
| psd_uniform | 13.61 | 7.95 | 6.03 | 5.32 | 5.16 |

FID needs the weights of Inception-v3: `--config.map.evaluators.samples.inception=FILE`, see
`kd/evaluators/inception.py`. Without, samples are measured in the features of a ResNet
trained on the same data, which orders samplers and is not comparable with these numbers.
"""

from kd.methods.flow import recipes

VARIANTS = ('paper,lsd',)


def get_config(variant: str = 'paper,lsd'):
    """The recipe of 'paper,algorithm'."""
    return recipes.parse(variant, {'paper': paper})


def paper(algorithm):
    """Unconditional, without augmentation, float32."""
    return recipes.paper_images(
        algorithm,
        data=dict(name='cifar10', train='train', validation='test'),
        classifier=recipes.judging_classifier(crop=4, steps=40_000),
        run=dict(
            network=dict(
                channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13
            ),
            steps=400_000,
            batch_size=512,
        ),
    )
