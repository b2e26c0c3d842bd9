"""TSD-KD: a teacher ranks, gates and sharpens what the student says (2026, arXiv:2603.13260).

    python -m kd.main --config=configs/lm/tsd_kd.py:cpu --workdir=runs/tsd_kd
    python -m kd.claims tsd_kd

| variant | teacher, student | prompts | hardware |
|---|---|---|---|
| cpu | decoders of width 64 and 32 | arithmetic of three operations | 2 cores, 6 min |
| qwen2_5_14b_to_1_5b (default) | Qwen2.5-14B-Instruct, 1.5B-Instruct | UltraInteract | 8 H100 |
| qwen3_8b_to_1_7b | Qwen3-8B, Qwen3-1.7B | UltraInteract | 8 H100 |

Stages of `cpu`: a teacher of true traces, a student of traces of which 40 % are corrupted, and from
there the teacher's answers, GKD and TSD-KD. Seed 0 has .40 of its answers right before, and .64,
.73 and .80 after; longer training turns the last two around, see `configs/claims/tsd_kd.py`.

The larger ones read directories as Hugging Face has them, in `/models`, and UltraInteract_sft as
lines of `instruction` and `response`, `ultrainteract_sft.jsonl` in `--data_dir`. As in the paper
and the released code: answers of the student alone, at temperature 1; beta .9, ten candidates in an
opener of 10 %, weight .1; the entropy of the 10 % least certain tokens, weight 1; AdamW at 5e-6,
cosine, a tenth of the steps warms up; three epochs, texts of up to 1,024 tokens. Ours: prompts of
up to 512 and answers of up to 512 of them; 128 prompts a step (the paper has 4 x 4 on each device)
and so 1,875 steps for 80,000 prompts. With Qwen2.5 the paper has 26.1 on MATH, and 21.7 for the
teacher.
"""

from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen2_5_14b_to_1_5b', 'qwen3_8b_to_1_7b')
CHAINS = dict(name='kd.data.chains.chains', kinds={'free': 1.0}, styles=2)
DISTILLATION = 'kd.methods.lm.distillation.distillation'
TSD_KD = 'kd.methods.lm.tsd_kd.tsd_kd'
# EOS ends an answer; PAD and BOS are never said.
SAMPLING = dict(max_new=7, stop=(2,), forbidden=(0, 1))


def get_config(variant: str = 'qwen2_5_14b_to_1_5b'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'qwen2_5_14b_to_1_5b': lambda: pair(
                ('qwen2_5_14b', 'Qwen2.5-14B-Instruct'), ('qwen2_5_1_5b', 'Qwen2.5-1.5B-Instruct')
            ),
            'qwen3_8b_to_1_7b': lambda: pair(
                ('qwen3_8b', 'Qwen3-8B'), ('qwen3_1_7b', 'Qwen3-1.7B')
            ),
        },
    )()


def cpu():
    """Chains of arithmetic."""
    rows = {
        'pretraining': 'before distillation',
        'sft': "teacher's answers",
        'gkd': 'GKD',
        'tsd_kd': 'TSD-KD',
    }
    config = kd_config.recipe(
        stages=('teacher', *rows),
        data=dict(
            source=dict(CHAINS, operations={'3': 1.0}), train='train', validation='validation'
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=tuple((title, stage) for stage, title in rows.items()),
            metrics=(
                ('validation/reward', 'right at temperature 1'),
                ('validation/length', 'tokens of an answer'),
            ),
        ),
    )
    config.teacher = learning(64, 'truth', 4e-3, 1_600)
    # A trace of three steps is right in .6 of the cases.
    config.pretraining = learning(32, 0.826, 5e-3, 2_400)
    methods = {
        'sft': dict(
            name=DISTILLATION, soft_weight=0.0, rollout=dict(SAMPLING, other='teacher')
        ),
        'gkd': dict(
            name=DISTILLATION, divergence='kd.losses.divergence.generalized_jsd', beta=0.9,
            on_policy=1.0, rollout=SAMPLING,
        ),
        'tsd_kd': dict(name=TSD_KD, ranking_weight=0.001, entropy_weight=0.01, rollout=SAMPLING),
    }  # fmt: skip
    for name, method in methods.items():
        config[name] = kd_config.stage(
            network=decoder(32),
            teacher='teacher',
            references=dict(start='pretraining'),
            method=dict(method, chunk=2_048),
            optimizer=adam(1e-3),
            steps=400,
            batch_size=64,
            log_every=20,
            eval_every=200,
            checkpoint_every=200,
            evaluators={'validation': verified('verified')},
        )
    return config


