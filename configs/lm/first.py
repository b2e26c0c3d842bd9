"""FIRST: five recalibrated probabilities of a teacher (Shum et al. 2024, arXiv:2408.12168).

    python -m kd.main --config=configs/lm/first.py:cpu --workdir=runs/first
    python -m kd.claims first

| variant | teacher, student | data | hardware |
|---|---|---|---|
| cpu | MLP 256-256, MLP 48-48 | 64 overlapping classes | 2 cores, 1 min |
| smollm2 | SmolLM2-135M, 10 of its 30 blocks | Python's documentation | 2 cores |
| qwen1_5_7b_to_1_8b (default) | Qwen1.5-7B, Qwen1.5-1.8B | Alpaca | 8 devices in the paper |

The teacher is fine-tuned; the stage `cache` writes its five most probable answers at every position
of the training texts, and fits the temperature on the validation split; students read both. In
`cpu` expect a calibration error of .02 from FIRST, .07 from the five as they are, and .09 from
fine-tuning; a smaller rate for fine-tuning, or a temperature of its own after it, does most of that
as well, see the claim.

`smollm2` says how sure SmolLM2 is of Python's documentation, and gives two students with that
beginning the same steps; where to get the file says `configs/lm/distil.py`. Its teacher is not
fine-tuned and runs at every step. All numbers of it are ours, and nobody has run it to the end.

The default reads `/models/Qwen1.5-7B` and `/models/Qwen1.5-1.8B`, directories as Hugging Face has
them, and Alpaca as records of `instruction`, `input` and `output`, `alpaca.jsonl` in `--data_dir`.
As in the released script: rows of 512 tokens, 128 of them in two micro-batches, 3 passes over the
310,000 rows that it counts; AdamW at 2e-6, cosine after 3 % of warm-up; the sum over the tokens of
a row. Ours: the temperature is on logits and q the student's whole softmax, where the script has
`use_other_token`, whose objective is degenerate (`against='other'`); Qwen's chat template; packed
rows; the teacher's fine-tuning, at 1e-5 for as many steps.
"""

import os

from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'smollm2', 'qwen1_5_7b_to_1_8b')
SMOLLM2 = 'SmolLM2-135M-Instruct.Q4_1.gguf'
DISTILLATION = 'kd.methods.lm.distillation.distillation'
FIRST = 'kd.methods.lm.first.first'
# Kept, and fitted.
TOP_5 = dict(name='kd.methods.cache.teacher_outputs', form='top_k', size=5)
TEMPERATURE = dict(name='kd.evaluators.temperature.temperature', size=5, kind='logits')
PRESET = 'kd.models.decoders.preset'


def get_config(variant: str = 'qwen1_5_7b_to_1_8b'):
    """The recipe of a variant."""
    known = {'cpu': cpu, 'smollm2': smollm2, 'qwen1_5_7b_to_1_8b': qwen1_5_7b_to_1_8b}
    return kd_config.variant(variant, known)()


def cache(teacher, batch_size):
    """What the teacher says of the training split, and its temperature on the validation split."""
    return kd_config.stage(
        teacher=teacher,
        method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': TOP_5},
        evaluators={'calibration': TEMPERATURE},
        batch_size=batch_size,
        steps=1,
    )


def cpu():
    """Overlapping classes: fine-tuning, five probabilities as they are, and recalibrated."""
    splits = dict(train='train', validation='validation', test='test')
    methods = {
        'hard': dict(name=DISTILLATION, soft_weight=0.0),
        'top_5': dict(name=FIRST, temperature=1.0),
        'first': dict(name=FIRST, calibrated='cache'),
    }
    config = kd_config.recipe(
        stages=('teacher', 'cache', *methods),
        data=dict(source=dict(name='kd.data.builders.gaussians.gaussians'), **splits),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(
                ('fine-tuned', 'hard'),
                ('top 5 as they are', 'top_5'),
                ('FIRST', 'first'),
                ('teacher', 'teacher'),
            ),
            student='first',
            notes='All but the teacher are students of one size that see the same inputs. FIRST '
            'learns five probabilities of the teacher, at a temperature fitted on the validation '
            'split.',
        ),
    )

    def run(widths, lr, steps):
        return dict(
            network=dict(name='kd.models.mlp.MLP', widths=widths),
            optimizer=dict(name='adam', lr=lr, schedule='cosine'),
            steps=steps,
            batch_size=128,
            log_every=50,
            eval_every=300,
            checkpoint_every=300,
            evaluators={'validation': dict(name='kd.evaluators.calibration.calibration', bins=10)},
        )

    config.teacher = kd_config.stage(
        method=dict(name=DISTILLATION, soft_weight=0.0), **run((256, 256), 1e-3, 600)
    )
    config.cache = cache('teacher', 500)
    cached = dict(source=dict(name='kd.data.transforms.cached.cached', stage='cache'), **splits)
    for name, method in methods.items():
        config[name] = kd_config.stage(
            method=method,
            data={} if name == 'hard' else cached,
            **run((48, 48), 2e-3, 1500),
        )
    return config


