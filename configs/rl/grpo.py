"""GRPO (Shao et al. 2024, arXiv:2402.03300), alone and with a teacher (KDRL, arXiv:2506.02208).

    python -m kd.main --config=configs/rl/grpo.py:cpu --workdir=runs/grpo
    python -m kd.aot --config=configs/rl/grpo.py:qwen3_8b --topology=v5p:8x8x8

| variant | policy, teacher | problems | hardware |
|---|---|---|---|
| cpu | decoders of 0.1 M parameters | chains of arithmetic | 2 cores |
| smollm2_gsm8k | SmolLM2-135M-Instruct | GSM8K, in `--data_dir` | a GPU |
| qwen3_1_7b (default) | Qwen3-1.7B, Qwen3-8B | GSM8K, in `--data_dir` | v5p-128 |
| qwen3_8b | Qwen3-8B, Qwen3-32B | GSM8K, thought over, in `--data_dir` | v5p-1024, v6e-256 |

`cpu` begins with the base of `configs/rl/bases.py:chain`, which it trains first if nobody has, and
so its teacher, `chain_clean`. One step is 16 prompts with 8 answers each and two updates, all of it
one compiled program. Expect .41 of right answers to become .7 in 40 steps, .92 in 160 and .95 in
320, with a teacher or without. What the policy says to four problems lies in
`STAGE/texts/samples_answers_STEP.md`, at every evaluation.

The larger ones have not been run to the end by us. Rewards are verdicts of `math-verify`
(`pip install -e '.[math]'`). Rates, lengths and batches are ours, near what GRPO's users take: Adam
at 1e-6, 64 to 128 prompts of 8 answers, cut at 512, 1,024 or 15,360 tokens, DAPO's clip of .2 and
.28, means over tokens, no KL to a reference. SmolLM2 is found as in `configs/lm/distil.py`, Qwen3
in `/models`, as Hugging Face has it.
"""

import os
from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'smollm2_gsm8k', 'qwen3_1_7b', 'qwen3_8b')
GRPO = 'kd.methods.rl.grpo.grpo'
VERIFIED = 'kd.evaluators.verified.verified'
TRANSCRIPTS = 'kd.evaluators.transcripts.transcripts'
CHAIN, TEACHER = 'configs/rl/bases.py:chain', 'configs/rl/bases.py:chain_clean'
SYMBOLS = 'kd.data.builders.symbols.SYMBOLS'
SMOLLM2 = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(variant: str = 'qwen3_1_7b'):
    """The recipe of a variant."""
    known = {
        'cpu': cpu, 'smollm2_gsm8k': smollm2_gsm8k, 'qwen3_1_7b': qwen3_1_7b, 'qwen3_8b': qwen3_8b
    }  # fmt: skip
    return kd_config.variant(variant, known)()


def cpu():
    """Chains: GRPO beside KDRL, from one base."""
    base, teacher = bases.directory(CHAIN), bases.directory(TEACHER)
    chains = kd_config.load_module(Path(CHAIN.partition(':')[0]))
    reward, sampling = chains.REWARD, dict(chains.SAMPLING, group=8)
    config = kd_config.recipe(
        stages=('grpo', 'kdrl'),
        data=dict(
            source=dict(name=chains.CHAINS),
            train='train',
            validation='validation[:400]',
            test='test',
        ),
        bases={base: CHAIN, teacher: TEACHER},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('GRPO', 'grpo'), ('KDRL', 'kdrl')),
            metrics=(
                ('validation/reward', 'right answers'),
                ('validation/pass_at_8', 'one of eight right'),
                ('train/entropy', 'entropy of a token, nats'),
            ),
            curves=(
                ('validation/reward', 'right answers'),
                ('greedy/reward', 'right, most probable tokens'),
                ('train/entropy', 'entropy of a token, nats'),
                ('train/dead_groups', 'groups of equal rewards'),
            ),
            notes='Two updates on each batch of answers. The base is right in four of ten answers.',
        ),
    )
    for name, fields in (
        ('grpo', {}),
        ('kdrl', dict(teacher=f'{teacher}/teacher', method=dict(teacher_weight=0.1))),
    ):
        method = dict(
            name=GRPO, reward=reward, sampling=sampling, updates=2, old='sampler', low=0.2,
            high=0.28, chunk=4_096, **fields.pop('method', {}),
        )  # fmt: skip
        config[name] = kd_config.stage(
            network=chains.NETWORK,
            references=dict(start=f'{base}/base'),
            method=method,
            optimizer=dict(name='adam', lr=4e-4),
            steps=320,
            batch_size=16,
            log_every=10,
            eval_every=40,
            checkpoint_every=80,
            evaluators={
                'validation': dict(name=VERIFIED, reward=reward, sampling=sampling, k=(8,)),
                'greedy': dict(name=VERIFIED, reward=reward, sampling=dict(sampling, top_k=1)),
                'samples': dict(
                    name=TRANSCRIPTS, reward=reward, sampling=sampling, symbols=SYMBOLS
                ),
            },
            **fields,
        )
    return config


