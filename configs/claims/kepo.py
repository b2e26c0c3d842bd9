"""Hints where no answer is right, a teacher's law where one is (arXiv:2602.00400).

    python -m kd.claims kepo            about 10 minutes on one core

Chains of arithmetic, half of which go through a fact that the base says rightly once in 200 times:
groups of eight answers are all wrong there, and rewards say nothing. GRPO, distillation on the
base's own answers (GKD), both together on all answers or on right ones, and KEPO, where a solution
of the teacher in the prompt opens what no answer has solved.
"""

from typing import NamedTuple

import jax
import numpy as np

from kd import figures
from kd.claims import chain_world as world
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import symbols
from kd.methods.rl import common, hints
from kd.methods.rl import kepo as of_kepo
from kd.methods.rl.hints import Hints
from kd.methods.rl.surrogate import Surrogate
from kd.metrics import mean_interval

TEACHERS = {'clean': 'chain_clean', 'biased': 'chain_biased'}
FIRST, EVERY = 20, 25
# Updates over which unsolved groups are counted.
FROM, TO = 50, 150
HINT = dict(
    solutions=8, temperature=1.0, top_p=1.0, before=(symbols.SOL,), behind=(symbols.BAR,), after=1,
    injected=2, tries=5,
)  # fmt: skip


class Arm(NamedTuple):
    """`threshold` of the gate, `policy` the weight of the policy gradient, and whose law it is."""

    title: str
    threshold: float = 1.0
    policy: float = 1.0
    teacher: str = 'clean'


