"""Alignment with smooth experts (Shen et al. 2023, arXiv 2310.10541).

As in mtt.py, with experts of momentum whose loss is faded in and whose input gradients are
penalised, and a more careful student: representative start, momentum, balanced loss, perturbed
kernels, intermediate targets.

    python -m kd.main --config=configs/dataset/smooth_experts.py:cpu --workdir=runs/smooth
    python -m kd.main --config=configs/dataset/smooth_experts.py:cifar100,ipc=10 --workdir=runs/c100

| variant | hardware |
|---|---|
| cpu (digits), ipc = 1, 10 (test accuracy 0.884 at IPC 1) | 2 cores, under 1 min |
| mnist, ipc = 1, 10 | one GPU, an hour |
| cifar10, ipc = 10; cifar100, ipc = 1, 10, 50; readme_cifar100, ipc = 1 | one GPU, days |
| tiny, ipc = 1 (64 pixels) | one GPU, days |

The paper's accuracies are the best over the epochs of an evaluation; ours are of the last epoch.
"""

from kd.methods.dataset import recipes

SMOOTH = 'kd.methods.dataset.smooth_experts.smooth_experts'
VARIANTS = ('cpu', 'cifar100,ipc=1')

# (data, ipc): student steps, segment epochs, start epochs, batch, rates of images and of step size,
# standardisation, start of the images, balance, perturbation, intermediate targets.
ROWS = {
    ('cifar100', 1): (40, 3, 15, 0, 1e2, 1e-5, 'channels', 'kmeans', False, 1.0, 'all'),
    ('cifar100', 10): (20, 2, 30, 128, 1e3, 1e-5, 'channels', 'kmeans', False, 1.0, 'all'),
    ('cifar10', 10): (30, 2, 20, 0, 1e2, 1e-6, 'zca', 'random', True, 1.0, 'all'),
    ('cifar100', 50): (80, 2, 40, 700, 1e3, 1e-5, 'channels', 'kmeans', False, 0.0, 'end'),
    ('tiny', 1): (10, 2, 10, 0, 1e4, 1e-4, 'channels', 'random', False, 1.0, 'all'),
    ('readme_cifar100', 1): (20, 3, 20, 0, 1e2, 1e-5, 'zca', 'kmeans', True, 1.0, 'all'),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def get_config(argument: str = 'cifar100,ipc=10'):
    """The recipe of a row of the table; `name` or `name,ipc=N` or `name,ipc=N,shards=N`."""
    name, ipc, shards = recipes.parse(argument)
    if name in ('cpu', 'mnist'):
        return small(name, ipc, shards)
    return full(name, ipc, shards)


def small(name, ipc, shards):
    """Digits with perceptrons, which have no kernels to perturb; MNIST with ConvNets."""
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
            optimizer=dict(name='sgd', lr=0.01 if cpu else 0.003, momentum=0.9),
            weight_decay=1e-3,
            ramp_epochs=10,
            penalty=0.0 if cpu else 2.0,
        ),
        distilled=recipes.matching(
            data,
            method=dict(
                name=SMOOTH,
                momentum=0.0,
                perturbation=0.0 if cpu else 1.0,
                student_steps=20,
                step_size=0.05 if cpu else 0.01,
                log_step_size=True,
            ),
            ipc=ipc,
            segment=(10, 2),
            steps=800 if cpu else 2000,
            optimizer=dict(name='adam', lr=0.02),
            protocol=protocol,
            eval_every=200 if cpu else 500,
        ),
        protocol=protocol,
        step_sizes=(0.003, 0.01, 0.03, 0.1),
    )


def full(name, ipc, shards):
    """A row of the released scripts."""
    (
        steps,
        length,
        starts,
        batch,
        lr,
        rate_lr,
        standardise,
        start,
        balance,
        perturbation,
        middle,
    ) = recipes.row(ROWS, name, ipc)
    data, together = recipes.shared_out(recipes.DATA[name.removeprefix('readme_')], 10, shards)
    protocol = dict(
        epochs=1000, augmentation=recipes.SIAMESE, weight_decay=1e-3, drop=0.5, late_momentum=0.8
    )
    return recipes.assembled(
        data,
        standardise=standardise,
        ipc=ipc,
        shards=shards,
        experts=recipes.experts(
            data,
            together=together,
            optimizer=dict(name='sgd', lr=0.003, momentum=0.9),
            augmentation=recipes.SIAMESE,
            weight_decay=1e-3,
            ramp_epochs=10,
            penalty=2.0,
            drop_epoch=27,
            drop_factor=0.6,
        ),
        distilled=recipes.matching(
            data,
            method=dict(
                name=SMOOTH,
                student_steps=steps,
                step_size=0.01,
                inner_batch=batch,
                step_size_optimizer=dict(name='sgd', lr=rate_lr, momentum=0.5),
                augmentation=recipes.SIAMESE,
                start=start,
                balance_epochs=starts if balance else 0,
                perturbation=perturbation,
                intermediate=middle,
            ),
            ipc=ipc,
            segment=(starts, length),
            steps=5_000,
            optimizer=dict(name='sgd', lr=lr, momentum=0.5),
            protocol=protocol,
            eval_every=200,
        ),
        protocol=protocol,
        step_sizes=LEARNING_RATES,
        networks=recipes.cross_architecture(),
    )
