"""Reinforcement learning on results, then on every printed value (arXiv:2505.16400).

    python -m kd.claims acereason            about 30 minutes on two busy cores

Chains of arithmetic (`kd.data.builders.chain`) in two tasks of the same facts: "math" prints the
result of three operations, "code" every value on the way, and all have to be right. One base knows
both, and holds 30 % of the facts for others (`configs/rl/bases.py:chain_exec`). Policies go on from
it by GRPO with a mean over tokens:

    math           rewards for results alone; what becomes of the other task?
    then code      from there, rewards for printed values alone; and of the first one?
    four updates   on each batch of answers in place of one, on all of them or on a quarter each
    mistakes       `then code` with verdicts that are wrong for 20 or 40 % of wrong or right answers
    last stages    from `math` on all problems, or those solved in at most 14, or 6, of 16 tries
    budgets        a base that says its last value once, or three or six times more, so that its
                   answers have 6, 9 or 12 tokens: 6 of them, then 9, then 12, or 12 from the
                   first, at an equal number of decoded tokens. (On the card every value is said
                   again, which a base of this size has not learned.)

Of 4,096 problems some 75 were hard for `math`, so that each came 20 times in the last stage, which
lost .10 of accuracy; the paper's hard set has 2,200.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import chain_world, seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import chain, symbols
from kd.methods.rl.grpo import grpo
from kd.sampling.autoregressive import sampler

BATCH, LR = chain_world.PROMPTS, 4e-4
TOKENS = {'chain': 6, 'exec': 8}
# Of wrong and of right answers, the share with a wrong verdict.
MISTAKES = {'wrong_20': (0.2, 0), 'right_20': (0, 0.2), 'wrong_40': (0.4, 0), 'right_40': (0, 0.4)}
# Problems of a last stage: solved in at most this share of the tries.
SETS = {'full': 1.0, 'easy': 14 / 16, 'hard': 6 / 16}
TRIES, POOL = 16, 4_096
# Seeds of an arm, and of one that is no part of a check; what is added to those of a later stage.
RUNS, FEW, LATER = 6, 3, 100
STAGED, DIRECT = (6, 9, 12), 12
TITLES = {
    'base': 'base',
    'math': 'math, 200 batches',
    'math_code': 'then code, 120 batches',
    'code': 'code from the base, 320 batches',
    'four': 'math, four updates on a batch',
    'quarters': 'math, an update on each quarter',
    'wrong_20': 'then code, 20 % of wrong answers pass',
    'right_20': 'then code, 20 % of right ones fail',
    'wrong_40': 'then code, 40 % of wrong answers pass',
    'right_40': 'then code, 40 % of right ones fail',
    'full': 'then all of math, 100 batches',
    'easy': 'then what is not yet solved',
    'hard': 'then what is hard',
    'wordy': 'wordy base',
    'staged': 'wordy, 6, 9, then 12 tokens',
    'direct': 'wordy, 12 tokens',
}

CHECKS = (
    Check('code beyond the base by .10, from rewards for math alone',
          'code', 'math', 'base', margin=0.1),
    Check('one update over four on math', 'math', 'math', 'four'),
    Check('one update over four on code, which had no reward', 'code', 'math', 'four'),
    Check('rewards for code cost math at most .03', 'math', 'math_code', 'math', margin=-0.03),
    Check('and add to code', 'code', 'math_code', 'math'),
)  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps from an untrained network."""
    runs, share = (FEW, 0.01) if smoke else (RUNS, 1.0)
    return Claim(
        paper='Chen et al. 2025 (AceReason-Nemotron), arXiv:2505.16400',
        statement='Rewards for mathematics alone make a policy better at code; rewards for code '
        'after them take nothing from it; and one update on each batch of answers is best.',
        setting='Chains of three operations, a decoder of width 64 and 2 layers; GRPO, '
        f'{BATCH} problems x {chain_world.GROUP} answers, mean over tokens, no KL, Adam {LR} with '
        'a constant rate, clip .2 and .28 where there are several updates; one base for all, '
        f'{runs} seeds of problems and draws (three where nothing is checked); accuracy at '
        'temperature 1 on 2,000 problems of which none was trained on. One learning rate for all '
        'arms, that of the card, not tuned.',
        run=lambda say: run(say, runs, share),
        checks=[check for check in CHECKS if not smoke or check.worse != 'four'],
        draw=draw,
        notes='The paper has 2 and 4 updates by minibatches, an update on each part of the '
        'answers: `quarters`. Four updates on all of them (`four`) are four times the '
        'gradient steps and the computation. `entropy` is that of a token of math, estimated by '
        '-log p of what is said. No check: code from the base, mistakes, last stages (`share` of '
        'the problems are left), budgets. The base of the last has a run of its own, and its '
        'budgets equal numbers of decoded tokens, not of updates.',
    )