def smollm2_gsm8k():
    """SmolLM2-135M-Instruct on GSM8K."""
    weights = f'gguf:{os.environ.get("KD_SMOLLM2", SMOLLM2)}'
    policy = dict(name='kd.models.decoders.preset', of='smollm2_135m')
    return gsm8k(
        tokenizer=weights, vocabulary=49_152, policy=policy, start=weights, longest=512, steps=500,
        batch_size=64,
    )  # fmt: skip


def qwen3_1_7b():
    """Qwen3-1.7B on GSM8K, with Qwen3-8B as its teacher."""
    return pod(
        'Qwen3-1.7B', 'Qwen3-8B', longest=1_024, batch_size=128, micro_batches=8,
        mesh=dict(data=1, fsdp=-1),
    )  # fmt: skip


def qwen3_8b():
    """Qwen3-8B with Qwen3-32B as its teacher, rows of 16,384 tokens.

    A prompt lies on all chips of a group along tensor, of which its answers' keys and values need
    the memory: 2.25 GiB each.
    """
    return pod(
        'Qwen3-8B', 'Qwen3-32B', longest=15_360, batch_size=64, micro_batches=8, length=1_024,
        thinking=True, mesh=dict(data=1, fsdp=64, tensor=-1),
    )  # fmt: skip


def pod(policy, teacher, **fields):
    """A released policy and teacher, in bfloat16, sharded over the devices."""

    def network(name, **more):
        of = name.lower().replace('-', '_').replace('.', '_')
        return dict(
            name='kd.models.decoders.preset', of=of, dtype='bfloat16', stacked=True, remat='block',
            **more,
        )  # fmt: skip

    own = network(policy)
    return gsm8k(
        tokenizer=f'hf:/models/{policy}',
        vocabulary=decoders.PRESETS[own['of']]['num_classes'],
        policy=own,
        start=f'hf:/models/{policy}',
        teacher=dict(
            weights=f'hf:/models/{teacher}', network=network(teacher, param_dtype='bfloat16')
        ),
        steps=1_000,
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
        **fields,
    )


def gsm8k(
    *, tokenizer, vocabulary, policy, start, longest, steps, batch_size, teacher=None,
    micro_batches=4, length=320, thinking=False, **parallel,
):  # fmt: skip
    """Problems in words, a group of answers to each, and verdicts on their results."""
    reward = dict(name='kd.rewards.mathematics.mathematics')
    sampling = dict(group=8, max_new=longest)
    pretrained = {'start': dict(weights=start, network=policy)}
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.data.text.gsm8k',
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                layout='prompts',
                length=length,
                response_length=512,
                template_arguments=dict(enable_thinking=thinking),
            ),
            train='train[:95%]',
            validation='train[95%:]',
            test='test',
        ),
        pretrained=pretrained | ({'teacher': teacher} if teacher else {}),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('GRPO', 'student'),),
            metrics=(('validation/reward', 'right answers'), ('validation/length', 'tokens')),
            curves=(
                ('train/reward', 'reward of samples'),
                ('validation/reward', 'right, most probable tokens'),
                ('train/length', 'tokens of an answer'),
                ('train/entropy', 'entropy of a token, nats'),
            ),
        ),
        **parallel,
    )
    config.student = kd_config.stage(
        network=policy,
        teacher='teacher' if teacher else '',
        references=dict(start='start'),
        method=dict(
            name=GRPO,
            reward=reward,
            sampling=sampling,
            aggregation='token_mean',
            low=0.2,
            high=0.28,
            teacher_weight=0.002 if teacher else 0.0,
            micro_batches=micro_batches,
        ),
        optimizer=dict(name='adamw', lr=1e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.01),
        steps=steps,
        batch_size=batch_size,
        log_every=1,
        eval_every=50,
        checkpoint_every=50,
        best='validation/reward',
        evaluators={
            'validation': dict(
                name=VERIFIED, reward=reward, sampling=dict(sampling, group=1, top_k=1)
            ),
            'samples': dict(name=TRANSCRIPTS, reward=reward, sampling=dict(sampling, group=2)),
        },
    )
    return config
