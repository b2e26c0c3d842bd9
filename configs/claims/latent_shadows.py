"""Consistency distillation of masked diffusion along coupled masks (arXiv:2602.00792).

    python -m kd.claims latent_shadows            about 10 minutes on two cores

A chain of order 2 in which 4 of 12 symbols can follow a pair (`kd.data.builders.sparse_chain`). A
masked diffusion model is distilled in four rounds, with the masks of the two times from one draw
or from two; the control trains on without distillation, as all students see data. How much of what
they write in a few calls is impossible, and is it as various?
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import sparse_chain
from kd.evaluators.masked_text import sample_metrics
from kd.losses.masked_diffusion import schedule
from kd.methods.discrete.latent_shadows import latent_shadows
from kd.methods.discrete.masked_diffusion import masked_diffusion
from kd.models.transformer import Transformer
from kd.network import from_linen
from kd.sampling import masked

LENGTH, BATCH, WIDTH = 16, 64, 48
CALLS = (2, 4, 8, 16)
# Seeds of pilots came before.
FIRST = 10
TITLES = {
    'teacher': 'teacher',
    'none': 'teacher, trained on',
    'independent': 'independent masks',
    'coupled': 'coupled masks',
    'tempered': 'coupled, tau .96 to .75',
}


class Size(NamedTuple):
    """Of the experiment."""

    runs: int
    teacher_steps: int
    round_steps: int
    samples: int
    calls: tuple[int, ...]
    depth: int = 2
    rows: int = 0
    arms: tuple[str, ...] = ('none', 'independent', 'coupled', 'tempered')


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps, one number of calls and two arms."""
    size = Size(5, 1_200, 150, 1_024, CALLS)
    if smoke:
        size = Size(3, 2, 1, 32, (2,), 1, 100, ('none', 'coupled'))
    return Claim(
        paper='Chen et al. 2026 (Latent Shadows), arXiv:2602.00792',
        statement='Distilled along coupled masks a masked diffusion model writes less that is '
        'impossible in a few calls than along independent ones, and either less than undistilled.',
        setting=f'Chain of order 2, 12 symbols, 4 successors of a pair, length {LENGTH}; '
        f'transformer of 2 layers, width {WIDTH}, not causal; teacher {size.teacher_steps} steps '
        f'of Adam 2e-3, all other arms {4 * size.round_steps} more of Adam 1e-3, batches of '
        f'{BATCH}; delta 1/16 to 1/2 in 4 rounds, temperature 1; {size.samples} samples; '
        f'{size.runs} seeds of chains, data and networks, one learning rate for all arms, not '
        'tuned.',
        run=lambda say: run(say, size),
        checks=[
            check
            for check in checks(size.calls)
            if {check.better, check.worse} <= {'teacher', *size.arms}
        ],
        draw=draw,
        notes='`tempered` sharpens its teacher as the paper does and is no part of a check: it is '
        'judged by both panels. `teacher` has seen less data than all the others.',
    )


def checks(calls):
    """At each number of calls: the order of the arms, and that entropy is not what pays for it."""
    found = []
    for n in calls:
        found += [
            Check(f'{n} calls: coupled below independent', f'impossible_{n}', 'coupled',
                  'independent', lower=True),
            Check(f'{n} calls: independent below none', f'impossible_{n}', 'independent', 'none',
                  lower=True),
            Check(f'{n} calls: entropy of pairs at least .99 of none', f'bigram_entropy_{n}',
                  'coupled', 'none', ratio=0.99),
        ]  # fmt: skip
    return found


def network(depth):
    """Of all arms."""
    module = Transformer(
        sparse_chain.TOKENS, width=WIDTH, depth=depth, heads=4, max_length=LENGTH, causal=False,
        extra_symbols=1,
    )  # fmt: skip
    return from_linen(module, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))