def run(say, runs, share):
    """Accuracy in both tasks after each arm, by seed."""
    world = World(say, share)
    base = world.base('chain_exec', runs)
    world.report('base', base)
    math = world.report('math', world.trained('chain', base, 200))
    if share < 1:
        world.report('math_code', world.trained('exec', math, 120, later=LATER))
    else:
        some = first(base)
        world.report('four', world.trained('chain', base, 200, updates=4))
        world.report('quarters', world.trained('chain', some, 200, updates=4, parts=4))
        world.then_code(math)
        world.report('code', world.trained('exec', some, 320))
        world.last_stages(first(math))
        world.budgets()
    return {arm: world.measured[arm] for arm in TITLES if arm in world.measured}


class World:
    """Problems, and what has been measured of policies.

    Attributes:
      share: of all numbers of steps.
      measured: {arm: {metric: [R]}}.
    """

    def __init__(self, say, share):
        self.say, self.share, self.measured = say, share, {}
        sizes = dict(train=20_000, test=2_000) if share == 1 else dict(train=64, test=32)
        self.train, self.test = (
            {task: chain_world.problems(split, size, tasks={task: 1.0}) for task in TOKENS}
            for split, size in sizes.items()
        )

    def base(self, name, runs):
        """Its parameters, [R, ...] all alike; of a network that has learnt nothing for a smoke."""
        params = chain_world.base(name, 'base', self.share < 1)
        return jax.tree.map(lambda x: np.stack([x] * runs), params)

    def trained(
        self, task, start, steps, *, rates=None, own=None, tokens=0, updates=1, parts=1,
        numbers=None, later=0,
    ):  # fmt: skip
        """Parameters [R, ...] after rewards for a task.

        Args:
          task: 'chain' or 'exec'.
          start: parameters [R, ...].
          steps: batches of answers.
          rates: of false positives and negatives, [R, 2]; None for exact verdicts.
          own: problems of each run [R, N, ...]; None for those of the task.
          tokens: of the longest answer; 0 for what the task needs.
          updates, parts: on each batch, and of it.
          numbers: seeds of the runs; None for 0, 1, ...
          later: added to them, so that a later stage draws anew.
        """
        steps = max(2, round(self.share * steps))
        data, runs = self.train[task], len(jax.tree.leaves(start)[0])
        numbers = np.arange(runs) if numbers is None else numbers
        spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in data.items()}
        reward, per_run = chain_world.REWARD, dict(own or {})
        if rates is not None:
            fields = ('false_positives', 'false_negatives')
            named = {field: field for field in fields}
            reward = dict(name='kd.rewards.noisy.noisy', reward=chain_world.REWARD, **named)
            spec |= dict.fromkeys(fields, jax.ShapeDtypeStruct((), jnp.float32))
            shape = (runs, len(data['input']))
            for field, of_run in zip(fields, np.float32(rates).T, strict=True):
                per_run[field] = np.broadcast_to(of_run[:, None], shape)
        context = seeds.context(
            network=chain_world.network(), references={'start': chain_world.network()},
            steps=steps, batch_size=BATCH, spec=spec, num_classes=symbols.TOKENS,
            optimizer=dict(name='adam', lr=LR),
        )  # fmt: skip
        method = grpo(
            context, reward=reward, aggregation='token_mean', updates=updates, parts=parts,
            sampling=dict(chain_world.SAMPLING, max_new=tokens or TOKENS[task]), old='sampler',
            low=0.2, high=0.28, chunk=8_192,
        )  # fmt: skip
        state = seeds.train(
            method, {} if own else data, later + numbers, steps=steps,
            batch_size=BATCH, per_run=per_run, frozen_per_run={'start': {'params': start}},
        )  # fmt: skip
        return state.params['network']

    def report(self, arm, params, **more):
        """Measures an arm in both tasks, and returns its parameters."""
        math, code = (answered(params, self.test[task], TOKENS[task]) for task in TOKENS)
        found = {
            'math': np.asarray(math['right'].mean(1)),
            'code': np.asarray(code['right'].mean(1)),
            'entropy': np.asarray(math['entropy']),
            **more,
        }
        self.tell(arm, found)
        return params

    def tell(self, arm, found):
        """Keeps and shows what was measured."""
        self.measured[arm] = found
        shown = ', '.join(f'{name} {np.mean(value):.3f}' for name, value in found.items())
        self.say(f'{TITLES[arm]}: {shown}')

    def then_code(self, math):
        """Rewards for code after those for math, exact ones and with mistakes, side by side."""
        several = joined(math, *[first(math)] * len(MISTAKES))
        rates = [(0, 0)] * RUNS + [rate for rate in MISTAKES.values() for _ in range(FEW)]
        numbers = np.r_[:RUNS, np.tile(np.arange(FEW), len(MISTAKES))]
        params = self.trained('exec', several, 120, rates=rates, numbers=numbers, later=LATER)
        self.report('math_code', part(params, 0, RUNS))
        for number, arm in enumerate(MISTAKES):
            self.report(arm, part(params, RUNS + number * FEW, FEW))

    def last_stages(self, math):
        """On all problems of a pool, or on those that are solved in some of the tries at most."""
        pool = {name: x[:POOL] for name, x in self.train['chain'].items()}
        passed = [answered(math, pool, TOKENS['chain'], 1_000 + n)['right'] for n in range(TRIES)]
        rates = np.mean([np.asarray(x) for x in passed], axis=0)
        left = {arm: [np.flatnonzero(x <= most) for x in rates] for arm, most in SETS.items()}
        rows = [np.resize(kept, POOL) for of_runs in left.values() for kept in of_runs]
        own = {name: np.stack([x[kept] for kept in rows]) for name, x in pool.items()}
        numbers, several = np.tile(np.arange(FEW), len(SETS)), joined(*[math] * len(SETS))
        params = self.trained('chain', several, 100, own=own, numbers=numbers, later=LATER)
        for number, (arm, of_runs) in enumerate(left.items()):
            share = np.asarray([len(kept) / POOL for kept in of_runs])
            self.report(arm, part(params, number * FEW, FEW), share=share)

    def budgets(self):
        """A growing number of tokens, or the last one from the first, for as many tokens."""
        each, wordy = 60, self.base('chain_wordy', FEW)
        staged = wordy
        for number, tokens in enumerate(STAGED):
            staged = self.trained('chain', staged, each, tokens=tokens, later=number * LATER)
        direct = self.trained('chain', wordy, each * sum(STAGED) // DIRECT, tokens=DIRECT)
        for arm, params in (('wordy', wordy), ('staged', staged), ('direct', direct)):
            found = answered(params, self.test['chain'], DIRECT)
            right, length = (np.asarray(found[name]) for name in ('right', 'length'))
            self.tell(arm, {'math': right.mean(1), 'length': length})


def part(tree, begin, count):
    """Some of the runs."""
    return jax.tree.map(lambda x: x[begin : begin + count], tree)


def first(tree):
    """The runs with the first seeds."""
    return part(tree, 0, FEW)


def joined(*trees):
    """Runs of several, one after another."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def answered(params, data, tokens, key=2026):
    """One answer of each run to each problem: `right` bool [R, N], `entropy` and `length` [R]."""
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(key), n))(
        jnp.arange(len(jax.tree.leaves(params)[0]))
    )
    return _answering(tokens)(params, data, keys)


@functools.cache
def _answering(tokens):
    draw = sampler(chain_world.network().module, **chain_world.DRAWS | dict(max_new=tokens))

    def of_run(params, data, key):
        said = draw({'params': params}, data['input'], data['prompt_mask'], key)
        return {
            'right': chain.passes(said.tokens, said.mask, data['printed']),
            'entropy': -jnp.sum(said.log_probs, where=said.mask) / said.mask.sum(),
            'length': said.mask.sum(1).mean(),
        }

    return jax.jit(jax.vmap(of_run, in_axes=(0, None, 0)))


def draw(measured):
    """Every arm a row, every seed a dot; accuracy in both tasks and entropy."""
    figure = figures.new_figure(12, 0.34 * len(measured) + 1)
    axes = figure.subplots(1, 3, sharey=True)
    panels = {
        'math': 'math: right results', 'code': 'code: right in every value',
        'entropy': 'entropy of a token of math, nats',
    }  # fmt: skip
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        rows = {TITLES[arm]: of[metric] for arm, of in measured.items() if metric in of}
        figures.dots(axis, rows)
        axis.set(xlabel=label)
    # The last ones have no code.
    axes[0].set_yticks(range(len(measured)), [TITLES[arm] for arm in measured])
    axes[0].set_ylim(len(measured) - 0.5, -0.5)
    return figure
