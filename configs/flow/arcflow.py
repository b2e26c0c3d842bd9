"""Two steps along curves: mixtures of momenta that imitate a flow (2026, arXiv:2602.09014).

    python -m kd.main --config=configs/flow/arcflow.py:cpu --workdir=runs/arcflow

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | eight Gaussians on a circle | perceptrons of 3 x 128 | 2 cores |
| flux_dev (default) | texts, in `--data_dir` | FLUX.1-dev, 11.9 B, and LoRA | 64 v5p chips |
| qwen_image | the same | Qwen-Image, 20.4 B, and LoRA | 64 v5p chips |

Stages of `cpu`: a flow, by flow matching; a student of one momentum for each of two segments, a
straight line; and one of eight. Both begin as the flow and learn from noise alone. The report has
the KL divergence of their samples in two calls beside that of the flow in 1 to 64.

`cpu` takes 3 minutes. With seed 0 KL is .43 for the straight line and .37 for eight momenta, where
the flow has 3.8 in two Euler steps and .17 in 64, and a perfect sampler .10; within segments, eight
are off the flow by .053 of the noise and the line by .071. Without dropout of modes, which so small
a network feels, they are far closer: see the claim.

Its sizes, rates and times are ours.

The larger ones read embedded texts alone, `DATA/flux/train` and `validation` as of
`kd.data.latents` (of Qwen-Image with `null_text` and `null_mask`), and networks of `diffusers` in
`/models`, at 1024 pixels: two steps, sixteen momenta by pixel, LoRA of rank 256 beside feed-forward
layers of the images and embedders of times, heads in float32. As released: shift 3.2, AdamW at
1e-4, a tenth of that for rates, betas .9 and .95, 10,000 and 15,000 steps of 16 texts, the
teacher's states for 2,000 and 1,000; FLUX is told the scale 3.5, Qwen-Image is guided by 4. The
clip at 50 is 1.67 here, where the loss is a thirtieth. Ours: no dropout of adapters (.05), an
average whose half-life is a tenth of the steps for one by powers of them, and the fields of texts,
512 tokens. The paper has 3,000,000 prompts. They were not run by us.
"""

from kd import config as kd_config
from kd.methods.flow import recipes
from kd.models.latent_parts import SHARDING

VARIANTS = ('cpu', 'flux_dev', 'qwen_image')
SHIFT = 3.2
TARGETS = r'(blocks/(ff/net_0/proj|ff/net_2|proj_mlp|proj_out)|timestep_embedder/linear_\d)/kernel$'
STUDENTS = {'straight': ('one momentum', 1), 'arc': ('eight momenta', 8)}


def get_config(variant: str = 'flux_dev'):
    """The recipe of a variant."""
    made = {'cpu': cpu, 'flux_dev': flux_dev, 'qwen_image': qwen_image}
    return kd_config.variant(variant, made)()


def cpu():
    """Minutes on two cores."""
    world = dict(recipes.RING)
    shared = world.pop('students')

    def student(modes):
        network = {**world['network'], 'name': 'kd.models.momentum_mlp.MomentumMLP'}
        return dict(
            network=dict(network, modes=modes),
            method=dict(name='kd.methods.flow.arcflow.arcflow', decay=900),
            evaluators=dict(steps=(2,)),
            **shared,
        )

    return recipes.few_steps(
        {name: (title, student(modes)) for name, (title, modes) in STUDENTS.items()}, **world
    )


def flux_dev():
    """Flux-dev, which is told the scale of its guidance."""
    return adapted(
        'flux_dev',
        'flux',
        fields=dict(text=(512, 4_096), pooled=(768,), guidance=()),
        constants=dict(guidance=3.5),
        guidance=1.0,
        decay=2_000,
        steps=10_000,
    )


def qwen_image():
    """Qwen-Image, guided; its student is not."""
    text = dict(text=(512, 3_584), mask=(512,))
    return adapted(
        'qwen_image',
        'qwen_image',
        fields={**text, **{f'null_{name}': shape for name, shape in text.items()}},
        constants={},
        guidance=4.0,
        decay=1_000,
        steps=15_000,
    )


def adapted(of, encoder, *, fields, constants, guidance, decay, steps):
    """One stage: adapters and heads beside a published network."""
    network = dict(
        name='kd.models.mmdit.preset', of=of, dtype='bfloat16', remat=True, fused=True
    )  # fmt: skip
    teacher = dict(
        name='kd.models.denoiser.denoiser', network=network, kind='flow',
        schedule=dict(name='kd.losses.schedule.flow'),
    )  # fmt: skip
    source = dict(
        name='kd.data.latents.latents', path=encoder, encoder=encoder,
        # Their shape is all that counts of latents.
        fields=dict(input=(128, 128, 16), **fields), constants=dict(input=0.0, **constants),
    )  # fmt: skip
    config = kd_config.recipe(
        stages=('arc',),
        data=dict(source=source, train='train', validation='validation'),
        pretrained=dict(teacher=dict(weights=f'hf:/models/{of}/transformer', network=teacher)),
        report=dict(name='kd.reports.generation.generation', rows=(('ArcFlow, 2 steps', 'arc'),)),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=16),
    )
    momenta = dict(name='kd.models.momentum_mmdit.momentum_mmdit', network=network, modes=16)
    config.arc = kd_config.stage(
        network=dict(
            name='kd.models.adapters.lora', base=momenta, rank=256, alpha=256.0, targets=TARGETS
        ),
        teacher='teacher',
        references={'start': 'teacher'},
        method=dict(
            name='kd.methods.flow.arcflow.arcflow', shift=SHIFT, decay=decay, guidance=guidance
        ),
        optimizer=dict(
            name='adamw', lr=1e-4, b1=0.9, b2=0.95, warmup_steps=100, clip_norm=50 / 30,
            scale=(('momentum/rate', 0.1),),
        ),
        ema={'slow': dict(halflife=steps / 10, ramp=0.1)},
        evaluators={
            'samples': dict(
                name='kd.evaluators.flow_samples.flow_samples', steps=(2,), shift=SHIFT,
                weights='slow', samples=256, batch=64,
            )
        },
        steps=steps,
        batch_size=16,
        log_every=50,
        eval_every=2_500,
        checkpoint_every=500,
    )  # fmt: skip
    return config
