"""The experiment of configs/vision/logit_kd.py:cpu in flax and optax, with nothing around it.

    python -m kd.benchmarks.plain.quickstart DIRECTORY

The same data, networks, optimisers, steps, evaluations, seeds and figures; no checks, checkpoints,
resuming or choice. Nothing of kd is used.
"""

import itertools
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH, SEEDS, T = 64, 5, 4.0


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.InstanceNorm()(nn.Conv(32, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def crop(key, images):
    """Each image moved by up to one pixel."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    take = lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(take)(padded, corners)


@jax.jit
def scores(logits, labels):
    """NLL, Brier score, accuracy and calibration error (15 bins)."""
    p, hot = nn.softmax(logits), nn.one_hot(labels, 10)
    right, sure = p.argmax(-1) == labels, p.max(-1)
    bins = nn.one_hot(jnp.clip((sure * 15).astype(int), 0, 14), 15)
    counts, hits = bins.sum(0), right @ bins
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    ece = jnp.abs(hits - sure @ bins).sum() / len(labels)
    return dict(nll=nll, brier=((p - hot) ** 2).sum(-1).mean(), accuracy=right.mean(), ece=ece,
                counts=counts, hits=hits)  # fmt: skip


class Trainer:
    """Training on labels, or on labels and the outputs of a teacher."""

    def __init__(self, model, steps, augment=False, teacher=None):
        self.model, self.steps = model, steps
        rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, steps)
        mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
        self.tx = optax.adamw(rate, weight_decay=1e-4, mask=mask)

        def loss(params, key, x, y):
            x = crop(key, x) if augment else x
            logits = model.apply(params, x)
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            if teacher is None:
                return hard
            target, own = nn.log_softmax(teacher(x) / T), nn.log_softmax(logits / T)
            return (
                0.1 * hard
                + 0.9 * T**2 * optax.losses.kl_divergence_with_log_targets(own, target).mean()
            )

        @jax.jit
        def step(params, moments, key, x, y):
            key, own = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, own, x, y)
            updates, moments = self.tx.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, key, value

        self.step, self.apply = step, jax.jit(model.apply)

    def __call__(self, seed, x, y, validation, file=None):
        key = jax.random.key(seed)
        params = self.model.init(key, x[:1])
        moments, curve, losses = self.tx.init(params), [], []
        rng = np.random.default_rng(seed)
        orders = itertools.chain.from_iterable(rng.permutation(len(x)) for _ in itertools.count())
        for step in range(1, self.steps + 1):
            rows = np.fromiter(itertools.islice(orders, BATCH), int, BATCH)
            params, moments, key, value = self.step(params, moments, key, x[rows], y[rows])
            if file is None:
                continue
            losses.append(value)
            if step % 100 == 0:
                held = scores(self.apply(params, validation[0]), validation[1])
                line = dict(step=step, loss=float(np.mean(jax.device_get(losses[-50:]))))
                curve.append(line | {m: float(held[m]) for m in ('nll', 'accuracy', 'ece')})
        if file is not None:
            file.write_bytes(serialization.to_bytes(params))
            file.with_suffix('.json').write_text(json.dumps(curve))
        return params, curve


def main(directory):
    """Trains everything, and writes networks, curves, a table and four figures there."""
    folder = Path(directory)
    folder.mkdir(parents=True)
    digits = load_digits()
    x, y = (digits.images[..., None] / 8 - 1).astype('f4'), digits.target.astype('i4')
    x, test_x, y, test_y = train_test_split(x, y, test_size=297, stratify=y, random_state=0)
    held = x[1200:], y[1200:]
    teacher = Trainer(ConvNet(), 400, augment=True)
    params, _ = first = teacher(0, x[:1200], y[:1200], held, folder / 'teacher')
    arms = {
        'student alone': (Trainer(MLP(), 1000), 200),
        'student distilled': (
            Trainer(MLP(), 1000, teacher=lambda x: ConvNet().apply(params, x)),
            200,
        ),
        'teacher': (teacher, 1200),
    }
    found, outputs, curves = {}, {}, {}
    for name, (train, size) in arms.items():
        runs = [first if name == 'teacher' else train(0, x[:size], y[:size], held, folder / name)]
        runs += [train(seed, x[:size], y[:size], held) for seed in range(1, SEEDS)]
        curves[name] = runs[0][1]
        outputs[name] = [train.apply(params, test_x) for params, _ in runs]
        found[name] = jax.device_get([scores(logits, test_y) for logits in outputs[name]])
    draw(folder, found, curves, test_x, outputs)
    means = {n: {m: float(np.mean([s[m] for s in of])) for m in ('accuracy', 'nll', 'ece', 'brier')}
             for n, of in found.items()}  # fmt: skip
    (folder / 'report.json').write_text(json.dumps(means))
    lines = [
        f'| {n} | ' + ' | '.join(f'{v:.4f}' for v in m.values()) + ' |' for n, m in means.items()
    ]
    (folder / 'report.md').write_text('\n'.join(lines))
    return means


def draw(folder, found, curves, images, outputs):
    """Seeds, learning curves, reliability, and images on which student and teacher differ."""
    figures = {n: Figure(figsize=(10, 3), dpi=150, layout='constrained')
               for n in ('comparison', 'learning_curves', 'reliability')}  # fmt: skip
    for axis, m in zip(
        figures['comparison'].subplots(1, 3), ('accuracy', 'nll', 'ece'), strict=True
    ):
        for place, (name, of) in enumerate(found.items()):
            axis.plot([s[m] for s in of], [place] * len(of), 'o', label=name)
        axis.set_xlabel(m)
    axes = figures['learning_curves'].subplots(1, 3)
    for axis, m in zip(axes, ('loss', 'accuracy', 'nll'), strict=True):
        for name, curve in curves.items():
            axis.plot([c['step'] for c in curve], [c[m] for c in curve], 'o-', label=name)
        axis.set_title(m)
    axes[0].legend()
    for axis, (name, of) in zip(figures['reliability'].subplots(1, 3), found.items(), strict=True):
        counts, hits = (sum(s[part] for s in of) for part in ('counts', 'hits'))
        axis.bar((np.arange(15) + 0.5) / 15, hits / np.maximum(counts, 1), 1 / 15)
        axis.step((np.arange(15) + 0.5) / 15, counts / counts.sum(), where='mid')
        axis.set_title(name)
    own, theirs = (np.asarray(outputs[n][0].argmax(-1)) for n in ('student distilled', 'teacher'))
    apart = np.flatnonzero(own != theirs)[:24]
    figures['disagreements'] = Figure(figsize=(10, 5), dpi=150, layout='constrained')
    for axis in (axes := figures['disagreements'].subplots(3, 8).ravel()):
        axis.set_axis_off()
    for axis, i in zip(axes, apart, strict=False):
        axis.imshow(images[i, ..., 0], cmap='gray')
        axis.set_title(f'{own[i]}, teacher {theirs[i]}', fontsize=6)
    for name, figure in figures.items():
        figure.savefig(folder / f'{name}.png')


if __name__ == '__main__':
    print(json.dumps(main(sys.argv[1])))
