"""Compensators shared by all classes (Zhang et al. 2024, arXiv:2408.06927).

    python -m kd.claims infer_ufc            about 4 minutes on two cores

Pairs of digits, one hundred classes, since sharing pays where classes are many. Three ConvNets with
batch normalisation; storage of two images per class. The paper compares with images that are each
trained from noise by the same loss (in the manner of SRe2L, Yin et al. 2023, arXiv:2306.13092). Two
controls that it does not show are reported without a check: random real images under the same soft
labels, and the real images of the compensated set alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds
from kd.claims.claim import Check, Claim
from kd.data.context import SourceContext
from kd.data.distilled import compensator, coreset
from kd.data.transforms import pairs, standardised
from kd.evaluators import compensated_set
from kd.losses import batch_statistics, classification
from kd.methods.dataset import infer_ufc
from kd.methods.vision.supervised import supervised
from kd.models.convnet import ConvNet
from kd.network import from_linen

STORAGE, WEIGHT = 2, 0.1
WIDTHS = (16, 24, 32)
ARMS = {
    'random_hard': 'random real, hard labels',
    'random': 'random real, soft labels',
    'trained': 'each image trained, soft labels',
    'real': 'its real images alone, soft labels',
    'infer_hard': 'compensated, hard labels',
    'infer': 'compensated, soft labels',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` shortens it to a few steps and arms."""
    runs, teaching, steps, epochs = (3, 2, 2, 1) if smoke else (4, 600, 250, 80)
    arms = ('infer',) if smoke else tuple(ARMS)
    widths = WIDTHS[:1] if smoke else WIDTHS
    checks = [
        Check('over hard labels of random images by 0.15', 'accuracy', 'infer',
              0.0 if smoke else 'random_hard',
              margin=0.15),
    ]  # fmt: skip
    if not smoke:
        checks.append(
            Check('over images each trained, by 0.05', 'accuracy', 'infer', 'trained', margin=0.05)
        )
    return Claim(
        paper='Zhang et al. 2024, arXiv:2408.06927',
        statement='Images sharing one trained perturbation across classes, softly labelled, teach '
        'more than images that are trained one by one.',
        setting=f'Pairs of digits, 100 classes, storage of {STORAGE} images per class; 3 ConvNets '
        f'as teachers, {steps} steps of training, {runs} seeds; the student has the architecture '
        'of the first teacher; soft labels at T = 4 with MixUp, equal steps for all sets.',
        run=lambda say: run(say, runs, teaching, steps, epochs, arms, widths),
        checks=checks,
        draw=draw,
        notes='Settings and margins are from a smaller experiment. All seeds share the teachers.',
    )


def run(say, runs, teaching, steps, epochs, arms, widths):
    """Trains teachers, then every set and a student on it, seed by seed."""
    source = pairs.digit_pairs(SourceContext('train'))
    train = standardised.everything(source)
    test = standardised.everything(pairs.digit_pairs(SourceContext('test')))
    shape = jax.ShapeDtypeStruct((1, 8, 16, 1), jnp.float32)
    nets, frozen = {}, {}
    labelled = {name: train[name] for name in ('input', 'label')}
    for index, width in enumerate(widths):
        module = ConvNet(depth=2, width=width, num_classes=100, norm='batch', conv='matmul')
        net = nets[f'net{index}'] = from_linen(module, shape)
        tx = optax.adam(optax.cosine_decay_schedule(3e-3, teaching))
        method = supervised(seeds.context(network=net, tx=tx, num_classes=100))
        state = seeds.train_one(method, labelled, index, steps=teaching, batch_size=100)
        frozen[f'net{index}'] = state.variables()
        logits = jax.jit(lambda x, net=net, v=frozen[f'net{index}']: net.apply(v, x).logits)
        accuracy = (logits(test['input']).argmax(-1) == test['label']).mean()
        say(f'teacher {index}: test accuracy {accuracy:.3f}')
    train_on = compensated_set.SoftTraining(
        nets['net0'], lr=3e-3, epochs=epochs, temperature=4.0, gradient_scale=4.0
    )
    build = builders(source, train, nets, frozen, steps)
    measured = {arm: {'accuracy': []} for arm in arms}
    for seed in range(runs):
        sets = build(seed, arms)
        most = max(len(one['input']) for one in sets.values())
        for arm, one in sets.items():
            accuracy = train_on(jax.random.split(jax.random.key(seed), 1), one, test, of=most)
            measured[arm]['accuracy'].append(float(accuracy.mean()))
            say(f'seed {seed}, {ARMS[arm]}: {accuracy.mean():.3f}')
    return measured


def builders(source, train, nets, frozen, steps):
    """`build(seed, arms)`: the training set of every arm."""
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps), b1=0.5, b2=0.9)
    context = dataclasses.replace(
        seeds.context(tx=tx, num_classes=100),
        recipe_source=lambda split: source,
        references=nets,
        locate=lambda reference: reference,
    )
    method = infer_ufc.infer_ufc(
        context, images_per_class=STORAGE, statistics_weight=WEIGHT, shift=1
    )
    step = jax.jit(method.step)
    alone = one_by_one(nets, frozen, steps)

    def soft(images):
        return compensated_set.soft_examples(nets, frozen, images)

    def build(seed, arms):
        rng = np.random.default_rng(seed)
        state = method.init(jax.random.key(seed), frozen)
        count = state.variables()['groups'].shape[0]
        chosen = compensator.group_indices(rng, train['label'], count)
        state = state.replace(mutables={'network': {'groups': jnp.asarray(train['input'][chosen])}})
        for _ in range(steps):
            state = step(state, {})[0]
        images = compensated_set.unfolded(state, -1.0, 1.0)
        hard = np.tile(np.arange(100, dtype=np.int32), len(images) // 100)
        rows = coreset.random_subset(rng, train['label'], STORAGE)
        random = {name: train[name][rows] for name in ('input', 'label')}
        sets = {
            'random_hard': lambda: random,
            'random': lambda: soft(random['input']),
            'trained': lambda: soft(alone(seed)),
            'real': lambda: soft(images[: 100 * count]),
            'infer_hard': lambda: {'input': images, 'label': hard},
            'infer': lambda: soft(images),
        }
        return {arm: sets[arm]() for arm in arms}

    return build


def one_by_one(nets, frozen, steps):
    """`train(seed)`: images trained from noise, each its own; network n trains group n."""
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps), b1=0.5, b2=0.9)
    updates = []
    for name in list(nets)[:STORAGE]:

        def loss(images, net=nets[name], variables=frozen[name]):
            logits, layers = infer_ufc.normalisation_inputs(net, variables, images)
            distance = batch_statistics.statistics_distance(layers)
            hard = classification.cross_entropy(logits, jnp.arange(100)).mean()
            return hard + WEIGHT * distance

        @jax.jit
        def step(images, opt_state, loss=loss):
            moves, opt_state = tx.update(jax.grad(loss)(images), opt_state)
            return optax.apply_updates(images, moves), opt_state

        updates.append(step)

    def train(seed):
        found = []
        for group, step in enumerate(updates):
            images = jax.random.normal(jax.random.key(100 * seed + group), (100, 8, 16, 1))
            opt_state = tx.init(images)
            for _ in range(steps):
                images, opt_state = step(images, opt_state)
            found.append(np.clip(np.asarray(images), -1.0, 1.0))
        return np.concatenate(found)

    return train


def draw(measured):
    """Test accuracy per arm, every seed a dot."""
    figure = figures.new_figure(6.5, 3.0)
    axis = figure.subplots()
    for row, values in enumerate(measured.values()):
        accuracy = np.asarray(values['accuracy'])
        axis.plot(accuracy, np.full(len(accuracy), row), 'o', color=figures.COLOURS[5], ms=4)
        axis.plot(accuracy.mean(), row, '|', color=figures.COLOURS[0], ms=18, mew=2.5)
    axis.set(xlabel='test accuracy', yticks=range(len(measured)))
    axis.set_yticklabels([ARMS[arm] for arm in measured])
    axis.grid(alpha=0.3)
    axis.margins(y=0.15)
    axis.invert_yaxis()
    return figure
