"""Answers that are wrong teach too, if they weigh less than right ones (REDI, arXiv:2505.24850).

    python -m kd.claims redi            three minutes on two cores

A language of one token (`kd.data.builders.table`): the three best answers of a teacher are valid,
and a student of rank 16 spreads over others besides. It is fine-tuned on valid answers until it
learns no more. Then it goes on with pairs of a valid answer of the teacher and a mistake of it:
further fine-tuning (alpha = 0), REDI, the symmetric loss (alpha = 1), DPO and SimPO.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import table_world
from kd.claims.claim import Check, Claim
from kd.data.builders import table
from kd.losses import numerics
from kd.methods.lm.distillation import distillation
from kd.methods.lm.preference import preference

WIDTH = 16
SFT_LR = 5e-3
RATES = (3e-4, 1e-3, 3e-3)
ALPHAS = (0.0, 0.2, 0.5, 0.8, 1.0)
METRICS = ('valid', 'of_eight', 'agreement', 'log_p_right', 'log_p_wrong')
# The wrong answers of other contexts: whether it matters that they are mistakes.
SHUFFLED = 'shuffled'
BASELINES = {
    'dpo': dict(loss='kd.losses.preference_family.dpo', beta=0.1),
    'simpo': dict(loss='kd.losses.preference_family.simpo', beta=2.0, gamma=1.0),
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps."""
    runs, sft, steps, size = (3, 20, 10, 2_000) if smoke else (6, 2500, 500, 100_000)
    alphas = (0.0, 0.8, 1.0) if smoke else ALPHAS
    log_p = 'log_p_right'
    return Claim(
        paper='REDI 2025, arXiv:2505.24850',
        statement="A teacher's wrong answers, unlearned with a weight below 1, teach more than "
        'further fine-tuning on right ones, and more than with weight 1.',
        setting=f'48 x 48 contexts, bottleneck of {WIDTH}; {size:,} pairs; fine-tuning of {sft} '
        f'steps at 5e-3, then {steps} steps of 256 pairs; Adam, the rate falling on a line, '
        f'gradients clipped at 1. All arms at the rates {", ".join(map(name_of, RATES))}; further '
        f'fine-tuning is held at its best of them. {runs} seeds of tables and students.',
        run=lambda say: run(say, runs, sft, steps, size, alphas),
        checks=[
            Check('valid: REDI at 3e-4 over more fine-tuning, by 0.015', 'valid',
                  arm_of(0.8, 3e-4), 'more', margin=0.015),
            Check('valid: alpha .8 over alpha 1, at 1e-3', 'valid',
                  arm_of(0.8, 1e-3), arm_of(1.0, 1e-3)),
            *(
                Check(f'log p of right answers falls from alpha {low:g} to {high:g}, at 1e-3',
                      log_p, arm_of(low, 1e-3), arm_of(high, 1e-3))
                for low, high in itertools.pairwise(alphas)
            ),
        ],
        draw=draw,
        notes='`more` is the best of the arms with alpha 0 by the mean over seeds. The gain is in '
        'mass alone: the first answer agrees less often with the teacher, and with many tries '
        'fewer contexts are solved. `shuffled`, alpha .8 with the wrong answers of other contexts, '
        "gains as much: in this world that they are a context's own mistakes does not matter. "
        'DPO is close to alpha 1; SimPO at the margin and beta of its paper is worse than '
        'fine-tuning.',
    )  # fmt: skip


def name_of(rate):
    return f'{rate:.0e}'.replace('e-0', 'e-')


def arm_of(alpha, rate):
    """Arms of pairs by what they are and their rate."""
    what = f'alpha_{alpha:g}' if isinstance(alpha, float) else alpha
    return f'{what}_{name_of(rate)}'


