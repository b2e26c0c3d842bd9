"""KEPO: a teacher's law where answers are right, its hints where none is (2026, arXiv:2602.00400).

    python -m kd.main --config=configs/rl/kepo.py:cpu --workdir=runs/kepo
    python -m kd.claims kepo
    python -m kd.aot --config=configs/rl/kepo.py:qwen3_1_7b_text --topology=v5p:4x4x4

| variant | policy, teacher | problems | the paper's hardware |
|---|---|---|---|
| cpu | decoders of 0.1 M parameters | chains, half of which the base never solves | 2 cores |
| qwen3_1_7b_text (default) | Qwen3-1.7B, Qwen3-8B | GSM8K, in `--data_dir` | 4 to 8 GPUs |

`cpu` begins with the base of `configs/rl/bases.py:chain_cliff`, which it trains first if nobody
has, and so its teacher. GRPO, GRPO beside the teacher's law on right answers, and KEPO, which has
hints too. The paper's rewards say nothing where all answers of a group are wrong; see the curve of
unsolved prompts. Of cliffs seed 0 solves .15, .16 and .47 after 40 steps, .77, .84 and .91 after
160.

The larger one stands in for the paper's: there Qwen3-VL-2B-Instruct learns from Qwen3-VL-32B to
answer questions about medical images (OmniMedVQA, 600 of one kind for training), and neither the
networks nor the images can be had here. As in its released code: 8 answers to a problem, 16
problems at a time, rate 2e-6, one epoch, answers of up to 1,024 tokens; Jensen-Shannon divergence
of .5 on answers with a reward of 1; two answers injected, five tries, hints at temperature .9 and
top-p .95; no KL to a reference; one update on a batch. Ours: AdamW, decay .01, clipped at 1; the
hint is a right solution of the teacher, of four, where the paper's teacher is shown the answer and
writes a hint. Nothing is known of results on this text; it has not been run by us.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.data.builders import symbols
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen3_1_7b_text')
KEPO = 'kd.methods.rl.kepo.kepo'
CLIFF, TEACHER = 'configs/rl/bases.py:chain_cliff', 'configs/rl/bases.py:chain_clean'
# A solution before the problem, as the base has learnt to read it.
SOLUTION = dict(
    solutions=8, temperature=1.0, top_p=1.0, before=(symbols.SOL,), behind=(symbols.BAR,), after=1
)


def get_config(variant: str = 'qwen3_1_7b_text'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen3_1_7b_text': qwen3_1_7b_text})()


def cpu():
    """Chains, half of which go through a fact that the base hardly ever has right."""
    base, teacher = bases.directory(CLIFF), bases.directory(TEACHER)
    chains = kd_config.load_module(Path(CLIFF.partition(':')[0]))
    reward, sampling = chains.REWARD, dict(chains.SAMPLING, group=8)
    splits = dict(train='train', validation='validation[:400]', test='test')
    config = kd_config.recipe(
        stages=('grpo', 'gated', 'kepo'),
        data=dict(source=dict(name=chains.CHAINS, cliffs=1.0), **splits),
        bases={base: CLIFF, teacher: TEACHER},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('GRPO', 'grpo'), ('teacher on right answers', 'gated'), ('KEPO', 'kepo')),
            metrics=(
                ('cliffs/reward', 'right answers on cliffs'),
                ('validation/reward', 'right answers, half of them on cliffs'),
                ('train/dead_groups', 'groups of equal rewards'),
            ),
            curves=(
                ('cliffs/reward', 'right answers on cliffs'),
                ('validation/reward', 'right answers, half of them on cliffs'),
                ('train/dead_groups', 'groups of equal rewards'),
                ('train/unsolved', 'prompts without a right answer'),
            ),
            notes='Half of the prompts are cliffs: their right way goes through a fact that the '
            'base has right once in 200 times.',
        ),
    )
    for name, method in (
        ('grpo', dict(threshold=None)),
        ('gated', {}),
        ('kepo', dict(hint=SOLUTION)),
    ):
        config[name] = kd_config.stage(
            network=chains.NETWORK,
            teacher=f'{teacher}/teacher',
            references=dict(start=f'{base}/base'),
            data=dict(source=dict(name=chains.CHAINS, cliffs=0.5), **splits),
            method=dict(name=KEPO, reward=reward, sampling=sampling, chunk=4_096, **method),
            optimizer=dict(name='adam', lr=4e-4),
            steps=160,
            batch_size=16,
            log_every=10,
            eval_every=40,
            checkpoint_every=160,
            evaluators={
                'validation': dict(
                    name='kd.evaluators.verified.verified', reward=reward, sampling=sampling
                ),
                'cliffs': dict(
                    name='kd.evaluators.verified.verified_of_recipe', reward=reward,
                    sampling=sampling,
                ),
            },
        )  # fmt: skip
    return config


def qwen3_1_7b_text():
    """Qwen3-1.7B on GSM8K, with Qwen3-8B."""
    preset, shape = 'kd.models.decoders.preset', dict(dtype='bfloat16', stacked=True, remat='block')
    policy = dict(name=preset, of='qwen3_1_7b', **shape)
    teacher = dict(name=preset, of='qwen3_8b', param_dtype='bfloat16', **shape)
    reward = dict(name='kd.rewards.mathematics.mathematics')
    sampling = dict(group=8, max_new=1_024)
    config = kd_config.recipe(
        stages=('student',),
        data=dict(
            source=dict(
                name='kd.data.text.gsm8k',
                tokenizer='hf:/models/Qwen3-1.7B',
                vocabulary=decoders.PRESETS['qwen3_1_7b']['num_classes'],
                layout='prompts',
                length=320,
                response_length=512,
                template_arguments=dict(enable_thinking=False),
            ),
            train='train[:95%]',
            validation='train[95%:]',
            test='test',
        ),
        pretrained=dict(
            start=dict(weights='hf:/models/Qwen3-1.7B', network=policy),
            teacher=dict(weights='hf:/models/Qwen3-8B', network=teacher),
        ),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('KEPO', 'student'),),
            metrics=(('validation/reward', 'right answers'), ('validation/length', 'tokens')),
            curves=(
                ('train/reward', 'reward of samples'),
                ('validation/reward', 'right, most probable tokens'),
                ('train/unsolved', 'prompts without a right answer'),
                ('train/injected', 'injected answers'),
            ),
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    config.student = kd_config.stage(
        network=policy,
        teacher='teacher',
        references=dict(start='start'),
        method=dict(
            name=KEPO,
            reward=reward,
            sampling=sampling,
            threshold=1.0,
            beta=0.5,
            hint=dict(
                solutions=4,
                temperature=0.9,
                top_p=0.95,
                # Behind what opens the user's turn: <|im_start|>, user and a line feed.
                after=3,
                before='Here is a hint, which your answer must not mention:\n',
                behind='\n\n',
                injected=2,
                tries=5,
            ),
            micro_batches=4,
        ),
        optimizer=dict(name='adamw', lr=2e-6, warmup_steps=10, clip_norm=1.0, weight_decay=0.01),
        steps=440,
        batch_size=16,
        log_every=1,
        eval_every=50,
        checkpoint_every=50,
        best='validation/reward',
        evaluators={
            'validation': dict(
                name='kd.evaluators.verified.verified', reward=reward,
                sampling=dict(sampling, group=1, top_k=1),
            )
        },
    )  # fmt: skip
    return config
