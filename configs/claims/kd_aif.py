"""Weights of influence against wrong teachers (KD-AIF 2025, arXiv:2501.02705).

    python -m kd.claims kd_aif

Digits. A teacher of 100 labels says what it thinks of 600 others, and a share of these outputs is
rolled to a wrong class. Students learn from them alike, by the teacher's confidence, or by weights
of influence on a few clean labels: five rounds of 100 steps, each from scratch, and 400 with the
last weights. Students that have the clean labels besides, or them alone, stand beside. Nothing is
tuned: AdamW at 1e-2 for all, damping .1 and kappa 3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.data.transforms.label_noise import rolled
from kd.evaluators.ranking import roc_auc
from kd.losses import classification, divergence, influence
from kd.methods.vision.adapted_weight import weighted_kd
from kd.methods.vision.supervised import supervised
from kd.models.mlp import MLP
from kd.network import from_linen

LABELLED, POOL, HELD, TEST = 100, 600, 100, 600
# (clean labels, share of wrong outputs)
SETTINGS = {'wrong_20': (40, 0.2), 'wrong_40': (40, 0.4), 'few_20': (20, 0.2), 'clean': (100, 0.0)}
TITLES = {
    'uniform': 'all alike',
    'confidence': "the teacher's confidence",
    'with_held': 'all alike, and the clean labels',
    'held': 'the clean labels alone',
    'aif': 'influence',
    'aif_with_held': 'influence, and the clean labels',
}
NAMES = {
    'wrong_20': '40 clean labels, 20 % wrong',
    'wrong_40': '40 clean labels, 40 % wrong',
    'few_20': '20 clean labels, 20 % wrong',
    'clean': '100 clean labels, none made wrong',
}
DAMPING, ITERATIONS, KAPPA, ROUNDS = 0.1, 60, 3.0, 5


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` shortens it to a few steps of one round."""
    runs = 3 if smoke else 8
    plan = dict(steps=(4, 8), rounds=1, teacher_steps=5) if smoke else {}
    checks = [
        Check(
            f'{NAMES[setting]}: influence over all alike by .05',
            setting, 'aif', 'uniform', margin=0.05,
        )
        for setting in ('wrong_20', 'wrong_40')
    ]  # fmt: skip
    for setting in ('wrong_20', 'wrong_40'):
        checks += [
            Check(
                f'{NAMES[setting]}: weights tell wrong outputs, area above .6',
                f'auc_{setting}', 'aif', 0.6,
            ),
            Check(
                f'{NAMES[setting]}: better than confidence does',
                f'auc_{setting}', 'aif', 'confidence',
            ),
        ]  # fmt: skip
    checks += [
        Check(
            'none made wrong: influence within .015 below all alike',
            'clean', 'aif', 'uniform', margin=-0.015,
        ),
        Check(
            'none made wrong: and within .015 above', 'clean', 'uniform', 'aif', margin=-0.015
        ),
    ]  # fmt: skip
    return Claim(
        paper='Wu et al. 2025, arXiv:2501.02705',
        statement='Where a teacher is partly wrong, weights by influence on clean labels make a '
        'better student than equal weights, find the wrong outputs better than confidence, and '
        'cost nothing where it is not.',
        setting=f'Digits: teacher 64-128-10 of {LABELLED} labels, {POOL} outputs, student '
        f'64-32-10; AdamW at 1e-2 on full batches, {ROUNDS} rounds of 100 steps and 400; '
        f'damping {DAMPING}, kappa {KAPPA:g}; {TEST} test images; {runs} seeds, each with its '
        'split and teacher.',
        run=lambda say: run(say, range(runs), **plan),
        checks=checks,
        draw=draw,
        notes='The clean labels alone, reported beside, make a better student than weights of '
        'influence where 40 % of the outputs are wrong; it is no check. The largest relative '
        'residual of the linear systems stands with the arm of influence.',
    )


