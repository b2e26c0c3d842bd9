"""A teacher that moves away from the student, against fixed ones (arXiv:2501.16937).

    python -m kd.claims taid            about a minute on two cores

A language of one token (`kd.data.builders.table`): a teacher of 48 x 48 contexts, and a student
whose logits have rank 8, so that it has to give something up. What each loss gives up: the mass on
the teacher's three best answers, the entropy, the total variation from the teacher.
"""

import numpy as np

from kd.claims import table_world
from kd.claims.claim import Check, Claim
from kd.methods.lm.distillation import distillation
from kd.methods.lm.taid import taid

LR = 5e-3
TITLES = {
    'forward_kl': 'forward KL',
    'reverse_kl': 'reverse KL',
    'taid': 'TAID, t from .4',
    'taid_early': 'TAID, t from .2',
    'taid_adaptive': 'TAID, alpha 6 / N',
    'skew_kl': 'skewed forward KL, .1',
    'jsd': 'Jensen-Shannon, .5',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps."""
    runs, steps = (3, 20) if smoke else (6, 1500)
    return Claim(
        paper='Shing et al. 2025 (TAID), arXiv:2501.16937',
        statement='A teacher that moves away from the student lies between forward and reverse KL, '
        'and closer to the teacher than both.',
        setting='48 x 48 contexts, bottleneck of 8; Adam 5e-3 with cosine, gradients clipped at 1, '
        f'{steps} steps of 256 contexts; {runs} seeds of tables and students, one learning rate '
        'for all arms, as given on the card and not tuned.',
        run=lambda say: run(say, runs, steps),
        checks=[
            Check('more mass on valid answers than forward KL', 'valid', 'taid', 'forward_kl'),
            Check('reverse KL: entropy below 1.2', 'entropy', 'reverse_kl', 1.2, lower=True),
            Check('TAID: entropy above 1.2', 'entropy', 'taid', 1.2),
            Check('less entropy than forward KL', 'entropy', 'taid', 'forward_kl', lower=True),
            Check('closer than forward KL (TV)', 'tv', 'taid', 'forward_kl', lower=True),
            Check('closer than reverse KL (TV)', 'tv', 'taid', 'reverse_kl', lower=True),
        ],
        draw=draw,
        notes='The adaptive part of the schedule cannot move t before about 4,000 steps at the '
        "paper's alpha of 5e-4: here t is the straight line but in `taid_adaptive`. The skewed "
        'forward KL of DistiLLM is not part of the claim, and is closer to the teacher here.',
    )


def run(say, runs, steps):
    """What each arm gives up, by seed."""
    network, laws = table_world.student(8), table_world.laws(runs)
    data = table_world.every_context(laws)
    context = table_world.context(network, steps, LR)

    def plain(name, **arguments):
        return distillation(context, divergence=f'kd.losses.divergence.{name}', **arguments)

    arms = {
        'forward_kl': plain('forward_kl'),
        'reverse_kl': plain('reverse_kl'),
        'taid': taid(context),
        'taid_early': taid(context, t_start=0.2),
        'taid_adaptive': taid(context, alpha=6 / steps),
        'skew_kl': plain('skew_kl', alpha=0.1),
        'jsd': plain('generalized_jsd', beta=0.5),
    }
    measured = {}
    for arm, method in arms.items():
        measured[arm] = table_world.measure(network, table_world.train(method, data, steps), laws)
        found = {name: float(np.mean(value)) for name, value in measured[arm].items()}
        say(f'{TITLES[arm]}: valid {found["valid"]:.3f}, tv {found["tv"]:.3f}')
    return measured


def draw(measured):
    """Every seed a dot."""
    panels = [
        ('valid', "mass on the teacher's three best"),
        ('entropy', 'entropy, nats'),
        ('tv', 'total variation'),
    ]
    return table_world.draw(measured, panels, TITLES)
