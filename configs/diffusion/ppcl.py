"""Runs of a diffusion transformer's blocks as one block each, to be put in (arXiv:2511.16156).

    python -m kd.main --config=configs/diffusion/ppcl.py:cpu --workdir=runs/ppcl

| variant | data | networks | hardware |
|---|---|---|---|
| cpu | 8x8 digits of scikit-learn, 1,500 | DiT of 10 blocks, 0.2 M parameters | 2 cores |
| qwen_image (default) | texts and latents in `--data_dir` | 20.4 B to 11.5 B | 64 v5p chips |
| flux_dev | the same | 11.9 B to 8.4 B | 64 v5p chips |

Stages: `detect` finds runs that linear maps would do for; in `depth` the first block of each run
learns to do for all of it, from the teacher's states alone; in `width` linear maps come after these
blocks and in the place of some MLPs. `cpu` has the teacher of hierarchical_prune, which it trains
too: with `--config.bases=...` of that recipe it would be the same. It takes three minutes of one
core. With seed 0 five runs of two blocks each are found; a block for each leaves 52 % of the
parameters, an error of .055 and, in 16 steps, a Frechet distance of samples of 17.4, where the
teacher's is 3.5. A linear map in the place of the first MLP, 46 %, is not enough: .150 and 34.2.

Of Qwen-Image the 13 runs and the three blocks without MLPs are the published ones, as are rates,
batches of 16 and steps; text runs, in which six spans of blocks share one text, are not there, so
that the student has 11.5 B parameters and not 10. Of Flux the runs are not published. The paper
reports a loss of 2.6 % of its scores after fine-tuning, which is `kd.methods.diffusion.denoising`
from `width`. The large ones were not run by us.
"""

from pathlib import Path

from kd import config as kd_config
from kd.models.latent_parts import SHARDING

pruned = kd_config.load_module(Path(__file__).with_name('hierarchical_prune.py'))
few_steps = pruned.few_steps
VARIANTS = ('cpu', 'qwen_image', 'flux_dev')
METHOD = 'kd.methods.diffusion.ppcl'
BLOCK, SINGLE = pruned.BLOCK, pruned.SINGLE
QWEN = (
    (3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49),
    (52, 53), (54, 55), (56, 57),
)  # fmt: skip
# Ours, while nothing has been detected.
FLUX = ((12, 15), (17, 20), (22, 25), (27, 30), (32, 36))


def get_config(variant: str = 'qwen_image'):
    """The recipe of a variant."""
    made = {'cpu': cpu, 'qwen_image': qwen_image, 'flux_dev': flux_dev}
    return kd_config.variant(variant, made)()


def cpu():
    """Minutes on two cores."""
    world = few_steps.DIGITS | dict(network=dict(patch=2, width=32, depth=10, heads=4))
    law = dict(name='kd.sampling.times.lognormal')
    measured = dict(
        name=f'{few_steps.PROBES}.denoiser_samples', steps=(4, 16), samples=1_000, batch=250,
        classifier='classifier', split='train',
    )  # fmt: skip
    config = few_steps.begun(
        stages=('detect', 'depth', 'width'),
        rows=(
            ('teacher', 'teacher'),
            ('a block for each run', 'depth'),
            ('and linear maps', 'width'),
        ),
        teacher=dict(steps=600, lr=2e-3, batch_size=128),
        evaluators={'samples': dict(weights='slow', **measured)},
        **world,
    )
    teacher = dict(teacher='teacher', teacher_weights='slow')
    config.detect = kd_config.stage(
        method=dict(name='kd.methods.cache.nothing'),
        writers={'runs': dict(name=f'{METHOD}.detect', longest=3, examples=256, law=law)},
        steps=1,
        batch_size=128,
        **teacher,
    )
    names = [f'block{i}' for i in range(10)]
    dropped = dict(found_by='detect', otherwise=left_out(names, ((1, 2), (3, 5), (6, 8))))
    less = dict(world['network'], dropped=dropped)
    for name, network, more in (
        ('depth', less, dict(lr=1e-3, references={'classifier': 'classifier'})),
        ('width', dict(less, linear=('block0/mlp',)),
         dict(lr=1e-4, references={'classifier': 'classifier', 'start': 'depth'})),
    ):  # fmt: skip
        config[name] = kd_config.stage(
            network=few_steps.denoiser(network, world['sigma_data']),
            references=more['references'],
            method=dict(name=f'{METHOD}.{name}', law=law),
            optimizer=dict(name='adam', lr=more['lr'], schedule='cosine', clip_norm=1.0),
            evaluators={
                'samples': measured,
                'pruned': dict(
                    name='kd.evaluators.pruned.pruned', split='validation', weight='edm', law=law
                ),
            },
            steps=300,
            batch_size=128,
            log_every=10,
            checkpoint_every=150,
            **teacher,
        )
    return config


