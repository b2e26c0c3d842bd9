"""What a small corpus teaches: which teacher, which questions, which answers (arXiv:2508.09883).

    python -m kd.claims ded            about 10 minutes on two cores

Three-step arithmetic (`kd.data.builders.chain`). An answer begins with a symbol for its style, and
a thought in style s is s more than it is; what is printed is the result. Students have learned from
traces of three styles (six on the card, which were not learned here within the steps of a claim) of
which half are corrupted; each then learns from another corpus of equal size in an equal number of
steps:

    teacher     of one who is right in .98 of the cases, in three styles, or of one who is right in
                .92, in one style; all that they say, to the same 600 questions
    questions   200 of a pool of which 70 % have one step and 30 % have three, drawn at random, or
                drawn of those that the student does not solve; right answers of the second teacher
    answers     four to each of 100 questions: the farthest of twelve right ones of the first
                teacher, any four, or one of them four times; a wider student
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import chains
from kd.data.builders import arithmetic, chain, symbols
from kd.losses import diversity
from kd.methods.lm.distillation import distillation
from kd.models.decoders import preset
from kd.network import from_linen
from kd.sampling.autoregressive import sampler

BATCH = 64
# Shares of right traces, and styles.
STYLES = 3
TEACHERS = {'mixed': (0.98, STYLES), 'plain': (0.92, 1)}
QUESTIONS, POOL, KEPT, ASKED = 600, 2000, 200, 100
TRIES, PASSED, DRAWN, FAR = 8, 0.5, 12, 4
LENGTH, WIDTH = 7, 17
TITLES = {
    'base': 'before',
    'teacher_mixed': 'of .98 and three styles',
    'teacher_plain': 'of .92 and one style',
    'random': '200 questions at random',
    'hard': '200 that it does not solve',
    'wide_base': 'before, width 64',
    'copies': 'one answer four times',
    'any': 'any four answers',
    'far': 'the four farthest',
}

CHECKS = (
    Check('one style of a worse teacher over three of a better one', 'three',
          'teacher_plain', 'teacher_mixed'),
    Check('and its corpus has less entropy', 'corpus_entropy',
          'teacher_plain', 'teacher_mixed', lower=True),
    Check('though more of it is wrong', 'corpus_right', 'teacher_mixed', 'teacher_plain'),
    Check('questions that are not solved over random ones, three steps', 'three',
          'hard', 'random'),
    Check('at most .05 less on one step than before', 'one', 'hard', 'base', margin=-0.05),
)  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has a few steps and arms."""
    runs, steps = (3, (3, 3, 3)) if smoke else (6, (3200, 800, 400))
    base, trial, final = steps
    arms = ('base', 'teacher_mixed', 'teacher_plain') if smoke else tuple(TITLES)
    return Claim(
        paper='DED 2025, arXiv:2508.09883',
        statement='What a corpus teaches is not what its teacher knows: one style teaches more '
        'than three, and questions that the student does not solve more than any.',
        setting='Chains of one to three operations; students of 2 layers, width 32 (64 for '
        f'answers), {base} steps of 128 half-corrupted traces; then {trial} steps of {BATCH} for '
        f'teachers, Adam 2e-3, and {final} for questions and answers, Adam 1e-3, cosine, clipped '
        f'at 1; pass rates of {TRIES} tries, solved from above {PASSED} on. {runs} seeds of '
        'questions, answers and orders, one student of each width for all; nothing is tuned.',
        run=lambda say: run(say, runs, steps, arms),
        checks=[check for check in CHECKS if check.better in arms],
        draw=draw,
        notes='How far answers lie from one another is no check: the card expects farthest over '
        'random over copies, and calls it unproven at this scale.',
    )  # fmt: skip


