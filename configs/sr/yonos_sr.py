"""Super-resolution in one step, learnt along scales (YONOS-SR 2024, arXiv:2401.17258).

    python -m kd.main --config=configs/sr/yonos_sr.py:cpu --workdir=runs/yonos_sr

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 grey patches of scikit-learn's two photographs | perceptrons, 3 x 256 | 2 cores |
| x4 (default), x8 | latents of 512 pixels, in `--data_dir` | Stable Diffusion 2.1, 866M | 8 A100 |

Stages: a denoiser that is told the image at half of its sides (x2); the same for a quarter (x4), by
the image itself and by the first denoiser, which is told more of it (and x8 by x4); then a decoder,
tuned to what the one call of the last denoiser leaves. The report has PSNR and a Frechet distance
of details, which is no FID, by steps of DDIM.

`cpu` takes 75 s. With seed 0, x4 in one call has 18.33 dB and a distance of .50 learnt from images,
17.59 dB and .31 from the denoiser of x2, and 19.84 dB and 1.18 with the decoder that was tuned by
L1; x2 itself has 17.82 dB and .09. In four calls the two of x4 differ by .16 dB and .02.

`x4` and `x8` have the networks of Stable Diffusion 2.1 (the paper's version is not known) with as
many channels again for the small image, latents of 64 x 64 x 4 and the decoder of its autoencoder.
Batches, rates, steps, weights of times, v-prediction with no signal at the end and a text that is
nothing are ours. The decoder learns by L1, by features and against a discriminator, as the paper's;
that the features are those of VGG16 (`timm/vgg16.tv_in1k`) without LPIPS's weights of channels, and
that the discriminator is weighed as latent diffusion has it, from the first step on, is ours too.
Data are written beforehand, for x4 and so for x2 and x8, `train` and `validation`, by

    python -m kd.data.degrade PICTURES --encoder=hf:/models/sd21/vae --to=DIR/sr_x4/train \\
        --nested --scale=4 --size=512 --name=none --count=100000

Neither was run by us. Pictures of any size are restored, and folders scored by the protocols of
tables, by `python -m kd.restore --run=runs/yonos_sr/decoder`.
"""

from kd import config as kd_config
from kd.models.latent_parts import SHARDING

VARIANTS = ('cpu', 'x4', 'x8')
METHODS = 'kd.methods.sr.yonos_sr'


def get_config(variant: str = 'x4'):
    """The recipe of a variant."""
    made = {'cpu': cpu, 'x4': lambda: latent(4), 'x8': lambda: latent(8)}
    return kd_config.variant(variant, made)()


def cpu():
    """Minutes on two cores."""
    crops = dict(
        name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=40_000
    )

    def data(*scales):
        name = 'kd.data.transforms.low_resolution.low_resolution'
        source = dict(name=name, of=crops, scales=scales, down='box', up='repeat')
        return dict(source=source, train='train', validation='test')

    network = dict(
        name='kd.models.denoiser.denoiser',
        network=dict(
            name='kd.models.velocity_mlp.VelocityMLP', width=256, depth=3, beside=('low',)
        ),
        schedule=dict(name='kd.losses.schedule.cosine'),
        kind='v',
    )
    stages = dict(first=3_000, direct=1_500, distilled=1_500, decoder=1_500)
    config = kd_config.recipe(
        stages=tuple(stages),
        data=data(2, 4),
        report=dict(
            name='kd.reports.generation.generation',
            rows=(
                ('x2', 'first'),
                ('x4 by images', 'direct'),
                ('x4 by x2', 'distilled'),
                ('x4, mended', 'decoder'),
            ),
            samples='restored',
        ),
    )
    run = dict(
        optimizer=dict(name='adam', lr=1e-3, schedule='cosine'), batch_size=256, log_every=100
    )
    probe = dict(name='kd.evaluators.details.denoised', samples=3_000, batch=1_000)

    def stage(name, method, steps=(1, 4, 16), **fields):
        return kd_config.stage(
            method=dict(name=f'{METHODS}.{method}'),
            steps=stages[name],
            checkpoint_every=stages[name] // 2,
            evaluators={'restored': dict(probe, steps=steps, decoded=name == 'decoder')},
            **run,
            **fields,
        )

    start = dict(network=network, references={'start': 'first'})
    config.first = stage('first', 'scale_distillation', network=network, data=data(2))
    config.direct = stage('direct', 'scale_distillation', **start)
    config.distilled = stage('distilled', 'scale_distillation', teacher='first', **start)
    refiner = dict(name='kd.models.refiner.Refiner', width=256, depth=2)
    config.decoder = stage(
        'decoder', 'decoder_tuning', (1,), network=refiner, teacher='distilled'
    )  # fmt: skip
    return config


