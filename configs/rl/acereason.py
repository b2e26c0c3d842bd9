"""AceReason-Nemotron: reinforcement learning on mathematics, then on code (2025, arXiv:2505.16400).

    python -m kd.main --config=configs/rl/acereason.py:cpu --workdir=runs/acereason
    python -m kd.claims acereason

| variant | policy | problems | hardware |
|---|---|---|---|
| cpu | a decoder of 0.1 M parameters | chains of arithmetic, results, then every value | 2 cores |
| r1_distill_7b (default) | DeepSeek-R1-Distill-Qwen-7B | mathematics, then code | 128 H100 there |
| r1_distill_14b | DeepSeek-R1-Distill-Qwen-14B | the same | 128 H100 there |

The method is GRPO with one update on each batch of answers, a mean over tokens and no KL: what is
new is the order of things. Each stage begins with the policy of the one before; the budget of
tokens grows; late stages leave out what the model that enters them solves in more than 6 of 16
tries; code comes after mathematics.

`cpu` begins with the base of `configs/rl/bases.py:chain_exec`, which it trains first if nobody has:
"math" is `chain`, whose result is verified, "code" is `exec`, all of whose printed values are. Both
have the same facts. Of seed 0 `math` was right in .90 of results and `code`, before any reward for
it, in .62 of all values (base .44 and .41); a stage of hard problems took both back to .86 and .55;
rewards for code left .97 in both. Four minutes.

The other two are the paper's setting, as far as it is told: AdamW, 1e-6 on mathematics and 5e-6 on
code, batches of 128 problems, 8 answers to each with 8k tokens and 16 beyond, temperature 1 (.6 on
code, at the end 1); 24k tokens with the problems of difficulty up to 5 (up to 7 for 14B) first on
code. Of ours are the numbers of steps, and on code the second round at 32k, which stands for one
after every epoch. AIME24, avg@64 there and avg@16 here: 55.5 before and 69.0 after for 7B, 69.7 and
78.6 for 14B. Nobody has run them here.

They read from `--data_dir`
  `acereason_math.jsonl`: `prompt` and `answer`, 49k problems of DeepScaleR and NuminaMath, without
    those that share 9-grams with a test, have several parts, choices, proofs or figures, whose
    majority answer of a strong model is wrong, or which it solves in under 2,000 tokens;
  `acereason_code.jsonl`: `prompt`, `answer` and `difficulty`, 8,520 problems, of 0 (solved in eight
    of eight tries of a strong model) to 7;
  `aime24.jsonl`: `prompt` and `answer`.

No program of a model is run by this package. The reward of code is `kd.rewards.programs`, which
hands an answer and the expected outputs (`answer` of the problem) to a verifier of yours:

    KD_CODE_VERIFIER=mine.verdict python -m kd.main --config=configs/rl/acereason.py ...

Without one the run does not begin.
"""

import os
from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'r1_distill_7b', 'r1_distill_14b')
BASE = 'configs/rl/bases.py:chain_exec'
GRPO = 'kd.methods.rl.grpo.grpo'
PASS_RATES = 'kd.data.generated.pass_rates'
# A problem is hard that is solved in at most so many of the tries.
HARD, TRIES = 6 / 16, 16
TEMPLATE = 'configs/rl/thinking.jinja'
INSTRUCTIONS = {
    'math': 'Please reason step by step, and put your final answer within \\boxed{}.',
    'code': 'Please reason step by step, and write a program in Python within ```python and ```.',
}


def get_config(variant: str = 'r1_distill_7b'):
    """The recipe of a variant."""
    return kd_config.variant(
        variant,
        {
            'cpu': cpu,
            'r1_distill_7b': lambda: r1_distill('7b', difficulty=5),
            'r1_distill_14b': lambda: r1_distill('14b', difficulty=7),
        },
    )()


def cpu():
    """Results of chains, hard ones, then printed values."""
    base = bases.directory(BASE)
    world = kd_config.load_module(Path(BASE.partition(':')[0]))
    chains = dict(name=world.CHAINS)
    sampling = dict(world.SAMPLING, group=8, max_new=8)
    config = kd_config.recipe(
        stages=('math', 'rates', 'hard', 'code'),
        data=dict(
            source=dict(
                name='kd.data.named.named',
                sets=dict(math=chains, code=dict(chains, tasks={'exec': 1.0})),
            ),
            train='math:train',
            math='math:validation[:800]',
            code='code:validation[:800]',
        ),
        bases={base: BASE},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('math', 'math'), ('hard math', 'hard'), ('then code', 'code')),
            metrics=(
                ('math/reward', 'right results'),
                ('code/reward', 'right in every value'),
                ('train/entropy', 'entropy of a token, nats'),
            ),
            curves=(
                ('math/reward', 'right results'),
                ('code/reward', 'right in every value'),
                ('train/entropy', 'entropy of a token, nats'),
                ('train/dead_groups', 'groups of equal rewards'),
            ),
            notes='Rewards of `math` and `hard` are for results alone, yet more of the values that '
            'the other task prints are right after them.',
        ),
    )

    def stage(start, steps, **fields):
        return learning(
            world.NETWORK, start, world.REWARD, sampling, chunk=4_096, steps=steps, batch_size=16,
            optimizer=dict(name='adam', lr=4e-4), log_every=10, eval_every=40,
            evaluators={
                of: verified(world.REWARD, dict(sampling, group=1), of) for of in ('math', 'code')
            },
            **fields,
        )  # fmt: skip

    config.math = stage(f'{base}/base', 160)
    config.rates = rates(
        'math', world.REWARD, dict(sampling, max_new=6), dict(train='math:train[:4096]'), 256
    )
    config.hard = stage(
        'math', 40, data=dict(source=dict(name=PASS_RATES, stage='rates', most=HARD), train='train')
    )
    config.code = stage('hard', 120, data=dict(train='code:train'))
    return config


