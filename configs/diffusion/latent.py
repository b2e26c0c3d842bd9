"""Few steps of large text-to-image models: DMD2 (arXiv:2405.14867), SNOOPI (arXiv:2412.02687).

    python -m kd.data.embed_texts FILE --model=/models/sdxl --encoder=sdxl --to=DATA/sdxl/train
    python -m kd.main --config=configs/diffusion/latent.py:sdxl --data_dir=DATA --workdir=runs/sdxl

| variant | teacher in /models | parameters | steps | hardware |
|---|---|---:|---|---|
| sdxl (default) | sdxl/unet | 2,567 M | 999, 749, 499, 249 | 64 A100 of 80 GB |
| sd15 | sd15/unet | 860 M | 999 | 64 A100 of 80 GB |
| snoopi,pixart_alpha | pixart/transformer, at 512 pixels | 611 M | 999 | 4 A100 of 40 GB |
| snoopi,sd15 | sd15/unet | 860 M | 999 | 4 A100 of 40 GB |
| snoopi,sd21 | sd21/unet, that of 512 pixels, which says noise | 866 M | 999 | 4 A100 of 40 GB |

Teachers are networks of directories of `diffusers`. Beside the texts, folders hold `input`, the
latents of real images as `python -m kd.data.embed_images` writes them, which DMD2's discriminator
asks for and samples are compared with; `DATA/sdxl/validation` is a split of the same kind.

DMD2 as released: guidance 8 and a batch of 128 at 5e-7, five moves of the critic, for SDXL; 1.75
and 2,048 at 1e-5, ten moves, for Stable Diffusion 1.5; the discriminator reads the middle of the
network. Both begin without the discriminator's loss in the paper for some time; here it is there
from the start, which is ours. The paper reports an FID of 19.32 for SDXL on 10,000 captions of
COCO.

SNOOPI: guidance drawn from .5 .. 3 and for Stable Diffusion to 4, batches of 64 prompts at 1e-6 and
60,000 moves (40,000 for 2.1), and a critic of adapters of rank 64 at 1e-3; which kernels have them,
the size of images and the betas of PixArt, from 1e-4 to .02, are ours. The paper reports an HPSv2
of 30.34 for PixArt, and 29.07 for the teacher. What a negative text names is left out by attention
in the finished generator, `kd.sampling.negative.away`.

Nothing of this was run by us; what samples are measured with here are the spread and diversity of
latents.
"""

from kd import config as kd_config
from kd.models.latent_parts import SHARDING

STEPS = (999.0, 749.0, 499.0, 249.0)


def get_config(variant: str = 'sdxl'):
    """The recipe of a variant."""
    made = {
        'sdxl': sdxl,
        'sd15': sd15,
        'snoopi,pixart_alpha': snoopi,
        'snoopi,sd15': lambda: snoopi_sd('sd15', 768, 60_000),
        'snoopi,sd21': lambda: snoopi_sd('sd21', 1_024, 40_000),
    }
    return kd_config.variant(variant, made)()


def sdxl():
    """Stable Diffusion XL at 1024 pixels in four steps."""
    return recipe(
        'sdxl',
        label='DMD2, 4 steps',
        network=unet('sdxl'),
        method=dmd(times=STEPS, guidance=8.0, gan=5e-3, updates=5, optimizer=adamw(5e-7)),
        fields=dict(text=(77, 2_048), pooled=(1_280,), size=(6,)),
        constants=dict(size=(1_024, 1_024, 0, 0, 1_024, 1_024)),
        shape=(128, 128, 4),
        lr=5e-7,
        batch_size=128,
        steps=19_000,
    )


def sd15():
    """Stable Diffusion 1.5 at 512 pixels in one step."""
    return recipe(
        'sd15',
        label='DMD2, 1 step',
        network=unet('sd15'),
        method=dmd(times=STEPS[:1], guidance=1.75, gan=1e-3, updates=10, optimizer=adamw(1e-5)),
        fields=dict(text=(77, 768)),
        lr=1e-5,
        batch_size=2_048,
        steps=40_000,
    )


def snoopi():
    """PixArt-alpha at 512 pixels in one step."""
    return recipe(
        'pixart',
        label='SNOOPI, 1 step',
        network=denoiser(
            dict(name='kd.models.latent_dit.preset', of='pixart_alpha_512', masked=True),
            dict(kind='linear', start=1e-4, end=0.02),
        ),
        method=drawn((0.5, 3.0)),
        fields=dict(text=(120, 4_096), mask=(120,)),
        lr=1e-6,
        batch_size=64,
        steps=60_000,
        folder='transformer',
    )


