"""Flat trajectory distillation (Du et al. 2022, arXiv 2211.11004).

As in mtt.py, with experts trained for flatness (adaptive GSAM) and an average of the images, which
is evaluated beside them, each on fresh networks.

    python -m kd.main --config=configs/dataset/ftd.py:cpu --workdir=runs/ftd
    python -m kd.main --config=configs/dataset/ftd.py:cifar10,ipc=10 --workdir=runs/ftd_cifar10

| variant | hardware | expected test accuracy, IPC 1 / 10 / 50 |
|---|---|---|
| cpu (digits), ipc = 1, 10 | 2 cores, under 1 min | 0.880, average 0.873 (IPC 1) |
| mnist, ipc = 1, 10 | one GPU, an hour | |
| cifar10, ipc = 1, 10, 50 | one GPU, a day | 46.8 / 66.6 / 73.8 |
| cifar100, ipc = 1, 10, 50 | one GPU, days | 25.2 / 43.4 / 50.7 |
| tiny, ipc = 1, 10 (64 pixels) | one GPU, days | 10.4 / 24.5 |

Radius and surrogate gap are those of the paper's scripts. At that radius the adaptive perturbation
is very small; on digits it has to be about a hundred times as large to change the experts at all.
"""

from kd.methods.dataset import recipes

FTD = 'kd.methods.dataset.ftd.ftd'
VARIANTS = ('cpu', 'cifar100,ipc=50')

# (data, ipc): student steps, segment epochs, start epochs, batch, rates of images and of step size,
# step size, alpha of the surrogate gap, decay of the average.
ROWS = {
    ('cifar10', 1): (50, 2, 2, 0, 1e2, 1e-7, 0.01, 0.3, 0.9999),
    ('cifar10', 10): (30, 2, 20, 0, 1e2, 1e-5, 0.001, 0.3, 0.9995),
    ('cifar10', 50): (30, 2, 40, 0, 1e3, 1e-5, 0.01, 1.0, 0.999),
    ('cifar100', 1): (40, 3, 20, 0, 1e3, 1e-5, 0.01, 1.0, 0.9995),
    ('cifar100', 10): (20, 2, 40, 0, 1e3, 1e-5, 0.01, 1.0, 0.9995),
    ('cifar100', 50): (80, 2, 40, 1000, 1e3, 1e-5, 0.01, 1.0, 0.999),
    ('tiny', 1): (30, 2, 10, 0, 1e4, 1e-4, 0.01, 1.0, 0.999),
    ('tiny', 10): (20, 2, 40, 500, 1e4, 1e-4, 0.01, 1.0, 0.999),
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def get_config(argument: str = 'cifar10,ipc=10'):
    """The recipe of a row of the table; `name` or `name,ipc=N` or `name,ipc=N,shards=N`."""
    name, ipc, shards = recipes.parse(argument)
    if name in ('cpu', 'mnist'):
        return small(name, ipc, shards)
    return full(name, ipc, shards)


def small(name, ipc, shards):
    """Digits with perceptrons, MNIST with ConvNets: adam on pixels and logarithm of step size."""
    data, cpu = recipes.DATA[name], name == 'cpu'
    protocol = dict(epochs=300, batch_size=1000)
    return recipes.assembled(
        data,
        standardise='mean' if cpu else 'channels',
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(
            data,
            together=20 if cpu else 10,
            optimizer=dict(name='sgd', lr=0.05 if cpu else 0.01),
            rho=1.0,
            alpha=0.4,
        ),
        distilled=recipes.matching(
            data,
            method=dict(name=FTD, ema=0.99, student_steps=20, step_size=0.03, log_step_size=True),
            ipc=ipc,
            segment=(10, 2),
            steps=800 if cpu else 2000,
            optimizer=dict(name='adam', lr=0.02),
            protocol=protocol,
            eval_every=200 if cpu else 500,
            average='average',
        ),
        protocol=protocol,
        step_sizes=(0.003, 0.01, 0.03, 0.1),
        average='average',
    )


def full(name, ipc, shards):
    """A row of the paper's table; CIFAR is whitened."""
    steps, length, starts, batch, lr, rate_lr, step_size, alpha, decay = recipes.row(
        ROWS, name, ipc
    )
    data, together = recipes.shared_out(recipes.DATA[name], 10, shards)
    protocol = dict(epochs=1000, augmentation=recipes.SIAMESE)
    return recipes.assembled(
        data,
        standardise='channels' if name == 'tiny' else 'zca',
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(
            data,
            together=together,
            optimizer=dict(name='sgd', lr=0.01),
            augmentation=recipes.SIAMESE,
            rho=0.01,
            alpha=alpha,
            adaptive=True,
        ),
        distilled=recipes.matching(
            data,
            method=dict(
                name=FTD,
                ema=decay,
                student_steps=steps,
                step_size=step_size,
                inner_batch=batch,
                step_size_optimizer=dict(name='sgd', lr=rate_lr, momentum=0.5),
                augmentation=recipes.SIAMESE,
            ),
            ipc=ipc,
            segment=(starts, length),
            steps=5_000,
            optimizer=dict(name='sgd', lr=lr, momentum=0.5),
            protocol=protocol,
            eval_every=500,
            average='average',
        ),
        protocol=protocol,
        step_sizes=LEARNING_RATES,
        average='average',
        networks=recipes.cross_architecture(),
    )