def run(say, seeds, steps=(100, 400), rounds=ROUNDS, teacher_steps=300):
    """Test accuracy of all arms by setting, and the area with which wrong outputs are told."""
    seeds = np.asarray(seeds)
    parts = [split(seed) for seed in seeds]
    taught = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    teacher = network(128)
    state = train(
        supervised(seeds_lib.context(network=teacher, tx=optax.adamw(1e-2), num_classes=10)),
        seeds, teacher_steps, {'input': taught['input_labelled'], 'label': taught['labelled']},
    )  # fmt: skip
    said = np.asarray(outputs(teacher, state, taught['input_pool']))
    right = (said.argmax(-1) == taught['pool']).mean()
    say(f'teachers: {right:.3f} of the pool right')

    # Settings are further runs, one after the other; those of one seed begin alike.
    every = [setting_of(name, said, taught, seeds) for name in SETTINGS]
    data = {name: np.concatenate([one[name] for one in every]) for name in every[0]}
    wrong = data.pop('wrong')
    of_runs = np.tile(seeds, len(SETTINGS))
    student = network(32)
    method = weighted_kd(
        seeds_lib.context(
            network=student, tx=optax.adamw(1e-2), num_classes=10,
            spec={'weight': jax.ShapeDtypeStruct((), np.float32)},
        ),
        temperature=1.0, soft_weight=1.0,
    )  # fmt: skip
    held = data.pop('held')
    pool = data.pop('pool')
    weights, worst = pool.astype(np.float32), 0.0
    for number in range(rounds):
        state = train(method, of_runs, steps[0], {**data, 'weight': weights})
        weights, residual = weigh(student, state, data, weights, pool, held)
        worst = max(worst, float(residual.max()))
        say(f'round {number + 1}: largest relative residual {residual.max():.1e}')
    confidence = np.exp(data['teacher_logits']).max(-1) * pool
    arms = {
        'uniform': pool, 'confidence': confidence, 'with_held': pool | held, 'held': held,
        'aif': weights, 'aif_with_held': weights + held,
    }  # fmt: skip
    tiled = {name: np.concatenate([x] * len(arms)) for name, x in data.items()}
    tiled['weight'] = np.concatenate([np.asarray(w, np.float32) for w in arms.values()])
    state = train(method, np.tile(of_runs, len(arms)), steps[1], tiled)
    repeats = len(arms) * len(SETTINGS)
    found = outputs(student, state, np.concatenate([taught['input_test']] * repeats))
    truth = np.concatenate([taught['test']] * repeats)
    accuracy = (np.asarray(found).argmax(-1) == truth).mean(-1)
    by_arm = dict(zip(arms, accuracy.reshape(len(arms), len(SETTINGS), len(seeds)), strict=True))
    measured = {arm: dict(zip(SETTINGS, values, strict=True)) for arm, values in by_arm.items()}
    for arm in ('aif', 'confidence'):
        areas = [
            roc_auc(-w[inside], flags[inside])
            for w, flags, inside in zip(arms[arm], wrong, pool, strict=True)
        ]
        for name, values in zip(SETTINGS, np.reshape(areas, (-1, len(seeds))), strict=True):
            measured[arm][f'auc_{name}'] = values
    measured['aif']['residual'] = np.full(len(seeds), worst)
    for arm, values in measured.items():
        told = ', '.join(f'{NAMES[s]} {values[s].mean():.3f}' for s in SETTINGS)
        say(f'{TITLES[arm]}: {told}')
    return measured


def split(seed):
    """Disjoint parts of all digits: inputs and labels of the teacher, the pool, held and test."""
    source = catalogue.load('digits', 'train+test')
    batch = source.fetch(np.random.default_rng(seed).permutation(len(source)))
    sizes, found, start = dict(labelled=LABELLED, pool=POOL, held=HELD, test=TEST), {}, 0
    for name, size in sizes.items():
        rows = slice(start, start + size)
        found |= {f'input_{name}': batch['input'][rows], name: batch['label'][rows]}
        start += size
    return found


