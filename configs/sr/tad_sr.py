r"""Super-resolution in one step, distilled from fifteen (TAD-SR 2024, arXiv:2408.07476).

    python -m kd.main --config=configs/sr/tad_sr.py:cpu --workdir=runs/tad_sr

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | grey patches of 8x8 of two photographs, x4 | perceptrons, 3 x 128 | 2 cores |
| imagenet256_realesrgan (default) | latents of ImageNet | Swin-UNet, 118,593,583 | 8 GPUs |
| ffhq | latents of faces of 512 pixels | the same, of 8 channels | 8 GPUs |

Stages: a teacher, a diffusion that shifts low pictures to whole ones (ResShift, arXiv:2307.12348);
its solutions, made once of a noise for each example; a student of one step that learns these alone
(`reg`, as SinSR does), and one that also has high-frequency score distillation and a discriminator
(`full`). The report has PSNR and the Frechet distance of patches: what is near on the average is
not what looks right, and neither number alone says which is better.

`cpu` takes a minute and a half. With seed 0 the teacher has 19.99 dB and a Frechet distance of .53
in fifteen steps; in one `reg` has 20.30 and .57, `full` 20.29 and .77: as in the claim, what comes
to the solutions does not bring the distance down here.

The other variants have the paper's teacher, rates, weights, steps and warm-up, and batches of 8 a
GPU; ResShift's rate for the teacher. Their data are written beforehand by

    python -m kd.data.degrade PICTURES --encoder=hf:VQ_F4 --to=DIR/imagenet256_realesrgan/train \
        --count=240000

and so `test`, with `--keep --size=512` of faces: examples of a fixed set, where the paper degrades
anew in every step. That faces are degraded as other pictures are is ours. We know no weights of the
networks in a form that is read here, so that the teacher is trained; it was not run by us.

Pictures of any size are restored, and folders scored by the protocols of tables, by
`python -m kd.restore --run=runs/tad_sr/full --average=slow`.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'imagenet256_realesrgan', 'ffhq')
SHIFT = dict(name='kd.losses.schedule.residual_shift', steps=15, kappa=2.0)


def get_config(variant: str = 'imagenet256_realesrgan'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant, {'cpu': cpu, 'imagenet256_realesrgan': imagenet, 'ffhq': ffhq}
    )()


def cpu():
    """Minutes on two cores."""
    crops = dict(
        name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=8_000
    )
    low = dict(
        name='kd.data.transforms.low_resolution.low_resolution', of=crops, scales=(4,), up='torch'
    )
    return recipe(
        data=dict(source=residual(low), train='train', validation='test'),
        network=shifted(dict(name='kd.models.shifted.ShiftedMLP', width=128, depth=3)),
        teacher=dict(
            optimizer=dict(name='adam', lr=2e-3, schedule='cosine'), steps=3_000, batch_size=128
        ),
        student=dict(optimizer=dict(name='adam', lr=5e-4), steps=300, batch_size=64),
        discriminator=dict(name='adam', lr=5e-4),
        features=('feature0', 'feature1', 'feature2'),
        solved=250,
        samples=2_000,
        average=0.98,
        distance=('frechet', 'Frechet distance'),
    )


def imagenet():
    """Days on 8 GPUs."""
    return latent('imagenet256_realesrgan', 'vq_f4', side=64, channels=3, low=64)


def ffhq():
    """Days on 8 GPUs; low pictures have the size of whole ones."""
    return latent('ffhq512_degraded', 'vq_f8', side=64, channels=8, low=512)


def latent(path, encoder, *, side, channels, low):
    """Latents of pictures, and the network of ResShift."""
    latents = dict(
        name='kd.data.latents.latents',
        path=path,
        encoder=encoder,
        fields=dict(input=(side, side, channels), anchor=(side, side, channels), low=(low, low, 3)),
    )
    network = dict(name='kd.models.swin_unet.SwinUNet', dtype='bfloat16', remat=True)
    adamw = dict(name='adamw', lr=5e-5, weight_decay=0.0)
    return recipe(
        data=dict(source=residual(latents, anchor='anchor'), train='train', validation='test'),
        network=shifted(network, anchored=True),
        teacher=dict(optimizer=dict(adamw, warmup_steps=5_000), steps=500_000, batch_size=64),
        student=dict(optimizer=dict(adamw, warmup_steps=5_000), steps=30_000, batch_size=64),
        discriminator=adamw,
        features=('level0', 'level1', 'level2', 'level3', 'middle'),
        solved=64,
        samples=2_000,
        average=0.999,
        distance=('sliced_wasserstein', 'sliced Wasserstein distance'),
        mesh=dict(data=-1),
    )


def residual(of, **more):
    """Data less their anchor."""
    return dict(name='kd.data.transforms.residual.residual', of=of, **more)


def shifted(network, **more):
    """A network of pictures as one of residuals."""
    return dict(name='kd.models.shifted.shifted', network=network, schedule=SHIFT, **more)


def recipe(
    *, data, network, teacher, student, discriminator, features, solved, samples, average, distance,
    **parallel,
):  # fmt: skip
    """Stages teacher, solutions, reg, full."""
    rows = (('teacher', 'teacher'), ('reg', 'reg'), ('full', 'full'))
    metrics = tuple(
        (f'patches/{name}_{n}', f'{title}, {n} step{"s" * (n > 1)}')
        for name, title in (('psnr', 'PSNR, dB'), distance)
        for n in (1, 15)
    )
    config = kd_config.recipe(
        stages=('teacher', 'solutions', 'reg', 'full'),
        data=data,
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=rows,
            metrics=(*metrics, ('patches/low_psnr', 'PSNR of the low patches, dB')),
            curves=(metrics[0], metrics[2]),
        ),
        **parallel,
    )

    def trained(method, steps, settings, **fields):
        every = max(settings['steps'] // 30, 1)
        probe = dict(
            name='kd.evaluators.restored.restored', steps=steps, weights='slow', samples=samples,
            batch=solved,
        )  # fmt: skip
        return kd_config.stage(
            network=network,
            method=method,
            ema={'slow': average},
            evaluators={'patches': probe},
            log_every=every,
            eval_every=max(settings['steps'] // 6, 1),
            checkpoint_every=settings['steps'] // 2,
            **settings,
            **fields,
        )

    config.teacher = trained(
        dict(name='kd.methods.diffusion.denoising.denoising', weight='x0', label_dropout=0.0),
        (1, 15),
        teacher,
    )
    config.solutions = kd_config.stage(
        teacher='teacher',
        teacher_weights='slow',
        method=dict(name='kd.methods.cache.nothing'),
        writers={'samples': dict(name='kd.methods.sampled.trajectories', steps=15, keep='ends')},
        steps=1,
        batch_size=solved,
    )
    for name, weights in (
        ('reg', dict(hsd=0.0, adversarial=0.0)),
        ('full', dict(features=features, optimizer=discriminator)),
    ):
        config[name] = trained(
            dict(name='kd.methods.sr.tad_sr.tad_sr', **weights),
            (1,),
            student,
            teacher='teacher',
            teacher_weights='slow',
            references={'start': 'teacher@slow'},
            data={**data, 'source': dict(name='kd.data.sampled.pairs', stage='solutions')},
        )
    return config
