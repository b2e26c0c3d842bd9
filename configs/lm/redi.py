"""REDI: a teacher's wrong answers are unlearned beside its right ones (arXiv:2505.24850).

    python -m kd.main --config=configs/lm/redi.py:cpu --workdir=runs/redi
    python -m kd.claims redi

| variant | student | pairs | hardware |
|---|---|---|---|
| cpu | bottleneck of 16, fine-tuned | a table's valid answers and mistakes | 2 cores, 1 min |
| qwen2_5_math_1_5b (default) | Qwen2.5-Math-1.5B | traces of DeepSeek-R1 | 8 A100 |

Stages of `cpu`: fine-tuning on right answers, and from there more of it, REDI, and the symmetric
loss. Expect .73 of the mass on valid answers from fine-tuning, .74 from more of it, .78 from REDI
and .76 with alpha = 1.

The larger one reads `/models/Qwen2.5-Math-1.5B`, a directory as Hugging Face has it, and
`openr1_math.jsonl` in `--data_dir`: OpenR1-Math-Raw without cn_k12, a line of `prompt`, `responses`
and `verified` a problem, where verified is what both the Llama judge and Math-Verify accept.
Fine-tuning takes the first that is, a pair that and the first that is not: 77,629 and 53,175 of
them. As the paper has it: positions to 32,768 with theta 300,000; AdamW, decay 1e-4, a tenth of the
steps warms up, then a line to 0; five epochs of 128 traces at 5e-5, then one of 32 pairs at 1e-6
with alpha .8, of prompts of up to 800 and answers of up to 19,000 tokens. Ours: the former are
packed, 32 rows a step, and pairs are held to their sum. MATH-500 is 80.4 before, 83.1 after, AIME24
21.9 and 28.1 (16 samples at temperature .6, top-p .95, the first token <think>).
"""

from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen2_5_math_1_5b')
PREFERENCE = 'kd.methods.lm.preference.preference'
REDI = 'kd.losses.preference_family.redi'


def get_config(variant: str = 'qwen2_5_math_1_5b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen2_5_math_1_5b': qwen2_5_math_1_5b})()


def cpu():
    """The table world."""
    rows = {'more': 0.0, 'redi': 0.8, 'symmetric': 1.0}
    config = kd_config.recipe(
        stages=('tuned', *rows),
        data=dict(
            source=dict(name='kd.data.builders.table.preferences'),
            train='train',
            validation='validation',
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(
                ('fine-tuned', 'tuned'),
                ('more of it', 'more'),
                ('REDI, alpha .8', 'redi'),
                ('symmetric, alpha 1', 'symmetric'),
            ),
            metrics=(
                ('validation/valid', 'mass on valid answers'),
                ('pairs/chosen', 'log p of right answers, nats'),
                ('pairs/rejected', 'log p of wrong answers, nats'),
            ),
            notes='Wrong answers, pushed away with a weight below 1, leave more mass for the valid '
            'ones than further fine-tuning does. The larger the weight, the less probable become '
            'the right answers that pairs have, too.',
        ),
    )

    def stage(alpha, steps, lr, **fields):
        return kd_config.stage(
            network=dict(name='kd.models.structured.BottleneckLM', width=16),
            method=dict(name=PREFERENCE, loss=REDI, alpha=alpha),
            optimizer=dict(name='adam', lr=lr, schedule='linear', clip_norm=1.0),
            steps=steps,
            batch_size=256,
            log_every=50,
            eval_every=500,
            checkpoint_every=500,
            evaluators=dict(
                validation=dict(name='kd.evaluators.coverage.coverage'),
                pairs=dict(name='kd.evaluators.preference.preference'),
            ),
            **fields,
        )

    # On right answers alone it is fine-tuning.
    config.tuned = stage(0.0, 2500, 5e-3)
    for name, alpha in rows.items():
        config[name] = stage(alpha, 500, 1e-3, references=dict(start='tuned'))
    return config


def qwen2_5_math_1_5b():
    """Qwen2.5-Math-1.5B."""
    student = dict(
        name='kd.models.decoders.preset',
        of='qwen2_5_math_1_5b',
        rope_theta=3e5,
        max_length=32_768,
        dtype='bfloat16',
        stacked=True,
        remat='block',
    )
    text = dict(
        path='openr1_math.jsonl',
        tokenizer='hf:/models/Qwen2.5-Math-1.5B',
        vocabulary=151_936,
        long='drop',
    )
    splits = dict(train='train[:99%]', validation='train[99%:]')
    config = kd_config.recipe(
        stages=('tuned', 'redi'),
        data=dict(source=dict(name='kd.data.text.chats', length=32_768, **text), **splits),
        pretrained=dict(base=dict(weights='hf:/models/Qwen2.5-Math-1.5B', network=student)),
        report=dict(
            name='kd.reports.language.language',
            rows=(('fine-tuned', 'tuned'), ('REDI', 'redi')),
            teacher='',
            batches=16,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )

    def stage(steps, lr, **fields):
        return kd_config.stage(
            network=student,
            optimizer=dict(
                name='adamw',
                lr=lr,
                schedule='linear',
                warmup_steps=steps // 10,
                weight_decay=1e-4,
            ),
            steps=steps,
            batch_size=32,
            log_every=10,
            eval_every=500,
            checkpoint_every=500,
            **fields,
        )

    config.tuned = stage(
        3_032,
        5e-5,
        method=dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0),
        references=dict(start='base'),
        evaluators=dict(validation=dict(name='kd.evaluators.language.language')),
    )
    config.redi = stage(
        1_661,
        1e-6,
        method=dict(name=PREFERENCE, loss=REDI, alpha=0.8),
        data=dict(source=dict(name='kd.data.text.preferences', length=19_968, **text), **splits),
        references=dict(start='tuned'),
        evaluators=dict(pairs=dict(name='kd.evaluators.preference.preference')),
    )
    return config
