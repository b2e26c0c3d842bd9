"""Language models anchored to a base teacher (Flouro, Chadwick 2026, arXiv:2601.13100).

    python -m kd.main --config=configs/lm/recursive_meta_distillation.py:cpu --workdir=runs/lm_meta
    python -m kd.main --config=configs/lm/recursive_meta_distillation.py:unanchored --workdir=...
    python -m kd.main --config=configs/lm/recursive_meta_distillation.py:gpt2 --workdir=...

| variant | data | teacher | student | lam | generations | hardware |
|---|---|---|---|---|---|---|
| cpu | characters of docstrings | 2 x 48 | 1 x 24 | 0.3 | 4 | 2 cores, 4 min |
| unanchored | the same | the same | the same | 0 | 4 | 2 cores, 4 min |
| gpt2 (default) | the same | 12 x 768 (GPT-2 small) | 6 x 768 | 0.3 | 5 | 8 GPUs or TPUs |

The paper has theory only. The default is the size at which the recursion would be tried on a
language model, with lam from {0, 0.1, 0.3}: bring text of that size as `data.source`; on the
built-in characters a network of that size only memorises.
"""

from kd import config as kd_config

VARIANTS = ('cpu', 'unanchored', 'gpt2')


def get_config(variant: str = 'gpt2'):
    """The recipe of a variant."""
    known = {'cpu': cpu, 'unanchored': unanchored, 'gpt2': gpt2}
    return kd_config.variant(variant, known)()


def cpu(lam: float = 0.3):
    """Characters in minutes on two cores."""
    run = dict(
        batch_size=16,
        steps=500,
        optimizer=dict(name='adamw', lr=3e-3, schedule='cosine', warmup_steps=50, clip_norm=1.0),
        log_every=50,
        eval_every=250,
        checkpoint_every=250,
    )
    return recipe(
        teacher=dict(width=48, depth=2, heads=4, max_length=64),
        student=dict(width=24, depth=1, heads=2, max_length=64),
        run=run,
        generations=4,
        lam=lam,
    )


def unanchored():
    """The control: every generation learns from the one before it alone."""
    return cpu(lam=0.0)


def gpt2():
    """GPT-2 small to half its depth, bfloat16, sharded over the devices."""
    run = dict(
        batch_size=512,
        steps=20_000,
        optimizer=dict(
            name='adamw',
            lr=6e-4,
            schedule='cosine',
            warmup_steps=700,
            weight_decay=0.1,
            clip_norm=1.0,
            b2=0.95,
        ),
        log_every=100,
        eval_every=1000,
        checkpoint_every=1000,
    )
    return recipe(
        teacher=dict(width=768, depth=12, heads=12, max_length=1024, dtype='bfloat16'),
        student=dict(width=768, depth=6, heads=12, max_length=1024, dtype='bfloat16'),
        run=run,
        generations=5,
        lam=0.3,
        mesh=dict(data=1, fsdp=-1),
        sharding=(('.*', 'fsdp'),),
        frozen_sharding=(('.*', 'fsdp'),),
    )


def recipe(*, teacher, student, run, generations, lam, **parallel):
    """Stages `teacher`, `generation_1` (plain distillation), `generation_2`, ..."""
    calibration = dict(name='kd.evaluators.calibration.calibration')
    agreement = dict(name='kd.evaluators.agreement.agreement')
    network = dict(name='kd.models.transformer.Transformer')
    blocks = {
        'teacher': kd_config.stage(
            network=network | teacher,
            method=dict(name='kd.methods.vision.supervised.supervised'),
            evaluators={'validation': calibration},
            **run,
        )
    }
    for t in range(1, generations + 1):
        blocks[f'generation_{t}'] = kd_config.stage(
            network=network | student,
            teacher='teacher',
            references=dict(student=f'generation_{t - 1}') if t > 1 else {},
            method=dict(
                name='kd.methods.recursive_meta_distillation.recursive_meta_distillation',
                lam=lam if t > 1 else 1.0,
            ),
            evaluators={'validation': calibration, 'agreement': agreement},
            **run,
        )
    rows = tuple((f'generation {t}', f'generation_{t}') for t in range(1, generations + 1))
    config = kd_config.recipe(
        stages=tuple(blocks),
        data=dict(
            name='stdlib_characters', train='train[:90%]', validation='train[90%:]', test='test'
        ),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(*rows, ('teacher', 'teacher')),
            student=f'generation_{generations}',
        ),
        **parallel,
    )
    for name, block in blocks.items():
        config[name] = block
    return config