PLAIN = {
    'grpo': Arm('GRPO', np.inf),
    'gated': Arm('GRPO, teacher on right answers'),
    'ungated': Arm('GRPO, teacher on all answers', 0.0),
    'gkd': Arm('GKD: the teacher alone', 0.0, 0.0),
    'ungated_biased': Arm('biased teacher on all answers', 0.0, teacher='biased'),
}
KEPO = {'kepo': Arm('KEPO'), 'kepo_biased': Arm('KEPO, biased teacher', teacher='biased')}
ARMS = {**PLAIN, **KEPO}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes one step on few answers, and a shallow, untrained base."""
    runs, steps = (3, 1) if smoke else (3, 200)
    over = [
        Check(f'cliffs: over {text} by .03', 'cliff', 'kepo', name, margin=0.03)
        for name, text in (
            ('grpo', 'GRPO'),
            ('gkd', 'GKD'),
            ('gated', 'a gate without hints'),
            ('ungated', 'a teacher on all answers'),
        )
    ]
    return Claim(
        paper='KEPO 2026, arXiv:2602.00400',
        statement='Hints of a teacher open problems on which every answer of a policy fails, and '
        'where rewards and a divergence to the teacher leave most of them unsolved.',
        setting='Chains of three operations, half of them through a fact that the base has right '
        f'with .005; decoders of 0.1 M parameters; {world.PROMPTS} prompts of {world.GROUP} '
        f'answers, {steps} batches, one update of Adam 4e-4 on each, all arms alike and as given '
        'on the card; teachers right in .92 (clean) and .28 (biased: wrong about one operator of '
        f'three) of sampled answers; 800 held-out prompts; {runs} seeds of answers and of the '
        'order of prompts, one base.',
        run=lambda say: run(say, runs, steps, world.SMOKE if smoke else world.Size(), smoke),
        checks=[
            *over,
            Check('cliffs, biased teacher: over a teacher on all answers by .1', 'cliff',
                  'kepo_biased', 'ungated_biased', margin=0.1),
            Check('half as many unsolved groups as GRPO', 'unsolved', 'kepo', 'grpo', lower=True,
                  ratio=0.5),
            Check('a gate without hints is within .1 of GRPO on cliffs', 'cliff', 'gated', 'grpo',
                  margin=-0.1, lower=True),
        ],
        draw=draw,
        notes='The hint is a right solution of the teacher, found in eight tries, and a problem '
        'without one has no hint. That the gate is better than none is no part of the claim: a '
        'clean teacher says the right next step after a wrong one too, so that its law on wrong '
        'answers is no noise here. Unsolved groups are counted on '
        f'100 held-out cliffs of eight answers each, without hints, from update {FROM} to {TO}.',
    )  # fmt: skip


def run(say, runs, steps, size, smoke):
    """What every arm gets right on cliffs and on other prompts, by seed."""
    own = world.network(depth=size.depth)
    asked = world.problems('train', size.train, cliffs=0.5)
    test = world.problems('test', size.test, cliffs=0.5)
    cliff, measured = test['cliff'], {}
    first = jax.tree.map(lambda x: x[None], world.base('chain_cliff', 'base', smoke, own=own))
    right = world.measure(first, test, own=own, greedy=False)['right'][0]
    say(f'base: cliffs {right[cliff].mean():.3f}, others {right[~cliff].mean():.3f}')
    context = world.context(asked, steps, own=own)
    # One program starts sooner than two.
    programs = [(ARMS, HINT)] if smoke else [(PLAIN, None), (KEPO, HINT)]
    for arms, hint in programs:
        method = side_by_side(context, size.sampling, hint)
        found, unsolved = trained(say, arms, method, runs, steps, asked, test, size, smoke)
        for place, name in enumerate(arms):
            rows = slice(place * runs, (place + 1) * runs)
            measured[name] = {
                'cliff': found['right'][rows][:, cliff].mean(1),
                'ordinary': found['right'][rows][:, ~cliff].mean(1),
                'unsolved': unsolved[rows],
                'entropy': found['entropy'][rows],
            }
            means = ', '.join(f'{key} {np.mean(x):.3f}' for key, x in measured[name].items())
            say(f'{ARMS[name].title}: {means}')
    return measured


def trained(say, arms, method, runs, steps, asked, test, size, smoke):
    """Measures of the arms' runs, arm by arm, at the end, and the share of unsolved groups."""
    own = world.network(depth=size.depth)
    base = world.base('chain_cliff', 'base', smoke, own=own)
    teachers = {name: world.base(of, 'teacher', smoke, own=own) for name, of in TEACHERS.items()}
    each = [arm for arm in arms.values() for _ in range(runs)]
    # As many rows as the test has.
    rows = np.flatnonzero(test['cliff'])[: size.test // size.group].repeat(size.group)
    cliffs = {name: x[rows] for name, x in test.items()}
    unsolved, final = [], {}

    def look(state):
        at, params = int(state.step), state.params['network']
        if FROM <= at <= TO or smoke:
            right = world.measure(params, cliffs, own=own, greedy=False)['right']
            unsolved.append(~right.reshape(len(right), -1, size.group).any(-1))
        if at == steps:
            final.update(world.measure(params, test, own=own, greedy=False))
        say(f'{len(arms)} arms, {at} batches')

    seeds.train(
        method, asked, np.tile(FIRST + np.arange(runs), len(arms)), steps=steps,
        batch_size=size.prompts, frozen={'start': {'params': base}},
        frozen_per_run={
            'teacher': {'params': jax.tree.map(
                lambda *x: np.stack(x), *[teachers[arm.teacher] for arm in each]
            )},
            'threshold': np.asarray([arm.threshold for arm in each], np.float32),
            'policy': np.asarray([arm.policy for arm in each], np.float32),
        },
        watch=look, watched=EVERY,
    )  # fmt: skip
    return final, np.mean(unsolved, axis=(0, 2))


def side_by_side(context, sampling, hint):
    """KEPO as one program, so that all runs are side by side: `state.frozen` says which answers the
    teacher's law is for, and whether there is a policy gradient."""
    config, how = common.Sampling(**sampling), Surrogate(chunk=4_096)
    draw = common.drawing(context, config, context.teacher)
    judge = common.of_block(context, world.REWARD)
    if hint is None:
        answer = common.answered(context, draw, judge, group=config.group)
    else:
        answer = hints.opened(context, draw, judge, config, Hints(**hint))

    def collect(state, batch, key):
        batch = common.valued(answer(state, batch, key), config.group, ddof=1, epsilon=1e-4)
        batch['weight'] *= state.frozen['policy']
        return of_kepo.gated(batch, state.frozen['threshold'])

    return of_kepo.learner(
        context, draw, collect, group=config.group, how=how, weight=1.0, beta=0.5
    )


def draw(measured):
    """A panel for each metric, an arm a row, a seed a dot."""

    def spread(values):
        return (list(values), *mean_interval(np.asarray(values)))

    metrics = {
        'cliff': 'right on cliffs',
        'ordinary': 'right on other prompts',
        'unsolved': 'unsolved groups on cliffs',
    }
    return figures.comparison({
        label: {ARMS[arm].title: spread(found[name]) for arm, found in measured.items()}
        for name, label in metrics.items()
    })  # fmt: skip
