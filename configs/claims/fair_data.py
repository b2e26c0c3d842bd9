"""Fairness by a latent that does not know the group (2024, arXiv:2408.10755).

    python -m kd.claims fair_data

Records whose outcome depends on a merit and on the group. An autoencoder is trained with a growing
weight of the dependence of its latent on the group; a student of a quarter of its width makes its
latents from noise. Logistic regression learns from the records that each generates and is asked of
real ones. The control decodes the outcome from latent and group, which brings the dependence back.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data import tabular
from kd.data.builders import record_files
from kd.evaluators.records import classified, generate, group_auc
from kd.losses.independence import distance_covariance
from kd.methods.tabular.fair_data import distil_latents, fair_vae
from kd.models.tabular import LatentStudent, TabularVAE
from kd.network import from_linen

FORM = tabular.form('biased')
LATENT, BATCH = 4, 128
BETAS = {'0': 0.0, '1e2': 1e2, '1e3': 1e3, '1e4': 1e4}
INPUTS = (jax.ShapeDtypeStruct((1, len(FORM.columns)), jnp.int32),
          jax.ShapeDtypeStruct((1,), jnp.int32))  # fmt: skip
SPEC = {'input': INPUTS[0], 'group': INPUTS[1], 'label': INPUTS[1]}
CHECKS = [
    Check('parity: beta 1e2 over 0', 'dp_ratio', 'vae_1e2', 'vae_0'),
    Check('parity: beta 1e3 over 1e2', 'dp_ratio', 'vae_1e3', 'vae_1e2'),
    Check('parity: beta 1e4 over 1e3', 'dp_ratio', 'vae_1e4', 'vae_1e3'),
    Check('parity of at least 0.8 at beta 1e3', 'dp_ratio', 'vae_1e3', 0.8),
    Check('merit: beta 1e3 over real records', 'merit_accuracy', 'vae_1e3', 'real'),
    Check('student within 0.05 of the parity, beta 1e3', 'dp_gap', 'student_1e3', 0.05, lower=True),
    Check(
        'student within 0.05 of the accuracy, beta 1e3',
        'accuracy_gap', 'student_1e3', 0.05, lower=True,
    ),
    Check(
        'control within 0.05 of the parity of real records', 'dp_gap', 'control', 0.05, lower=True
    ),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and one weight, and no control."""
    plan = (3, 2, 2, 300) if smoke else (6, 2_000, 800, 4_000)
    runs, steps, student_steps, count = plan
    betas = {'1e3': 1e3} if smoke else BETAS
    return Claim(
        paper='2024, arXiv:2408.10755',
        statement='A latent that is kept independent of the group gives records that train fair '
        'classifiers, and a smaller encoder inherits it.',
        setting='4,000 training and 2,000 test records, new for each of '
        f'{runs} seeds. Autoencoder: latent {LATENT}, width 64, {steps} steps of Adam 1e-3, '
        f'batches of {BATCH}; student: width 16, {student_steps} steps, from noise, energy '
        f'distance. Logistic regression on {count} generated records, groups drawn apart, asked '
        'of real ones.',
        run=lambda say: run(say, 10 + np.arange(runs), steps, student_steps, count, betas),
        checks=CHECKS[3:4] if smoke else CHECKS,
        draw=draw,
        notes='Equalised odds, which refer to the biased outcome, the dependence of the latent, '
        'and how well it tells the group are reported and not asserted.',
    )


def run(say, seeds, steps, student_steps, count, betas):
    """Every arm, seed by seed."""
    train, test = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        train.append(record_files.biased(rng, 4_000))
        test.append(record_files.biased(rng, 2_000))
    measured = {}
    real = [classified(a, b, FORM.columns) for a, b in zip(train, test, strict=True)]
    note(measured, say, 'real', real)
    data = {name: np.stack([one[name] for one in train]) for name in ('input', 'group', 'label')}

    def vae_arm(name, beta, outcome_from='latent'):
        net = from_linen(
            TabularVAE(
                columns=FORM.columns, width=64, latent=LATENT, outcome_from=outcome_from
            ),
            *INPUTS,
        )  # fmt: skip
        context = context_of(net, steps)
        state = seeds_lib.train(
            fair_vae(context, beta=beta), {}, seeds, steps=steps, batch_size=BATCH, per_run=data
        )
        params = state.params['network']
        made = generated(net, params, seeds, count)
        note(measured, say, name, judged(made, test), latents(net, params, train, test))
        return net, params

    for label, beta in betas.items():
        net, params = vae_arm(f'vae_{label}', beta)
        small = from_linen(
            LatentStudent(width=16, latent=LATENT), jax.ShapeDtypeStruct((1, LATENT), jnp.float32)
        )
        context = context_of(small, student_steps, net)
        state = seeds_lib.train(
            distil_latents(context), {}, seeds, steps=student_steps, batch_size=BATCH,
            per_run=data, frozen_per_run={'vae': {'params': params}},
        )  # fmt: skip
        made = generated(net, params, seeds, count, small, state.params['network'])
        note(measured, say, f'student_{label}', judged(made, test))
        gaps(measured, f'student_{label}', f'vae_{label}')
    if len(betas) > 1:
        vae_arm('control', 0.0, 'latent_and_group')
        gaps(measured, 'control', 'real')
    return measured


