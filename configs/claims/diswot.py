"""Does a score of untrained networks find the best student? (DisWOT 2023, arXiv:2303.15678).

    python -m kd.claims diswot

24 residual MLPs of width 4 to 24 and 0 to 4 blocks are students of one of width 128, on 200
labelled digits. A repetition scores each by the mean over 8 random starts and a batch of 64, and
trains it from 3 others, on labels and distilled. All train as one program, in the shapes of the
largest: padded with zeros, a smaller network stays what it is (`kd.models.mlp.ResidualMLP`).

Number of parameters, operations and depth rank the same networks, and so does a score against
features that are noise, which knows no teacher. Nothing is claimed over the number of parameters:
on the 64 ResNets whose accuracies the authors published it tells the distilled accuracy better
(tau .87) than accuracy on labels alone does (.84).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.evaluators import ranking, train_free
from kd.losses import train_free as losses
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.supervised import supervised
from kd.models.mlp import ResidualMLP
from kd.network import from_linen, operations, parameter_count

WIDTHS, DEPTHS = (4, 6, 8, 12, 16, 24), (0, 1, 2, 4)
BATCH, TRAIN, BUDGET = 64, 200, 1_100
TITLES = {
    'relation': 'relation score',
    'semantic': 'semantic score, by class',
    'sum': 'sum of ranks of the two',
    'noise': 'relation to noise',
    'parameters': 'parameters',
    'operations': 'operations',
    'depth': 'depth',
    'vanilla': 'accuracy on labels alone',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has four networks and a few steps."""
    widths, depths = (WIDTHS[:2], DEPTHS[:2]) if smoke else (WIDTHS, DEPTHS)
    space = tuple(itertools.product(widths, depths))
    runs, inits, starts, steps = (3, 1, 1, 2) if smoke else (4, 8, 3, 200)
    return Claim(
        paper='Dong et al. 2023 (DisWOT), arXiv:2303.15678',
        statement='How untrained networks relate examples ranks them by what they reach when they '
        'are distilled.',
        setting=f'Digits of scikit-learn, {TRAIN} labels and 1,197 to test; {len(space)} residual '
        f'MLPs, {steps} AdamW steps on all labels at once with KD (.9, temperature 4); scores of '
        f'{inits} random starts; {runs} repetitions with starts of their own, accuracy being the '
        f'mean of {starts} networks. Kendall correlation over the networks.',
        run=lambda say: run(say, space, runs, inits, starts, steps),
        checks=[
            Check('relation score, tau above .4', 'tau', 'relation', 0.4),
            Check('sum of ranks, tau above .4', 'tau', 'sum', 0.4),
            Check(
                'what the relation score picks is within .02 of the best',
                'gap', 'relation', 0.02, lower=True,
            ),
            Check('relation to a teacher over relation to noise', 'tau', 'relation', 'noise'),
        ],
        draw=draw,
        notes='`low` and `high` are ends of the bootstrap interval of tau over the networks, '
        '`stable` is tau between the scores of one repetition and the next, `small` is tau among '
        f'networks of less than {BUDGET:,} parameters, `gap` the accuracy that the best network '
        'has over the one that is picked.',
    )  # fmt: skip


def run(say, space, runs, inits, starts, steps):
    """Scores and accuracies of all networks for every repetition."""
    splits = [catalogue.load('digits', s) for s in ('train', 'test')]
    parts = [split.fetch(np.arange(len(split))) for split in splits]
    data = {name: np.concatenate([part[name] for part in parts]) for name in ('input', 'label')}
    train = {name: x[:TRAIN] for name, x in data.items()}
    test = {name: x[600:] for name, x in data.items()}
    shape = jax.ShapeDtypeStruct((1, *data['input'].shape[1:]), jnp.float32)
    largest = [max(sizes) for sizes in zip(*space, strict=True)]
    large, teacher = (
        from_linen(ResidualMLP(width, depth), shape) for width, depth in (largest, (128, 4))
    )
    batch = {name: x[:BATCH] for name, x in train.items()}
    scored = score(large, teacher, space, batch, runs * inits)
    scored = {name: x.reshape(len(space), runs, inits).mean(2) for name, x in scored.items()}
    say('scored')
    method = supervised(context(teacher, teacher, steps, lr=1e-3))
    state = seeds.train_one(method, train, 0, steps=2 * steps, batch_size=TRAIN)
    frozen = {'teacher': state.variables()}
    say(f'teacher: {accuracy(teacher, jax.tree.map(lambda x: x[None], frozen["teacher"]), test)}')
    reached = {}
    for name, build in (('vanilla', supervised), ('distilled', distilled)):
        method = build(context(large, teacher, steps))
        variables = trained(method, large, space, train, frozen, runs * starts, steps)
        values = accuracy(large, variables, test)
        reached[name] = np.reshape(values, (len(space), runs, starts)).mean(2)
        say(f'{name}: mean {reached[name].mean():.3f}, best {reached[name].mean(1).max():.3f}')
    own = [from_linen(ResidualMLP(width, depth), shape) for width, depth in space]
    sizes = [parameter_count(jax.eval_shape(net.init, jax.random.key(0))) for net in own]
    known = {
        'parameters': sizes,
        'operations': [operations(net) for net in own],
        'depth': [depth for _, depth in space],
    }
    scored |= {name: np.repeat(np.array(x)[:, None], runs, 1) for name, x in known.items()}
    both = [
        train_free.sum_of_ranks([scored['relation'][:, r], scored['semantic'][:, r]])
        for r in range(runs)
    ]
    scored |= {'sum': np.stack(both, 1), 'vanilla': reached['vanilla']}
    small = np.array(sizes) < BUDGET
    return {arm: judged(scored[arm], reached['distilled'], small) for arm in TITLES}


