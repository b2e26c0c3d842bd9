"""A small network of one step, from pairs of a large flow (2024, arXiv:2407.12718).

    python -m kd.main --config=configs/flow/slimflow.py:cpu --workdir=runs/slimflow

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | whitened 8x8 digits of scikit-learn, 1,500 | perceptrons, 3 x 256 to 3 x 64 | 2 cores |
| cifar10,15.7M (default) | CIFAR-10, in `--data_dir` | NCSN++ of 61.8M, and of 15.7M | 8 GPUs |

Stages: a classifier whose features measure samples; a flow; its pairs; a small flow that learns
from these with annealed noises; pairs of its own; and a student of one step that begins as it. The
report has the Frechet distance of samples by number of Euler steps.

`cpu` takes 4 minutes. With seed 0 the student of one step, of 3 x 64, has a Frechet distance of 5.9
to the data, as its own flow has in 1 to 16 steps; the large flow has 134 in one step, 29 in 4 and
9.3 in 16.

Students of `cifar10` are of 27.9M, 15.7M, 7.0M or 3.4M parameters.

Sizes and times of `cpu` are ours. `cifar10` has the paper's networks (to the parameter), rates,
batches, steps and number of pairs, but squared errors for LPIPS, Heun's 50 steps for an adaptive
solver, and averages over 100,000 steps for 1,000,000 (ours); it was not run by us.
"""

from kd import config as kd_config
from kd.methods.flow import recipes

VARIANTS = ('cpu', 'cifar10', 'cifar10,3.4M')
# Channels, multipliers and blocks of students, by their number of parameters.
SIZES = {
    '27.9M': (128, (1, 2, 2), 2),
    '15.7M': (96, (1, 2, 2), 2),
    '7.0M': (64, (1, 2, 2), 2),
    '3.4M': (64, (1, 1, 2), 1),
}


def get_config(variant: str = 'cifar10'):
    """The recipe of 'cpu', or of 'cifar10' and, after a comma, the size of the student."""
    scale, _, size = variant.partition(',')
    size = size or '15.7M'
    kd_config.variant(size, SIZES)
    return kd_config.variant(scale, {'cpu': cpu, 'cifar10': lambda: cifar10(size)})()


def cpu():
    """Minutes on two cores."""
    perceptron = dict(name='kd.models.velocity_mlp.VelocityMLP', depth=3, num_classes=None)
    adam = dict(name='adam', lr=1e-3, schedule='cosine')
    whitened = dict(name='kd.data.transforms.standardised.standardised', of='digits', kind='zca')
    return recipe(
        data=dict(source=dict(whitened, eps=0.1), train='train', validation='test'),
        judge=dict(
            network=dict(name='kd.models.mlp.MLP', widths=(64, 32)),
            optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', weight_decay=1e-3),
            steps=600,
        ),
        networks=(dict(perceptron, width=256), dict(perceptron, width=64)),
        optimizers=(adam, adam),
        steps=(6_000, 8_000, 4_000),
        anneal=3_000,
        averages=(0.998, 0.998),
        batch_size=128,
        flip=False,
        measured=dict(samples=1_500, batch=500),
    )


def cifar10(size):
    """Days on 8 GPUs."""

    def ncsnpp(channels, multipliers, blocks):
        network = dict(
            name='kd.models.edm.SongUNet', channels=channels, multipliers=multipliers,
            blocks=blocks, attention=(16,), dropout=0.15,
        )  # fmt: skip
        return dict(name='kd.models.one_time.one_time', network=network, scale=999.0)

    adam = dict(name='adam', lr=2e-4, clip_norm=1.0)
    return recipe(
        data=dict(name='cifar10', train='train', validation='test'),
        judge=recipes.judging_classifier(crop=4, steps=40_000),
        networks=(ncsnpp(128, (1, 2, 2, 2), 4), ncsnpp(*SIZES[size])),
        optimizers=(dict(adam, warmup_steps=5_000), adam),
        steps=(400_000, 800_000, 400_000),
        anneal=300_000,
        averages=(0.99999, 0.99999),
        batch_size=128,
        flip=True,
        measured=dict(samples=10_000),
        mesh=dict(data=-1),
    )


def recipe(
    *, data, judge, networks, optimizers, steps, anneal, averages, batch_size, flip, measured,
    **parallel,
):  # fmt: skip
    """Stages classifier, flow, pairs, small, small_pairs, one."""
    large, small = networks
    config = kd_config.recipe(
        stages=('classifier', 'flow', 'pairs', 'small', 'small_pairs', 'one'),
        data=data,
        report=dict(
            name='kd.reports.generation.generation',
            rows=(('large flow', 'flow'), ('small flow', 'small'), ('one step', 'one')),
        ),
        **parallel,
    )
    config.classifier = kd_config.stage(**{
        'method': dict(name='kd.methods.vision.supervised.supervised'),
        'evaluators': {'validation': dict(name='kd.evaluators.classification.classification')},
        'batch_size': 128,
        **judge,
    })  # fmt: skip

    def stage(number, name, network, at=(1, 2, 4, 16), optimizer=0, references=None, **fields):
        probe = 'kd.evaluators.flow_samples.flow_samples'
        return kd_config.stage(
            network=network,
            optimizer=optimizers[optimizer],
            ema={'slow': averages[optimizer]},
            references={'classifier': 'classifier', **(references or {})},
            evaluators={
                'samples': dict(
                    name=probe, sampler='euler', steps=at, weights='slow', split='train',
                    classifier='classifier', **measured,
                )
            },
            steps=steps[number],
            batch_size=batch_size,
            log_every=max(steps[number] // 50, 1),
            checkpoint_every=steps[number] // 2,
            method=dict(name=f'kd.methods.flow.{name}', **fields.pop('method', {})),
            **fields,
        )  # fmt: skip

    def pairs(teacher):
        return kd_config.stage(
            teacher=teacher,
            teacher_weights='slow',
            method=dict(name='kd.methods.cache.nothing'),
            writers={
                'samples': dict(
                    name='kd.methods.sampled.trajectories', steps=50, keep='ends', sampler='heun'
                )
            },
            steps=1,
            batch_size=250,
        )

    def paired(name):
        source = dict(name='kd.data.sampled.pairs', stage=name)
        return {**data, 'source': source}

    config.flow = stage(0, 'flow_matching.flow_matching', large)
    config.pairs = pairs('flow')
    config.small = stage(
        1, 'slimflow.annealing_reflow', small, data=paired('pairs'),
        method=dict(anneal=anneal, flip=flip),
    )  # fmt: skip
    config.small_pairs = pairs('small')
    config.one = stage(
        2, 'slimflow.flow_guided_distillation', small, at=(1,), optimizer=1,
        teacher='small', teacher_weights='slow', references={'start': 'small@slow'},
        data=paired('small_pairs'),
    )  # fmt: skip
    return config
