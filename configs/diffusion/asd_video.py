"""Videos frame by frame in one call each (Adversarial Self-Distillation, arXiv:2511.01419).

    python -m kd.main --config=configs/diffusion/asd_video.py:cpu --workdir=runs/asd_video

| variant | videos | networks | hardware |
|---|---|---|---|
| cpu (default) | a point that turns on a ring, 6 frames | perceptrons and one attention | 2 cores |
| wan21_1_3b | latents, 480 x 832 pixels, 21 frames | Wan 2.1, 1.3 and 14 billion | 64 GPUs |

Stages: a teacher, which denoises whole videos; a causal network that denoises each frame after the
clean ones before it, from which the generators begin; Self-Forcing; and ASD, which besides is
taken for itself with a call more. Generators are measured in one, two and four calls for a frame,
and, as rows of their own, with four calls for the first frame whatever the others have.

The figures `samples` of a stage show its frames by calls beside the data's: in one call the first
frame lies between the modes, and off the ring. With seed 0 four calls for the first frame bring the
share of videos off the ring, in one call for the others, from .54 to .38 (Self-Forcing) and from
.53 to .43 (ASD); the sliced Wasserstein distance is .108 and .105, and .106 and .120. ASD is no
better than Self-Forcing in one call, .106 against .108, and in four it is worse, .158 against .096.
Six minutes where other work shared the cores, under three of them of CPU.

Of `cpu` sizes, rates and the weight of ASD, 3 where the paper has 30, are ours.

`wan21_1_3b` has the paper's models: Wan 2.1 of 1.3 billion parameters, three frames of latents a
block, from /models/wan21_causal, the causal network regressed on trajectories by which Self-Forcing
begins; the one of 14 billion as teacher and the smaller one as critic; flow matching with shift 5,
times [1000, 750, 500, 250], batches of 64, rates 2e-6 and 4e-7 for the critic, five of whose moves
go with one of the generator, guidance of scale 4, an average of .99, prompts alone. The paper has
its discriminator as heads on the critic's layers, here it is a network of its own on latents; its
rate, that of the critic, and the number of steps are ours. It was not run by us.

    python -m kd.data.embed_texts FILE --model=/models/wan --encoder=wan --to=DATA/wan/train
    python -m kd.main --config=configs/diffusion/asd_video.py:wan21_1_3b --data_dir=DATA \
        --workdir=runs/asd_wan
"""

from pathlib import Path

from kd import config as kd_config

latent = kd_config.load_module(Path(__file__).with_name('latent.py'))
VARIANTS = ('cpu', 'wan21_1_3b')
LEVELS = (3.0, 1.2, 0.5, 0.2)
STUDENTS = {'self_forcing': 0.0, 'asd': 3.0}
TITLES = {'self_forcing': 'Self-Forcing', 'asd': 'ASD'}
SCHEDULE = dict(name='kd.losses.schedule.edm', low=0.02, high=5.0)


def get_config(variant: str = 'cpu'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'wan21_1_3b': wan})()


def wan():
    """Wan 2.1 of 1.3 billion parameters, from the one of 14 billion."""
    shift = 5.0
    small, large = (
        latent.flow(dict(name='kd.models.wan.preset', of=of)) for of in ('wan21_1_3b', 'wan21_14b')
    )
    causal = latent.flow(dict(name='kd.models.wan.preset', of='wan21_1_3b', causal=3))
    shape = (21, 60, 104, 16)
    config = latent.begun(
        'wan', ('generator',), dict(text=(512, 4_096)), dict(input=0.0), shape=shape
    )
    config.pretrained = dict(
        teacher=latent.weights('wan21_14b', large),
        critic=latent.weights('wan21_1_3b', small),
        causal=latent.weights('wan21_causal', causal),
    )
    config.report.rows = (('ASD', 'generator'),)
    config.generator = latent.stage(
        network=causal,
        teacher='teacher',
        references={'start': 'causal', 'critic': 'critic'},
        method=dict(
            name='kd.methods.diffusion.asd_video.asd_video',
            times=latent.shifted(4, shift),
            clock=dict(name='kd.sampling.times.straight', shift=shift),
            critic='critic',
            guidance=4.0,
            updates=5,
            optimizer=latent.adamw(4e-7, b1=0.0),
            discriminator=dict(name='kd.models.discriminator.FeatureHead', logits=4),
        ),
        optimizer=latent.adamw(2e-6, b1=0.0),
        ema={'slow': dict(decay=0.99, of='generator', start=200)},
        probe='causal_samples.causal_samples',
        samples=64,
        steps=1_000,
        batch_size=64,
    )
    return config


def cpu():
    """Minutes on two cores."""
    config = kd_config.recipe(
        stages=('teacher', 'causal', *STUDENTS),
        data=dict(
            source=dict(name='kd.data.builders.ring_video.ring_video'),
            train='train', validation='validation',
        ),
        report=dict(
            name='kd.reports.generation.generation',
            rows=(
                ('teacher', 'teacher'),
                *(
                    row
                    for name, title in TITLES.items()
                    for row in ((title, name), (f'{title}, first frame 4', name, 'enhanced'))
                ),
            ),
        ),
    )  # fmt: skip
    measured = dict(samples=2_000, batch=1_000, support='kd.data.builders.ring_video.on_ring')
    config.teacher = kd_config.stage(
        network=dict(
            name='kd.models.denoiser.denoiser',
            network=dict(name='kd.models.velocity_mlp.VelocityMLP', width=192, depth=4),
            schedule=SCHEDULE,
            kind='flow',
            precondition='edm',
        ),
        method=dict(
            name='kd.methods.diffusion.denoising.denoising',
            law=dict(name='kd.sampling.times.lognormal', mean=-0.8, deviation=1.4),
            weight='edm',
            label_dropout=0.0,
        ),
        optimizer=dict(name='adam', lr=2e-3, schedule='cosine'),
        ema={'slow': dict(decay=0.99)},
        evaluators={
            'samples': dict(
                name='kd.evaluators.generator_samples.denoiser_samples', steps=(1, 2, 4, 32),
                weights='slow', **measured,
            )
        },
        steps=3_000,
        batch_size=256,
        log_every=100,
    )  # fmt: skip
    causal = dict(name='kd.models.causal_video.causal_video', schedule=SCHEDULE, width=48)
    config.causal = kd_config.stage(
        network=causal,
        method=dict(
            name='kd.methods.diffusion.asd_video.forced',
            law=dict(name='kd.sampling.times.among', levels=LEVELS),
            weight='x0',
        ),
        optimizer=dict(name='adam', lr=1e-3, schedule='cosine'),
        steps=2_000,
        batch_size=256,
        log_every=100,
    )
    probe = dict(name='kd.evaluators.causal_samples.causal_samples', weights='slow', **measured)
    for name, weight in STUDENTS.items():
        config[name] = kd_config.stage(
            network=causal,
            result='generator',
            teacher='teacher',
            teacher_weights='slow',
            references={'start': 'causal'},
            method=dict(
                name='kd.methods.diffusion.asd_video.asd_video',
                times=LEVELS,
                optimizer=dict(name='adam', lr=1e-3, b1=0.0),
                discriminator=dict(
                    name='kd.models.mlp.MLP', widths=(96, 96), num_classes=len(LEVELS),
                    activation='silu',
                ),
                weight=weight,
                denoising='edm',
                updates=3,
            ),
            optimizer=dict(name='adam', lr=3e-4, b1=0.0),
            ema={'slow': dict(decay=0.99, of='generator')},
            evaluators={'samples': probe, 'enhanced': dict(whole=(0,), **probe)},
            steps=700,
            batch_size=128,
            log_every=20,
        )  # fmt: skip
    return config
