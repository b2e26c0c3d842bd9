"""Flow maps of CIFAR-10 at the paper's scale (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/cifar10.py:paper,lsd --workdir=runs/cifar10_lsd
    python -m kd.main --config=configs/flow/cifar10.py:few_steps --workdir=runs/cifar10_few

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

`few_steps` trains the plain flow and distils it without a second time: by velocity matching
(`kd.methods.flow.mdt_dist`, for one step), and by consistency within four phases and one
(`kd.methods.flow.hyper_sd`, for as many). Sizes are those above, rates and steps of students ours,
and we have not run it.
"""

from kd.methods.flow import recipes

VARIANTS = ('paper,lsd', 'few_steps')


def get_config(variant: str = 'paper,lsd'):
    """The recipe of 'paper,algorithm', or of 'few_steps'."""
    if variant == 'few_steps':
        return few_steps()
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


def few_steps():
    """Students that are told no end."""
    world = dict(recipes.CIFAR10)
    shared = world.pop('students')
    phased = dict(name='kd.methods.flow.hyper_sd.tscd', target='slow')
    students = {
        'matching': (
            'velocity matching',
            dict(name='kd.methods.flow.mdt_dist.mdt_dist', distribution=0.0),
        ),
        'four': ('4 phases', dict(phased, phases=4)),
        'one': ('1 phase', dict(phased, phases=1)),
    }
    return recipes.few_steps(
        {
            name: (
                title,
                dict(
                    method=method,
                    ema={'slow': 0.999},
                    evaluators=dict(sampler='euler', steps=(1, 2, 4), weights='slow'),
                    **shared,
                ),
            )
            for name, (title, method) in students.items()
        },
        **world,
    )