def latent(scale):
    """A cascade of Stable Diffusion's networks, and the decoder."""
    cascade = [2**i for i in range(1, scale.bit_length())]
    network = dict(
        name='kd.models.denoiser.denoiser',
        network=dict(
            name='kd.models.unet_conditional.preset', of='sd21', beside=('low',),
            dtype='bfloat16', remat=True, fused=True,
        ),
        schedule=dict(
            name='kd.losses.schedule.discrete', kind='scaled_linear', zero_terminal=True
        ),
        kind='v',
    )  # fmt: skip
    vgg = dict(name='kd.models.vgg_features.VGGFeatures', dtype='bfloat16')
    plain = dict(network, network={k: x for k, x in network['network'].items() if k != 'beside'})
    autoencoder = dict(name='kd.models.autoencoder_kl.preset', of='sd15')
    latents = dict(input=(64, 64, 4), low=(64, 64, 4), text=(77, 1_024))

    def data(factor, **more):
        source = dict(
            name='kd.data.latents.latents', path=f'sr_x{factor}', encoder='none',
            fields={**latents, **more}, constants=dict(text=0.0),
        )  # fmt: skip
        return dict(source=source, train='train', validation='validation')

    names = [f'x{factor}' for factor in cascade]
    config = kd_config.recipe(
        stages=(*names, 'decoder'),
        data=data(scale, easier=(64, 64, 4), image=(512, 512, 3)),
        pretrained=dict(
            diffusion=dict(weights='hf:/models/sd21/unet', network=plain),
            autoencoder=dict(weights='hf:/models/sd21/vae', network=autoencoder),
            vgg16=dict(weights='hf:/models/vgg16', network=vgg),
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=tuple((name, name) for name in (*names, 'decoder')),
            metrics=(('train/loss', 'loss'),),
        ),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=8),
    )
    run = dict(
        optimizer=dict(name='adamw', lr=5e-5, weight_decay=0.01, clip_norm=1.0, warmup_steps=500),
        batch_size=64,
        ema={'slow': 0.9999},
        log_every=100,
        steps=50_000,
        checkpoint_every=5_000,
    )
    for before, factor in zip((None, *cascade), cascade, strict=False):
        easier = {} if before is None else dict(easier=(64, 64, 4))
        of = {} if before is None else dict(teacher=f'x{before}', teacher_weights='slow')
        begun = 'diffusion' if before is None else f'x{before}@slow'
        config[f'x{factor}'] = kd_config.stage(
            network=network,
            method=dict(name=f'{METHODS}.scale_distillation'),
            references={'start': begun},
            data=data(factor, **easier),
            **of,
            **run,
        )
    config.decoder = kd_config.stage(
        network=dict(name='kd.models.refiner.latent_decoder', autoencoder=autoencoder),
        method=dict(
            name=f'{METHODS}.decoder_tuning',
            perceptual=1.0,
            features=tuple(f'level{i}' for i in range(5)),
            adversarial=0.5,
            last='decoder/conv_out/kernel',
        ),
        teacher=names[-1],
        teacher_weights='slow',
        references={'start': 'autoencoder', 'perceptual': 'vgg16'},
        **run,
    )
    return config
