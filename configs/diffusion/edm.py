"""One step of EDM's networks: DMD2 (arXiv:2405.14867), and an embedding loss (arXiv:2604.22379).

    python -m kd.main --config=configs/diffusion/edm.py:dmd,imagenet64 --workdir=runs/dmd_imagenet64

| variant | teacher in /models | parameters | hardware |
|---|---|---:|---|
| dmd,imagenet64 (default) | edm-imagenet-64x64-cond-adm | 295.9 M | 8 H100, or v5p-16 |
| embedding_loss,cifar10 | edm-cifar10-32x32-uncond-vp | 55.7 M | 1 H100 |
| embedding_loss,imagenet64 | edm-imagenet-64x64-cond-adm | 295.9 M | 8 H100 |
| embedding_loss,afhq64 | edm-afhqv2-64x64-uncond-vp | 61.8 M | 1 H100 |
| embedding_loss,ffhq64 | edm-ffhq-64x64-uncond-vp | 61.8 M | 1 H100 |

Teachers are directories made of EDM's pickles as `kd/io/diffusion_names.py` says. ImageNet is
`imagenet_resized/64x64` of tfds; `afhq_64` and `ffhq_64` are prepared by you, as array_record with
the feature `image` uint8 [64, 64, 3]. With `--config.generator.evaluators.samples.inception=FILE`
samples have an FID; without there are their saturation and spread alone. What these take has not
been run by us; DMD2 reports an FID of 1.51 on ImageNet.

DMD2 as released: one step at sigma 80, five moves of the critic for one of the generator, both of
280 examples at 2e-6; 200,000 moves of the critic; a discriminator on the last features of the
encoder, .003 in the loss of the generator and .01 in the critic's. Of the embedding loss only the
weight of 16 generated examples in a step is the paper's; all other numbers are those of DMD2 or
ours, see `kd.methods.diffusion.embedding_loss`.
"""

from kd import config as kd_config

VARIANTS = (
    'dmd,imagenet64',
    *(f'embedding_loss,{name}' for name in ('cifar10', 'imagenet64', 'afhq64', 'ffhq64')),
)
# Over the axis 'fsdp' of the mesh, where that is more than 1.
SHARDING = ((r'kernel$', 'fsdp'),)
DATA = {
    'cifar10': ('cifar10', 'train', 'test', 'edm-cifar10-32x32-uncond-vp'),
    'imagenet64': (
        'imagenet_resized/64x64', 'train', 'validation', 'edm-imagenet-64x64-cond-adm',
    ),
    'afhq64': ('afhq_64', 'train', 'test', 'edm-afhqv2-64x64-uncond-vp'),
    'ffhq64': ('ffhq_64', 'train[:69000]', 'train[69000:]', 'edm-ffhq-64x64-uncond-vp'),
}  # fmt: skip


def get_config(variant: str = 'dmd,imagenet64'):
    """The recipe of 'method,teacher'."""
    makers = {name: lambda name=name: _made(*name.split(',')) for name in VARIANTS}
    return kd_config.variant(variant, makers)()


def _made(method: str, of: str):
    return {'dmd': dmd, 'embedding_loss': embedding_loss}[method](of)


def dmd(of: str):
    """DMD2 with its discriminator."""
    method = dict(
        name='kd.methods.diffusion.dmd.dmd',
        times=(80.0,),
        weight='edm',
        optimizer=optimizer(),
        updates=5,
        gan=3e-3,
        gan_critic=1e-2,
        feature='enc_8x8_block2',
    )
    return recipe(of, 'DMD2', method, batch_size=280, steps=40_000)


def embedding_loss(of: str):
    """DMD of 16 examples, beside a discrepancy of them from 256 of the data."""
    depth = 3 if of == 'cifar10' else 4
    method = dict(
        name='kd.methods.diffusion.embedding_loss.embedding_loss',
        times=(80.0,),
        weight='edm',
        optimizer=optimizer(),
        updates=5,
        embedding=dict(name='kd.models.convnet.ConvNet', depth=depth, width=128, num_classes=256),
        networks=4,
        samples=16,
        unbiased=True,
    )
    return recipe(of, 'DMD and embedding loss', method, batch_size=256, steps=40_000)


def optimizer(**changes):
    """That of both players, 500 moves of warming up."""
    return (
        dict(name='adamw', lr=2e-6, b2=0.999, weight_decay=0.01, clip_norm=10.0, warmup_steps=500)
        | changes
    )


def recipe(of: str, label: str, method, *, batch_size: int, steps: int):
    """One stage, `generator`."""
    name, train, validation, folder = DATA[of]
    conditional = {} if of == 'imagenet64' else dict(num_classes=None)

    def denoiser(**changes):
        return dict(
            name='kd.models.denoiser.denoiser',
            network=dict(
                name='kd.models.edm.preset', of=of, dtype='bfloat16', remat=True, **changes
            ),
            schedule=dict(name='kd.losses.schedule.edm'),
            precondition='edm',
            sigma_data=0.5,
            **conditional,
        )

    config = kd_config.recipe(
        stages=('generator',),
        data=dict(name=name, train=train, validation=validation),
        pretrained=dict(teacher=dict(weights=f'hf:/models/{folder}', network=denoiser())),
        report=dict(name='kd.reports.generation.generation', rows=((label, 'generator'),)),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )
    config.generator = kd_config.stage(
        # As released, without the dropout of the teacher's training.
        network=denoiser(dropout=0.0),
        result='generator',
        teacher='teacher',
        method=method,
        optimizer=optimizer(),
        ema={'slow': dict(halflife=1_000, ramp=0.05)},
        evaluators={
            'samples': dict(
                name='kd.evaluators.generator_samples.generator_samples',
                samples=10_000, batch=250, split='validation',
            )
        },
        steps=steps,
        batch_size=batch_size,
        log_every=100,
        eval_every=steps // 8,
        checkpoint_every=steps // 40,
    )  # fmt: skip
    return config
