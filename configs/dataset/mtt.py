"""Matching of training trajectories (Cazenavette et al. 2022, arXiv 2203.11932), and its variant
TESLA (Cui et al. 2022, arXiv 2211.10586).

Experts are trained on real data and their parameters kept after every epoch; a synthetic set is
trained until students on it go where the experts went; networks trained on the set from scratch
are tested beside a random subset, K-means representatives, and experts.

    python -m kd.main --config=configs/dataset/mtt.py:cpu --workdir=runs/mtt
    python -m kd.main --config=configs/dataset/mtt.py:cpu,ipc=10 --workdir=runs/mtt10
    python -m kd.main --config=configs/dataset/mtt.py:cifar10,ipc=10 --workdir=runs/mtt_cifar10

| variant | hardware | expected test accuracy, IPC 1 / 10 / 50 |
|---|---|---|
| cpu (digits), ipc = 1, 10 | 2 cores, under 1 min | 0.882 / 0.926 (random 0.523 / 0.848) |
| mnist, ipc = 1, 10 | one GPU, an hour | |
| cifar10, ipc = 1, 10, 50 | one GPU, a day | 46.2 / 65.4 / 71.6 |
| cifar100, ipc = 1, 10, 50 | one GPU, days | 24.3 / 39.7 / 47.7 |
| imagefruit, ipc = 1 (128 pixels) | one GPU, days | |
| tesla_cifar10, ipc = 1 | one GPU, a day | |
| tesla_imagenet, ipc = 1 (64 pixels) | pod | |

Data sets are tfds's; `imagefruit` is a folder of that name that you prepare in the format of tfds.
Whitened data where the paper whitens. With more than one device, write
`shards=N` to spread the synthetic set, and with it the inner loop, over N of them.
"""

from kd.methods.dataset import recipes

MTT = 'kd.methods.dataset.mtt.mtt'

VARIANTS = ('cpu', 'mnist,ipc=10', 'cifar10,ipc=10')

# (data, ipc): student steps, segment epochs, start epochs, batch, rates of images and of step size,
# step size, standardisation. Where the paper says `no whitening`, channels are standardised.
ROWS = {
    ('cifar10', 1): (50, 2, 2, 0, 1e2, 1e-7, 0.01, 'zca'),
    ('cifar10', 10): (30, 2, 20, 0, 1e5, 1e-6, 0.001, 'zca'),
    ('cifar10', 50): (30, 2, 40, 0, 1e3, 1e-5, 0.001, 'channels'),
    ('cifar100', 1): (20, 3, 20, 0, 1e3, 1e-5, 0.01, 'zca'),
    ('cifar100', 10): (20, 2, 20, 0, 1e3, 1e-5, 0.01, 'channels'),
    ('cifar100', 50): (80, 2, 40, 125, 1e3, 1e-5, 0.01, 'zca'),
    ('imagefruit', 1): (20, 2, 10, 0, 1e3, 1e-6, 0.01, 'channels'),
    ('tesla_cifar10', 1): (50, 2, 5, 0, 1e3, 1e-7, 0.01, 'channels'),
    ('tesla_imagenet', 1): (10, 3, 10, 100, 1e4, 1e-4, 0.01, 'channels'),
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def get_config(argument: str = 'cifar10,ipc=10'):
    """The recipe of a row of the table; `name` or `name,ipc=N` or `name,ipc=N,shards=N`."""
    name, ipc, shards = recipes.parse(argument)
    if name == 'cpu':
        return cpu(ipc, shards)
    if name == 'mnist':
        return mnist(ipc, shards)
    return full(name, ipc, shards)


def cpu(ipc, shards):
    """Digits with perceptrons: adam on pixels and on the logarithm of the step size."""
    data = recipes.DATA['cpu']
    protocol = dict(epochs=300, batch_size=1000)
    return recipes.assembled(
        data,
        standardise='mean',
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(data, together=20, optimizer=dict(name='sgd', lr=0.05)),
        distilled=recipes.matching(
            data,
            method=dict(name=MTT, student_steps=20, step_size=0.03, log_step_size=True),
            ipc=ipc,
            segment=(10, 2),
            steps=800,
            optimizer=dict(name='adam', lr=0.02),
            protocol=protocol,
            eval_every=200,
        ),
        protocol=protocol,
        step_sizes=(0.003, 0.01, 0.03, 0.1),
        networks=dict(wide=dict(name='kd.models.mlp.MLP', widths=(256,))),
    )


def mnist(ipc, shards):
    """MNIST with ConvNets, in the manner of the CPU variant."""
    data = recipes.DATA['mnist']
    protocol = dict(epochs=300)
    return recipes.assembled(
        data,
        standardise='channels',
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(data, together=10, optimizer=dict(name='sgd', lr=0.01)),
        distilled=recipes.matching(
            data,
            method=dict(name=MTT, student_steps=20, step_size=0.01, log_step_size=True),
            ipc=ipc,
            segment=(10, 2),
            steps=2000,
            optimizer=dict(name='adam', lr=0.02),
            protocol=protocol,
            eval_every=500,
        ),
        protocol=protocol,
        step_sizes=LEARNING_RATES,
        networks=recipes.cross_architecture(),
    )


def full(name, ipc, shards):
    """A row of the papers' tables: SGD with momentum 0.5 on images and on the step size."""
    steps, length, starts, batch, lr, rate_lr, step_size, standardise = recipes.row(ROWS, name, ipc)
    tesla = name.startswith('tesla')
    data, together = recipes.shared_out(recipes.DATA[name.removeprefix('tesla_')], 10, shards)
    protocol = dict(epochs=1000, augmentation=recipes.SIAMESE, repeats=3 if tesla else 5)
    return recipes.assembled(
        data,
        standardise=standardise,
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(
            data,
            together=together,
            optimizer=dict(name='sgd', lr=0.01),
            augmentation=recipes.SIAMESE,
        ),
        distilled=recipes.matching(
            data,
            method=dict(
                name=MTT,
                student_steps=steps,
                step_size=step_size,
                inner_batch=batch,
                step_size_optimizer=dict(name='sgd', lr=rate_lr, momentum=0.5),
                augmentation=recipes.SIAMESE,
                gradient='tesla' if tesla else 'exact',
                labels='expert' if name == 'tesla_imagenet' else 'hard',
            ),
            ipc=ipc,
            segment=(starts, length),
            steps=10_000 if tesla else 5_000,
            optimizer=dict(name='sgd', lr=lr, momentum=0.5),
            protocol=protocol,
            eval_every=100 if tesla else 500,
        ),
        protocol=protocol,
        step_sizes=LEARNING_RATES,
        networks=recipes.cross_architecture(),
    )
