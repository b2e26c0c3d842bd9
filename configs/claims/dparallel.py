"""Certainty of many positions at once, learnt from one's own right answers (arXiv:2509.26488).

    python -m kd.claims dparallel

Running sums of digits (`kd.data.builders.running_sums`), whose base becomes certain of one sum
after another. Bases learn the sums from one step to the next or, of about half of all seeds, not in
as many steps, and then they have no right answers to teach. So more bases are trained than are
needed, and the first six stay that answer nine in ten prompts right in every symbol, one position a
call, before there is any student; how many were tried is told. P(d) ~ .45^d takes them fewer calls,
.6^d is not learnt in as many steps.

How many calls does a network need for as many right answers as the base, two in a hundred less?
Thresholds are swept for each: at an equal threshold networks are not equally often right.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import running_sums
from kd.evaluators.masked_answers import THRESHOLDS, calls_at, decoder
from kd.methods.discrete.dparallel import certainty_forcing
from kd.methods.discrete.masked_diffusion import masked_diffusion
from kd.models.transformer import Transformer
from kd.network import from_linen
from kd.sampling import masked

MODULUS, LENGTH, BATCH, WIDTH = running_sums.MODULUS, running_sums.LENGTH, 64, 32
SLACK = 0.02
# Seeds of pilots came before.
FIRST = 10
TITLES = {
    'base': 'base',
    'trained_on': 'base, trained on',
    'consistency': 'cross-entropy',
    'dparallel': 'cross-entropy + 2 certainty',
    'certainty': 'certainty alone',
}
# Of cross-entropy and certainty.
WEIGHTS = {'consistency': (1.0, 0.0), 'dparallel': (1.0, 2.0), 'certainty': (0.0, 2.0)}


class Size(NamedTuple):
    """Of the experiment."""

    runs: int
    candidates: int
    base_steps: int
    steps: int
    prompts: int
    tests: int
    thresholds: tuple[float, ...]
    rows: int = 20_000
    depth: int = 1
    least: float = 0.9
    arms: tuple[str, ...] = ('trained_on', 'consistency', 'dparallel', 'certainty')


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps, one threshold and one student."""
    size = Size(6, 14, 3_600, 600, 4_000, 400, THRESHOLDS)
    if smoke:
        size = Size(3, 4, 2, 2, 64, 8, (0.5,), rows=200, least=0.0, arms=('dparallel',))
    wanted = [
        Check('fewer calls than the base at its accuracy less .02', 'calls_at_level', 'dparallel',
              'base', lower=True),
        Check('cross-entropy alone: fewer calls than the base', 'calls_at_level', 'consistency',
              'base', lower=True),
        Check('fewer calls than cross-entropy alone', 'calls_at_level', 'dparallel', 'consistency',
              lower=True),
        Check('certainty alone loses accuracy, one position a call', 'exact_one', 'certainty',
              'base', lower=True),
    ]  # fmt: skip
    return Claim(
        paper='Chen et al. 2025 (dParallel), arXiv:2509.26488',
        statement='On answers of its own that are right a masked diffusion model learns to be '
        'certain of many positions at once, and needs fewer calls for as many right answers.',
        setting=f'Running sums of {LENGTH} digits modulo {MODULUS}, P(d) ~ '
        f'{running_sums.DECAY:g}^d; transformer of {size.depth} layer, width {WIDTH}, not causal; '
        f'base {size.base_steps:,} steps of Adam 5e-3 on {size.rows:,} rows, of {size.candidates} '
        f'the first {size.runs} that are right in {size.least:.0%}; answers of the base to '
        f'{size.prompts:,} prompts, one position a call, those that are right kept; all others '
        f'{size.steps} steps of Adam 2e-3 on these, batches of {BATCH}; one block, half of it '
        f'hidden, both halves learnt; {len(size.thresholds)} thresholds of the entropy, '
        f'{size.tests} tests, {size.runs} seeds, one learning rate for all arms, not tuned.',
        run=lambda say: run(say, size),
        checks=[c for c in wanted if {c.better, c.worse} <= {'base', *size.arms}],
        draw=draw,
        notes='`trained_on` is the base on the same answers by its own loss: what the choice of '
        'answers and more steps do alone. Calls at a level are the fewest of any threshold that '
        f'reaches it, {LENGTH} where none does.',
    )


def network(depth):
    """Of all arms."""
    module = Transformer(
        MODULUS, width=WIDTH, depth=depth, heads=4, max_length=2 * LENGTH, causal=False,
        extra_symbols=1,
    )  # fmt: skip
    return from_linen(module, jax.ShapeDtypeStruct((1, 2 * LENGTH), jnp.int32))


