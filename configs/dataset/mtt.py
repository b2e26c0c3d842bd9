"""Matching of training trajectories (Cazenavette et al. 2022, arXiv 2203.11932), and its variant
TESLA (Cui et al. 2022, arXiv 2211.10586).

Experts are trained on real data and their parameters kept after every epoch; a synthetic set is
trained until students on it go where the experts went; networks trained on the set from scratch
are tested beside a random subset, K-means representatives, and experts.

    python -m kd.main --config=configs/dataset/mtt.py:cpu --workdir=runs/mtt
    python -m kd.main --config=configs/dataset/mtt.py:cpu_mnist --workdir=runs/mtt_mnist
    python -m kd.main --config=configs/dataset/mtt.py:cifar10,ipc=10 --workdir=runs/mtt_cifar10

| variant | hardware | expected test accuracy, IPC 1 / 10 / 50 |
|---|---|---|
| cpu (digits), ipc = 1, 10 | 2 cores, under 1 min | 0.882 / 0.926 (random 0.523 / 0.848) |
| cpu_mnist, ipc = 1, 10 | 2 cores, under 10 min | 0.809 / 0.870 (random 0.415 / 0.742) |
| mnist, ipc = 1, 10 | one GPU, an hour | |
| cifar10, ipc = 1, 10, 50 | one GPU, a day | 46.2 / 65.4 / 71.6 |
| cifar100, ipc = 1, 10, 50 | one GPU, days | 24.3 / 39.7 / 47.7 |
| tiny, ipc = 1, 10, 50 (64 pixels) | one GPU, days | 8.8 / 23.2 / 28.0 |
| imagefruit, ipc = 1 (128 pixels) | one GPU, days | |
| tesla_cifar10, ipc = 1 | one GPU, a day | |
| tesla_imagenet, ipc = 1 (64 pixels) | pod | |

Data sets are tfds's; `imagefruit` and `tiny_imagenet` are folders of these names that you prepare
in the format of tfds. With more than one device, write `shards=N` to spread the synthetic set, and
with it the inner loop, over N of them.

The papers', for all but `cpu`, `cpu_mnist` and `mnist`: experts, networks, augmentation, whitening
or the released mean and deviation of channels, and the numbers of `ROWS`, of which those of
CIFAR-10 at IPC 10 are the authors' later commands, the learning rates of Tiny ImageNet those of FTD
(arXiv 2211.11004), and the pixels' of TESLA half of its commands', since its released code applies
half of the derivative. Ours:

- Some training images, 5,000 of CIFAR's 50,000, are held out for validation, and the set that is
  kept is the best there, of evaluations every 500 steps (TESLA: 100). The release trains on all,
  and reports the best on the test set, of evaluations every 100.
- Evaluations take 1,000 epochs and lower the rate after 500; the release takes 1,001, and 502.
  TESLA evaluates 3 networks, not 5.
"""

from kd.methods.dataset import recipes, small_recipes
from kd.methods.dataset.recipes import Schedule

MTT = 'kd.methods.dataset.mtt.mtt'

VARIANTS = ('cpu', 'cpu_mnist', 'mnist,ipc=10', 'cifar10,ipc=10')

# (data, ipc): schedule and standardisation. Where the paper says `no whitening`, channels are
# standardised.
ROWS = {
    ('cifar10', 1): (Schedule(50, 2, 2, 0, 1e2, 1e-7, 0.01), 'zca'),
    ('cifar10', 10): (Schedule(30, 2, 20, 0, 1e2, 1e-5, 0.001), 'zca'),
    ('cifar10', 50): (Schedule(30, 2, 40, 0, 1e3, 1e-5, 0.001), 'channels'),
    ('cifar100', 1): (Schedule(20, 3, 20, 0, 1e3, 1e-5, 0.01), 'zca'),
    ('cifar100', 10): (Schedule(20, 2, 20, 0, 1e3, 1e-5, 0.01), 'channels'),
    ('cifar100', 50): (Schedule(80, 2, 40, 125, 1e3, 1e-5, 0.01), 'zca'),
    ('tiny', 1): (Schedule(10, 2, 10, 0, 1e4, 1e-4, 0.01), 'channels'),
    ('tiny', 10): (Schedule(40, 2, 20, 200, 1e4, 1e-4, 0.01), 'channels'),
    ('tiny', 50): (Schedule(40, 2, 20, 300, 1e4, 1e-4, 0.01), 'channels'),
    ('imagefruit', 1): (Schedule(20, 2, 10, 0, 1e3, 1e-6, 0.01), 'channels'),
    ('tesla_cifar10', 1): (Schedule(50, 2, 5, 0, 5e2, 1e-7, 0.01), 'channels'),
    ('tesla_imagenet', 1): (Schedule(10, 3, 10, 100, 5e3, 1e-4, 0.01), 'channels'),
}


def get_config(argument: str = 'cifar10,ipc=10'):
    """The recipe of a row of the table; `name` or `name,ipc=N` or `name,ipc=N,shards=N`."""
    name, ipc, shards = recipes.parse(argument)
    if name in recipes.SMALL:
        return small(name, ipc, shards)
    return full(name, ipc, shards)


def small(name, ipc, shards):
    """Digits or MNIST with perceptrons, MNIST with ConvNets."""
    step_size = 0.01 if name == 'mnist' else 0.03
    return small_recipes.matching(
        name, ipc, shards, experts={}, method=dict(name=MTT, step_size=step_size)
    )


def full(name, ipc, shards):
    """A row of the papers' tables; TESLA on ImageNet has the labels of its experts."""
    schedule, standardise = recipes.row(ROWS, name, ipc)
    tesla = name.startswith('tesla')
    return recipes.full_matching(
        name.removeprefix('tesla_'),
        ipc,
        shards,
        schedule,
        standardise=standardise,
        experts=dict(optimizer=dict(name='sgd', lr=0.01)),
        method=dict(
            name=MTT,
            gradient='tesla' if tesla else 'exact',
            labels='expert' if name == 'tesla_imagenet' else 'hard',
        ),
        steps=10_000 if tesla else 5_000,
        eval_every=100 if tesla else 500,
    )