def decoder(width: int):
    """The decoder of the small worlds, by its width."""
    name = 'kd.models.decoders.preset'
    return dict(name=name, of='toy', width=width, mlp_hidden=4 * width, max_length=32)


def learning(width: int, law, lr: float, steps: int):
    """Traces of a law, of two and three operations."""
    operations = {'2': 0.4, '3': 0.6}
    source = dict(CHAINS, operations=operations, law=law, layout='rows')
    return kd_config.stage(
        network=decoder(width),
        method=dict(name=DISTILLATION, soft_weight=0.0, chunk=4_096),
        data=dict(source=source, train='train', validation='validation'),
        optimizer=adam(lr),
        steps=steps,
        batch_size=128,
        log_every=50,
        checkpoint_every=steps,
        evaluators={'validation': verified('verified_of_recipe')},
    )


def adam(lr: float):
    """Adam with a warm-up, cosine and clipped gradients."""
    return dict(
        name='adam',
        lr=lr,
        schedule='cosine',
        schedule_args=dict(end=0.1),
        warmup_steps=30,
        clip_norm=1.0,
    )


def verified(name: str):
    """How often a sampled answer prints the result."""
    return dict(
        name=f'kd.evaluators.verified.{name}',
        reward=dict(name='kd.rewards.printed.printed'),
        sampling=dict(SAMPLING, group=1),
    )


def pair(large, small):
    """A pair of released models of one tokenizer; vocabularies may be padded to other sizes."""
    (teacher, its_folder), (student, own_folder) = large, small
    shape = dict(dtype='bfloat16', stacked=True, remat='block')
    preset = 'kd.models.decoders.preset'
    network = dict(name=preset, of=student, **shape)
    weights = f'hf:/models/{own_folder}'
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.data.text.chats',
                path='ultrainteract_sft.jsonl',
                fields=('instruction', 'response'),
                tokenizer=weights,
                length=512,
                layout='prompts',
                response_length=512,
                long='drop',
                vocabulary=decoders.PRESETS[student]['num_classes'],
            ),
            train='train[:99%]',
            validation='train[99%:]',
        ),
        pretrained=dict(
            teacher=dict(
                weights=f'hf:/models/{its_folder}',
                network=dict(name=preset, of=teacher, param_dtype='bfloat16', **shape),
            ),
            start=dict(weights=weights, network=network),
        ),
        report=dict(
            name='kd.reports.language.language',
            rows=(('student', 'student'), ('before', 'start'), ('teacher', 'teacher')),
            batches=64,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    config.student = kd_config.stage(
        network=network,
        teacher='teacher',
        references=dict(start='start'),
        method=dict(
            name=TSD_KD,
            beta=0.9,
            gate=True,
            ranking_weight=0.1,
            candidates=10,
            opener=0.1,
            entropy_weight=1.0,
            uncertain=0.1,
            rollout=dict(max_new=512, temperature=1.0),
        ),
        optimizer=dict(
            name='adamw', lr=5e-6, schedule='cosine', warmup_steps=188, clip_norm=1.0
        ),
        steps=1_875,
        batch_size=128,
        log_every=10,
        eval_every=375,
        checkpoint_every=375,
        evaluators={'validation': dict(name='kd.evaluators.language.language')},
    )  # fmt: skip
    return config
