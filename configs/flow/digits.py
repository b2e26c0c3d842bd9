"""Class-conditional flow maps of whitened 8x8 digits (Boffi et al. 2025, arXiv:2505.18825).

    python -m kd.main --config=configs/flow/digits.py:cpu,lsd --workdir=runs/digits_lsd

1,500 images; minutes on two cores. The variant is 'cpu' and, after a comma, an algorithm: lsd, esd,
psd_uniform, psd_midpoint, meanflow, shortcut, consistency, fmm; or lmd, emd, pfmm, which distil the
flow of an earlier stage. The error is weighted equally at all times: with a learned weight this
small network has loss spikes at this learning rate. Samples are compared with the data in the
features of a classifier that the first stage trains.
"""

from kd.methods.flow import recipes

VARIANTS = ('cpu,lsd', 'cpu,lmd')


def get_config(variant: str = 'cpu,lsd'):
    """The recipe of 'cpu,algorithm'."""
    return recipes.parse(variant, {'cpu': cpu})


def cpu(algorithm):
    """Raw digits have pixels without variance, on which small flows diverge: hence whitened."""
    source = dict(
        name='kd.data.transforms.standardised.standardised', of='digits', kind='zca', eps=0.1
    )
    return recipes.flow_map(
        algorithm,
        data=dict(source=source, train='train', validation='test'),
        classifier=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(64, 32)),
            method=dict(name='kd.methods.vision.supervised.supervised'),
            optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', weight_decay=1e-3),
            evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
            steps=600,
            batch_size=128,
        ),
        run=dict(
            network=dict(
                name='kd.models.velocity_mlp.VelocityMLP',
                width=256,
                depth=3,
                # Measured after whitening.
                data_scale=0.65,
                num_classes=10,
            ),
            optimizer=dict(
                name='radam',
                lr=1e-3 if algorithm in ('esd', 'emd') else 4e-3,
                clip_norm=10.0,
                schedule='rsqrt',
                schedule_args=dict(timescale=1000),
            ),
            ema={'slow': 0.999},
            steps=4000,
            batch_size=128,
            log_every=500,
            checkpoint_every=2000,
        ),
        evaluators=lambda sampler: recipes.samples(
            sampler, weights='slow', samples=2000, classifier='classifier', split='train'
        ),
        weights='slow',
        baseline=True,
    )
