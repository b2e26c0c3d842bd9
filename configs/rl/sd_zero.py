"""SD-Zero: a model learns from its own revisions, told right or wrong (2026, arXiv:2604.12002).

    python -m kd.main --config=configs/rl/sd_zero.py:cpu --workdir=runs/sd_zero
    python -m kd.claims sd_zero

| variant | model | problems | hardware |
|---|---|---|---|
| cpu | decoder of 0.1 M parameters | chains of arithmetic | 2 cores, 2 min, bases 5 |
| qwen3_4b (default) | Qwen3-4B-Instruct-2507 | OpenR1-Math, 15k | v5p-64 |

Stages: `first`, answers to one part of the problems; `revised`, revisions of the wrong ones; `srt`,
phase 1, on the revisions that are right; `sd_zero`, phase 2, on the other problems.

`cpu` begins with the base of `configs/rl/bases.py:chain_reviser`, which it trains first if nobody
has: .4 of its answers are right. What was wrong stands before the problem, as all blocks of that
base do, and a generator is taught the revised answer alone. `rft` is fine-tuned on the right ones
among the first answers. Expect .84 of right answers of `rft`, .97 of `srt` and all of `sd_zero`;
greedily .95, and all of both others. Of the few wrong ones the teacher of `sd_zero` disagrees with
the first error by .05 nats and with the rest by .004.

`qwen3_4b` has the paper's sizes: answers of up to 16,384 tokens at temperature 1 and top-p .9;
4,000 records for the loss of generation and 2,000 for that of revision, one after the other as in
the released code, at 5e-6 (cosine, 5 % warm-up, decay 1e-4, Adam .9, .95) for three epochs; phase 2
with 128 prompts a step, one answer to each of up to 8,192 tokens, 5e-6 after 20 steps, decay .01,
both KLs in equal parts on the teacher's 64 favourites. It reads `/models/Qwen3-4B-Instruct-2507`,
as Hugging Face has it, and `openr1_math_15k.jsonl` in `--data_dir`, lines of `problem` and
`answer`. Ours: the words of the cues, which the released code has for every model anew; the answer
and its verdict in the assistant's turn in all three places (there, the second fine-tuning has them
in the user's); three first answers and one revision of each; batches of 64 records; all records of
revised wrong answers; rows of 32,768 tokens, longer ones left out; 110 steps of phase 2, about two
epochs. Codeforces problems and Olmo-3-7B are not here. Nobody has run it. The paper goes from 49.8
(mean of eight benchmarks) to 60.3, with RFT to 54.3 and GRPO to 53.1.
"""

from pathlib import Path

from kd import bases
from kd import config as kd_config
from kd.data.builders import symbols
from kd.models import decoders
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen3_4b')
REVISER = 'configs/rl/bases.py:chain_reviser'
SRT, SD_ZERO = 'kd.methods.rl.sd_zero.srt', 'kd.methods.rl.sd_zero.sd_zero'
PROMPTS, RECORDS = 'kd.data.revisions.prompts', 'kd.data.revisions.records'
# Of the small world: BOS GOOD y | x, or BAD.
CUES = dict(
    right=((symbols.GOOD,), (symbols.BAR,)), wrong=((symbols.BAD,), (symbols.BAR,)), after=1
)
# Of text, in the turn that answers.
WORDS = dict(
    right=('', '\n\nThis is correct. Let me put it in other words:\n\n'),
    wrong=('', '\n\nWait, this is not correct. Let me start again and correct it:\n\n'),
)
# Of the released code.
MIXED = dict(
    divergence='kd.losses.divergence.mixed_kl', arguments=dict(weight=0.5), top_k=64,
    favourites='teacher', rest='renormalised',
)  # fmt: skip


def get_config(variant: str = 'qwen3_4b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen3_4b': qwen3_4b})()


def answering(who: str, data, batch_size: int, **writer):
    """Answers to all prompts of some data, judged."""
    return kd_config.stage(
        teacher=who,
        method=dict(name='kd.methods.cache.nothing'),
        data=data,
        writers={'answers': dict(name='kd.methods.generate.responses', **writer)},
        steps=1,
        batch_size=batch_size,
    )


