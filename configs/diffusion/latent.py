"""Few steps of large text-to-image models by DMD2 (arXiv:2405.14867), on embedded texts.

    python -m kd.data.embed_texts FILE --model=/models/sdxl --encoder=sdxl --to=DATA/sdxl/train
    python -m kd.main --config=configs/diffusion/latent.py:sdxl --data_dir=DATA --workdir=runs/sdxl

| variant | teacher in /models | parameters | steps | hardware |
|---|---|---:|---|---|
| sdxl (default) | sdxl/unet | 2,567 M | 999, 749, 499, 249 | 64 A100 of 80 GB |
| sd15 | sd15/unet | 860 M | 999 | 64 A100 of 80 GB |

Teachers are the UNets of directories of `diffusers`. Beside the texts, folders hold `input`, the
latents of real images by `kd.models.autoencoder_kl`, scaled, which the discriminator asks for;
`sdxl/validation` is a split of the same kind.

As released: guidance 8 and a batch of 128 at 5e-7, five moves of the critic, for SDXL; guidance
1.75 and 2,048 at 1e-5, ten moves, for Stable Diffusion 1.5; the discriminator reads the middle of
the network. Both begin without the discriminator's loss in the paper for some time; here it is
there from the start, which is ours. The paper reports FIDs of 19.32 (SDXL, 10,000 captions of COCO)
and 8.35 (SD 1.5); neither was run by us, and what samples are measured with here are the spread and
diversity of latents.
"""

from kd import config as kd_config
from kd.models.latent_parts import SHARDING

STEPS = (999.0, 749.0, 499.0, 249.0)


def get_config(variant: str = 'sdxl'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'sdxl': sdxl, 'sd15': sd15})()


def sdxl():
    """Stable Diffusion XL at 1024 pixels in four steps."""
    size = (1_024, 1_024, 0, 0, 1_024, 1_024)
    return recipe(
        'sdxl',
        label='DMD2, 4 steps',
        fields=dict(text=(77, 2_048), pooled=(1_280,), size=(6,)),
        side=128,
        constants=dict(size=size),
        times=STEPS,
        guidance=8.0,
        gan=5e-3,
        updates=5,
        lr=5e-7,
        batch_size=128,
        steps=19_000,
    )


def sd15():
    """Stable Diffusion 1.5 at 512 pixels in one step."""
    return recipe(
        'sd15',
        label='DMD2, 1 step',
        fields=dict(text=(77, 768)),
        side=64,
        constants={},
        times=(999.0,),
        guidance=1.75,
        gan=1e-3,
        updates=10,
        lr=1e-5,
        batch_size=2_048,
        steps=40_000,
    )


def recipe(of, *, label, fields, side, constants, lr, steps, batch_size, **method):
    """One stage, `generator`."""
    nulls = {f'null_{name}': shape for name, shape in fields.items() if name not in constants}
    network = dict(
        name='kd.models.denoiser.denoiser',
        network=dict(
            name='kd.models.unet_conditional.preset',
            of=of,
            dtype='bfloat16',
            remat=True,
            fused=True,
        ),
        schedule=dict(name='kd.losses.schedule.discrete', kind='scaled_linear'),
        kind='eps',
    )
    config = kd_config.recipe(
        stages=('generator',),
        data=dict(
            source=dict(
                name='kd.data.latents.latents',
                path=of,
                encoder=of,
                fields=dict(input=(side, side, 4), **fields, **nulls),
                constants=constants,
            ),
            train='train',
            validation='validation',
        ),
        pretrained=dict(teacher=dict(weights=f'hf:/models/{of}/unet', network=network)),
        report=dict(name='kd.reports.generation.generation', rows=((label, 'generator'),)),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=8),
    )
    tx = dict(name='adamw', lr=lr, b2=0.999, weight_decay=0.01, clip_norm=10.0, warmup_steps=500)
    config.generator = kd_config.stage(
        network=network,
        result='generator',
        teacher='teacher',
        method=dict(
            name='kd.methods.diffusion.dmd.dmd',
            optimizer=tx,
            gan_critic=1e-2,
            feature='mid_block/resnets_1',
            **method,
        ),
        optimizer=tx,
        evaluators={
            'samples': dict(
                name='kd.evaluators.generator_samples.generator_samples', samples=512, batch=64
            )
        },
        steps=steps,
        batch_size=batch_size,
        log_every=100,
        eval_every=steps // 10,
        checkpoint_every=steps // 40,
    )
    return config