def context_of(net, steps, vae=None):
    """Of a stage."""
    return seeds_lib.context(
        network=net, references={'vae': vae} if vae else {}, num_classes=2, steps=steps, spec=SPEC,
        optimizer=dict(name='adam', lr=1e-3),
    )  # fmt: skip


def generated(net, params, seeds, count, small=None, own=None):
    """Records of every run."""

    @jax.jit
    @jax.vmap
    def make(key, params, own):
        student = None if small is None else (small, {'params': own})
        return generate(key, net, {'params': params}, count, student=student)

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    made = jax.device_get(make(keys, params, params if own is None else own))
    return [{name: x[r] for name, x in made.items()} for r in range(len(seeds))]


def judged(made, test):
    """What classifiers that learn from it say of real records."""
    return [classified(a, b, FORM.columns) for a, b in zip(made, test, strict=True)]


def latents(net, params, train, test):
    """The dependence of the latent on the group in test records, and the group's AUC."""

    @jax.jit
    def encoded(params, one):
        mu, variance = net.apply({'params': params}, *one, method='encode').logits
        return mu, distance_covariance(mu, variance, one[1], FORM.groups, diagonal=False)

    found = []
    for r, (a, b) in enumerate(zip(train, test, strict=True)):
        own = jax.tree.map(lambda x, r=r: x[r], params)
        known, _ = encoded(own, (a['input'], a['group']))
        asked, dependence = encoded(own, (b['input'], b['group']))
        auc = group_auc(np.asarray(known), a['group'], np.asarray(asked), b['group'])
        found.append({'dependence': float(dependence), 'group_auc': auc})
    return found


def note(measured, say, arm, *found):
    """Metrics of an arm over runs."""
    rows = [{k: v for one in row for k, v in one.items()} for row in zip(*found, strict=True)]
    measured[arm] = {name: [row[name] for row in rows] for name in rows[0]}
    told = ', '.join(f'{name} {np.mean(x):.4g}' for name, x in measured[arm].items())
    say(f'{arm}: {told}')


def gaps(measured, arm, reference):
    """How far two arms are from each other."""
    for name in ('dp', 'accuracy'):
        metric = 'dp_ratio' if name == 'dp' else name
        apart = np.subtract(measured[arm][metric], measured[reference][metric])
        measured[arm][f'{name}_gap'] = np.abs(apart).tolist()


def draw(measured):
    """Parity against accuracy on the biased outcome and on the merit; a dot is a seed."""
    figure = figures.new_figure(9.5, 3.8)
    axes = figure.subplots(1, 2, sharey=True)
    labels = {'real': 'real records', 'control': 'outcome sees the group'}
    for arm, found in measured.items():
        kind, _, beta = arm.partition('_')
        title = labels.get(arm, f'{"autoencoder" if kind == "vae" else kind}, beta {beta}')
        known = list(BETAS).index(beta) if beta in BETAS else 0
        colour = {'real': '0.2', 'control': figures.COLOURS[1]}.get(arm, f'C{known}')
        mark = {'vae': 'o', 'student': 'x', 'real': 's', 'control': '^'}[kind]
        for axis, metric in zip(axes, ('accuracy', 'merit_accuracy'), strict=True):
            axis.plot(found[metric], found['dp_ratio'], mark, ms=5, color=colour, label=title)
    axes[0].set(xlabel='accuracy, biased outcome', ylabel='demographic parity ratio')
    axes[1].set(xlabel='accuracy, merit')
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', fontsize=7)
    return figure