def run(say, runs, sft, steps, size, alphas):
    """Mass on valid answers and log-probabilities of both kinds, by arm and seed."""
    network, laws = table_world.student(WIDTH), table_world.laws(runs)
    data = pairs(laws, size)
    measured = {}

    def report(arm, params):
        every = table_world.measure(network, params, laws, of_answers)
        measured[arm] = {name: every[name] for name in METRICS}
        found = {name: float(np.mean(value)) for name, value in measured[arm].items()}
        say(
            f'{arm}: valid {found["valid"]:.3f}, of eight {found["of_eight"]:.3f}, '
            f'log p {found["log_p_right"]:.3f} and {found["log_p_wrong"]:.3f}'
        )

    tuned = distillation(
        table_world.context(network, sft, SFT_LR, schedule='linear'), soft_weight=0.0
    )
    right = {'input': data['input'][:, :, 0], 'label': data['label'][:, :, 0]}
    begun = table_world.train(tuned, right, sft)
    report('fine_tuned', begun)
    references = {'start': begun, 'reference': begun}
    context = table_world.tuned_context(network, steps, tuple(references))
    arms = {alpha: dict(alpha=alpha) for alpha in alphas}
    if alphas == ALPHAS:
        arms |= {SHUFFLED: dict(alpha=0.8), **BASELINES}
    for what, options in arms.items():
        method, taken = preference(context, **options), data
        if what == SHUFFLED:
            wrong = np.roll(data['label'][:, :, 1], 1, axis=1)
            taken = {**data, 'label': np.stack([right['label'], wrong], axis=2)}
        found = table_world.tune(method, taken, steps, RATES, references)
        for rate, params in found.items():
            report(arm_of(what, rate), params)
    more = [measured[arm_of(0.0, rate)] for rate in RATES]
    measured['more'] = max(more, key=lambda found: np.mean(found['valid']))
    return measured


def pairs(laws, size):
    """Pairs of every seed's table, as of `kd.data.builders.table.preferences`."""
    cube = (table.TOKENS,) * 3
    drawn = [table.draw_pairs(law.reshape(cube), size, seed) for seed, law in enumerate(laws)]
    contexts, answers = (np.stack(part) for part in zip(*drawn, strict=True))
    return {'input': np.stack([contexts, contexts], axis=2), 'label': answers}


def of_answers(logits, law):
    """Right in one of eight tries; expected log-probability of right and of wrong answers."""
    log_q = numerics.log_softmax(logits)
    right = law >= jax.lax.top_k(law, table.VALID)[0][:, -1:]
    mass = jnp.where(right, jnp.exp(log_q), 0.0).sum(-1)

    def expected(kept):
        p = jax.nn.softmax(jnp.where(kept, law, -jnp.inf))
        return jnp.where(kept, p * log_q, 0.0).sum(-1)

    return {
        'of_eight': 1 - (1 - mass) ** 8,
        'log_p_right': expected(right),
        'log_p_wrong': expected(~right),
    }


def draw(measured):
    """By alpha, a line for each rate and a dot for each seed; the other losses beside."""
    panels = {
        'valid': 'mass on valid answers',
        'of_eight': 'right in one of eight tries',
        'log_p_right': 'log p of right answers, nats',
    }
    alphas = [alpha for alpha in ALPHAS if arm_of(alpha, RATES[0]) in measured]
    others = [what for what in (SHUFFLED, *BASELINES) if arm_of(what, RATES[0]) in measured]
    places = {alpha: alpha for alpha in alphas}
    places |= {what: 1.3 + 0.25 * i for i, what in enumerate(others)}
    figure = figures.new_figure(15, 5)
    for axis, (metric, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        start = np.mean(measured['fine_tuned'][metric])
        axis.axhline(start, color='0.4', ls='--', lw=1, label='fine-tuned')
        for i, rate in enumerate(RATES):
            shift, colour = 0.02 * (i - 1), figures.COLOURS[i]
            values = {what: np.asarray(measured[arm_of(what, rate)][metric]) for what in places}
            line = [float(np.mean(values[alpha])) for alpha in alphas]
            label_of = f'rate {name_of(rate)}'
            axis.plot(np.asarray(alphas) + shift, line, color=colour, label=label_of)
            for what, found in values.items():
                x = places[what] + shift
                axis.plot(np.full(len(found), x), found, 'o', color=colour, ms=3, alpha=0.5)
                axis.plot(x, found.mean(), '_', color=colour, ms=12, mew=2)
        axis.set_xticks(list(places.values()), [str(what) for what in places])
        axis.tick_params(axis='x', labelrotation=30)
        axis.set(title=label, xlabel='alpha, and other arms')
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure
