"""A diffusion transformer in two steps, then tuned by a reward beside distillation (2511.20549).

    python -m kd.main --config=configs/diffusion/flash_dmd.py:cpu --workdir=runs/flash

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 digits of scikit-learn, 1,500 | DiT of 0.1 M parameters | 2 cores |
| cifar10 (default) | CIFAR-10, in `--data_dir` | DiT of 36 M parameters | 8 GPUs or v5e-8 |
| sdxl | latents and texts, see `latent.py` | SDXL, 2,567 M | 8 GPUs of 141 GB |
| sd3_medium | the same of Stable Diffusion 3 | adapters on 2,028 M | 8 GPUs of 80 GB |

Stages: a classifier, whose layers the discriminator reads and whose features measure samples; the
teacher; the generator of stage 1 (`distilled`); and from there the reward alone (`alone`) and the
reward with a round of distillation after five of its moves (`joint`). The reward is the brightness
of a state, noise and all, and says nothing of digits: what it does to them alone is the point.

`sdxl` and `sd3_medium` are the paper's models in four steps, stage 1 alone: batches of 64, 1,000
moves with one of the critic for SDXL, and 4,000 with two of adapters for SD3-Medium. The paper's
discriminator has heads on SAM, which sees decoded images; here the head is on latents, a stand-in.
Its stage 2 wants a reward model of noisy latents, which is not here. Rates, the rank 64 and which
kernels have adapters, guidance and, for SD3, no coupling are ours. In `cpu` and `cifar10` a DiT of
our own stands for these models, the classifier for SAM and brightness for the reward model; four
times with three of matching, batches of 64, 1,000 moves in stage 1 and 2,000 rounds in stage 2 are
the paper's in `cifar10`, its rates are ours. Of all variants `cpu` alone was run by us.

`cpu`, seed 0, in two steps: the sliced Wasserstein distance is .213 after stage 1 (the teacher's is
.322 in two steps and .064 in sixteen), 1.892 with the reward alone, whose samples are white with
few dark pixels, and .356 jointly, whose samples are digits with grey around them. The Frechet
distance of the classifier's features is 25.9, 521.1 and 47.2. It took 43 minutes beside much other
work, 15 of them to compile.
"""

from pathlib import Path

from kd import config as kd_config

few_steps = kd_config.load_module(Path(__file__).with_name('mnist.py'))
latent = kd_config.load_module(Path(__file__).with_name('latent.py'))
VARIANTS = ('cpu', 'cifar10', 'sdxl', 'sd3_medium')
METHODS = 'kd.methods.diffusion'
# Stage: (title, what it has).
TUNED = {'alone': 'reward alone', 'joint': 'reward and distillation'}


def get_config(variant: str = 'cifar10'):
    """The recipe of a variant."""
    made = {'cpu': cpu, 'cifar10': cifar10, 'sdxl': sdxl, 'sd3_medium': sd3_medium}
    return kd_config.variant(variant, made)()


def sdxl():
    """Stage 1 of Stable Diffusion XL."""
    return latent.recipe(
        'sdxl',
        label='Flash-DMD, 4 steps',
        network=latent.unet('sdxl'),
        method=first(times=latent.STEPS, guidance=8.0, updates=1, optimizer=latent.adamw(5e-7)),
        fields=dict(text=(77, 2_048), pooled=(1_280,), size=(6,)),
        constants=dict(size=(1_024, 1_024, 0, 0, 1_024, 1_024)),
        shape=(128, 128, 4),
        lr=5e-7,
        batch_size=64,
        steps=1_000,
    )


def sd3_medium():
    """Stage 1 of Stable Diffusion 3, by adapters."""
    shift = 3.0
    network = dict(name='kd.models.mmdit.preset', of='sd3_medium')
    config = latent.recipe(
        'sd3',
        label='Flash-DMD, 4 steps',
        network=latent.flow(network),
        method=first(
            times=latent.shifted(4, shift),
            clock=dict(name='kd.sampling.times.straight', shift=shift),
            guidance=7.0,
            updates=2,
            coupling=1.0,
            weight='flow',
            optimizer=latent.adamw(1e-6),
        ),
        fields=dict(text=(333, 4_096), pooled=(2_048,)),
        shape=(128, 128, 16),
        lr=5e-5,
        batch_size=64,
        steps=4_000,
        folder='transformer',
    )
    adapter = dict(rank=64, alpha=64.0, targets=r'(to_[qkv]|add_[qkv]_proj|to_out_0)/kernel$')
    config.generator.network = latent.flow(network, adapter=adapter)
    config.generator.references = {'start': 'teacher'}
    return config


