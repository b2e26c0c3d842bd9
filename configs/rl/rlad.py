"""RLAD: the teacher stands in the ratio of GRPO (2026, arXiv:2602.22495).

    python -m kd.main --config=configs/rl/rlad.py:cpu --workdir=runs/rlad
    python -m kd.claims rlad
    python -m kd.aot --config=configs/rl/rlad.py:qwen3_1_7b_logic --topology=v5p:4x4x4

| variant | policy, teacher | problems | the paper's hardware |
|---|---|---|---|
| cpu | decoders of 0.1 M parameters | chains of arithmetic | 2 cores |
| qwen3_0_6b_logic (default) | Qwen3-0.6B, Qwen3-8B | knights and knaves | 8 H200 |
| qwen3_1_7b_logic | Qwen3-1.7B, Qwen3-8B | knights and knaves | 8 H200 |
| qwen3_1_7b_base_math | Qwen3-1.7B-Base, Qwen3-8B | Skywork-OR1 | 64 H200 |
| qwen3_8b_base_math | Qwen3-8B-Base, Qwen3-32B | Skywork-OR1 | 64 H200 |
| qwen3_1_7b_math | Qwen3-1.7B, Qwen3-8B | Skywork-OR1 | 64 H200 |
| r1_distill_1_5b_math | R1-Distill-Qwen-1.5B, -7B | Skywork-OR1 | 64 H200 |

`cpu` begins with the base of `configs/rl/bases.py:chain`, which it trains first if nobody has, and
so its teacher. Six updates on every batch of answers, at twice the rate that the chains are learnt
with. From .40 of right answers GRPO falls to .18, KDRL to .27, and RLAD is left with .40 (seed 0).

The larger ones have not been run by us. Of the paper: 8 answers to a problem, 32 problems at a time
(256 answers), rate 1e-6, clip .2 and .28, alpha .5, teacher's branch clamped at 1, means over
tokens and then over answers, no KL to a reference (its weight is not given); logic of up to 2,048
tokens (`--config.student.method.sampling.max_new=8192` for its longer runs), judged at temperature
.6 and top-p .95; mathematics of up to 8,192 tokens, 30,720 for base models, without groups of equal
rewards. Expect .90 of the puzzles from 0.6B and .93 from 1.7B at 2,048 tokens, .94 and .99 at
8,192, where GRPO has .70, .86, .76 and .95.

Ours: puzzles are those of `reasoning-gym` (`pip install -e '.[gym]'`), of three to seven people;
one update on a batch; the number of steps; AdamW, decay .01, clipped at 1. Skywork-OR1's adaptive
weight of the entropy is not here. Its problems are a file of `question` and `answer`,
`skywork_or1/math.jsonl` in `--data_dir`; verdicts are those of `math-verify`. Weights are read from
`/models`, as Hugging Face has them.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

GRPO, RLAD = 'kd.methods.rl.grpo.grpo', 'kd.methods.rl.rlad.rlad'
VERIFIED = 'kd.evaluators.verified.verified'
CHAIN, TEACHER = 'configs/rl/bases.py:chain', 'configs/rl/bases.py:chain_clean'
# {variant: (preset and directory of the policy, of the teacher)}
LOGIC = {
    'qwen3_0_6b_logic': (('qwen3_0_6b', 'Qwen3-0.6B'), ('qwen3_8b', 'Qwen3-8B')),
    'qwen3_1_7b_logic': (('qwen3_1_7b', 'Qwen3-1.7B'), ('qwen3_8b', 'Qwen3-8B')),
}
MATH = {
    'qwen3_1_7b_base_math': (('qwen3_1_7b', 'Qwen3-1.7B-Base'), ('qwen3_8b', 'Qwen3-8B')),
    'qwen3_8b_base_math': (('qwen3_8b', 'Qwen3-8B-Base'), ('qwen3_32b', 'Qwen3-32B')),
    'qwen3_1_7b_math': (('qwen3_1_7b', 'Qwen3-1.7B'), ('qwen3_8b', 'Qwen3-8B')),
    'r1_distill_1_5b_math': (
        ('r1_distill_qwen_1_5b', 'DeepSeek-R1-Distill-Qwen-1.5B'),
        ('r1_distill_qwen_7b', 'DeepSeek-R1-Distill-Qwen-7B'),
    ),
}
VARIANTS = (
    'cpu',
    'qwen3_0_6b_logic',
    'qwen3_1_7b_logic',
    'qwen3_1_7b_base_math',
    'qwen3_8b_base_math',
    'qwen3_1_7b_math',
    'r1_distill_1_5b_math',
)
# Puzzles of three to seven people take turns.
PUZZLES = dict(task='knights_knaves', levels=tuple(dict(n_people=people) for people in range(3, 8)))


def get_config(variant: str = 'qwen3_0_6b_logic'):
    """The recipe of a variant."""
    known = {'cpu': cpu}
    known |= {name: lambda pair=pair: logic(*pair) for name, pair in LOGIC.items()}
    known |= {
        name: lambda name=name, pair=pair: mathematics(*pair, 30_720 if 'base' in name else 8_192)
        for name, pair in MATH.items()
    }
    return kd_config.variant(variant, known)()


def cpu():
    """Chains: GRPO, KDRL and RLAD from one base, at a rate and number of updates that ruin GRPO."""
    base, teacher = bases.directory(CHAIN), bases.directory(TEACHER)
    chains = kd_config.load_module(Path(CHAIN.partition(':')[0]))
    reward, sampling = chains.REWARD, dict(chains.SAMPLING, group=8)
    config = kd_config.recipe(
        stages=('grpo', 'kdrl', 'rlad'),
        data=dict(
            source=dict(name=chains.CHAINS),
            train='train',
            validation='validation[:400]',
            test='test',
        ),
        bases={base: CHAIN, teacher: TEACHER},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('GRPO', 'grpo'), ('KDRL', 'kdrl'), ('RLAD', 'rlad')),
            metrics=(
                ('validation/reward', 'right answers'),
                ('train/entropy', 'entropy of a token, nats'),
                ('train/clip_fraction', 'tokens without a gradient'),
            ),
            curves=(
                ('validation/reward', 'right answers'),
                ('train/entropy', 'entropy of a token, nats'),
                ('train/dead_groups', 'groups of equal rewards'),
                ('train/clip_fraction', 'tokens without a gradient'),
            ),
            notes='Six updates on each batch of answers. The base is right in four of ten answers.',
        ),
    )
    for name, method in (
        ('grpo', dict(name=GRPO)),
        ('kdrl', dict(name=GRPO, teacher_weight=0.1)),
        ('rlad', dict(name=RLAD)),
    ):
        config[name] = kd_config.stage(
            network=chains.NETWORK,
            references=dict(start=f'{base}/base'),
            method=dict(
                reward=reward, sampling=sampling, updates=6, old='sampler', low=0.2, high=0.28,
                chunk=4_096, **method,
            ),
            optimizer=dict(name='adam', lr=8e-4),
            steps=80,
            batch_size=16,
            log_every=5,
            eval_every=20,
            checkpoint_every=80,
            evaluators={'validation': dict(name=VERIFIED, reward=reward, sampling=sampling)},
            **({} if name == 'grpo' else dict(teacher=f'{teacher}/teacher')),
        )  # fmt: skip
    return config


def logic(policy, teacher):
    """Puzzles of knights and knaves."""
    source = dict(
        name='kd.data.reasoning.reasoning_gym',
        length=1_024,
        sizes=dict(train=10_000, validation=500, test=1_000),
        **PUZZLES,
    )
    reward = dict(name='kd.rewards.reasoning.reasoning_gym', **PUZZLES)
    return student(
        policy, teacher, source, reward, longest=2_048, steps=400, title='puzzles solved',
        splits=dict(train='train', validation='validation', test='test'),
    )  # fmt: skip


def mathematics(policy, teacher, longest):
    """Problems of Skywork-OR1, up to five times each."""
    source = dict(
        name='kd.data.text.chats',
        path='skywork_or1/math.jsonl',
        fields=('question', 'answer'),
        length=2_048,
        response_length=64,
        long='drop',
    )
    reward = dict(name='kd.rewards.mathematics.mathematics')
    return student(
        policy, teacher, source, reward, longest=longest, steps=2_000, title='right answers',
        splits=dict(train='train[:-500]', validation='train[-500:]'), drop_dead=True,
    )  # fmt: skip


def student(policy, teacher, source, reward, *, longest, steps, title, splits, **method):
    """A policy with a teacher of its family, on problems with verdicts."""
    shape = dict(dtype='bfloat16', stacked=True, remat='block')
    (own, directory), (other, others) = policy, teacher
    network = dict(name='kd.models.decoders.preset', of=own, **shape)
    weights = f'hf:/models/{directory}'
    sampling = dict(group=8, max_new=longest)
    source = dict(
        source, tokenizer=weights, vocabulary=decoders.PRESETS[own]['num_classes'],
        layout='prompts',
    )  # fmt: skip
    config = kd_config.recipe(
        stages=('student',),
        data=dict(source=source, **splits),
        pretrained=dict(
            start=dict(weights=weights, network=network),
            teacher=dict(
                weights=f'hf:/models/{others}',
                network=dict(
                    name='kd.models.decoders.preset', of=other, param_dtype='bfloat16', **shape
                ),
            ),
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('RLAD', 'student'),),
            metrics=(('validation/reward', title), ('validation/length', 'tokens')),
            curves=(
                ('train/reward', 'reward of samples'),
                ('validation/reward', title),
                ('train/length', 'tokens of an answer'),
                ('train/clip_fraction', 'tokens without a gradient'),
            ),
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
            name=RLAD, reward=reward, sampling=sampling, alpha=0.5, clamp=1.0, low=0.2, high=0.28,
            aggregation='sequence_mean', micro_batches=8, **method,
        ),
        optimizer=dict(name='adamw', lr=1e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.01),
        steps=steps,
        batch_size=32,
        log_every=1,
        eval_every=50,
        checkpoint_every=50,
        best='validation/reward',
        evaluators={
            'validation': dict(
                name=VERIFIED, reward=reward,
                sampling=dict(sampling, group=4, temperature=0.6, top_p=0.95),
            )
        },
    )  # fmt: skip
    return config