def run(say, runs, steps, arms):
    """Accuracies on one and three steps, and what is in the corpora, by seed."""
    base_steps, trial, final = steps
    tests = {L: questions(runs, 1000, L, 90 + L, 'test') for L in (1, 3)}
    measured = {}

    def report(arm, width, params, **more):
        found = {
            name: exact(network(width), params, tests[L]) for name, L in (('one', 1), ('three', 3))
        }
        measured[arm] = {**found, **more}
        say(f'{TITLES[arm]}: ' + ', '.join(f'{k} {np.mean(v):.3f}' for k, v in found.items()))

    base = pretrained(32, runs, base_steps)
    report('base', 32, base)
    asked = questions(runs, QUESTIONS, 3, 1)
    corpora = {
        name: [answered(one, *teacher, [s, 2]) for s, one in enumerate(asked)]
        for name, teacher in TEACHERS.items()
    }
    for name, params in tuned(32, base, corpora, trial, 2e-3).items():
        right = [passing(one, part) for one, part in zip(asked, corpora[name], strict=True)]
        report(
            f'teacher_{name}', 32, params, corpus_right=right,
            corpus_entropy=[entropy(*TEACHERS[name])] * runs,
            shift=shift(network(32), base, params, tests[3]),
        )  # fmt: skip
    if 'hard' not in arms:
        return measured
    pools = pool(runs)
    rates = pass_rates(network(32), base, pools)
    corpora = {
        name: [chosen(pools, rates, s, most) for s in range(runs)]
        for name, most in (('random', 1.0), ('hard', PASSED))
    }
    for name, params in tuned(32, base, corpora, final, 1e-3).items():
        report(name, 32, params)
    wide = pretrained(64, runs, base_steps)
    report('wide_base', 64, wide)
    asked = questions(runs, ASKED, 3, 3)
    corpora = {
        name: [selected(one, name, s) for s, one in enumerate(asked)]
        for name in ('copies', 'any', 'far')
    }
    for name, params in tuned(64, wide, corpora, final, 1e-3).items():
        report(name, 64, params)
    return measured