def r1_distill(size: str, *, difficulty: int):
    """Eight stages of learning, from 8k to 32k tokens, and three of pass rates between them."""
    of, folder = f'r1_distill_qwen_{size}', f'hf:/models/DeepSeek-R1-Distill-Qwen-{size.upper()}'
    network = dict(
        name='kd.models.decoders.preset', of=of, dtype='bfloat16', stacked=True, remat='block'
    )

    def problems(file, kind, length):
        return dict(
            name='kd.data.text.chats', path=file, fields=('prompt', 'answer'), tokenizer=folder,
            vocabulary=decoders.PRESETS[of]['num_classes'], template=TEMPLATE,
            template_arguments=dict(instruction=INSTRUCTIONS[kind]), layout='prompts',
            length=length, response_length=2_048 if kind == 'code' else 64, long='drop',
        )  # fmt: skip

    math = dict(source=problems('acereason_math.jsonl', 'math', 2_048), train='train')
    every = problems('acereason_code.jsonl', 'code', 4_096)
    easier = dict(
        every, edit=dict(name='kd.data.builders.records.at_most', field='difficulty',
                         most=difficulty),
    )  # fmt: skip
    code = dict(source=every, train='train')
    result = dict(name='kd.rewards.mathematics.mathematics', after='</think>')
    passed = dict(
        name='kd.rewards.programs.programs', after='</think>',
        function=os.environ.get('KD_CODE_VERIFIER', ''),
    )  # fmt: skip
    config = kd_config.recipe(
        stages=(
            *('math_8k', 'math_16k', 'rates_24k', 'math_24k'),
            *('code_24k', 'code_32k', 'solved', 'code_again', 'rates_32k', 'math_32k'),
        ),
        data=dict(source=problems('aime24.jsonl', 'math', 2_048), train='train'),
        pretrained=dict(start=dict(weights=folder, network=network)),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('math, 24k', 'math_24k'), ('code', 'code_again'), ('math, 32k', 'math_32k')),
            metrics=(('aime24/reward', 'AIME24, avg@16'), ('aime24/length', 'tokens')),
            curves=(('train/reward', 'reward'), ('train/entropy', 'entropy of a token, nats')),
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    asked = verified(result, dict(group=16, max_new=32_768, temperature=0.6, top_p=0.95), 'train')

    def stage(start, steps, data, thousand, *, group=16, temperature=1.0, on='math'):
        return learning(
            network, start, result if on == 'math' else passed,
            dict(group=group, max_new=1_024 * thousand, temperature=temperature),
            micro_batches=group, data=data, steps=steps, batch_size=128,
            optimizer=dict(name='adamw', lr=1e-6 if on == 'math' else 5e-6, clip_norm=1.0),
            log_every=1, eval_every=steps, evaluators={'aime24': asked},
        )  # fmt: skip

    def left(name, most):
        return dict(source=dict(name=PASS_RATES, stage=name, most=most), train='train')

    def tried(who, reward, data, thousand, temperature=1.0):
        drawn = dict(group=TRIES, max_new=1_024 * thousand, temperature=temperature)
        return rates(who, reward, drawn, data, 128)

    config.math_8k = stage('start', 400, math, 8, group=8)
    config.math_16k = stage('math_8k', 200, math, 16)
    config.rates_24k = tried('math_16k', result, math, 24)
    config.math_24k = stage('math_16k', 200, left('rates_24k', HARD), 24)
    first = dict(source=easier, train='train')
    config.code_24k = stage('math_24k', 130, first, 24, group=8, temperature=0.6, on='code')
    config.code_32k = stage('code_24k', 66, code, 32, group=8, temperature=0.6, on='code')
    config.solved = tried('code_32k', passed, code, 32, 0.6)
    config.code_again = stage('code_32k', 66, left('solved', 15 / 16), 32, on='code')
    config.rates_32k = tried('code_again', result, math, 32)
    config.math_32k = stage('code_again', 100, left('rates_32k', HARD), 32)
    return config


def learning(network, start, reward, sampling, *, chunk=256, micro_batches=1, **fields):
    """GRPO as the paper has it: one update on a batch, a mean over tokens, no KL."""
    return kd_config.stage(
        network=network,
        references=dict(start=start),
        method=dict(
            name=GRPO, reward=reward, sampling=sampling, aggregation='token_mean', chunk=chunk,
            micro_batches=micro_batches,
        ),
        checkpoint_every=fields['eval_every'],
        **fields,
    )  # fmt: skip


def rates(who, reward, sampling, data, batch_size):
    """How often the policy that enters a stage solves each problem."""
    drawn = {name: value for name, value in sampling.items() if name != 'group'}
    answers = dict(
        name='kd.methods.generate.responses', who='policy', samples=TRIES, reward=reward, **drawn
    )
    return kd_config.stage(
        references=dict(policy=who),
        method=dict(name='kd.methods.cache.nothing'),
        data=data,
        writers=dict(answers=answers),
        steps=1,
        batch_size=batch_size,
    )


def verified(reward, sampling, of):
    """The evaluator of a split of the recipe's own data."""
    return dict(
        name='kd.evaluators.verified.verified_of_recipe', reward=reward, sampling=sampling,
        data=of, split='train',
    )  # fmt: skip
