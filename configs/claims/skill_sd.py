"""Skills for a teacher that is oneself, beside rewards and in their place (arXiv:2604.10674).

    python -m kd.claims skill_sd            about 12 minutes on one core

Boxes pushed to their goals in at most twelve turns, 96 levels to learn from, one base that wins
one level in five. GRPO; Skill-SD, which adds a reverse KL to the policy that is told what it learnt
from earlier tries, at two weights; that KL without any reward; GRPO with the skill in the prompt,
which the policy has not when it is measured; and the told policy acting for the other to learn.
"""

import jax
import jax.numpy as jnp
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
    """The claim; `smoke` takes two steps, an untrained base, few levels and arms."""
    size = world.SMOKE if smoke else world.FULL
    return Claim(
        paper='Skill-SD 2026, arXiv:2604.10674',
        statement='A policy that is drawn to itself as it is when told of earlier tries learns at '
        'least as much as from rewards alone; told so in its own prompt, or without rewards, it '
        'learns less.',
        setting='Boxes pushed on a grid of 5 x 5, 12 turns; a decoder of 0.1 M parameters; '
        f'{size.levels} levels of 96 with {size.group} episodes each, one update of Adam '
        f'{world.LR:g}, clip .2, {size.steps} steps, the same for all arms; 64 held-out levels, '
        f'{size.tries} tries each, without a skill; {size.runs} seeds of episodes and of the order '
        'of levels, one base.',
        run=lambda say: run(say, size),
        checks=[check for check in CHECKS if not smoke or check.worse not in OTHERS],
        draw=draw,
        notes='Skills are computed, not written by a language model: whether the best try won, the '
        'directions of its pushes, and where the box got lost. That Skill-SD is better than GRPO '
        'is not part of the claim, nor is what happens where the told policy acts. Nothing was '
        'tuned.',
    )


def run(say, size):
    """Success and completion by arm and seed."""
    base, asked, runs = world.base(size), push.levels('train'), size.runs
    common = dict(
        reward=world.REWARD, sampling=size.sampling, chunk=8_192,
        summary=dict(name='kd.rewards.push.summary'), tasks=96,
    )  # fmt: skip
    measured = {}

    def measure(arm, params):
        measured[arm] = found = world.measure(params, size)
        means = ', '.join(f'{name} {x.mean():.3f}' for name, x in found.items())
        say(f'{TITLES[arm]}: {means}')

    def trained(arms, numbers, **fields):
        method = skill_sd(world.context(size, asked), **common, **fields)
        state = seeds.train(
            method, asked, np.tile(world.FIRST + np.arange(runs), len(arms)), steps=size.steps,
            batch_size=size.levels, frozen={'start': {'params': base}},
            frozen_per_run={
                name: np.repeat(np.float32(values), runs) for name, values in numbers.items()
            },
        )  # fmt: skip
        for place, arm in enumerate(arms):
            rows = slice(place * runs, (place + 1) * runs)
            measure(arm, jax.tree.map(lambda x, rows=rows: x[rows], state.params['network']))

    measure('base', jax.tree.map(lambda x: jnp.repeat(x[None], runs, axis=0), base))
    reward_weights, weights = zip(*WEIGHTS.values(), strict=True)
    trained(
        list(WEIGHTS), {'reward_weight': reward_weights, 'weight': weights},
        weight=lambda state: state.frozen['weight'],
        reward_weight=lambda state: state.frozen['reward_weight'],
    )  # fmt: skip
    if size is world.FULL:
        for arm, fields in OTHERS.items():
            trained([arm], {}, **fields)
    return measured


def draw(measured):
    """Success on levels held out and on those of training."""
    panels = (('success', 'won, held-out levels'), ('train_success', 'won, training levels'))
    return world.draw(measured, panels, TITLES)
