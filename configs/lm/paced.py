"""PACED: distillation weighted by the student's pass rate (2026, arXiv:2603.11178).

The student is distilled by forward KL and then, from those weights, by reverse KL.

    python -m kd.main --config=configs/lm/paced.py:cpu --workdir=runs/paced
    python -m kd.main --config=configs/lm/paced.py:learnable --workdir=runs/paced_learnable
    python -m kd.main --config=configs/lm/paced.py:chains --workdir=runs/paced_chains

| variant | problems | hardware |
|---|---|---|
| cpu | six families; in the hardest, 40 %, the teacher is incoherent | 2 cores, 1 min |
| learnable | the teacher knows the hardest too: uniform weights should win | 2 cores, 1 min |
| chains | language models on chains of 2, 3 and 4 operations | 2 cores, 2 min, bases 5 |
| qwen3_8b_to_1_7b (default) | mathematics, `dapo_math_17k.jsonl` in `--data_dir` | v5p-64 |

In `cpu` and `learnable` a pre-trained student's pass rates are estimated anew at every step from
eight rollouts. To compare, set `--config.forward.method.weighting=uniform` (or hard), likewise
`reverse`.

The others are of text. Before each of the two, a stage lets the student answer every prompt eight
times at temperature 1 and has the answers judged; forward KL is on references, reverse KL on what
the student answers while it learns. `chains` begins with the base of `configs/rl/bases.py:chain`
and its teacher, `chain_clean`, which it trains first if nobody has; a stage `uniform` is as long as
both others together. The base answers .21 of its problems rightly; expect .31 after `uniform`, .32
after `forward` and .40 after `reverse`, greedily .43, .44 and .45. One seed and nothing tuned: a
check that it runs, and no result.

The paper distils Qwen3-8B (after GRPO) into Qwen3-1.7B on DAPO-Math-17k, prompts of 2,048 and
responses of 8,192 tokens, batches of 256 at a learning rate of 1e-6: MATH-500 76.8 uniform, 79.4
PACED. References are the teacher's own answers, one a prompt. Qwen3-8B as released stands for that
after GRPO, which is not to be had; 200 steps for each of both stages are ours. The file has lines
of `prompt` and `answer`, the result. Nobody has run it.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.data.builders import verifiable
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'learnable', 'chains', 'qwen3_8b_to_1_7b')
CHAIN, TEACHER = 'configs/rl/bases.py:chain', 'configs/rl/bases.py:chain_clean'
PACED = 'kd.methods.lm.paced.paced_text'


def get_config(variant: str = 'qwen3_8b_to_1_7b'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'learnable': learnable,
            'chains': chains,
            'qwen3_8b_to_1_7b': qwen3_8b_to_1_7b,
        },
    )()


def cpu(coherent: bool = False):
    """The toy; `coherent` lets the teacher know the hardest family."""

    def data(mix):
        source = dict(
            name='kd.data.builders.verifiable.problems', mix=tuple(mix), coherent=coherent
        )
        return dict(source=source, train='train', validation='validation', test='test')

    def run(steps, lr):
        return dict(
            network=dict(name='kd.models.structured.AnswerMLP', widths=(96, 96)),
            optimizer=dict(name='adam', lr=lr),
            steps=steps,
            batch_size=64,
            log_every=50,
            eval_every=100,
            checkpoint_every=300,
            evaluators={
                'validation': dict(name='kd.evaluators.answers.answers', groups=verifiable.FAMILIES)
            },
        )

    def distil(divergence):
        return dict(
            name='kd.methods.lm.paced.paced',
            divergence=f'kd.losses.divergence.{divergence}',
            weighting='beta',
            rollouts=8,
        )

    config = kd_config.recipe(
        stages=('pretraining', 'forward', 'reverse'), data=data(verifiable.DISTILLATION_MIX)
    )
    config.pretraining = kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        data=data(verifiable.PRETRAINING_MIX),
        **run(900, 2e-3),
    )
    config.forward = kd_config.stage(
        method=distil('forward_kl'), references=dict(start='pretraining'), **run(200, 1e-3)
    )
    config.reverse = kd_config.stage(
        method=distil('reverse_kl'), references=dict(start='forward'), **run(100, 1e-3)
    )
    return config


def learnable():
    """The counter-regime: what the student always fails can be learnt."""
    return cpu(coherent=True)


def chains():
    """Small decoders on chains of arithmetic: PACED beside uniform weights."""
    base, teacher = bases.directory(CHAIN), bases.directory(TEACHER)
    world = kd_config.load_module(Path(CHAIN.partition(':')[0]))
    sampling = dict(world.SAMPLING, group=8, max_new=8)
    problems = dict(
        name=world.CHAINS, law='clean', operations={'2': 0.3, '3': 0.4, '4': 0.3}, size=4_096
    )
    splits = dict(train='train', validation='validation')
    config = kd_config.recipe(
        stages=('rates', 'uniform', 'forward', 'again', 'reverse'),
        data=dict(source=problems, **splits),
        bases={base: CHAIN, teacher: TEACHER},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('uniform', 'uniform'), ('forward', 'forward'), ('then reverse', 'reverse')),
            metrics=(('sampled/reward', 'right answers'), ('greedy/reward', 'right, greedy')),
            notes='The base is right in four of ten answers to problems of three operations, and '
            'has seen none of four.',
        ),
    )
    config.rates = rates(f'{base}/base', world.REWARD, sampling, batch_size=256)
    config.again = rates('forward', world.REWARD, sampling, batch_size=256)
    for name, start, steps, method in (
        ('uniform', f'{base}/base', 300, dict(weighting='uniform')),
        ('forward', f'{base}/base', 200, {}),
        ('reverse', 'forward', 100, dict(
            divergence='kd.losses.divergence.reverse_kl', answers='student', sampling=sampling)),
    ):  # fmt: skip
        config[name] = kd_config.stage(
            network=world.NETWORK,
            teacher=f'{teacher}/teacher',
            references=dict(start=start),
            method=dict(name=PACED, chunk=4_096, **method),
            optimizer=dict(name='adam', lr=3e-4, clip_norm=1.0),
            data=dict(source=dict(name='kd.data.generated.pass_rates',
                                  stage='again' if name == 'reverse' else 'rates'), train='train'),
            steps=steps,
            batch_size=64,
            log_every=20,
            checkpoint_every=100,
            evaluators={
                'sampled': verified(world.REWARD, dict(sampling, group=1)),
                'greedy': verified(world.REWARD, dict(sampling, group=1, top_k=1)),
            },
        )  # fmt: skip
    return config


def qwen3_8b_to_1_7b():
    """Qwen3-8B into Qwen3-1.7B on DAPO-Math-17k."""
    preset, shape = 'kd.models.decoders.preset', dict(dtype='bfloat16', stacked=True, remat='block')
    student = dict(name=preset, of='qwen3_1_7b', **shape)
    large = dict(name=preset, of='qwen3_8b', param_dtype='bfloat16', **shape)
    sampling = dict(group=8, max_new=8_192)
    reward = dict(name='kd.rewards.mathematics.mathematics')
    config = kd_config.recipe(
        stages=('reference', 'rates', 'forward', 'again', 'reverse'),
        data=dict(
            source=dict(
                name='kd.data.text.chats',
                path='dapo_math_17k.jsonl',
                fields=('prompt', 'answer'),
                tokenizer='hf:/models/Qwen3-1.7B',
                vocabulary=decoders.PRESETS['qwen3_1_7b']['num_classes'],
                layout='prompts',
                length=2_048,
                response_length=64,
                long='drop',
            ),
            train='train[:99%]',
            validation='train[99%:]',
        ),
        pretrained=dict(
            teacher=dict(weights='hf:/models/Qwen3-8B', network=large),
            start=dict(weights='hf:/models/Qwen3-1.7B', network=student),
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    config.reference = kd_config.stage(
        teacher='teacher',
        method=dict(name='kd.methods.cache.nothing'),
        writers={'answers': dict(name='kd.methods.generate.responses', max_new=8_192)},
        steps=1,
        batch_size=128,
    )
    config.rates = rates('start', reward, sampling, batch_size=32)
    config.again = rates('forward', reward, sampling, batch_size=32)
    texts = dict(name='kd.data.generated.teacher_text', stage='reference', rates='rates',
                 layout='rows', length=10_240)  # fmt: skip
    prompts = dict(name='kd.data.generated.pass_rates', stage='again')
    own = dict(divergence='kd.losses.divergence.reverse_kl', answers='student', sampling=sampling)
    for name, start, source, method in (
        ('forward', 'start', texts, {}),
        ('reverse', 'forward', prompts, own),
    ):
        config[name] = kd_config.stage(
            network=student,
            teacher='teacher',
            references=dict(start=start),
            method=dict(name=PACED, micro_batches=4, **method),
            optimizer=dict(name='adamw', lr=1e-6, warmup_steps=10, clip_norm=1.0),
            data=dict(source=source, train='train'),
            steps=200,
            batch_size=256,
            log_every=1,
            checkpoint_every=50,
            evaluators={'validation': verified(reward, dict(sampling, group=1))},
        )
    return config


def verified(reward, sampling):
    """The evaluator of an answer to each of the recipe's own prompts; stages have other splits."""
    return dict(
        name='kd.evaluators.verified.verified_of_recipe',
        split='train',
        reward=reward,
        sampling=sampling,
    )


def rates(student: str, reward, sampling, *, batch_size: int):
    """A stage in which a student answers every prompt, eight times, and is judged."""
    drawn = {name: value for name, value in sampling.items() if name != 'group'}
    return kd_config.stage(
        references=dict(student=student),
        method=dict(name='kd.methods.cache.nothing'),
        writers={
            'answers': dict(
                name='kd.methods.generate.responses',
                who='student',
                samples=sampling['group'],
                reward=reward,
                **drawn,
            )
        },
        steps=1,
        batch_size=batch_size,
    )