def snoopi_sd(of, context, steps):
    """Stable Diffusion 1.5 or 2.1 at 512 pixels in one step."""
    return recipe(
        of,
        label='SNOOPI, 1 step',
        network=unet(of),
        method=drawn((0.5, 4.0)),
        fields=dict(text=(77, context)),
        lr=1e-6,
        batch_size=64,
        steps=steps,
    )


def drawn(guidance):
    """SNOOPI's method."""
    return dict(
        name='kd.methods.diffusion.snoopi.snoopi',
        times=STEPS[:1],
        guidance=guidance,
        optimizer=adamw(1e-3),
        targets=r'attn\d/(to_q|to_v)/kernel$',
        rank=64,
        alpha=128.0,
    )


def dmd(**arguments):
    """DMD2 with its discriminator in the middle of the network."""
    name = 'kd.methods.diffusion.dmd.dmd'
    return dict(name=name, gan_critic=1e-2, feature='mid_block/resnets_1', **arguments)


def unet(of):
    """That of Stable Diffusion."""
    return denoiser(
        dict(name='kd.models.unet_conditional.preset', of=of), dict(kind='scaled_linear')
    )


def denoiser(network, schedule):
    """In bfloat16, for little memory."""
    return dict(
        name='kd.models.denoiser.denoiser',
        network=dict(**network, dtype='bfloat16', remat=True, fused=True),
        schedule=dict(name='kd.losses.schedule.discrete', **schedule),
        kind='eps',
    )


def flow(network, adapter=None):
    """One of rectified flow, and with `adapter` its adapters beside it."""
    network = dict(**network, dtype='bfloat16', remat=True, fused=True)
    if adapter is not None:
        network = dict(name='kd.models.adapters.lora', base=network, **adapter)
    return dict(
        name='kd.models.denoiser.denoiser',
        network=network,
        schedule=dict(name='kd.losses.schedule.flow'),
        kind='flow',
    )


def shifted(steps, shift):
    """Even times of a flow, moved towards noise."""
    even = [1 - i / steps for i in range(steps)]
    return tuple(shift * u / (1 + (shift - 1) * u) for u in even)


def adamw(lr, weight_decay=0.01, warmup_steps=500, **more):
    """That of both players."""
    return dict(
        name='adamw', lr=lr, b2=0.999, weight_decay=weight_decay, clip_norm=10.0,
        warmup_steps=warmup_steps, **more,
    )  # fmt: skip


def recipe(
    of, *, label, network, method, fields, constants=None, shape=(64, 64, 4), lr, steps, batch_size,
    folder='unet', weight_decay=0.01,
):  # fmt: skip
    """One stage, `generator`."""
    config = begun(of, ('generator',), fields, constants, shape)
    config.pretrained = dict(teacher=weights(of, network, folder))
    config.report.rows = ((label, 'generator'),)
    config.generator = stage(
        network=network, teacher='teacher', method=method, steps=steps, batch_size=batch_size,
        optimizer=adamw(lr, weight_decay=weight_decay),
    )  # fmt: skip
    return config


def weights(of, network, folder='transformer'):
    """A network of a directory of diffusers."""
    return dict(weights=f'hf:/models/{of}/{folder}', network=network)


def begun(of, stages, fields, constants=None, shape=(64, 64, 4)):
    """Data of these fields, and where everything lies."""
    constants = constants or {}
    nulls = {f'null_{name}': field for name, field in fields.items() if name not in constants}
    source = dict(
        name='kd.data.latents.latents',
        path=of,
        encoder=of,
        fields=dict(input=shape, **fields, **nulls),
        constants=constants,
    )
    return kd_config.recipe(
        stages=stages,
        data=dict(source=source, train='train', validation='validation'),
        report=dict(name='kd.reports.generation.generation'),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=8),
    )


def stage(*, steps, probe='generator_samples.generator_samples', samples=512, **given):
    """A generator, of which samples are drawn ten times."""
    evaluator = dict(name=f'kd.evaluators.{probe}', samples=samples, batch=min(samples, 64))
    return kd_config.stage(
        result='generator',
        evaluators={'samples': evaluator} if probe else {},
        steps=steps,
        log_every=min(100, steps),
        eval_every=steps // 10,
        checkpoint_every=max(steps // 40, 1),
        **given,
    )