@functools.cache
def network(width):
    """The decoder of the small worlds, by its width."""
    module = preset('toy', width=width, mlp_hidden=4 * width, max_length=32)
    return from_linen(module, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def questions(runs, size, operations, stream, split='train'):
    """Problems of every seed."""
    return [
        chain.problems(np.random.default_rng([s, stream]), size, operations, split)
        for s in range(runs)
    ]


def law(right, operations=3):
    """Of one whose traces of three steps are all right in this share of cases."""
    return arithmetic.noisy(arithmetic.TRUTH, (right ** (1 / operations) - 0.1) / 0.9)


def answered(problems, right, styles, seed):
    """Prompts and answers of a teacher."""
    rng = np.random.default_rng(seed)
    return chain.part('shift', problems, law(right), rng, styles=styles)


def passing(problems, part):
    """The share of answers that print the result."""
    _, said = part
    return float(chain.passes(said, np.ones(said.shape, bool), chain.key_of(problems)).mean())


def entropy(right, styles):
    """Nats per token of a teacher on its own text: the style, three thoughts, and three symbols
    that follow from them."""
    p = law(right)
    of_step = -(p * np.log(p)).sum(-1).mean()
    return float((np.log(styles) + 3 * of_step) / LENGTH)


def stacked(corpora):
    """Rows of every seed, fields [R, N, ...]; a corpus is one or several (prompts, answers)."""
    made = [
        chain.rows(one if isinstance(one, list) else [one], length=WIDTH) for one in corpora
    ]  # fmt: skip
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def pool(runs):
    """Questions of one step and of three, [(problems of one, problems of three)] of each seed."""
    ones, threes = (questions(runs, round(share * POOL), L, 4) for L, share in ((1, 0.7), (3, 0.3)))
    return list(zip(ones, threes, strict=True))


def pass_rates(network, params, pools):
    """Of the student's tries at every question of its pool: two float arrays [R, N]."""
    found = []
    for kind in range(2):
        asked = [pair[kind] for pair in pools]
        tries = [
            exact(network, params, asked, seed=seed, mean=False) for seed in range(TRIES)
        ]  # fmt: skip
        found.append(np.mean(tries, axis=0))
    return found


def chosen(pools, rates, seed, most):
    """Right answers of the plain teacher to questions whose pass rate is at most so much."""
    rng = np.random.default_rng([seed, 5])
    right, styles = TEACHERS['plain']
    kinds, rows = [], []
    for kind in range(2):
        allowed = np.flatnonzero(rates[kind][seed] <= most)
        kinds += [kind] * len(allowed)
        rows += allowed.tolist()
    picked = rng.choice(len(rows), KEPT, replace=len(rows) < KEPT)
    parts = []
    for kind, problems in enumerate(pools[seed]):
        at = [rows[i] for i in picked if kinds[i] == kind]
        if at:
            own = chain.Problems(problems.digits[at], problems.operators[at])
            parts.append(until_right(own, right, styles, rng))
    return parts


def until_right(problems, right, styles, rng):
    """Answers of a teacher that is asked again where its answer is wrong."""
    key = chain.key_of(problems)
    prompts, said = chain.part('shift', problems, law(right), rng, styles=styles)
    while True:
        wrong = ~np.asarray(chain.passes(said, np.ones(said.shape, bool), key))
        if not wrong.any():
            return prompts, said
        again = chain.part('shift', problems, law(right), rng, styles=styles)[1]
        said = np.where(wrong[:, None], again, said)


def selected(problems, how, seed):
    """Four answers to each question."""
    rng = np.random.default_rng([seed, 6])
    right, styles = TEACHERS['mixed']
    tries = [until_right(problems, right, styles, rng) for _ in range(DRAWN)]
    prompts, said = tries[0][0], np.stack([each for _, each in tries], 1)
    if how == 'far':
        lengths = np.full(said.shape[:2], LENGTH)

        @jax.jit
        @jax.vmap
        def far(tokens, lengths):
            apart = diversity.levenshtein(tokens[:, None], tokens, lengths[:, None], lengths)
            return diversity.farthest_subset(apart, jnp.ones(DRAWN, bool), FAR)

        numbers = np.asarray(far(said, lengths))
    else:
        numbers = np.tile(np.arange(FAR) if how == 'any' else 0, (len(prompts), 1))
        numbers = np.broadcast_to(numbers, (len(prompts), FAR))
    kept = np.take_along_axis(said, numbers[..., None], axis=1)
    return np.repeat(prompts, FAR, axis=0), kept.reshape(-1, LENGTH)


def context(width, steps, lr, **more):
    """For fine-tuning."""
    optimizer = dict(
        name='adam', lr=lr, schedule='cosine', warmup_steps=30, clip_norm=1.0,
        schedule_args=dict(end=0.1),
    )  # fmt: skip
    return seeds.context(
        network=network(width), steps=steps, num_classes=symbols.TOKENS, optimizer=optimizer, **more
    )


def pretrained(width, runs, steps):
    """Parameters [R, ...], all alike, of a student that has learned half-corrupted traces."""
    data = chains.make(
        'train', law=law(0.5), operations={1: 0.3, 2: 0.3, 3: 0.4}, kinds={'shift': 1.0},
        styles=STYLES, layout='rows',
    )  # fmt: skip
    method = distillation(context(width, steps, 5e-3), soft_weight=0.0, chunk=8192)
    state = seeds.train(method, data, np.arange(1), steps=steps, batch_size=2 * BATCH)
    return jax.tree.map(lambda x: jnp.concatenate([x] * runs), state.params['network'])


def tuned(width, base, corpora, steps, lr):
    """{name: parameters [R, ...]} after further steps on corpora of every seed's own; all names and
    seeds side by side, seeds alike but for the corpus."""
    made = context(width, steps, lr, references={'start': network(width)})
    arms = {name: stacked(of_seeds) for name, of_seeds in corpora.items()}
    runs, count = len(next(iter(corpora.values()))), len(arms)
    state = seeds.train(
        distillation(made, soft_weight=0.0, chunk=8192), {}, np.tile(np.arange(runs), count),
        steps=steps, batch_size=BATCH,
        per_run={
            field: np.concatenate([arm[field] for arm in arms.values()])
            for field in next(iter(arms.values()))
        },
        frozen_per_run={
            'start': {'params': jax.tree.map(lambda x: jnp.concatenate([x] * count), base)}
        },
    )  # fmt: skip
    found = state.params['network']
    return {
        name: jax.tree.map(lambda x, i=i: x[i * runs : (i + 1) * runs], found)
        for i, name in enumerate(arms)
    }


def exact(network, params, problems, *, seed=2026, mean=True):
    """Sampled answers to each seed's problems that print the result: shares [R], or bool [R, N]."""
    prompts = np.stack([chain.prompts(one) for one in problems])
    keys = np.stack([chain.key_of(one) for one in problems])
    right = np.asarray(_right(network)(params, prompts, keys, jax.random.key(seed)))
    return right.mean(1) if mean else right


def shift(network, before, after, problems):
    """How far the hidden states of prompts have moved, in their two directions of most variance."""

    @jax.jit
    @jax.vmap
    def of_run(before, after, prompts):
        pooled = (
            network.apply({'params': params}, prompts, method='hidden').logits.mean(1)
            for params in (before, after)
        )
        return diversity.latent_shift(*pooled)

    prompts = np.stack([chain.prompts(one) for one in problems])
    return np.asarray(of_run(before, after, prompts))


@functools.cache
def _right(network):
    draw = sampler(
        network.module, max_new=LENGTH, stop=(symbols.EOS,), forbidden=(symbols.PAD, symbols.BOS)
    )

    def of_run(params, prompts, printed, key):
        said = draw({'params': params}, prompts, jnp.ones(prompts.shape, bool), key)
        return chain.passes(said.tokens, said.mask, printed)

    return jax.jit(jax.vmap(of_run, in_axes=(0, 0, 0, None)))


def draw(measured):
    """Three and one steps, every seed a dot."""
    figure = figures.new_figure(10, 4)
    arms = [arm for arm in TITLES if arm in measured]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (metric, label) in zip(
        axes, (('three', 'right on three steps'), ('one', 'right on one step')), strict=True
    ):
        figures.dots(axis, {TITLES[arm]: measured[arm][metric] for arm in arms})
        axis.set(xlabel=label)
    return figure
