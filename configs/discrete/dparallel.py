"""dParallel: answers in parallel (Chen et al. 2025, arXiv:2509.26488).

    python -m kd.main --config=configs/discrete/dparallel.py:cpu --workdir=runs/dparallel
    python -m kd.claims dparallel

| variant | network | answers of its own | hardware |
|---|---|---|---|
| cpu | a layer of width 32 | running sums of 12 digits | 2 cores |
| llada_8b_instruct (default) | LLaDA-8B-Instruct, LoRA 32 | GSM8K, PRM12K, Numina | 8 H100 |
| llada_1_5 | LLaDA-1.5, LoRA 128 | the same | 8 H100 |
| dream_7b | Dream-7B-Instruct, LoRA 16 | the same and 10,000 of AceCode | 8 H100 |

In `cpu` (90 s on two shared cores) seed 0 gave, one position a call, .51 of the answers right for
the base, .86 by consistency alone and .68 with certainty, and 8.6, 8.0 and 8.1 calls for 12
positions where those of at most .03 nats are committed; bases of other seeds were right in .1 to
.99. An answer that is right is the only one, so that the right answers of the base are those of the
data, which the students read. Compare calls at equal accuracy, never at an equal threshold: how
sure a network is at .1 says nothing of how often it is right.

The larger ones read what the base has answered and was right about, as lines of prompt and
response: `llada_answers.jsonl` (92,000 in the paper, which has released them) or
`dream_answers.jsonl` in `--data_dir`; and directories as Hugging Face has them, in `/models`. As in
the paper and its code: rows of 384 tokens whose padding is an end of text and is learnt, blocks of
32 (Dream: random masking, logits one place early), half of a block hidden, both halves learnt, beta
2 (Dream: 1), AdamW at 2e-5, weight decay .01, clipped at 1, batches of 64, 6, 4 and 3 epochs. The
paper's table has rank 32 and alpha 32 for LLaDA, its code 128; for Dream 16 and 32. Ours: Dream's
block of 256, and a warm-up of 5 % for it in steps.
"""

from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'llada_8b_instruct', 'llada_1_5', 'dream_7b')
LENGTH = 12
THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
TARGETS = r'(query|key|value|output|gate|up|down)/kernel$'


def get_config(variant: str = 'llada_8b_instruct'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'llada_8b_instruct': lambda: llada('LLaDA-8B-Instruct', rank=32, epochs=6),
            'llada_1_5': lambda: llada('LLaDA-1.5', rank=128, epochs=4),
            'dream_7b': dream_7b,
        },
    )()


def cpu():
    """Running sums: the base, cross-entropy alone, and with certainty."""
    names = ('base', 'consistency', 'student')
    titles = ('base', 'consistency alone', 'with certainty')
    config = kd_config.recipe(
        stages=names,
        data=dict(
            source=dict(name='kd.data.builders.running_sums.running_sums'),
            train='train',
            validation='validation',
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=tuple(zip(titles, names, strict=True)),
            metrics=tuple(
                (f'answers/{what}_{at}', f'{label}, {where}')
                for at, where in (('one', 'one a call'), ('0.03', 'entropy .03'), ('0.2', '.2'))
                for what, label in (('exact', 'right'), ('calls', 'calls'))
            ),
            curves=(('answers/calls_0.1', 'calls at .1'), ('answers/exact_0.1', 'right at .1')),
            notes='Fewer calls at the same threshold are worth something where as many answers are '
            'right; the claim compares them at equal accuracy.',
        ),
    )
    shared = dict(
        network=dict(
            name='kd.models.transformer.Transformer',
            width=32,
            depth=1,
            heads=4,
            max_length=2 * LENGTH,
            causal=False,
            extra_symbols=1,
        ),
        batch_size=64,
        evaluators={
            'answers': dict(
                name='kd.evaluators.masked_answers.masked_answers',
                block=LENGTH,
                limit=LENGTH,
                thresholds=THRESHOLDS,
                examples=512,
            ),
        },
    )
    config.base = kd_config.stage(
        method=dict(name='kd.methods.discrete.masked_diffusion.masked_diffusion'),
        optimizer=dict(name='adam', lr=5e-3, schedule='cosine', clip_norm=1.0),
        steps=1_800,
        **shared,
    )
    for name, certainty in (('consistency', 0.0), ('student', 2.0)):
        config[name] = kd_config.stage(
            references=dict(start='base'),
            method=dict(
                name='kd.methods.discrete.dparallel.certainty_forcing',
                block=LENGTH,
                certainty=certainty,
                tail=False,
            ),
            optimizer=dict(name='adam', lr=2e-3, schedule='cosine', clip_norm=1.0),
            steps=600,
            **shared,
        )
    return config


def llada(folder: str, *, rank: int, epochs: int):
    """LLaDA-8B-Instruct, or LLaDA-1.5, which has its sizes."""
    return adapted(
        folder,
        'llada_8b',
        'llada_answers.jsonl',
        rank=rank,
        steps=epochs * 92_000 // 64,
        method=dict(block=32, certainty=2.0, mask=126_336),
        schedule='constant',
        warmup_steps=0,
    )


def dream_7b():
    """Dream-7B-Instruct, which was causal before."""
    steps = 3 * 102_000 // 64
    return adapted(
        'Dream-v0-Instruct-7B',
        'dream_7b',
        'dream_answers.jsonl',
        rank=16,
        steps=steps,
        method=dict(block=256, certainty=1.0, mask=151_666, shift=True, tail=False),
        schedule='cosine',
        warmup_steps=steps // 20,
    )


def adapted(folder, preset, path, *, rank, steps, method, schedule, warmup_steps):
    """LoRA on the network whose answers are read."""
    base = dict(
        name='kd.models.decoders.preset',
        of=preset,
        dtype='bfloat16',
        stacked=True,
        remat='block',
        # Padding is seen and learnt, as released: nothing says where a text ends.
        fields=('input',),
    )
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.data.text.chats',
                path=path,
                tokenizer=f'hf:/models/{folder}',
                length=384,
                layout='rows',
                vocabulary=decoders.PRESETS[preset]['num_classes'],
            ),
            train='train[:99%]',
            validation='train[99%:]',
        ),
        pretrained=dict(
            base=dict(weights=f'hf:/models/{folder}', network=base | dict(param_dtype='bfloat16'))
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )
    config.student = kd_config.stage(
        network=dict(
            name='kd.models.adapters.lora',
            base=base | dict(param_dtype='bfloat16'),
            rank=rank,
            alpha=float(rank),
            targets=TARGETS,
        ),
        references=dict(start='base'),
        method=dict(name='kd.methods.discrete.dparallel.certainty_forcing', **method),
        optimizer=dict(
            name='adamw',
            lr=2e-5,
            schedule=schedule,
            warmup_steps=warmup_steps,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        steps=steps,
        batch_size=64,
        log_every=10,
        eval_every=1_000,
        checkpoint_every=500,
        evaluators={
            'validation': dict(name='kd.evaluators.masked_text.likelihood', mask=method['mask'])
        },
    )
    return config