def first(**arguments):
    """The method of stage 1."""
    head = dict(name='kd.models.discriminator.FeatureHead')
    return dict(
        name=f'{METHODS}.flash_dmd.flash_dmd', high=3, gan=0.1, heads={'latents': head}, **arguments
    )


def cpu():
    """Minutes on two cores."""
    return recipe(
        **few_steps.DIGITS,
        teacher=dict(steps=1_200, lr=2e-3, batch_size=128),
        students=dict(steps=500, lr=3e-4, critic_lr=6e-4, gan=0.3, updates=2, batch_size=128),
        tuned=dict(steps=50, lr=1e-4, critic_lr=6e-4, gan=0.3, updates=2, batch_size=128),
        times=(80.0, 2.5),
        high=1,
        reward=dict(reward_times=1, beta=1.0),
        samples=1_000,
        reads={'first': 'classifier/hidden0', 'second': 'classifier/hidden1'},
    )


def cifar10():
    """A teacher from nothing, and its generators, in a day on 8 GPUs."""
    return recipe(
        **few_steps.CIFAR10,
        teacher=dict(steps=400_000, lr=2e-4, batch_size=512),
        students=dict(steps=1_000, lr=1e-5, critic_lr=1e-5, gan=0.1, updates=1, batch_size=64),
        tuned=dict(steps=2_000, lr=1e-5, critic_lr=1e-5, gan=0.1, updates=1, batch_size=64),
        times=few_steps.LEVELS['four'],
        high=3,
        reward=dict(reward_times=2, beta=1.0),
        samples=10_000,
        reads={'first': 'classifier/block1', 'second': 'classifier/block2'},
        mesh=dict(data=-1),
    )


def recipe(*, teacher, students, tuned, times, high, reward, samples, reads, **world):
    """Stages classifier, teacher, distilled, alone, joint."""
    network, probes = few_steps.denoiser(**world), few_steps.PROBES
    measured = dict(
        weights='slow', samples=samples, batch=250, classifier='classifier', split='train'
    )
    config = few_steps.begun(
        stages=('distilled', *TUNED),
        rows=(
            ('teacher', 'teacher'),
            ('Flash-DMD', 'distilled'),
            *((title, name) for name, title in TUNED.items()),
        ),
        teacher=teacher,
        evaluators={
            'samples': dict(name=f'{probes}.denoiser_samples', steps=(1, 2, 16), **measured)
        },
        **world,
    )
    asked = dict(
        reward=dict(name=f'{METHODS}.preferred_steps.brightness'), reward_updates=5, candidates=4,
        **reward,
    )  # fmt: skip

    def stage(sizes, method, **more):
        return kd_config.stage(
            network=network,
            result='generator',
            method=dict(times=times, **method),
            optimizer=dict(name='adam', b1=0.0, lr=sizes['lr'], clip_norm=10.0),
            ema={'slow': dict(halflife=sizes['steps'] / 20, ramp=0.05)},
            evaluators={'samples': dict(name=f'{probes}.generator_samples', **measured)},
            steps=sizes['steps'],
            batch_size=sizes['batch_size'],
            log_every=max(sizes['steps'] // 30, 1),
            checkpoint_every=sizes['steps'] // 2,
            **more,
        )

    def flash(sizes, references, **more):
        head = dict(name='kd.models.discriminator.FeatureHead')
        method = dict(
            name=f'{METHODS}.flash_dmd.flash_dmd',
            high=high,
            weight='edm',
            optimizer=dict(name='adam', b1=0.0, lr=sizes['critic_lr'], clip_norm=10.0),
            heads=dict.fromkeys(reads, head),
            reads=reads,
            gan=sizes['gan'],
            updates=sizes['updates'],
            **more,
        )
        return stage(
            sizes, method, teacher='teacher', teacher_weights='slow', references=references
        )

    judge, begin = {'classifier': 'classifier'}, {'start': 'distilled@slow'}
    config.distilled = flash(students, judge)
    config.alone = stage(
        tuned, dict(name=f'{METHODS}.preferred_steps.preferred_steps', **asked),
        references=judge | begin,
    )  # fmt: skip
    config.joint = flash(tuned, judge | begin, **asked)
    return config