def judged(scores, accuracies, small):
    """What [networks, repetitions] of scores tell of accuracies."""
    found = {name: [] for name in ('tau', 'low', 'high', 'small', 'gap', 'stable')}
    runs = scores.shape[1]
    for r in range(runs):
        a, b = scores[:, r], accuracies[:, r]
        found['tau'].append(ranking.kendall_tau(a, b))
        low, high = ranking.kendall_interval(a, b, draws=500)
        found['low'].append(low)
        found['high'].append(high)
        found['small'].append(ranking.kendall_tau(a[small], b[small]))
        found['gap'].append(b.max() - b[a.argmax()])
        found['stable'].append(ranking.kendall_tau(a, scores[:, (r + 1) % runs]))
    return found


def initial(network, key, width, depth):
    """Variables of a smaller network at its own random start, padded with zeros.

    Kernels behind the first are drawn for the width of `network`, and scaled to what they would be.

    Args:
      network: of a `ResidualMLP`.
      key: typed random key.
      width, depth: of the smaller network; arrays or numbers.
    """
    params, module = network.init(key)['params'], network.module
    live = jnp.arange(module.width) < width
    wider = jnp.sqrt(module.width / width)
    made = {'stem': {'kernel': params['stem']['kernel'] * live, 'bias': params['stem']['bias']}}
    for i in range(module.depth):
        block = params[f'block{i}']
        kernel = block['kernel'] * wider * (live[:, None] & live) * (i < depth)
        made[f'block{i}'] = {'kernel': kernel, 'bias': block['bias']}
    head = {name: x * wider for name, x in params['head'].items()}
    made['head'] = {'kernel': head['kernel'] * live[:, None], 'bias': head['bias']}
    return {'params': made}


def starting(network, space, count, seed):
    """Padded variables, [networks, starts] on the leading axes, and their keys."""
    keys = jax.random.split(jax.random.key(seed), (len(space), count))
    widths, depths = (jnp.array(sizes) for sizes in zip(*space, strict=True))
    each = jax.vmap(
        jax.vmap(lambda key, w, d: initial(network, key, w, d), (0, None, None)), (0, 0, 0)
    )
    return jax.jit(each)(keys, widths, depths), keys


def score(network, teacher, space, batch, count):
    """{score: [networks, starts]}, higher is better."""
    labels, capture = jnp.asarray(batch['label']), ('features',)

    def view(net, variables):
        output = net.apply(variables, batch['input'], capture=capture)
        pooled = output.features['features']
        return pooled, losses.classifier_gradient(pooled, output.logits, labels)

    variables, _ = starting(network, space, count, seed=1)
    keys = jax.random.split(jax.random.key(2), count)
    references = jax.jit(jax.vmap(lambda key: view(teacher, teacher.init(key))))(keys)
    noise = jax.random.normal(jax.random.key(3), references[0].shape)

    def compared(variables, reference, noise):
        features, gradient = view(network, variables)
        return {
            'relation': losses.relation_score(features, reference[0]),
            'semantic': losses.class_semantic_score(gradient, reference[1]),
            'noise': losses.relation_score(features, jnp.abs(noise)),
        }

    each = jax.jit(jax.vmap(jax.vmap(compared), (0, None, None)))
    return jax.tree.map(np.asarray, each(variables, references, noise))


def context(network, teacher, steps, lr=1e-2):
    """One optimiser for all students; the teacher, which is wide, wants a lower rate."""
    tx = optax.adamw(lr, weight_decay=1e-4)
    return seeds.context(network=network, teacher=teacher, tx=tx, num_classes=10, steps=steps)


def distilled(made):
    """The paper's mixture."""
    return logit_kd(made, soft_weight=0.9, temperature=4.0)


def trained(method, network, space, batch, frozen, count, steps):
    """Variables after all steps, [networks * starts] on the leading axis."""
    variables, keys = starting(network, space, count, seed=4)

    def begun(key, variables):
        state = method.init(key, frozen)
        state = state.replace(params={'network': variables['params']}, frozen={})
        return state

    @jax.jit
    def together(variables, keys, batch, frozen):
        state = jax.vmap(jax.vmap(begun))(keys, variables)

        def step(state, _):
            def one(state):
                return method.step(state.replace(frozen=frozen), batch)[0].replace(frozen={})

            return jax.vmap(jax.vmap(one))(state), None

        return jax.lax.scan(step, state, None, length=steps)[0].params['network']

    params = together(variables, keys, batch, frozen)
    return {'params': jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), params)}


def accuracy(network, variables, test):
    """Of networks on the leading axis."""
    apply = jax.jit(jax.vmap(lambda v: network.apply(v, test['input']).logits.argmax(-1)))
    return np.mean(np.asarray(apply(variables)) == test['label'], axis=1)


def draw(measured):
    """Rank correlations and what is lost by the pick, every repetition a dot."""
    figure = figures.new_figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric, label in zip(
        axes, ('tau', 'gap'),
        ('Kendall correlation with distilled accuracy', 'accuracy below the best network'),
        strict=True,
    ):  # fmt: skip
        figures.dots(axis, {title: measured[arm][metric] for arm, title in TITLES.items()})
        axis.set(xlabel=label)
    return figure
