"""A teacher in the ratio, or in a term of its own, where updates run away (arXiv:2602.22495).

    python -m kd.claims rlad            about 14 minutes on one core

Chains of arithmetic, verified answers, one base that is right in four of ten. GRPO, GRPO with a KL
to a teacher (KDRL) at four weights, and RLAD, which has the teacher in the ratio that is clipped
and no weight: first with six updates on every batch of answers, which GRPO does not survive at
twice the usual rate; then with two, beside a good teacher and a biased one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import chain_world as world
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import symbols
from kd.losses import policy
from kd.methods.rl import common, surrogate
from kd.methods.rl.surrogate import Surrogate, Term
from kd.metrics import mean_interval

RATE, STRESS = 4e-4, 8e-4
WEIGHTS = (0.03, 0.1, 0.3, 0.5)
TEACHERS = {'clean': 'chain_clean', 'biased': 'chain_biased'}
FIRST, EVERY = 10, 20


class Arm(NamedTuple):
    """`beta` is the weight of KDRL's teacher; `anchored` has it in the ratio."""

    title: str
    beta: float = 0.0
    anchored: bool = False
    rate: float = RATE
    teacher: str = 'clean'


def kinds(weights=WEIGHTS, **fields):
    """{name: arm}: RLAD, and KDRL at some weights."""
    found = {f'kdrl_{beta:g}': Arm(f'KDRL, beta {beta:g}', beta, **fields) for beta in weights}
    return {'rlad': Arm('RLAD', anchored=True, **fields), **found}