def smollm2():
    """How sure SmolLM2 is, and two students of a third of its blocks."""
    weights = f'gguf:{os.environ.get("KD_SMOLLM2", SMOLLM2)}'
    teacher = dict(name=PRESET, of='smollm2_135m')
    config = kd_config.recipe(
        stages=('calibration', 'hard', 'first'),
        data=dict(
            source=dict(
                name='kd.data.text.stdlib_docs', tokenizer=weights, length=256, vocabulary=49_152
            ),
            train='train',
            validation='validation[:64]',
        ),
        pretrained=dict(teacher=dict(weights=weights, network=teacher)),
        report=comparison((('fine-tuned', 'hard'), ('FIRST', 'first'))),
    )
    config.calibration = cache('teacher', 4)
    config.calibration.writers = {}
    blocks = tuple(range(0, 30, 3))
    for name, method in {
        'hard': dict(name=DISTILLATION, soft_weight=0.0),
        'first': dict(name=FIRST, calibrated='calibration', mean_over='token_mean'),
    }.items():
        config[name] = kd_config.stage(
            network=teacher | dict(depth=10),
            teacher='teacher' if name == 'first' else '',
            references=dict(start='teacher'),
            method=method | dict(blocks=blocks),
            optimizer=dict(
                name='adamw', lr=5e-4, schedule='cosine', warmup_steps=20, clip_norm=1.0
            ),
            steps=300,
            batch_size=4,
            log_every=10,
            eval_every=100,
            checkpoint_every=100,
            evaluators=of_text(),
        )
    return config


def qwen1_5_7b_to_1_8b():
    """Qwen1.5-7B, fine-tuned, into Qwen1.5-1.8B."""
    shape = dict(dtype='bfloat16', stacked=True, remat='block')
    large, small = (dict(name=PRESET, of=of, **shape) for of in ('qwen1_5_7b', 'qwen1_5_1_8b'))
    splits = dict(train='train[:99%]', validation='train[99%:]')
    config = kd_config.recipe(
        stages=('teacher', 'cache', 'student'),
        data=dict(
            source=dict(
                name='kd.data.text.chats',
                path='alpaca.jsonl',
                tokenizer='hf:/models/Qwen1.5-7B',
                length=512,
                vocabulary=151_936,
            ),
            **splits,
        ),
        pretrained=dict(
            large=dict(weights='hf:/models/Qwen1.5-7B', network=large),
            small=dict(weights='hf:/models/Qwen1.5-1.8B', network=small),
        ),
        report=comparison((('student', 'student'), ('teacher', 'teacher'))),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )

    def run(lr):
        return dict(
            optimizer=dict(name='adamw', lr=lr, schedule='cosine', warmup_steps=218),
            steps=7_266,
            batch_size=128,
            log_every=10,
            eval_every=2_422,
            checkpoint_every=500,
            evaluators=of_text(),
        )

    config.teacher = kd_config.stage(
        network=large,
        references=dict(start='large'),
        method=dict(name=DISTILLATION, soft_weight=0.0, micro_batches=2),
        **run(1e-5),
    )
    config.cache = cache('teacher', 128)
    config.student = kd_config.stage(
        network=small,
        data=dict(source=dict(name='kd.data.transforms.cached.cached', stage='cache'), **splits),
        references=dict(start='small'),
        method=dict(name=FIRST, calibrated='cache', micro_batches=2),
        **run(2e-6),
    )
    return config


def of_text():
    """What is asked of a language model: how well it predicts, and how sure it is."""
    return {
        'validation': dict(name='kd.evaluators.language.language'),
        'calibration': TEMPERATURE | dict(of='network'),
    }


def comparison(rows):
    """The report on language models."""
    return dict(
        name='kd.reports.comparison.comparison',
        rows=rows,
        metrics=(
            ('calibration/ece', 'calibration error (ECE)'),
            ('calibration/accuracy', 'accuracy of the next token'),
            ('validation/nll', 'NLL, nats'),
        ),
    )