def cpu():
    """Chains."""
    base = bases.directory(REVISER)
    chains = kd_config.load_module(Path(REVISER.partition(':')[0]))
    reward, sampling = chains.REWARD, dict(chains.SAMPLING, group=1)
    drawn = {name: value for name, value in sampling.items() if name != 'group'}
    source = dict(name=chains.CHAINS)
    config = kd_config.recipe(
        stages=('first', 'revised', 'rft', 'srt', 'sd_zero'),
        data=dict(
            source=source, train='train[7680:]', validation='validation[:800]', test='test'
        ),
        bases={base: REVISER},
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('RFT', 'rft'), ('SRT, phase 1', 'srt'), ('SD-Zero', 'sd_zero')),
            metrics=(
                ('sampled/reward', 'right answers'),
                ('greedy/reward', 'right, most probable tokens'),
                ('train/divergence_at_error', 'KL to the teacher at the first error, nats'),
                ('train/divergence_elsewhere', 'elsewhere in wrong answers'),
            ),
            curves=(
                ('sampled/reward', 'right answers'),
                ('greedy/reward', 'right, most probable tokens'),
                ('train/revision_loss', 'loss of revisions, nats'),
                ('train/divergence', 'KL to the teacher, nats'),
            ),
            notes='RFT has learned from the right ones of 7,680 answers, SRT from revisions of the '
            'wrong ones, SD-Zero from 19,200 further answers and from what it thinks of them once '
            'it has read them.',
        ),
    )  # fmt: skip
    config.first = answering(
        f'{base}/base', dict(source=source, train='train[:7680]'), 512, reward=reward, **drawn
    )
    revised = dict(name=PROMPTS, stage='first', length=18, cues=CUES)
    config.revised = answering(
        f'{base}/base', dict(source=revised, train='train'), 512, samples=3, reward=reward, **drawn
    )

    def learning(source, method, lr, steps, batch_size, start, **fields):
        verified = dict(
            name='kd.evaluators.verified.verified_of_recipe', split='train', reward=reward
        )
        return kd_config.stage(
            network=chains.NETWORK,
            references=dict(start=start),
            method=dict(chunk=4_096, **method),
            optimizer=dict(name='adam', lr=lr, warmup_steps=20, clip_norm=1.0),
            steps=steps,
            batch_size=batch_size,
            log_every=10,
            eval_every=50,
            checkpoint_every=steps,
            evaluators={
                'sampled': dict(verified, sampling=sampling),
                'greedy': dict(verified, sampling=dict(sampling, top_k=1)),
            },
            **(dict(data=dict(source=source, train='train')) if source else {}),
            **fields,
        )

    right = dict(
        name='kd.data.generated.teacher_text', stage='first', length=16, layout='rows', least=1.0,
        ended=True,
    )  # fmt: skip
    tuning = dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0)
    config.rft = learning(right, tuning, 1e-3, 100, 128, f'{base}/base')
    records = dict(name=RECORDS, stage='revised', length=24, generation='revised')
    config.srt = learning(records, dict(name=SRT), 1e-3, 300, 64, f'{base}/base')
    phase_2 = dict(
        name=SD_ZERO, reward=reward, sampling=sampling, cues=CUES, located='response'
    )  # fmt: skip
    config.sd_zero = learning(None, phase_2, 5e-4, 150, 128, 'srt', teacher='srt')
    return config


def qwen3_4b():
    """Qwen3-4B on mathematics."""
    weights = 'hf:/models/Qwen3-4B-Instruct-2507'
    preset, shape = 'kd.models.decoders.preset', dict(dtype='bfloat16', stacked=True, remat='block')
    # The rotary base of 2507.
    network = dict(name=preset, of='qwen3_4b', rope_theta=5e6, max_length=40_960, **shape)
    prompt, answer, row = 1_024, 16_384, 32_768
    source = dict(
        name='kd.data.text.chats', path='openr1_math_15k.jsonl', fields=('problem', 'answer'),
        tokenizer=weights, vocabulary=decoders.PRESETS['qwen3_4b']['num_classes'],
        layout='prompts', length=prompt, response_length=256, long='drop',
    )  # fmt: skip
    reward = dict(name='kd.rewards.mathematics.mathematics')
    config = kd_config.recipe(
        stages=('first', 'revised', 'generation', 'srt', 'sd_zero'),
        data=dict(source=source, train='train[50%:98%]', validation='train[98%:]'),
        pretrained=dict(base=dict(weights=weights, network=network)),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('SRT, phase 1', 'srt'), ('SD-Zero', 'sd_zero')),
            metrics=(('validation/reward', 'right answers'), ('validation/length', 'tokens')),
            curves=(
                ('validation/reward', 'right answers'),
                ('validation/length', 'tokens of an answer'),
                ('train/divergence_wrong', 'KL on wrong answers, nats'),
                ('train/divergence_right', 'KL on right answers, nats'),
            ),
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
        rollout_dtype='bfloat16',
    )
    drawn = dict(max_new=answer, temperature=1.0, top_p=0.9, reward=reward)
    config.first = answering(
        'base', dict(source=source, train='train[:50%]'), 256, samples=3, **drawn
    )
    revised = dict(name=PROMPTS, stage='first', length=row - answer, cues=WORDS)
    config.revised = answering('base', dict(source=revised, train='train'), 256, **drawn)

    def learning(method, lr, decay, steps, batch_size, start, warmup, data=None, **fields):
        return kd_config.stage(
            network=network,
            references=dict(start=start),
            method=method,
            optimizer=dict(
                name='adamw', lr=lr, weight_decay=decay, warmup_steps=warmup, clip_norm=1.0,
                **fields.pop('optimizer', {}),
            ),
            **(dict(data=data) if data else {}),
            steps=steps,
            batch_size=batch_size,
            log_every=5,
            eval_every=steps // 2,
            checkpoint_every=steps // 2,
            evaluators={
                'validation': dict(
                    name='kd.evaluators.verified.verified_of_recipe', split='train', reward=reward,
                    sampling=dict(group=1, max_new=answer, temperature=0.7),
                )
            },
            **fields,
        )  # fmt: skip

    records = dict(name=RECORDS, stage='revised', length=row)
    falls = dict(optimizer=dict(schedule='cosine', b2=0.95))
    for name, size, part, weights_of, steps, start in (
        ('generation', 4_000, 'train[:70%]', (0.0, 1.0), 188, 'base'),
        ('srt', 2_000, 'train[70%:]', (1.0, 0.0), 94, 'generation'),
    ):
        method = dict(
            name=SRT, revision_weight=weights_of[0], generation_weight=weights_of[1],
            micro_batches=16,
        )  # fmt: skip
        data = dict(source=dict(records, size=size), train=part)
        config[name] = learning(
            method, 5e-6, 1e-4, steps, 64, start, round(0.05 * steps), data, **falls
        )
    method = dict(
        name=SD_ZERO, reward=reward, sampling=dict(group=1, max_new=8_192), cues=WORDS,
        comparison=MIXED, micro_batches=16,
    )  # fmt: skip
    config.sd_zero = learning(method, 5e-6, 0.01, 110, 128, 'srt', 20, teacher='srt')
    return config