def qwen_image():
    """Qwen-Image at 1024 pixels."""
    names = [f'{BLOCK}_{i}' for i in range(60)]
    maps = (
        *(names[u] for u, _ in QWEN),
        *(f'{names[i]}/{branch}' for i in (2, 58, 59) for branch in ('mlp', 'context_mlp')),
    )
    return large(
        'qwen_image',
        'qwen_image',
        dict(text=(512, 3_584), mask=(512,)),
        left_out(names, QWEN),
        maps,
    )


def flux_dev():
    """Flux-dev at 1024 pixels; its blocks over text and tokens as one."""
    names = [f'{SINGLE}_{i}' for i in range(38)]
    dropped = dict(found_by='detect', otherwise=left_out(names, FLUX))
    fields = dict(text=(512, 4_096), pooled=(768,), guidance=())
    return large('flux_dev', 'flux', fields, dropped)


def left_out(names, runs):
    """All blocks of runs but the first of each."""
    return tuple(names[i] for u, v in runs for i in range(u + 1, v + 1))


def large(of, encoder, fields, dropped, linear=()):
    """Stages detect, where nothing is published, depth, and width, where there are maps."""
    network = dict(name='kd.models.mmdit.preset', of=of)
    constants = dict(guidance=3.5) if 'guidance' in fields else {}
    source = dict(
        name='kd.data.latents.latents', path=encoder, encoder=encoder,
        fields=dict(input=(128, 128, 16), **fields), constants=constants,
    )  # fmt: skip
    detects, maps = ('detect',) * (not isinstance(dropped, tuple)), ('width',) * bool(linear)
    weights = f'hf:/models/{of}/transformer'
    last = (*maps, 'depth')[0]
    config = kd_config.recipe(
        stages=(*detects, 'depth', *maps),
        data=dict(source=source, train='train', validation='validation'),
        pretrained=dict(teacher=dict(weights=weights, network=pruned.denoiser(network))),
        report=dict(name='kd.reports.generation.generation', rows=(('PPCL', last),)),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        mesh=dict(data=-1, fsdp=16),
    )
    # Evenly, and then towards noise by 3.
    law = dict(name='kd.sampling.times.evenly', shift=3.0)
    probe = f'{few_steps.PROBES}.denoiser_samples'
    for name in detects:
        config[name] = kd_config.stage(
            teacher='teacher',
            method=dict(name='kd.methods.cache.nothing'),
            writers={'runs': dict(name=f'{METHOD}.detect', longest=5, examples=64, law=law)},
            steps=1,
            batch_size=64,
        )
    for name, steps in (('depth', 6_000), ('width', 2_000))[: 1 + len(maps)]:
        of_stage = dict(network, dropped=dropped)
        if name == 'width':
            of_stage['linear'] = linear
        config[name] = kd_config.stage(
            network=pruned.denoiser(of_stage),
            teacher='teacher',
            references={'start': 'depth'} if name == 'width' else {},
            method=dict(name=f'{METHOD}.{name}', law=law),
            optimizer=dict(
                name='adamw', lr=1e-5, schedule='cosine', b2=0.95, weight_decay=0.02,
                warmup_steps=32,
            ),
            evaluators={'samples': dict(name=probe, steps=(16,), samples=256, batch=64)},
            steps=steps,
            batch_size=16,
            log_every=50,
            eval_every=2_000,
            checkpoint_every=500,
        )  # fmt: skip
    return config
