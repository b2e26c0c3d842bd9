"""One call from any time to data, by velocities matched (2025, arXiv:2509.04406).

    python -m kd.main --config=configs/flow/mdt_dist.py:cpu --workdir=runs/mdt_dist

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | eight Gaussians on a circle | perceptrons of 3 x 128 | 2 cores |
| shapes | spheres, boxes and tori of 8^3 voxels | transformer of 0.1 M | 2 cores |
| trellis_structure (default) | latents of 16^3, in `--data_dir` | TRELLIS, 556 M | 64 A100 |
| trellis_latents | latents of up to 20,480 voxels of 64^3 | TRELLIS, 601 M | 64 A100 |

Stages: a flow, by flow matching, and two students that begin as it: by velocity matching, and with
velocity distillation beside. The report has the KL divergence of their samples in one and two Euler
steps beside that of the flow in 1 to 64.

`cpu` takes 3 minutes. With seed 0 KL in one call is .64, and .65 with velocity distillation, where
the flow has 5.3, and .17 in 64 steps, and a perfect sampler .10. Two steps are no better, 1.2: a
network that always aims at data is no flow on the way.

`shapes` has the same stages, with occupancies in 3-D; all its settings are ours. Sizes, rates and
times of `cpu` are ours too.

The larger ones distil the two transformers of TRELLIS-image-large, one after the other: where a
shape has voxels, and latents of these. They read directories that hold the released weights as
`kd.io.shape_names` says, in `/models/trellis`, and what the paper's encoders say of its 500,000
shapes, as of `kd.data.latents`: `input`, `text`, 1,374 features of an image by DINOv2-L/14 with
registers, and for voxels `coordinates` and `voxel_mask`. As released: guidance 41 and, for samples,
101, derivatives normalised with .1, times of sigmoid(N(1, 1)), AdamW without decay at 4e-8 for
6,000 steps and 1e-8 for 4,000, batches of 256, averages of .9999; clipped at 1 and not at a
percentile as well, and computed in bfloat16 for float16 with copies, which is ours. They were not
run by us.
"""

from kd import config as kd_config
from kd.methods.flow import recipes
from kd.models.shape_dit import SHARDING

VARIANTS = ('cpu', 'shapes', 'trellis_structure', 'trellis_latents')
VOXELS = 20_480
STUDENTS = {'velocity': ('velocity matching', 0.0), 'both': ('with velocity distillation', 1.0)}


def get_config(variant: str = 'trellis_structure'):
    """The recipe of a variant."""
    made = {
        'cpu': cpu,
        'shapes': shapes,
        'trellis_structure': trellis_structure,
        'trellis_latents': trellis_latents,
    }
    return kd_config.variant(variant, made)()


def cpu():
    """Minutes on two cores."""
    world = dict(recipes.RING)
    return recipe(world.pop('students'), **world)


def shapes():
    """Shapes of 8^3 voxels, minutes on two cores."""
    of = dict(name='kd.models.shape_dit.ShapeDiT', width=48, depth=2, heads=4, context=0, patch=2)
    return recipe(
        dict(optimizer=dict(name='adam', lr=3e-4, schedule='cosine'), steps=600, batch_size=64),
        data=dict(
            source=dict(name='kd.data.builders.shapes.shapes'), train='train', validation='test'
        ),
        network=dict(
            name='kd.models.one_time.one_time', network=of, scale=1000.0, backward=True,
            num_classes=None,
        ),
        teacher=dict(
            optimizer=dict(name='adam', lr=1e-3, schedule='cosine'), steps=1_500, batch_size=64
        ),
        measured=dict(samples=512, batch=256),
    )  # fmt: skip


def recipe(shared, **world):
    """The flow, and both students."""

    def student(weight):
        return dict(
            method=dict(name='kd.methods.flow.mdt_dist.mdt_dist', distribution=weight),
            ema={'slow': 0.998},
            evaluators=dict(sampler='euler', steps=(1, 2), weights='slow'),
            **shared,
        )

    return recipes.few_steps(
        {name: (title, student(weight)) for name, (title, weight) in STUDENTS.items()}, **world
    )


def trellis_structure():
    """Where a shape has voxels."""
    return released('structure', dict(input=(16, 16, 16, 8)), lr=4e-8, steps=6_000)


def trellis_latents():
    """Latents of the voxels that there are."""
    fields = dict(input=(VOXELS, 8), coordinates=(VOXELS, 3), voxel_mask=(VOXELS,))
    return released('latents', fields, lr=1e-8, steps=4_000, tokens=8_192)


def released(of, fields, *, lr, steps, **settings):
    """One stage, a student of a network of TRELLIS."""
    inner = dict(
        name='kd.models.shape_dit.preset', of=f'trellis_{of}_large', dtype='bfloat16', remat=True,
        fused=True, **settings,
    )  # fmt: skip
    network = dict(
        name='kd.models.one_time.one_time', network=inner, scale=1000.0, backward=True
    )  # fmt: skip
    text = (1_374, 1_024)
    source = dict(
        name='kd.data.latents.latents', path=f'trellis_{of}', encoder='dinov2',
        fields=dict(text=text, null_text=text, **fields), constants=dict(null_text=0.0),
    )  # fmt: skip
    config = kd_config.recipe(
        stages=('student',),
        data=dict(source=source, train='train', validation='validation'),
        pretrained=dict(teacher=dict(weights=f'hf:/models/trellis/{of}', network=network)),
        report=dict(name='kd.reports.generation.generation', rows=(('MDT-dist', 'student'),)),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=8),
    )
    config.student = kd_config.stage(
        network=network,
        teacher='teacher',
        references={'start': 'teacher'},
        method=dict(
            name='kd.methods.flow.mdt_dist.mdt_dist', constant=0.1, guidance=41.0,
            distribution_guidance=101.0,
        ),
        optimizer=dict(name='adamw', lr=lr, weight_decay=0.0, clip_norm=1.0),
        ema={'slow': 0.9999},
        evaluators={
            'samples': dict(
                name='kd.evaluators.flow_samples.flow_samples', sampler='euler', steps=(1, 2),
                weights='slow', samples=256, batch=64,
            )
        },
        steps=steps,
        batch_size=256,
        log_every=50,
        eval_every=1_000,
        checkpoint_every=500,
    )  # fmt: skip
    return config
