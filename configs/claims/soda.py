"""A student learns more from a teacher's answers against its own first ones (arXiv:2604.03873).

    python -m kd.claims soda            five minutes on two cores

A language of one token (`kd.data.builders.table`). The student, of rank 16, is trained on a table
that is weakly related to the teacher's (q_0), then fine-tuned on text of the teacher, drawn a
little sharper than its law (q_w). From there it goes on with the same text for as many steps: by
further fine-tuning (SeqKD), or by SODA, which prefers it to answers of q_0. The score is the mean
log-probability under the teacher of what the student says, as a judge would give.
"""

from functools import partial

import jax
import numpy as np

from kd.claims import table_world
from kd.claims.claim import Check, Claim
from kd.data.builders import table
from kd.methods.lm.distillation import distillation
from kd.methods.lm.soda import soda

WIDTH = 16
SFT_LR = 5e-3
RATES = (2e-4, 6e-4, 2e-3)
# The settings of the card: beta and rate.
SETTINGS = ((0.5, 6e-4), (0.1, 2e-4))
# Of the text: logits are multiplied by it.
SHARPER = 1.3
METRICS = ('valid', 'score', 'agreement', 'entropy')
# Whose answers are rejected, and what they are compared with.
CONTROLS = {
    'own': 'own first ones',
    'warm': 'own ones after fine-tuning',
    'other': "another seed's first ones",
    'uniform': 'any at all',
    'first_reference': 'own first ones, relative to first student',
}
# Samples of the teacher, and steps of fine-tuning before.
WORLDS = {'': (30_000, 2500), 'few_': (4_000, 2500), 'early_': (30_000, 400)}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps."""
    runs, base, steps = (3, 20, 10) if smoke else (6, 1500, 600)
    worlds = {'': (2_000, 20)} if smoke else WORLDS
    return Claim(
        paper='SODA 2026, arXiv:2604.03873',
        statement="A teacher's answers, preferred to those that the student gave before any "
        'training, teach more than as many steps of further fine-tuning on them.',
        setting=f'48 x 48 contexts, bottleneck of {WIDTH}; {worlds[""][0]:,} answers of the '
        f'teacher; {base} steps on a related table, {worlds[""][1]} of fine-tuning at 5e-3, '
        f'{steps} of either, of 256 contexts; Adam, the rate falling on a line, gradients clipped '
        f'at 1. Rates {", ".join(map(name_of, RATES))} for all; further fine-tuning is held at '
        f'its best by the score. {runs} seeds of tables and students.',
        run=lambda say: run(say, runs, base, steps, worlds),
        checks=[
            Check(f'{metric}: SODA, beta {beta:g} at {name_of(rate)}, over SeqKD', metric,
                  arm_of('', 'own', beta, rate), 'seqkd')
            for beta, rate in SETTINGS
            for metric in ('score', 'valid')
        ],
        draw=draw,
        notes='Whose answers are rejected matters, and not as the paper has it: those of the first '
        'student of another seed teach more than its own, any answers at all (`uniform`) the most, '
        'and those of the fine-tuned student nothing. What is gained is sharpness: entropy falls '
        'and samples are better, while the most probable answer agrees with the teacher less often '
        'than after fine-tuning. With 4,000 answers (`few`) SODA is ahead too; after 400 steps of '
        'fine-tuning (`early`) SeqKD at its best rate is level with beta 0.5 and ahead of beta 0.1 '
        'at the rates of the checks.',
    )  # fmt: skip


def name_of(rate):
    return f'{rate:.0e}'.replace('e-0', 'e-')


def arm_of(world, control, beta, rate):
    return f'{world}soda_{control}_{beta:g}_{name_of(rate)}'


def run(say, runs, base_steps, steps, worlds):
    """Mass on valid answers, score, agreement and entropy, by arm and seed."""
    network, laws = table_world.student(WIDTH), table_world.laws(runs)
    measured, full = {}, len(worlds) > 1

    def report(arm, params):
        every = table_world.measure(network, params, laws)
        measured[arm] = {name: every[name] for name in METRICS}
        found = {name: float(np.mean(value)) for name, value in measured[arm].items()}
        say(f'{arm}: valid {found["valid"]:.3f}, score {found["score"]:.3f}')

    def tune(build, data, steps, rates, references):
        context = table_world.tuned_context(network, steps, tuple(references))
        return table_world.tune(build(context), data, steps, rates, references)

    cube = (table.TOKENS,) * 3
    known = [table.relative(law.reshape(cube), 0.25, 0.8, seed) for seed, law in enumerate(laws)]
    related = text_of(np.stack(known), 100_000, 1)
    first = tune(learn, related, base_steps, (SFT_LR,), {})[SFT_LR]
    report('first', first)
    for world, (size, warm_steps) in worlds.items():
        text = text_of(SHARPER * laws, size, 2)
        warm = tune(learn, text, warm_steps, (SFT_LR,), {'start': first})[SFT_LR]
        report(f'{world}fine_tuned', warm)
        for rate, params in tune(learn, text, steps, RATES, {'start': warm}).items():
            report(f'{world}seqkd_{name_of(rate)}', params)
        fits = [measured[f'{world}seqkd_{name_of(rate)}'] for rate in RATES]
        measured[f'{world}seqkd'] = max(fits, key=lambda found: np.mean(found['score']))
        for beta, own_rate in SETTINGS:
            controls = tuple(CONTROLS)[1:] if full and not world else ()
            # The grid of rates for what is judged, its own setting for each control.
            for rates, kinds in ((RATES, ('own',)), ((own_rate,), controls)):
                if not kinds:
                    continue
                references = side_by_side([roles(kind, first, warm) for kind in kinds])
                data = {name: np.concatenate([x] * len(kinds)) for name, x in text.items()}
                build = partial(soda, beta=beta)
                for rate, params in tune(build, data, steps, rates, references).items():
                    for i, kind in enumerate(kinds):
                        one = jax.tree.map(lambda x, i=i: x[i * runs : (i + 1) * runs], params)
                        report(arm_of(world, kind, beta, rate), one)
    return measured


def learn(context):
    """Fine-tuning on the answers."""
    return distillation(context, soft_weight=0.0)


def text_of(laws, size, seed):
    """Contexts of every seed with answers of its law, [R, N, ...]."""
    cube = (table.TOKENS,) * 3
    drawn = [
        table.draw(law.reshape(cube), size, 10 * number + seed) for number, law in enumerate(laws)
    ]
    contexts, answers = (np.stack(part) for part in zip(*drawn, strict=True))
    index = np.broadcast_to(np.arange(size, dtype=np.int32), answers.shape)
    return {'input': contexts, 'label': answers, 'index': index}


def roles(control, first, warm):
    """Parameters by reference: who is started from, compared with, and whose answers are worse."""
    initial = {
        'own': first,
        'warm': warm,
        'other': jax.tree.map(lambda x: np.roll(x, 1, axis=0), first),
        'uniform': jax.tree.map(np.zeros_like, first),
        'first_reference': first,
    }[control]
    reference = first if control == 'first_reference' else warm
    return {'start': warm, 'reference': reference, 'initial': initial}


def side_by_side(trees):
    """The runs of several trees [R, ...] after each other."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def draw(measured):
    """Every seed a dot, relative to further fine-tuning at its best from the same student."""
    titles = {'fine_tuned': 'no further training'}
    for beta, rate in SETTINGS:
        for control, what in CONTROLS.items():
            titles[arm_of('', control, beta, rate)] = f'beta {beta:g}: {what}'
    for world, what in (('few_', 'with 4,000 answers'), ('early_', 'after 400 steps')):
        for beta, rate in SETTINGS:
            titles[arm_of(world, 'own', beta, rate)] = f'beta {beta:g}, {what}: {CONTROLS["own"]}'
    gains = {}
    for arm in titles:
        world = next((world for world in ('few_', 'early_') if arm.startswith(world)), '')
        if arm in measured:
            gains[arm] = {
                name: np.asarray(values) - np.asarray(measured[f'{world}seqkd'][name])
                for name, values in measured[arm].items()
            }
    panels = [
        ('score', 'score over SeqKD, nats'),
        ('valid', 'mass on three best, over it'),
        ('agreement', 'agreement, over it'),
    ]
    return table_world.draw(gains, panels, titles)
