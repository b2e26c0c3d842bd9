"""Eight steps, four, two, one: consistency within phases of time (2024, arXiv:2404.13686).

    python -m kd.main --config=configs/flow/hyper_sd.py:cpu --workdir=runs/hyper_sd

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | eight Gaussians on a circle | perceptrons of 3 x 128 | 2 cores |
| cifar10 | CIFAR-10, in `--data_dir` | UNet of 128 channels | 8 GPUs or v5e-8 |
| sdxl (default) | texts and latents of 1024 pixels | SDXL, 2,567 M, and LoRA | 64 A100 of 80 GB |
| sd15 | the same of 512 pixels | Stable Diffusion 1.5, 860 M, and LoRA | 64 A100 of 80 GB |

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

`sdxl` and `sd15` read `input`, scaled latents, and embedded texts, as of `kd.data.latents`, in
`DATA/sdxl/train` and `validation`, and networks of `diffusers` in `/models`. A stage trains
adapters alone; those of the stage before are part of what the next begins with, so that the LoRA of
one step is the difference to the first base. Batches of 512 at 1e-6 and four stages are the
paper's, on LAION and COYO. It does not give its rank, steps, grid, averages and guidance: here 64
on attention and feed-forward layers, 10,000, 64, .95 and 7.5. Its adversarial term, its rewards and
its last stage, DMD (`configs/diffusion/latent.py`), are not here.

Sizes, rates and times of the others are ours, and `cifar10`, `sd15` and `sdxl` were not run by us.
"""

from pathlib import Path

from kd import config as kd_config
from kd.methods.flow import recipes
from kd.models.latent_parts import SHARDING

latents = kd_config.load_module(Path(__file__).parents[1] / 'diffusion' / 'latent.py')
VARIANTS = ('cpu', 'cifar10', 'sd15', 'sdxl')
TARGETS = r'/(to_[qkv]|to_out_0|proj|net_2)/kernel$'
PHASES = {'eight': 8, 'four': 4, 'two': 2, 'one': 1}


def get_config(variant: str = 'sdxl'):
    """The recipe of a variant."""
    made = {'cpu': cpu, 'cifar10': cifar10, 'sd15': sd15, 'sdxl': sdxl}
    return kd_config.variant(variant, made)()


def cpu():
    """Minutes on two cores."""
    world = dict(recipes.RING)
    return recipe(world.pop('students'), decay=0.99, **world)


def cifar10():
    """Unconditional, a day on 8 GPUs."""
    world = dict(recipes.CIFAR10)
    return recipe(world.pop('students'), decay=0.999, **world)


def sd15():
    """Stable Diffusion 1.5 at 512 pixels."""
    return adapted('sd15', dict(text=(77, 768)), side=64)


def sdxl():
    """Stable Diffusion XL at 1024 pixels."""
    return adapted(
        'sdxl',
        dict(text=(77, 2_048), pooled=(1_280,), size=(6,)),
        constants=dict(size=(1_024, 1_024, 0, 0, 1_024, 1_024)),
        side=128,
    )


def adapted(of, fields, *, side, constants=None):
    """Adapters of a published network, a stage for each number of phases."""
    constants, network = constants or {}, latents.unet(of)
    nulls = {f'null_{name}': shape for name, shape in fields.items() if name not in constants}
    source = dict(
        name='kd.data.latents.latents', path=of, encoder=of, constants=constants,
        fields=dict(input=(side, side, 4), **fields, **nulls),
    )  # fmt: skip
    rows = tuple((f'{phases} phase{"s" * (phases > 1)}', name) for name, phases in PHASES.items())
    config = kd_config.recipe(
        stages=tuple(PHASES),
        data=dict(source=source, train='train', validation='validation'),
        pretrained=dict(teacher=dict(weights=f'hf:/models/{of}/unet', network=network)),
        report=dict(name='kd.reports.generation.generation', rows=rows),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=8),
    )
    beside = dict(
        name='kd.models.adapters.lora', base=network, rank=64, alpha=64.0,
        targets=TARGETS,
    )  # fmt: skip
    probe = dict(
        name='kd.evaluators.generator_samples.denoiser_samples', steps=(1, 2, 4, 8),
        weights='slow', samples=512, batch=64,
    )  # fmt: skip
    before = 'teacher'
    for name, phases in PHASES.items():
        config[name] = kd_config.stage(
            network=beside,
            teacher='teacher',
            references={'start': before},
            method=dict(
                name='kd.methods.flow.hyper_sd.tscd', phases=phases, target='slow', guidance=7.5
            ),
            optimizer=dict(name='adamw', lr=1e-6, warmup_steps=500, clip_norm=1.0),
            ema={'slow': 0.95},
            evaluators={'samples': probe},
            steps=10_000,
            batch_size=512,
            log_every=100,
            eval_every=5_000,
            checkpoint_every=500,
        )
        before = f'{name}@slow'
    return config


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
