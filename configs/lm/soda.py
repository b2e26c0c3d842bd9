"""SODA: a teacher's answers are preferred to the student's own first ones (arXiv:2604.03873).

    python -m kd.main --config=configs/lm/soda.py:cpu --workdir=runs/soda
    python -m kd.claims soda

| variant | student | text | hardware |
|---|---|---|---|
| cpu | bottleneck of 16 | answers drawn from a table | 2 cores, 1 min |
| qwen2_5_3b (default) | Qwen2.5-3B-Instruct | GPT-5-Chat on LMSYS-Chat | v5p-64 |
| qwen2_5_7b | Qwen2.5-7B-Instruct | the same | v5p-64 |

Stages of `cpu`: the student is trained on a related table, fine-tuned on the teacher's text, and
goes on with that for as many steps either way, by SeqKD or by SODA. Expect scores of -2.55, -2.52
and -2.24 nats of the last three, and .726, .728 and .751 of the mass on the teacher's three best.

The larger ones read `/models/Qwen2.5-3B-Instruct`, a directory as Hugging Face has it, and
`lmsys_gpt5.jsonl` in `--data_dir`, the teacher's answers to LMSYS-Chat as lines of `prompt` and
`response` (ytz20/LMSYS-Chat-GPT-5-Chat-Response). Stages: `first`, in which the student answers
every prompt as it is; `tuned`; `sums` of the tuned one over all pairs; `soda`. Prompts of 2,048
tokens, answers of 1,536, fine-tuning of one epoch of 256 rows at 1e-6, the clipped gradient and
sampling at temperature .8 are those of GAD's scripts, which the paper compares with. Its own beta
and rate could not be read: .1 and 5e-7 are ours, as are AdamW, an epoch of pairs, and leaving out
first answers without an end. The exact students are not known either: these are of their kind.
Answers are judged elsewhere, by GPT-4o in the paper; export `soda` for that.
"""

from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen2_5_3b', 'qwen2_5_7b')
SODA = 'kd.methods.lm.soda.soda'
FINE_TUNING = dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0)
PROMPT, ANSWER = 2_048, 1_536


def get_config(variant: str = 'qwen2_5_3b'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'qwen2_5_3b': lambda: text('qwen2_5_3b', 'Qwen2.5-3B-Instruct'),
            'qwen2_5_7b': lambda: text('qwen2_5_7b', 'Qwen2.5-7B-Instruct'),
        },
    )()


def cpu():
    """The table world."""
    table = 'kd.data.builders.table.table'
    splits = dict(train='train', validation='validation')
    config = kd_config.recipe(
        stages=('first', 'tuned', 'seqkd', 'soda'),
        # The teacher's text is a little sharper than its law.
        data=dict(source=dict(name=table, size=30_000, temperature=1 / 1.3), **splits),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(
                ('at first', 'first'),
                ('fine-tuned', 'tuned'),
                ('more of it (SeqKD)', 'seqkd'),
                ('SODA', 'soda'),
            ),
            metrics=(
                ('validation/score', 'score: mean log p of the teacher, nats'),
                ('validation/valid', "mass on the teacher's three best"),
                ('validation/entropy', 'entropy, nats'),
            ),
            notes='The score is what a judge of the teacher would give to what the student says. '
            'SODA takes mass away from answers that the student gave at first.',
        ),
    )

    def stage(steps, lr, method=FINE_TUNING, **fields):
        return kd_config.stage(
            network=dict(name='kd.models.structured.BottleneckLM', width=16),
            method=method,
            optimizer=dict(name='adam', lr=lr, schedule='linear', clip_norm=1.0),
            steps=steps,
            batch_size=256,
            log_every=50,
            eval_every=500,
            checkpoint_every=500,
            evaluators=dict(validation=dict(name='kd.evaluators.coverage.coverage')),
            **fields,
        )

    related = dict(source=dict(name=table, related=(0.25, 0.8)), **splits)
    config.first = stage(1_500, 5e-3, data=related)
    config.tuned = stage(2_500, 5e-3, references=dict(start='first'))
    config.seqkd = stage(600, 6e-4, references=dict(start='tuned'))
    config.soda = stage(
        600,
        6e-4,
        method=dict(name=SODA, beta=0.5),
        references=dict(start='tuned', reference='tuned', initial='first'),
    )
    return config


def text(preset: str, folder: str):
    """A student and its text."""
    weights = f'hf:/models/{folder}'
    student = dict(
        name='kd.models.decoders.preset', of=preset, dtype='bfloat16', stacked=True, remat='block'
    )
    answers = dict(
        name='kd.data.text.chats',
        path='lmsys_gpt5.jsonl',
        tokenizer=weights,
        vocabulary=152_064 if preset == 'qwen2_5_7b' else 151_936,
        long='drop',
    )
    prompts = dict(**answers, layout='prompts', length=PROMPT, response_length=ANSWER)
    rows = dict(**answers, layout='rows', length=PROMPT + ANSWER)
    # The answers of the data against those of the stage `first`.
    pairs = dict(
        name='kd.data.generated.pairs', rejected='first', ended=True, length=PROMPT + ANSWER
    )
    splits = dict(train='train[:99%]', validation='train[99%:]')
    config = kd_config.recipe(
        stages=('first', 'tuned', 'sums', 'soda'),
        data=dict(source=rows, **splits),
        pretrained=dict(base=dict(weights=weights, network=student)),
        report=dict(
            name='kd.reports.language.language',
            rows=(('fine-tuned', 'tuned'), ('SODA', 'soda')),
            teacher='',
            batches=16,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    config.first = kd_config.stage(
        teacher='base',
        method=dict(name='kd.methods.cache.nothing'),
        writers=dict(
            answers=dict(name='kd.methods.generate.responses', max_new=ANSWER, temperature=0.8)
        ),
        data=dict(source=prompts, train='train'),
        steps=1,
        batch_size=256,
    )

    def stage(lr, method, **fields):
        return kd_config.stage(
            network=student,
            method=method,
            optimizer=dict(name='adamw', lr=lr, schedule='cosine', clip_norm=0.2),
            steps=800,
            batch_size=256,
            log_every=10,
            eval_every=200,
            checkpoint_every=200,
            **fields,
        )

    config.tuned = stage(
        1e-6,
        FINE_TUNING,
        references=dict(start='base'),
        evaluators=dict(validation=dict(name='kd.evaluators.language.language')),
    )
    # Once for all pairs, so that training holds neither teacher nor reference.
    config.sums = kd_config.stage(
        teacher='tuned',
        data=dict(source=pairs, **splits),
        method=dict(name='kd.methods.cache.nothing'),
        writers=dict(sums=dict(name='kd.methods.reference_sums.reference_sums')),
        steps=1,
        batch_size=256,
    )
    config.soda = stage(
        5e-7,
        dict(name=SODA, beta=0.1),
        references=dict(start='tuned'),
        data=dict(source=dict(name='kd.data.transforms.anchored.anchored'), **splits),
        evaluators=dict(pairs=dict(name='kd.evaluators.preference.preference')),
    )
    return config