def setting_of(name, said, taught, seeds):
    """Rows of a setting [R, POOL + HELD]: outputs of the pool, some of them rolled, and labels."""
    clean, share = SETTINGS[name]
    logits = said - np.log(np.exp(said).sum(-1, keepdims=True))
    for one, seed in zip(logits, seeds, strict=True):
        rng = np.random.default_rng([seed, 1])
        places = rng.integers(1, 10, POOL)
        one[:] = rolled(one, np.where(rng.permutation(POOL) < share * POOL, places, 0))
    runs = len(seeds)
    certain = np.log(np.eye(10, dtype=np.float32)[taught['held']] * (1 - 1e-6) + 1e-7)
    inside = np.arange(POOL + HELD) < POOL
    return {
        'input': np.concatenate([taught['input_pool'], taught['input_held']], 1),
        'teacher_logits': np.concatenate([logits, certain], 1).astype(np.float32),
        'pool': np.tile(inside, (runs, 1)),
        'held': np.tile(~inside & (np.arange(POOL + HELD) < POOL + clean), (runs, 1)),
        'wrong': np.concatenate(
            [logits.argmax(-1) != taught['pool'], np.zeros((runs, HELD), bool)], 1
        ),
    }


def weigh(student, state, data, weights, pool, held):
    """(weights [R, n], relative residuals [R]) by the influence on the held rows."""

    @jax.jit
    @jax.vmap
    def one(variables, x, said, w, pool, held):
        params = variables['params']

        def logits(params):
            return student.apply({'params': params}, x).logits

        def on_held(params):
            labels = said.argmax(-1)
            losses = classification.cross_entropy(logits(params), labels)
            return jnp.sum(jnp.where(held, losses, 0.0)) / held.sum()

        def product(v):
            return influence.gauss_newton_product(
                logits, params, v, weights=w * len(w) / w.sum(), damping=DAMPING
            )

        solved, residual = influence.conjugate_gradient(
            product, jax.grad(on_held)(params), iterations=ITERATIONS
        )
        found = influence.influence(
            lambda p: divergence.forward_kl(logits(p), said), params, solved
        )
        return jnp.where(
            pool, influence.influence_weights(found, kappa=KAPPA, where=pool), 0.0
        ), residual

    found = one(state.variables(), data['input'], data['teacher_logits'], weights, pool, held)
    return tuple(np.asarray(x) for x in found)


def network(width):
    """A perceptron."""
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    return from_linen(MLP(widths=(width,), num_classes=10), shape)


def train(method, seeds, steps, per_run):
    """On full batches."""
    size = next(iter(per_run.values())).shape[1]
    return seeds_lib.train(method, {}, seeds, steps=steps, batch_size=size, per_run=per_run)


def outputs(net, state, x):
    """Logits of all runs."""
    return jax.jit(jax.vmap(lambda v, x: net.apply(v, x).logits))(state.variables(), x)


def draw(measured):
    """Accuracy by setting and arm, and the areas; every seed a dot."""
    figure = figures.new_figure(12, 6.4)
    axes = figure.subplots(2, 3, width_ratios=(2, 2, 1.4))
    for axis, setting in zip(axes[:, :2].ravel(), SETTINGS, strict=True):
        figures.dots(axis, {TITLES[arm]: values[setting] for arm, values in measured.items()})
        axis.set_title(NAMES[setting], fontsize=9)
        axis.set_xlabel('test accuracy')
        if axis not in axes[:, 0]:
            axis.set_yticklabels([])
    for axis, setting in zip(axes[:, 2], ('wrong_20', 'wrong_40'), strict=True):
        areas = {arm: measured[arm][f'auc_{setting}'] for arm in ('aif', 'confidence')}
        figures.dots(axis, {'influence': areas['aif'], 'confidence': areas['confidence']})
        axis.axvline(0.5, color='black', linestyle='--', linewidth=1)
        axis.set_title(NAMES[setting], fontsize=9)
        axis.set_xlabel('area: weights tell what is wrong')
    return figure
