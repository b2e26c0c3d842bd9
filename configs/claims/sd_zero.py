"""A model that learns from revisions of its own answers (arXiv:2604.12002).

    python -m kd.claims sd_zero            about 15 minutes on two busy cores, bases aside

A base answers chains of arithmetic, is told which answers were wrong, and revises these. It learns
from the revisions that are right (SRT); then from a frozen copy of itself that has read what it
answers (SD-Zero). Does each step gain, over learning from right answers alone, and does the copy
know where an answer goes wrong?
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as kd_config
from kd import figures
from kd.claims import chain_world, seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import chain, symbols
from kd.methods.lm import answering
from kd.methods.lm.distillation import distillation
from kd.methods.rl import common, scoring, sd_zero, self_teacher
from kd.methods.rl.grpo import grpo
from kd.metrics import mean_interval

CUES = dict(
    right=((symbols.GOOD,), (symbols.BAR,)), wrong=((symbols.BAD,), (symbols.BAR,)), after=1
)
# A record: BOS BAD, six symbols, |, nine of the problem and six of an answer. Alone it is shorter.
WIDTH, PLAIN_WIDTH = 24, 16
TRIES = 3
FIRST = 60


class Size(NamedTuple):
    """How much of everything there is.

    Attributes:
      runs: seeds.
      first: problems of phase 1.
      records: of them; right ones among own answers for as many of these in all.
      further: problems of phase 2.
      tests: problems.
      srt, phase_2: steps.
    """

    runs: int
    first: int
    records: int
    further: int
    tests: int
    srt: int
    phase_2: int


FULL = Size(runs=4, first=7_680, records=6_000, further=19_200, tests=2_000, srt=300, phase_2=150)
SMOKE = Size(runs=3, first=64, records=32, further=64, tests=32, srt=2, phase_2=2)
# Answers that are generated: 7,680, three revisions of each wrong one, and 19,200.
BUDGET = 40_448
TITLES = {
    'base': 'base',
    'rft': 'RFT',
    'grpo': 'GRPO',
    'phase_2': 'phase 2 alone',
    'srt': 'SRT, phase 1',
    'srt_all': 'SRT, as many answers',
    'sd_zero': 'SD-Zero',
    'mixed': 'SD-Zero, mixed KL',
    'synced': 'SD-Zero, one sync',
}
CHECKS = [
    Check('SRT over RFT by .05', 'sampled', 'srt', 'rft', margin=0.05),
    Check('SD-Zero over its first phase by .01', 'sampled', 'sd_zero', 'srt', margin=0.01),
    Check('SD-Zero over SRT on as many answers', 'sampled', 'sd_zero', 'srt_all'),
    Check('mixed KL, too, over RFT', 'sampled', 'mixed', 'rft'),
    Check('phase 2 without phase 1 below phase 1', 'sampled', 'srt', 'phase_2'),
    Check('SRT mends more of its wrong answers than the base', 'mended', 'srt', 'base'),
    Check('the teacher disagrees ten times as much on the first error as elsewhere in wrong '
          'answers', 'localisation', 'srt', 10.0),
]  # fmt: skip
MIXED = dict(
    divergence='kd.losses.divergence.mixed_kl', arguments=dict(weight=0.5), top_k=64,
    favourites='teacher', rest='renormalised',
)  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes strangers for the base, few steps and arms."""
    size = SMOKE if smoke else FULL
    arms = ('srt', 'sd_zero') if smoke else tuple(TITLES)[1:]
    known = {'base', *arms}
    return Claim(
        paper='SD-Zero 2026, arXiv:2604.12002',
        statement='A model that revises its own answers, told only whether they were right, '
        'teaches itself more than its right answers do, and more again once it reads what it '
        'says and tells where it goes wrong.',
        setting='Chains of three operations; a base of 0.1 M parameters that has seen answers '
        'revised by one who holds misconceptions half as firmly. '
        f'{BUDGET:,} answers generated for every arm but SRT, which has {BUDGET - 19_200:,} or so. '
        f'Phase 1: {FULL.first:,} problems, {TRIES} revisions of each wrong answer, '
        f'{FULL.records:,} right ones, {FULL.srt} steps of 64 records at 1e-3; SRT on as many '
        f'answers: twice as many records, {FULL.srt + FULL.phase_2} steps; RFT: right ones among '
        f'own answers, three epochs of 128 at 1e-3; phase 2: {FULL.phase_2} steps of 128 answers '
        'at 5e-4; GRPO: 16 problems of 8 answers, two updates at 4e-4; Adam, clipped at 1. One '
        f'base, {size.runs} seeds of problems, answers and orders; nothing is tuned. '
        f'{size.tests:,} other problems are the test.',
        run=lambda say: run(say, size, arms, smoke),
        checks=[c for c in CHECKS if {c.better, c.worse} <= known | {10.0}],
        draw=draw,
        notes='Not part of the claim: GRPO, as right answers are frequent here and the problems '
        'easy; and the sync, a second half of phase 2 whose teacher is what the first has made. '
        'Revisions stand before the problem and generators are taught the revised answer alone: '
        'nothing can be said of the length of answers. SRT and RFT have cross-entropies; RFT has '
        'had twice as many answers as phase 1.',
    )


