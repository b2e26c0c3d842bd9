"""Super-resolution in one step, with fidelity against realism by a number (2024, arXiv:2412.09465).

    python -m kd.main --config=configs/sr/oftsr.py:cpu --workdir=runs/oftsr

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 grey patches of scikit-learn's two photographs, x4 | perceptrons, 3 x 256 | 2 cores |
| ffhq256 (default) | FFHQ at 256 pixels, x4 | ADM of 93.6M | 8 GPUs, days |
| div2k | DIV2K, crops of 256 pixels, x4 | the same | 8 GPUs, days |
| imagenet256 | ImageNet at 256 pixels, x4 | ADM of 552.8M | 8 GPUs, days |

Stages: a flow that begins at what is left of an image, with a share of noise, and the student,
which begins as it. The report has PSNR and a Frechet distance of details, which is no FID: of the
flow by Euler's steps, of the student's one call by its time.

`cpu` takes two and a half minutes. With seed 0, of patches of the strips in the middle of the
photographs, the flow has 20.43 dB and a distance of .570 in one step, 18.68 dB and .072 in 80; the
student 20.68, 20.55, 20.22, 19.60 and 18.76 dB at t = .01, .25, .5, .75 and .99, and distances of
.627, .529, .382, .218 and .095. What is left of patches has 21.01 dB as it is, and 1.647.

`ffhq256`, `div2k` and `imagenet256` have the paper's networks (to the parameter), L1 for the flow,
shares of noise and weights, Adam at 1e-4 for the flow and at 1e-5 for the student, as released, and
batches of 32, of 8 for the student of `div2k`; low-resolution images are by an antialiased bicubic
in both directions. FFHQ (`ffhq_256`) and ImageNet (`imagenet_256`) are data sets in `--data_dir`,
DIV2K is as of `configs/sr/imdn.py`. Crops of it are turned from left to right by a coin, other
images are not; the paper turns all of them so, and 6 % upside down. Steps of students are in the
paper's range of 5,000 to 50,000, warm-ups in that of 500 to 1,000, and ImageNet's network has the
dropout of the other (ours). None was run by us.

Pictures of any size are restored, and folders scored by the protocols of tables, by

    python -m kd.restore --run=runs/oftsr/student --average=slow --time=0.5 --pictures=Set5
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'ffhq256', 'div2k', 'imagenet256')
TIMES = (0.01, 0.25, 0.5, 0.75, 0.99)


def get_config(variant: str = 'ffhq256'):
    """The recipe of a variant."""
    adm = dict(ffhq256='ffhq256', div2k='ffhq256', imagenet256='adm256')
    images = dict(ffhq256='ffhq_256', imagenet256='imagenet_256', div2k=div2k_crops())
    shares = dict(ffhq256=0.1, div2k=0.2, imagenet256=0.2)
    large = {
        name: (lambda name=name: full(images[name], adm[name], shares[name], name == 'div2k'))
        for name in adm
    }
    return kd_config.variant(variant, {'cpu': cpu, **large})()


def cpu():
    """Minutes on two cores."""
    crops = dict(
        name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=40_000
    )
    return recipe(
        data=dict(
            source=low(crops, down='box', up='repeat'), train='train', validation='test'
        ),
        network=dict(
            name='kd.models.velocity_mlp.VelocityMLP', width=256, depth=3, num_classes=None,
            beside=('low',),
        ),
        distance='l2',
        share=0.3,
        teacher=dict(
            optimizer=dict(name='adam', lr=2e-3, schedule='cosine'), steps=6_000, batch_size=256
        ),
        student=dict(
            optimizer=dict(name='adam', lr=5e-4, schedule='cosine'), steps=3_000, batch_size=256
        ),
        averages=0.99,
        measured=dict(samples=3_000, batch=1_000),
        steps=(1, 80),
    )  # fmt: skip


def div2k_crops():
    """Crops of 256 pixels."""
    return dict(name='kd.data.patches.crops', of='DIV2K', size=256, augment=('flip',))


def full(images, adm, share, folders):
    """Days on 8 GPUs."""
    network = dict(
        name='kd.models.edm.preset', of=adm, beside=('low',), dropout=0.1, remat=True, augment=0
    )
    splits = dict(train='train', validation='test')
    if folders:
        splits = dict(train='DIV2K_train_HR', validation='DIV2K_valid_HR')
    if images == 'imagenet_256':
        splits['validation'] = 'validation'
    adam = dict(name='adam', lr=1e-4, clip_norm=1.0)
    return recipe(
        data=dict(source=low(images, down='torch_antialias', up='torch_antialias'), **splits),
        network=dict(name='kd.models.one_time.one_time', network=network, scale=999.0),
        distance='l1',
        share=share,
        teacher=dict(
            optimizer=dict(adam, warmup_steps=1_000), steps=300_000, batch_size=32
        ),
        student=dict(
            optimizer=dict(adam, lr=1e-5, warmup_steps=500), steps=20_000,
            batch_size=8 if folders else 32,
        ),
        averages=0.9999,
        measured=dict(samples=1_000, batch=32),
        steps=(1, 20),
        mesh=dict(data=-1),
    )  # fmt: skip


def low(of, **by):
    """Images and what is left of them at a quarter of their sides."""
    name = 'kd.data.transforms.low_resolution.low_resolution'
    return dict(name=name, of=of, scales=(4,), **by)


def recipe(
    *, data, network, distance, share, teacher, student, averages, measured, steps, **parallel
):
    """Stages flow, student."""
    config = kd_config.recipe(
        stages=('flow', 'student'),
        data=data,
        report=dict(
            name='kd.reports.generation.generation',
            rows=(('flow', 'flow'), ('OFTSR', 'student')),
            samples='restored',
        ),
        **parallel,
    )
    config.flow = stage(
        'restoring_flow', network, averages, dict(measured, steps=steps),
        method=dict(share=share, distance=distance), **teacher,
    )  # fmt: skip
    config.student = stage(
        'oftsr', network, averages, dict(measured, times=TIMES),
        method=dict(share=share), teacher='flow', teacher_weights='slow',
        references={'start': 'flow@slow'}, **student,
    )  # fmt: skip
    return config


def stage(name, network, averages, measured, *, method, steps, **fields):
    """A network that is scored by its restored images."""
    return kd_config.stage(
        network=network,
        method=dict(name=f'kd.methods.sr.oftsr.{name}', **method),
        ema={'slow': averages},
        evaluators={
            'restored': dict(name='kd.evaluators.details.restored', weights='slow', **measured)
        },
        steps=steps,
        log_every=max(steps // 50, 1),
        checkpoint_every=steps // 2,
        **fields,
    )
