"""Super-resolution by a small network that keeps a quarter of its channels again and again
(IMDN 2019, arXiv:1909.11856).

    python -m kd.main --config=configs/sr/imdn.py:cpu --workdir=runs/imdn
    python -m kd.main --config=configs/sr/imdn.py:x2 --workdir=runs/imdn_x2 --data_dir=DIR

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | strips of scikit-learn's two photographs, x2 | 3 blocks of 16 channels | 2 cores |
| x2 (default), x3, x4 | DIV2K, in `--data_dir` | 6 blocks of 64 channels | one GPU, days |

`cpu` trains IMDN and a plain network of as many parameters (24,987 and 25,632). Both learn a tenth
of what is missing from bicubic enlargement, which so few steps would not reach alone (ours); the
report has PSNR and SSIM of the strips in the middle of the photographs. It takes a minute and a
half; with seed 0 IMDN has 27.47 dB, the plain network 27.50, bicubic enlargement 26.55.

The other variants have the paper's network, patches of 192 pixels, batch of 16, L1 and Adam at
2e-4, halved every 200,000 of 1,000,000 steps. `--data_dir` has the folders `DIV2K_train_HR` and
`DIV2K_valid_HR` below `DIV2K`, as pictures or, to be mapped and not decoded, as arrays
(`numpy.save` of each). `x3` and `x4` begin as a trained `x2`, but for its last convolution, with
`--config.imdn.references.start=runs/imdn_x2/imdn`. The paper's Set5 is 38.00, 34.36 and 32.21 dB;
validation is by DIV2K's own pictures. It was not run by us.

Pictures of a folder are scored, and small ones enlarged, by `python -m kd.restore`.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'x2', 'x3', 'x4')


def get_config(variant: str = 'x2'):
    """The recipe of a variant."""
    scales = {f'x{scale}': (lambda scale=scale: div2k(scale)) for scale in (2, 3, 4)}
    return kd_config.variant(variant, {'cpu': cpu, **scales})()


def cpu():
    """Minutes on two cores."""
    imdn = dict(name='kd.models.imdn.IMDN', scale=2, channels=16, blocks=3)
    plain = dict(name='kd.models.restorers.PlainSR', scale=2, channels=14, blocks=3)
    config = recipe(
        dict(of='china_flower', scale=2, size=24, count=3_000),
        train='train',
        validation='test',
        rows=(('IMDN', 'imdn'), ('plain', 'plain')),
    )
    run = dict(
        batch_size=8,
        optimizer=dict(name='adam', lr=4e-3, schedule='cosine'),
        steps=1_000,
        log_every=50,
        eval_every=250,
        checkpoint_every=1_000,
    )
    scored = dict(of='china_flower', folder='test', scale=2)
    for name, network in (('imdn', imdn), ('plain', plain)):
        over = dict(name='kd.models.restorers.over_bicubic', network=network, share=0.1)
        config[name] = stage(over, scored, **run)
    return config


def div2k(scale):
    """Days on a GPU."""
    config = recipe(
        dict(of='DIV2K', scale=scale, size=192 // scale),
        train='DIV2K_train_HR',
        validation='DIV2K_valid_HR',
        rows=(('IMDN', 'imdn'),),
    )
    halved = dict(boundaries=(0.2, 0.4, 0.6, 0.8), factor=0.5)
    config.imdn = stage(
        dict(name='kd.models.imdn.IMDN', scale=scale),
        dict(of='DIV2K', folder='DIV2K_valid_HR', scale=scale),
        batch_size=16,
        optimizer=dict(name='adam', lr=2e-4, schedule='step', schedule_args=halved),
        steps=1_000_000,
        log_every=100,
        eval_every=20_000,
        checkpoint_every=5_000,
    )
    return config


def stage(network, scored, **run):
    """A network that learns from patches and is scored on whole pictures."""
    return kd_config.stage(
        network=network,
        method=dict(name='kd.methods.sr.restoration.restoration'),
        evaluators={
            'pictures': dict(name='kd.evaluators.restoration.restoration', **scored),
        },
        **run,
    )


def recipe(patches, *, train, validation, rows):
    """Networks by their scores."""
    return kd_config.recipe(
        stages=tuple(stage for _, stage in rows),
        data=dict(
            source=dict(name='kd.data.patches.patches', **patches),
            train=train,
            validation=validation,
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=rows,
            metrics=(
                ('pictures/psnr', 'PSNR, dB'),
                ('pictures/ssim', 'SSIM'),
                ('pictures/bicubic_psnr', 'bicubic PSNR, dB'),
            ),
            curves=(('pictures/psnr', 'PSNR, dB'),),
        ),
    )