def run(say, size, arms, smoke):
    """Accuracies and what becomes of wrong answers, by arm and seed."""
    world = World(size, smoke)
    measured = {}

    def report(arm, params):
        measured[arm] = found = world.measure(params)
        say(f'{TITLES[arm]}: ' + ', '.join(f'{k} {np.mean(v):.3f}' for k, v in found.items()))

    report('base', world.base)
    phase_1 = {name: world.records(blocks) for name, blocks in (('srt', 1), ('srt_all', 2))
               if name in arms}  # fmt: skip
    say(', '.join(f'{kept:.0f} right revisions for {n}' for n, (_, kept) in phase_1.items()))
    made = {
        'rft': lambda: world.rft(),
        'grpo': lambda: world.grpo(),
        'phase_2': lambda: world.phase_2(world.base, world.budget_steps, world.problems),
        'srt': lambda: world.srt(phase_1['srt'][0], size.srt),
        'srt_all': lambda: world.srt(phase_1['srt_all'][0], size.srt + size.phase_2),
        'sd_zero': lambda: world.phase_2(reviser, size.phase_2),
        'mixed': lambda: world.phase_2(reviser, size.phase_2, comparison=MIXED),
        'synced': lambda: world.phase_2(
            world.phase_2(reviser, size.phase_2 // 2), size.phase_2 - size.phase_2 // 2, seed=1
        ),
    }
    for arm in arms:
        params = made[arm]()
        report(arm, params)
        if arm == 'srt':
            reviser = params
            found = world.located(reviser)
            measured[arm] |= found
            say(', '.join(f'{name} {np.mean(value):.4f}' for name, value in found.items()))
    return measured


class World:
    """Problems of every seed, and networks that begin with one base.

    Attributes:
      base: parameters [R, ...], all alike.
      problems: {'first', 'further', 'all', 'test': fields [R, N, ...]}, no problem in two of the
        first two, nor in the test and another.
    """

    def __init__(self, size, smoke):
        self.size, self.smoke = size, smoke
        self.seeds = FIRST + np.arange(size.runs)
        self.network = chain_world.network()
        one = chain_world.base('chain_reviser', 'base', smoke)
        self.base = jax.tree.map(lambda x: np.stack([x] * size.runs), one)
        drawn = [_problems(int(seed), size) for seed in self.seeds]
        self.problems = {name: stacked([each[name] for each in drawn]) for name in drawn[0]}
        self.budget_steps = size.phase_2 if smoke else BUDGET // 128

    def records(self, blocks):
        """Records of phase 1 from so many blocks of problems, [R, N, 2, T], and how many revisions
        were right on average."""
        count = blocks * self.size.records
        made, kept = [], []
        for run, seed in enumerate(self.seeds):
            params, parts = _at(self.base, run), []
            for number in range(blocks):
                asked = {k: v[run] for k, v in self.problems['all'].items()}
                part = slice(number * self.size.first, (number + 1) * self.size.first)
                asked = {name: value[part] for name, value in asked.items()}
                key = jax.random.fold_in(jax.random.key(seed), 10 * number)
                found = jax.device_get(
                    _revised(self.network)(params, asked, jax.random.split(key, TRIES + 1))
                )
                wanted = found.pop('kept')
                parts.append({name: value[wanted | self.smoke] for name, value in found.items()})
            rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            total = len(rows['input'])
            kept.append(total)
            at = np.resize(np.random.default_rng([seed, 4]).permutation(total), count)
            made.append({name: value[at] for name, value in rows.items()})
        return stacked(made), np.mean(kept)

    def srt(self, records, steps):
        """Parameters after phase 1."""
        context = self.context(1e-3, steps, 64, records)
        method = sd_zero.srt(context, chunk=8_192)
        return self.trained(method, records, steps, 64, {'start': self.base})

    def rft(self):
        """Parameters after fine-tuning on right answers among the first ones, three epochs."""
        tries, made = self.budget_steps * 128, []
        for run, seed in enumerate(self.seeds):
            parts, left = [], tries
            for number in range(-(-tries // self.size.first)):
                rows = np.arange(number * self.size.first, (number + 1) * self.size.first)
                asked = {
                    name: np.take(value[run], rows, axis=0, mode='wrap')
                    for name, value in self.problems['all'].items()
                }
                key = jax.random.fold_in(jax.random.key(seed), 100 + number)
                text = jax.device_get(_own(self.network)(_at(self.base, run), asked, key))
                wanted = (text.pop('rewards') > 0.5) | self.smoke
                wanted &= np.arange(len(wanted)) < left
                left -= len(wanted)
                parts.append({name: value[wanted] for name, value in text.items()})
            made.append({k: np.concatenate([part[k] for part in parts]) for k in parts[0]})
        count = min(len(one['input']) for one in made)
        rows = stacked([{name: value[:count] for name, value in one.items()} for one in made])
        steps = 2 if self.smoke else 3 * count // 128
        method = distillation(self.context(1e-3, steps, 128, rows), soft_weight=0.0, chunk=8_192)
        return self.trained(method, rows, steps, 128, {'start': self.base})

    def phase_2(self, params, steps, problems=None, *, comparison=None, seed=0):
        """Parameters after phase 2 from these, which are the teacher."""
        asked = self.problems['further'] if problems is None else problems['all']
        context = self.context(5e-4, steps, 128, asked, teacher=self.network)
        method = sd_zero.sd_zero(
            context, reward=chain_world.REWARD, sampling=dict(chain_world.DRAWS, group=1),
            cues=CUES, comparison=comparison, chunk=8_192,
        )  # fmt: skip
        frozen = {'start': params, 'teacher': params}
        return self.trained(method, asked, steps, 128, frozen, seed)

    def grpo(self):
        """Parameters after as many answers of GRPO."""
        asked, steps = self.problems['all'], self.budget_steps
        context = self.context(4e-4, steps, 16, asked)
        method = grpo(
            context, reward=chain_world.REWARD, sampling=chain_world.SAMPLING, updates=2,
            old='sampler', low=0.2, high=0.28, chunk=8_192,
        )  # fmt: skip
        return self.trained(method, asked, steps, 16, {'start': self.base})

    def context(self, lr, steps, batch_size, data, **fields):
        """For a method's builder."""
        spec = {name: jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for name, x in data.items()}
        return seeds.context(
            network=self.network, references={'start': self.network}, num_classes=symbols.TOKENS,
            steps=steps, batch_size=batch_size, spec=spec,
            optimizer=dict(name='adam', lr=lr, warmup_steps=20, clip_norm=1.0), **fields,
        )  # fmt: skip

    def trained(self, method, data, steps, batch_size, frozen, seed=0):
        """Parameters [R, ...] of all seeds, side by side."""
        state = seeds.train(
            method, {}, self.seeds + 1_000 * seed, steps=steps, batch_size=batch_size,
            per_run=data,
            frozen_per_run={name: {'params': params} for name, params in frozen.items()},
        )  # fmt: skip
        return state.params['network']

    def measure(self, params):
        """Right answers, sampled and most probable; after a revision of each sampled one, told
        whether it was right; and the share of wrong ones that were mended: [R] each."""
        found = _measured(self.network)
        each = [
            found(_at(params, run), {k: v[run] for k, v in self.problems['test'].items()})
            for run in range(len(self.seeds))
        ]
        return {name: np.asarray([float(one[name]) for one in each]) for name in each[0]}

    def located(self, params):
        """Where one that has read an answer disagrees: mean KL of a token, nats, [R] each.

        At the start of phase 2, on half of its problems, as few answers are wrong.
        """
        found, half = _located(self.network), self.size.further // 2
        each = [
            found(_at(params, run), {k: v[run, :half] for k, v in self.problems['further'].items()})
            for run in range(len(self.seeds))
        ]
        made = {
            name: np.asarray([float(one[name].total / max(one[name].count, 1)) for one in each])
            for name in ('divergence_at_error', 'divergence_elsewhere', 'divergence_right')
        }
        ratio = made['divergence_at_error'] / np.maximum(made['divergence_elsewhere'], 1e-9)
        return {**made, 'localisation': ratio}


def _problems(seed, size):
    """Fields of problems of one seed: different ones for both phases."""
    count = size.first + size.further
    pool = chain.problems(np.random.default_rng([seed, 1]), 2 * count, 3, 'train')
    _, first = np.unique(np.concatenate(pool, axis=1), axis=0, return_index=True)
    rows = np.random.default_rng([seed, 2]).permutation(first)[:count]
    assert len(rows) == count
    tests = chain.problems(np.random.default_rng([seed, 3]), size.tests, 3, 'test')
    every = fields(chain.Problems(*(x[rows] for x in pool)))
    return {
        'first': {name: value[: size.first] for name, value in every.items()},
        'further': {name: value[size.first :] for name, value in every.items()},
        'all': every,
        'test': fields(tests),
    }


def fields(problems):
    """Prompts, what answers have to print, and right answers."""
    prompts, right = chain.prompts(problems), chain.evaluate(problems)
    return {
        'input': prompts,
        'prompt_mask': np.ones(prompts.shape, bool),
        'printed': chain.printed(right),
        'response': chain.responses(right),
    }


def stacked(runs):
    """Fields [R, N, ...] of those of every run."""
    return {name: np.stack([one[name] for one in runs]) for name in runs[0]}


@jax.jit
def _at(params, run):
    return jax.tree.map(lambda x: x[run], params)


@functools.cache
def _tools(network, top_k=0):
    """The sampler, (params, prompts, key) -> answers with verdicts, and what reads them again."""
    spec = {'prompt_mask': 0, 'printed': 0}
    context = seeds.context(network=network, spec=spec)
    draw = common.drawing(context, common.Sampling(group=1, top_k=top_k, **chain_world.DRAWS))
    reward = kd_config.build(chain_world.REWARD, context, where='reward')

    def answered(params, asked, key):
        said = draw({'params': params}, asked['input'], asked['prompt_mask'], key)
        return common.rewarded(asked, said, reward)

    return draw, answered, sd_zero.read_again(context, CUES)


@functools.cache
def _own(network):
    """Own answers as text, with their verdicts."""
    answered = _tools(network)[1]

    @jax.jit
    def of_run(params, asked, key):
        said = answered(params, asked, key)
        return {**_rows(said, PLAIN_WIDTH), 'rewards': said['rewards']}

    return of_run


def _rows(said, width=WIDTH):
    """Prompts and answers as text."""
    text = answering.answered(
        {name: said[name] for name in ('input', 'prompt_mask')}, said['tokens'], said['mask']
    )
    room = width - text['input'].shape[1]
    return {name: jnp.pad(x, ((0, 0), (0, room))) for name, x in text.items()}


@functools.cache
def _revised(network):
    """Records of all first answers and revisions, and which of them are kept."""
    _, answered, again = _tools(network)

    @jax.jit
    def of_run(params, asked, keys):
        first = answered(params, asked, keys[0])

        def of_try(key):
            second = answered(params, again(first), key)
            generated = {**second, **{name: asked[name] for name in ('input', 'prompt_mask')}}
            both = [_rows(one) for one in (second, generated)]
            rows = {name: jnp.stack([one[name] for one in both], axis=1) for name in both[0]}
            rows['kept'] = (first['rewards'] < 0.5) & (second['rewards'] > 0.5)
            return rows

        made = jax.lax.map(of_try, keys[1:])
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in made.items()}

    return of_run


@functools.cache
def _measured(network):
    _, answered, again = _tools(network)
    greedy = _tools(network, top_k=1)[1]

    @jax.jit
    def of_run(params, asked):
        keys = jax.random.split(jax.random.key(2026), 3)
        first = answered(params, asked, keys[0])
        second = answered(params, again(first), keys[1])
        wrong = first['rewards'] < 0.5
        return {
            'sampled': first['rewards'].mean(),
            'greedy': greedy(params, asked, keys[2])['rewards'].mean(),
            'revised': second['rewards'].mean(),
            'mended': (second['rewards'] * wrong).sum() / jnp.maximum(wrong.sum(), 1),
        }

    return of_run


@functools.cache
def _located(network):
    draw, answered, again = _tools(network)
    compare = self_teacher.comparison(draw, self_teacher.Comparison())

    @jax.jit
    def of_run(params, asked):
        variables = {'params': params}
        batch = answered(params, asked, jax.random.key(2027))
        found = scoring.answer_losses(
            network, variables, batch, draw, lambda said: (compare(said), ()), chunk=8_192,
            teacher=scoring.hidden(network, variables, again(batch)), train=False,
        )  # fmt: skip
        return sd_zero.localisation(found.losses, batch, batch['response'])

    return of_run


def draw(measured):
    """Every arm a row, every seed a dot."""
    arms = [arm for arm in TITLES if arm in measured]
    panels = {
        'sampled': 'right answers',
        'greedy': 'right, most probable',
        'mended': 'wrong answers mended',
    }

    def spread(values):
        return (list(values), *mean_interval(np.asarray(values)))

    return figures.comparison({
        label: {TITLES[arm]: spread(measured[arm][metric]) for arm in arms}
        for metric, label in panels.items()
    })  # fmt: skip
