"""CurioSFT: fine-tuning that keeps a model's curiosity (2026, arXiv:2602.02244).

    python -m kd.main --config=configs/lm/curiosft.py:cpu --workdir=runs/curiosft
    python -m kd.claims curiosft

| variant | model | demonstrations | hardware |
|---|---|---|---|
| cpu | bottleneck of 32 | facts and connectors, favourites of an expert | 2 cores, 1 min |
| qwen2_5_math_7b (default) | Qwen2.5-Math-7B, 16k tokens | OpenR1-Math, 46k | 8 H100 |

In `cpu` expect the entropy of connectors to fall from 1.9 nats to 1.1 by fine-tuning, to 1.2 by
CurioSFT with the same mass of .84 on facts, and to 1.3 by the divergence over the whole vocabulary,
which gives up .01 of it; a fixed temperature of 1.5 gives up .1.

The larger one reads `/models/Qwen2.5-Math-7B-16k`, the released weights in a directory whose
`config.json` says 16,384 positions and a rotary base of 40,000 (ours: the paper extends the context
and does not say how) and whose tokenizer has the chat template for thoughts, and demonstrations as
lines of messages, `openr1_math_46k.jsonl` in `--data_dir`. As in the released scripts: batches of
256 examples, of prompts of up to 1,024 and answers of up to 8,192 tokens; 1e-5 after 60 steps,
falling as a cosine to 1e-4 of it; 3 epochs, which are 540 steps. Ours: a row has up to 9,216
tokens, whatever its prompt; AdamW without decay, clipped at 1; one in a hundred examples is left
for validation. The paper's token entropy is .43 nats after it and .31 after plain fine-tuning,
`--config.student.method.weight=0`. Reinforcement learning from there, the paper's second half, is
not part of this recipe.
"""

from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen2_5_math_7b')
CURIOSFT = 'kd.methods.lm.curiosft.curiosft'


def get_config(variant: str = 'qwen2_5_math_7b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen2_5_math_7b': qwen2_5_math_7b})()


def cpu():
    """Facts and connectors: a base, and ways to fine-tune it."""
    distillation = dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0)
    fixed = dict(low=1.5, high=1.5)
    # The law over the whole vocabulary, in place of the demonstrated token, is ours.
    methods = {
        'fine_tuned': ('fine-tuning', distillation),
        'bonus': (
            'a bonus for entropy, .05',
            dict(name='kd.methods.lm.curiosft.entropy_bonus', weight=0.05),
        ),
        'curiosft': ('CurioSFT', dict(name=CURIOSFT)),
        'whole_law': ('KL, temperature by entropy', dict(name=CURIOSFT, distance='kl')),
        'whole_law_fixed': ('KL, temperature 1.5', dict(name=CURIOSFT, distance='kl', **fixed)),
    }

    def data(answers):
        source = dict(name='kd.data.builders.facts.facts', answers=answers)
        return dict(source=source, train='train', validation='validation')

    def run(steps, lr):
        return dict(
            network=dict(name='kd.models.structured.BottleneckLM', width=32),
            optimizer=dict(name='adam', lr=lr, schedule='cosine', clip_norm=1.0),
            steps=steps,
            batch_size=256,
            log_every=50,
            eval_every=steps // 2,
            checkpoint_every=steps // 2,
            evaluators={'validation': dict(name='kd.evaluators.choices.choices')},
        )

    config = kd_config.recipe(
        stages=('base', *methods),
        data=data('any'),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(
                ('before fine-tuning', 'base'),
                *((title, stage) for stage, (title, _) in methods.items()),
            ),
            metrics=(
                ('validation/fact', 'probability of facts'),
                ('validation/entropy', 'entropy of connectors, nats'),
                ('validation/pass', 'pass@16 of connectors'),
            ),
            notes='Fine-tuning on favourites gives up the other answers of connectors. CurioSFT '
            'keeps a little more of them at no cost in facts, which a bonus for entropy has.',
        ),
    )
    config.base = kd_config.stage(method=distillation, **run(3000, 5e-3))
    for stage, (_, method) in methods.items():
        config[stage] = kd_config.stage(
            method=method,
            references=dict(start='base'),
            data=data('favourite'),
            **run(400, 2e-3),
        )
    return config


def qwen2_5_math_7b():
    """Qwen2.5-Math-7B on solutions with thoughts."""
    weights = 'hf:/models/Qwen2.5-Math-7B-16k'
    network = dict(
        name='kd.models.decoders.preset',
        of='qwen2_5_math_7b',
        max_length=16_384,
        rope_theta=4e4,
        dtype='bfloat16',
        stacked=True,
        remat='block',
    )
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.data.text.chats',
                path='openr1_math_46k.jsonl',
                tokenizer=weights,
                length=9_216,
                layout='rows',
                turns='last',
                vocabulary=152_064,
            ),
            train='train[:99%]',
            validation='train[99%:]',
        ),
        pretrained=dict(start=dict(weights=weights, network=network)),
        report=dict(
            name='kd.reports.language.language',
            rows=(('CurioSFT', 'student'), ('before', 'start')),
            teacher='',
            batches=64,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )
    config.student = kd_config.stage(
        network=network,
        references=dict(start='start'),
        method=dict(
            name=CURIOSFT, low=1.1, high=1.5, pivot=1.2, slope=2.0, amplitude=0.5, certain=0.03,
            top_k=512, mix=0.99, every=5, micro_batches=8,
        ),
        optimizer=dict(
            name='adamw', lr=1e-5, schedule='cosine', schedule_args=dict(end=1e-4),
            warmup_steps=60, clip_norm=1.0,
        ),
        steps=540,
        batch_size=256,
        log_every=10,
        eval_every=180,
        checkpoint_every=90,
        evaluators={'validation': dict(name='kd.evaluators.language.language')},
    )  # fmt: skip
    return config