def run(say, size):
    """What each arm writes, by seed."""
    own, each = network(size.depth), FIRST + np.arange(size.runs)
    data, held = (
        np.stack(
            [sparse_chain.make(split, length=LENGTH, seed=int(s), size=size.rows) for s in each]
        )
        for split in ('train', 'test')
    )
    laws = [sparse_chain.law(int(s)) for s in each]

    def trained(method, context, steps, start=None):
        frozen: dict[str, Any] = {} if start is None else {'start': {'params': start}}
        state = seeds.train(
            method(context), {}, each, steps=steps, batch_size=BATCH, per_run={'input': data},
            frozen_per_run=frozen,
        )  # fmt: skip
        return state.params['network']

    def context(steps, lr, *references):
        optimizer = dict(name='adam', lr=lr, schedule='cosine', clip_norm=1.0)
        return seeds.context(
            network=own, num_classes=sparse_chain.TOKENS, steps=steps, batch_size=BATCH,
            optimizer=optimizer, references=dict.fromkeys(references, own),
        )  # fmt: skip

    def distilled(temperature, coupling):
        return lambda context: latent_shadows(
            context, delta=1 / 16, round_steps=size.round_steps, temperature=temperature,
            coupling=coupling,
        )  # fmt: skip

    arms = {
        'none': masked_diffusion,
        'independent': distilled((1.0, 1.0), 'independent'),
        'coupled': distilled((1.0, 1.0), 'coupled'),
        'tempered': distilled((0.96, 0.75), 'coupled'),
    }
    teacher = trained(masked_diffusion, context(size.teacher_steps, 2e-3), size.teacher_steps)
    measured = {'teacher': measure(own, teacher, laws, size, say, 'teacher')}
    later = context(4 * size.round_steps, 1e-3, 'start')
    for arm in size.arms:
        params = trained(arms[arm], later, 4 * size.round_steps, teacher)
        measured[arm] = measure(own, params, laws, size, say, arm)
    of_data = [sample_metrics(rows, judge(law)) for rows, law in zip(held, laws, strict=True)]
    for name in ('impossible', 'bigram_entropy'):
        values = [float(of[name]) for of in of_data]
        measured.setdefault('data', {}).update({f'{name}_{n}': values for n in size.calls})
    return measured


def judge(law):
    """The true law."""
    return lambda said: sparse_chain.log_probs(law, said)


def measure(own, params, laws, size, say, arm):
    """Shares and entropies by number of calls, a value a seed; all arms draw by the same keys."""
    mask = masked.mask_of(own)

    def draw(params, key, count):
        logits = masked.logits_function(own, {'params': params}, mask)
        return masked.ancestral(
            logits, key, (size.samples, LENGTH), count, schedule=schedule(), mask=mask
        )

    keys = jax.random.split(jax.random.key(0), len(laws))
    found: dict[str, list[float]] = {}
    for count in size.calls:
        # One run after another: the samples of all at once would be a large array.
        said = jax.lax.map(lambda x, n=count: draw(*x, n), (params, keys))
        for rows, law in zip(np.asarray(said), laws, strict=True):
            metrics = sample_metrics(rows, judge(law))
            for name in ('impossible', 'nll', 'entropy', 'bigram_entropy', 'distinct'):
                found.setdefault(f'{name}_{count}', []).append(metrics[name])
    shares = ', '.join(f'{np.mean(found[f"impossible_{n}"]):.3f}' for n in size.calls)
    pairs = ', '.join(f'{np.mean(found[f"bigram_entropy_{n}"]):.3f}' for n in size.calls)
    say(f'{TITLES[arm]}: impossible {shares}; entropy of pairs {pairs}')
    return found


def draw(measured):
    """Shares by calls, what distillation saves of the control's, and the entropy of pairs."""
    calls = [int(name.rpartition('_')[2]) for name in measured['teacher'] if 'nll' in name]
    figure = figures.new_figure(10.5, 3.6)
    axes = figure.subplots(1, 3)
    shown = {arm: title for arm, title in TITLES.items() if arm in measured}
    for colour, (arm, title) in zip(figures.COLOURS, shown.items(), strict=False):
        share, none, pairs = (
            np.array([measured[of][f'{name}_{n}'] for n in calls])
            for of, name in ((arm, 'impossible'), ('none', 'impossible'), (arm, 'bigram_entropy'))
        )
        for axis, values in zip(axes, (share, share / none, pairs), strict=True):
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
            axis.errorbar(calls, values.mean(1), error, fmt='o-', ms=4, color=colour, label=title)
    data = np.mean(measured['data'][f'bigram_entropy_{calls[0]}'])
    axes[2].axhline(data, color='black', lw=0.8, ls='--', label='data')
    titles = (
        'share that is impossible',
        'share over that of the control',
        'entropy of pairs, nats',
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale('log', base=2)
        axis.set_xticks(calls, [str(n) for n in calls])
        axis.set(xlabel='calls of the network')
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    handles, names = axes[2].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=len(names), frameon=False)
    return figure
