"""Eight steps, four, two, one: consistency within phases of time (2024, arXiv:2404.13686).

    python -m kd.main --config=configs/flow/hyper_sd.py:cpu --workdir=runs/hyper_sd

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | eight Gaussians on a circle | perceptrons of 3 x 128 | 2 cores |
| cifar10 (default) | CIFAR-10, in `--data_dir` | UNet of 128 channels | 8 GPUs or v5e-8 |

Stages: a flow, by flow matching, and students of eight, four, two and one phases, each begun as the
average of the one before; the student of k phases is sampled in 1 to 8 Euler steps, and is meant
for k. The last is a compromise over all ends of its one phase, as the network is told none: one
step wants a stage of its own, DMD in the paper (`configs/diffusion/mnist.py`).

`cpu` takes 3 minutes. KL with seed 0, where a perfect sampler has .10 and the flow .17 in 64 steps:

| steps | flow, Euler | 8 phases | 4 phases | 2 phases | 1 phase |
|---|---:|---:|---:|---:|---:|
| 8 | .37 | **.20** | .22 | .52 | 1.72 |
| 4 | 1.07 | .56 | **.25** | .31 | 1.28 |
| 2 | 3.81 | 2.93 | 1.96 | **.49** | .74 |
| 1 | 5.34 | 5.31 | 5.30 | 5.26 | **2.99** |

Sizes, rates and times are ours, and `cifar10` was not run by us. The paper's own models, Stable
Diffusion 1.5 and XL with LoRA, batches of 512 at 1e-6, are not here.
"""

from kd import config as kd_config
from kd.methods.flow import recipes

VARIANTS = ('cpu', 'cifar10')
PHASES = {'eight': 8, 'four': 4, 'two': 2, 'one': 1}


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'cifar10': cifar10})()


def cpu():
    """Minutes on two cores."""
    world = dict(recipes.RING)
    return recipe(world.pop('students'), decay=0.99, **world)


def cifar10():
    """Unconditional, a day on 8 GPUs."""
    world = dict(recipes.CIFAR10)
    return recipe(world.pop('students'), decay=0.999, **world)


def recipe(shared, decay, **world):
    """Four students in a chain."""
    students, before = {}, 'flow'
    for name, phases in PHASES.items():
        fields = dict(
            after=before,
            method=dict(name='kd.methods.flow.hyper_sd.tscd', phases=phases, target='slow'),
            ema={'slow': decay},
            evaluators=dict(sampler='euler', steps=(1, 2, 4, 8), weights='slow'),
            **shared,
        )
        students[name], before = (f'{phases} phase{"s" * (phases > 1)}', fields), name
    return recipes.few_steps(students, **world)
