"""Distillation weighted by the pass rate on verifiable problems (arXiv:2603.11178).

    python -m kd.claims paced            about 3 minutes on two cores

Six families of problems of rising difficulty. A student pre-trained on the first five is distilled
on a mix of which 40 % are of the sixth: it always fails there, and the teacher is confident and
incoherent. Exact match is that of the five solvable families, by which a weighting must not lose
what the student could do before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.builders import verifiable
from kd.methods.lm.paced import paced, sampled_pass_rate
from kd.methods.vision.supervised import supervised
from kd.models.structured import AnswerMLP
from kd.network import from_linen

BATCH, ROLLOUTS = 64, 8
FORWARD, REVERSE = 'kd.losses.divergence.forward_kl', 'kd.losses.divergence.reverse_kl'
TITLES = {
    'base': 'before distillation',
    'uniform': 'uniform',
    'hard': 'hard filter',
    'paced': 'PACED',
    'paced_once': 'PACED, p estimated once',
    'two_stage': 'PACED, forward then reverse',
    'uniform_long': 'uniform, long',
    'hard_long': 'hard filter, long',
    'paced_long': 'PACED, long',
    'uniform_learnable': 'uniform, all learnable',
    'paced_learnable': 'PACED, all learnable',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps = (3, (10, 5, 10, 10, 10)) if smoke else (8, (900, 300, 1000, 200, 1500))
    pretraining, short, long, forward, counter = steps
    checks = [
        Check(f'PACED over uniform, {short} steps', 'exact', 'paced', 'uniform', margin=0.015),
        Check('PACED keeps the easiest family', 'exact_0', 'paced', 'base'),
    ]
    if not smoke:
        text = f'PACED at most 0.005 under uniform, {long} steps'
        checks.append(Check(text, 'exact', 'paced_long', 'uniform_long', margin=-0.005))
    return Claim(
        paper='PACED 2026, arXiv:2603.11178',
        statement="Weighting problems by p (1 - p) of the student's pass rate distils more and "
        'forgets less.',
        setting=f'Answers of 3 digits, AnswerMLP 96-96; {pretraining} steps of pre-training, then '
        f'forward KL, Adam 1e-3, batches of {BATCH}, {ROLLOUTS} rollouts at every step, weights '
        f'divided by their mean; {runs} seeds of data, teacher and student. One learning rate for '
        'all arms, as given and not tuned.',
        run=lambda say: run(say, runs, steps, smoke),
        checks=checks,
        draw=draw,
        notes='Exact match by the most likely digits, mean of the five solvable families. After '
        f'{short} steps every weighting is still below the student before distillation. In '
        f'`*_learnable`, {counter} steps, the teacher knows the sixth family too: there a weight '
        'of p (1 - p) starves what could be learnt (`exact_5`), and uniform weights are expected '
        f'to win. `two_stage` is {forward} steps of forward and {short - forward} of reverse KL.',
    )


def run(say, runs, steps, smoke):
    """Exact match per arm and seed."""
    pretraining, short, long, forward, counter = steps
    network = from_linen(AnswerMLP(), jax.ShapeDtypeStruct((1, 18), jnp.float32))
    size = 4000 if smoke else max(counter, long) * BATCH
    make = functools.partial(tables, runs, size)
    base = train(
        supervised(context(network, 2e-3)), make(verifiable.PRETRAINING_MIX), pretraining, None, 0
    )
    test = tables(runs, 10_000, (1 / 6,) * 6, split='test')
    measured = {}

    def report(arm, params):
        measured[arm] = measure(network, params, test)
        say(f'{TITLES[arm]}: {np.mean(measured[arm]["exact"]):.3f}')

    report('base', base)
    data = make(verifiable.DISTILLATION_MIX)
    distil = functools.partial(paced, context(network, 1e-3), rollouts=ROLLOUTS)
    uniform, hard, beta = (distil(weighting=w) for w in ('uniform', 'hard', 'beta'))
    report('uniform', train(uniform, data, short, base, 1))
    report('paced', train(beta, data, short, base, 1))
    if smoke:
        return measured
    report('hard', train(hard, data, short, base, 1))
    rated = data | {'pass_rate': rates(network, base, data)}
    report('paced_once', train(beta, rated, short, base, 1))
    first = train(beta, data, forward, base, 1)
    report('two_stage', train(distil(divergence=REVERSE), data, short - forward, first, 2))
    for name, method in (('uniform', uniform), ('hard', hard), ('paced', beta)):
        report(f'{name}_long', train(method, data, long, base, 1))
    learnable = make(verifiable.DISTILLATION_MIX, coherent=True)
    for name, method in (('uniform', uniform), ('paced', beta)):
        report(f'{name}_learnable', train(method, learnable, counter, base, 1))
    return measured


def tables(runs, size, mix, **options):
    """Problems of every seed, each with its own rule: arrays [R, N, ...]."""
    options = {'split': 'train', **options}
    parts = [verifiable.make(mix=mix, size=size, seed=seed, **options) for seed in range(runs)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def context(network, lr):
    """For networks that learn from logits in the batch."""
    return seeds.context(network=network, tx=optax.adam(lr), num_classes=verifiable.VALUES)


def train(method, data, steps, params, stream):
    """Trains every seed on its own data, from `params` [R, ...] if given."""
    runs, size = data['label'].shape[:2]
    keys = jax.vmap(jax.random.key)(jnp.arange(runs) + 1000 * stream)
    state = jax.jit(jax.vmap(lambda key: method.init(key, {})))(keys)
    if params is not None:
        state = state.with_params(params)
    rng = np.random.default_rng(stream)
    order = np.stack([rng.permutation(size)[: steps * BATCH] for _ in range(runs)])
    rows = order.reshape(runs, steps, BATCH).swapaxes(0, 1)

    @jax.jit
    def loop(state, data, rows):
        def one(state, data, rows):
            return method.step(state, {name: value[rows] for name, value in data.items()})[0]

        state = jax.lax.scan(lambda s, r: (jax.vmap(one)(s, data, r), None), state, rows)[0]
        return state.variables()['params']

    return jax.block_until_ready(loop(state, data, rows))


def rates(network, params, data):
    """Pass rates of all problems, estimated once, [R, N]."""

    @jax.jit
    @jax.vmap
    def estimate(key, params, x, labels):
        logits = network.apply({'params': params}, x).logits
        return sampled_pass_rate(key, logits, labels, ROLLOUTS)

    keys = jax.random.split(jax.random.key(3), len(data['label']))
    return np.asarray(estimate(keys, params, data['input'], data['label']))


def measure(network, params, test):
    """Exact match of every family, and the mean over the five that can be solved."""
    apply = jax.jit(jax.vmap(lambda p, x: network.apply({'params': p}, x).logits.argmax(-1)))
    right = (np.asarray(apply(params, test['input'])) == test['label']).all(-1)
    families = np.stack([
        [np.mean(r[f == k]) for r, f in zip(right, test['family'], strict=True)] for k in range(6)
    ])  # fmt: skip
    exact = {f'exact_{k}': families[k] for k in range(6)}
    return {'exact': families[:5].mean(0), **exact}


def draw(measured):
    """Exact match on the solvable families, and on the last, every seed a dot."""
    figure = figures.new_figure(9, 4)
    axes = figure.subplots(1, 2, sharey=True)
    arms = [arm for arm in TITLES if arm in measured]
    panels = (('exact', 'exact match, five solvable families'), ('exact_5', 'the sixth family'))
    for axis, (metric, label) in zip(axes, panels, strict=True):
        figures.dots(axis, {TITLES[arm]: measured[arm][metric] for arm in arms})
        axis.set(xlabel=label)
    return figure
