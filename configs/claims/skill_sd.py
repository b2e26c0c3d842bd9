"""Skills for a teacher that is oneself, beside rewards and in their place (arXiv:2604.10674).

    python -m kd.claims skill_sd            about 12 minutes on one core

Boxes pushed to their goals in at most twelve turns, 96 levels to learn from, one base that wins
one level in five. GRPO; Skill-SD, which adds a reverse KL to the policy that is told what it learnt
from earlier tries, at two weights; that KL without any reward; GRPO with the skill in the prompt,
which the policy has not when it is measured; and the told policy acting for the other to learn.
"""

import jax
import numpy as np

from kd.claims import push_world as world
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import push
from kd.methods.rl.skill_sd import skill_sd

# (weight of the rewards, lambda) of arms that are one program.
WEIGHTS = {
    'grpo': (1.0, 0.0),
    'skill_sd_0.01': (1.0, 0.01),
    'skill_sd_0.1': (1.0, 0.1),
    'opd': (0.0, 1.0),
}
# Fields of arms that are programs of their own.
OTHERS = {
    'told': dict(weight=0.0, acts='told'),
    'teacher_acts': dict(weight=0.01, acts='teacher'),
}
TITLES = {
    'base': 'base',
    'grpo': 'GRPO',
    'skill_sd_0.01': 'Skill-SD, lambda .01',
    'skill_sd_0.1': 'Skill-SD, lambda .1',
    'teacher_acts': 'lambda .01, the teacher acts',
    'opd': 'distillation without rewards',
    'told': 'GRPO, skill in the prompt',
}
CHECKS = [
    Check('a skill in the prompt is below GRPO, held out', 'success', 'grpo', 'told'),
    Check('a skill in the prompt is below GRPO, training levels', 'train_success', 'grpo', 'told'),
    Check('distillation without rewards ends below GRPO', 'success', 'grpo', 'opd'),
    Check('distillation without rewards ends below where it began', 'success', 'base', 'opd'),
    Check('Skill-SD, lambda .01, is not below GRPO - .03', 'success', 'skill_sd_0.01', 'grpo',
          margin=-0.03),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes two steps, an untrained base and few levels."""
    runs, steps = (3, 2) if smoke else (3, 100)
    return Claim(
        paper='Skill-SD 2026, arXiv:2604.10674',
        statement='A policy that is drawn to itself as it is when told of earlier tries learns at '
        'least as much as from rewards alone; told so in its own prompt, or without rewards, it '
        'learns less.',
        setting='Boxes pushed on a grid of 5 x 5, 12 turns; a decoder of 0.1 M parameters; '
        f'{world.LEVELS} levels of 96 with {world.GROUP} episodes each, one update of Adam '
        f'{world.LR:g}, clip .2, {steps} steps, the same for all arms; 64 held-out levels, '
        f'{world.TRIES} tries each, without a skill; {runs} seeds of episodes and of the order of '
        'levels, one base.',
        run=lambda say: run(say, runs, steps, smoke),
        checks=CHECKS,
        draw=draw,
        notes='Skills are computed, not written by a language model: whether the best try won, the '
        'directions of its pushes, and where the box got lost. That Skill-SD is better than GRPO '
        'is not part of the claim, nor is what happens where the told policy acts. Nothing was '
        'tuned.',
    )


def run(say, runs, steps, smoke):
    """Success and completion by arm and seed."""
    base = world.base(smoke)
    few = dict(few=6, tries=2) if smoke else {}
    asked = push.levels('train')
    common = dict(
        reward=world.REWARD, sampling=world.SAMPLING, chunk=8_192,
        summary=dict(name='kd.rewards.push.summary'), tasks=96,
    )  # fmt: skip
    started = world.measure(jax.tree.map(lambda x: x[None], base), **few)
    measured = {'base': {name: np.repeat(x, runs) for name, x in started.items()}}

    def trained(arms, numbers, **fields):
        method = skill_sd(world.context(steps, asked=asked), **common, **fields)
        state = seeds.train(
            method, asked, np.tile(world.FIRST + np.arange(runs), len(arms)), steps=steps,
            batch_size=world.LEVELS, frozen={'start': {'params': base}},
            frozen_per_run={
                name: np.repeat(np.float32(values), runs) for name, values in numbers.items()
            },
        )  # fmt: skip
        found = world.measure(state.params['network'], **few)
        for place, arm in enumerate(arms):
            rows = slice(place * runs, (place + 1) * runs)
            measured[arm] = {name: x[rows] for name, x in found.items()}
            means = ', '.join(f'{name} {x.mean():.3f}' for name, x in measured[arm].items())
            say(f'{TITLES[arm]}: {means}')

    reward_weights, weights = zip(*WEIGHTS.values(), strict=True)
    trained(
        list(WEIGHTS), {'reward_weight': reward_weights, 'weight': weights},
        weight=lambda state: state.frozen['weight'],
        reward_weight=lambda state: state.frozen['reward_weight'],
    )  # fmt: skip
    for arm, fields in OTHERS.items():
        if not smoke or arm == 'told':
            trained([arm], {}, **fields)
    return measured


def draw(measured):
    """Success on levels held out and on those of training."""
    panels = (('success', 'won, held-out levels'), ('train_success', 'won, training levels'))
    return world.draw(measured, panels, TITLES)