def run(say, size):
    """Accuracy and calls of each arm by threshold, by seed."""
    own, each = network(size.depth), FIRST + np.arange(size.candidates)
    parts = [running_sums.make('train', size=size.rows, seed=int(s)) for s in each]
    tests = running_sums.make('test', size=size.tests, seed=FIRST)
    decode = decoder(own, masked.mask_of(own), block=LENGTH, limit=LENGTH)
    data = {name: np.stack([part[name] for part in parts]) for name in ('input', 'response_mask')}
    base = trained(own, masked_diffusion, data, each, size.base_steps, 5e-3)
    right = right_answers(base, decode, size)
    able = np.flatnonzero(right.mean(1) >= size.least)[: size.runs]
    say(f'bases right in {", ".join(f"{of:.2f}" for of in right.mean(1))}; chosen: {able}')
    if len(able) < 3:
        raise ValueError(
            f'{len(able)} of {len(each)} bases have learnt the sums; train them longer.'
        )
    base, each = jax.tree.map(lambda x: x[able], base), each[able]
    measured: dict[str, dict[str, list[float]]] = {}

    def measure(params, arm):
        levels = measured['base']['exact_one'] if measured else None
        measured[arm] = found = by_threshold(params, decode, tests, size, levels)
        say(
            f'{TITLES[arm]}: right {np.mean(found["exact_one"]):.3f} one a call; '
            f'{np.mean(found["calls_at_level"]):.2f} calls at the level'
        )

    measure(base, 'base')
    answers = chosen_answers(right[able], size)
    say(f'{answers["input"].shape[1]:,} right answers of {size.prompts:,} kept, for each seed')
    for arm in size.arms:
        method = masked_diffusion if arm == 'trained_on' else forcing(*WEIGHTS[arm])
        measure(trained(own, method, answers, each, size.steps, 2e-3, base), arm)
    return measured


def trained(own, method, data, each, steps, lr, start=None):
    """Parameters [R, ...] of the runs of these seeds, each on data of its own."""
    context = seeds.context(
        network=own,
        num_classes=MODULUS,
        steps=steps,
        batch_size=BATCH,
        optimizer=dict(name='adam', lr=lr, schedule='cosine', clip_norm=1.0),
        references={} if start is None else {'start': own},
    )
    frozen: dict[str, Any] = {} if start is None else {'start': {'params': start}}
    state = seeds.train(
        method(context), {}, each, steps=steps, batch_size=BATCH, per_run=data,
        frozen_per_run=frozen,
    )  # fmt: skip
    return state.params['network']


def forcing(hard, sure):
    """The method with weights of cross-entropy and certainty."""
    return lambda context: certainty_forcing(
        context, block=LENGTH, consistency=hard, certainty=sure, tail=False
    )


def of_run(params, run):
    """Variables of one run."""
    return {'params': jax.tree.map(lambda x: x[run], params)}


def by_threshold(params, decode, tests, size, levels=None):
    """{'exact_TAU', 'calls_TAU', 'calls_at_level': [R]}; 'one' is one position a call."""
    found: dict[str, list[float]] = {}
    taus = (-1.0, *size.thresholds)
    for run in range(len(jax.tree.leaves(params)[0])):
        all_of = [decode(of_run(params, run), tests, tau).mean(1) for tau in taus]
        exact, calls = np.asarray(all_of).T
        for name, right, count in zip(('one', *map(str, taus[1:])), exact, calls, strict=True):
            found.setdefault(f'exact_{name}', []).append(float(right))
            found.setdefault(f'calls_{name}', []).append(float(count))
        level = (exact[0] if levels is None else levels[run]) - SLACK
        reached = calls_at(exact, calls, level, LENGTH)
        found.setdefault('calls_at_level', []).append(reached)
    return found


def prompts_of(size):
    """What bases are asked to answer; no base has learnt from them."""
    return running_sums.make('validation', size=size.prompts, seed=FIRST)


def right_answers(base, decode, size):
    """Which prompts each base answers right, one position a call, bool [bases, prompts]."""
    prompts, count = prompts_of(size), len(jax.tree.leaves(base)[0])
    found = [decode(of_run(base, run), prompts, -1.0)[0] for run in range(count)]
    return np.asarray(found) == 1


def chosen_answers(right, size):
    """Prompts with answers of the bases' own that are right, as many for each."""
    # An answer is unique: one that is right is that of the data.
    kept = int(right.sum(1).min()) or 1
    chosen = [np.argsort(~of, kind='stable')[:kept] for of in right]
    return {name: np.stack([x[rows] for rows in chosen]) for name, x in prompts_of(size).items()}


def draw(measured):
    """Accuracy over calls, a curve by threshold for each arm; and calls at the level, by seed."""
    taus = [name.removeprefix('exact_') for name in measured['base'] if name.startswith('exact_')]
    figure = figures.new_figure(10.0, 3.9)
    curve, level = figure.subplots(1, 2, width_ratios=(1.3, 1))
    shown = {arm: title for arm, title in TITLES.items() if arm in measured}
    for colour, (arm, title) in zip(figures.COLOURS, shown.items(), strict=False):
        calls, exact = (
            [np.mean(measured[arm][f'{what}_{tau}']) for tau in taus] for what in ('calls', 'exact')
        )
        curve.plot(calls, exact, 'o-', ms=4, color=colour, label=title)
    needed = np.mean(measured['base']['exact_one']) - SLACK
    curve.axhline(needed, color='black', lw=0.8, ls='--', label='the level')
    curve.set(xlabel='calls of the network', ylabel='answers right in every symbol')
    curve.grid(alpha=0.3)
    figures.dots(level, {title: measured[arm]['calls_at_level'] for arm, title in shown.items()})
    level.set(xlabel='calls at the level')
    handles, names = curve.get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=3, frameon=False)
    return figure