# {updates: {name: arm}}
ARMS = {
    6: {
        f'{name}_{label}': arm
        for label, rate, weights in (('6_stress', STRESS, WEIGHTS), ('6', RATE, (0.1,)))
        for name, arm in {'grpo': Arm('GRPO', rate=rate), **kinds(weights, rate=rate)}.items()
    },
    2: {
        'grpo_2': Arm('GRPO'),
        **{f'{name}_2_clean': arm for name, arm in kinds((0.5,)).items()},
        **{f'{name}_2_biased': arm for name, arm in kinds(teacher='biased').items()},
    },
}
SETTINGS = {
    '6_stress': '6 updates, Adam 8e-4',
    '6': '6 updates, Adam 4e-4',
    '2_clean': '2 updates, clean teacher',
    '2_biased': '2 updates, biased teacher',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes one step on few answers, and a shallow, untrained base."""
    runs, steps = (3, {6: 1, 2: 1}) if smoke else (5, {6: 80, 2: 80})
    return Claim(
        paper='RLAD 2026, arXiv:2602.22495',
        statement='A teacher in the clipped ratio keeps policy gradients on their way where a KL '
        'to it as a term of the loss does less, and does less harm where it is wrong, without a '
        'weight to be tuned.',
        setting='Chains of three operations; decoders of 0.1 M parameters; '
        f'{world.PROMPTS} prompts of {world.GROUP} answers, {steps[6]} batches of them at six '
        f'updates and {steps[2]} at two, clip .2 and .28, means over tokens of an answer and then '
        'over answers; teachers right in .92 (clean) and .28 (biased: wrong about one operator of '
        f'three) of sampled answers; 800 held-out prompts; {runs} seeds of answers and of the '
        'order of prompts, one base.',
        run=lambda say: run(say, runs, steps, world.SMOKE if smoke else world.Size(), smoke),
        checks=[
            Check('6 updates: RLAD over KDRL of weight .1', 'right', 'rlad_6_stress',
                  'kdrl_0.1_6_stress'),
            Check('6 updates: KDRL of weight .1 over GRPO', 'right', 'kdrl_0.1_6_stress',
                  'grpo_6_stress'),
            Check('6 updates: RLAD over GRPO by .2', 'right', 'rlad_6_stress', 'grpo_6_stress',
                  margin=0.2),
            Check('2 updates, biased teacher: RLAD over KDRL of weight .5 by .05', 'right',
                  'rlad_2_biased', 'kdrl_0.5_2_biased', margin=0.05),
            Check('2 updates, biased teacher: weights of KDRL differ by .1', 'spread',
                  'kdrl_2_biased', 0.1),
        ],
        draw=draw,
        notes='The rate of the first checks was sought with GRPO alone, one seed that is not '
        'among these, among 4e-4, 8e-4 and 1.6e-3: the first at which six updates ruin it. At two '
        'updates GRPO alone solves the chains, and that RLAD learns faster is no part of the '
        'claim.',
    )  # fmt: skip


def run(say, runs, steps, size, smoke):
    """What every arm gets right, by seed."""
    test = world.problems('test', size.test)
    with_at = (test['input'] == symbols.AT).any(-1)
    measured = {}
    # One program starts sooner than two.
    programs = {2: {**ARMS[6], **ARMS[2]}} if smoke else ARMS
    for updates, arms in programs.items():
        found, best = trained(say, arms, runs, steps[updates], updates, test, size, smoke)
        for place, name in enumerate(arms):
            rows = slice(place * runs, (place + 1) * runs)
            right = found['right'][rows]
            measured[name] = {
                'right': right.mean(1),
                'best': best[rows],
                'greedy': found['greedy'][rows].mean(1),
                'entropy': found['entropy'][rows],
                'with_at': right[:, with_at].mean(1),
                'without_at': right[:, ~with_at].mean(1),
            }
            means = ', '.join(f'{key} {np.mean(x):.3f}' for key, x in measured[name].items())
            say(f'{name}: {means}')
    every = np.stack([measured[f'kdrl_{beta:g}_2_biased']['right'] for beta in WEIGHTS])
    measured['kdrl_2_biased'] = {'spread': np.ptp(every, axis=0)}
    return measured


def trained(say, arms, runs, steps, updates, test, size, smoke):
    """Measures of the arms' runs, arm by arm: at the end, and the best on the way."""
    own = world.network(depth=size.depth)
    base = world.base('chain', 'base', smoke, own=own)
    teachers = {name: world.base(of, 'teacher', smoke, own=own) for name, of in TEACHERS.items()}
    asked = world.problems('train', size.train)
    method = side_by_side(world.context(asked, steps, own=own), updates, sampling=size.sampling)
    each = [arm for arm in arms.values() for _ in range(runs)]
    seen = []

    def look(state):
        seen.append(world.measure(state.params['network'], test, own=own))
        by_arm = seen[-1]['right'].mean(1).reshape(-1, runs).mean(1)
        say(f'{updates} updates, {int(state.step)} batches: {np.array2string(by_arm, precision=2)}')

    seeds.train(
        method, asked, np.tile(FIRST + np.arange(runs), len(arms)), steps=steps,
        batch_size=size.prompts, frozen={'start': {'params': base}},
        frozen_per_run={
            'teacher': {'params': jax.tree.map(
                lambda *x: np.stack(x), *[teachers[arm.teacher] for arm in each]
            )},
            'beta': np.asarray([arm.beta for arm in each], np.float32),
            'anchored': np.asarray([arm.anchored for arm in each]),
        },
        hyperparameters={'learning_rate': [arm.rate for arm in each]},
        watch=look, watched=EVERY,
    )  # fmt: skip
    return seen[-1], np.max([found['right'].mean(1) for found in seen], axis=0)


def side_by_side(context, updates, reward=world.REWARD, sampling=world.SAMPLING):
    """GRPO, KDRL and RLAD as one method, so that all runs are one program: `state.frozen` says by
    `beta` and `anchored` which one a run is. See kd/methods/rl/{grpo,rlad}.py."""
    how = Surrogate(updates=updates, old='sampler', high=0.28, chunk=4_096)
    config = common.Sampling(**sampling)
    draw = common.drawing(context, config, context.teacher)
    roll = common.rollouts(context, draw, common.of_block(context, reward), group=config.group)
    scored = surrogate.scored(roll, {'teacher': context.teacher}, draw, how)

    def collect(state, batch, key):
        batch = scored(state, batch, key)
        rows = len(batch['rewards'])
        own = {name: jnp.full(rows, state.frozen[name]) for name in ('beta', 'anchored')}
        return {**batch, **own}

    def term(said, old, given):
        teacher = given['teacher_log_probs']
        plain = policy.log_ratio(said.log_p, old)
        anchored = policy.anchored_log_ratio(said.log_p, old, teacher)
        pull = given['beta'] * policy.kl_estimate(said.log_p, teacher, 'k2')
        return Term(jnp.where(given['anchored'], anchored, plain), pull)

    return surrogate.method(
        context, draw, collect, term, group=config.group, how=how,
        fields=('teacher_log_probs', 'beta', 'anchored'),
    )  # fmt: skip


def draw(measured):
    """A panel for each setting, an arm a row, a seed a dot."""
    titles = {'grpo': 'GRPO', **{name: arm.title for name, arm in kinds().items()}}

    def spread(name, label):
        for arm in (f'{name}_{label}', f'{name}_{label.partition("_")[0]}'):
            if arm in measured and 'right' in measured[arm]:
                values = np.asarray(measured[arm]['right'])
                return (list(values), *mean_interval(values))
        return [], np.nan, np.nan

    return figures.comparison({
        f'right, {text}': {title: spread(name, label) for name, title in titles.items()}
        for label, text in SETTINGS.items()
    })  # fmt: skip
