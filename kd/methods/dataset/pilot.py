"""Dataset distillation on digits over many seeds at once, for experiments that compare means.

Experts are shared by all seeds of an arm; a seed decides the real images a set starts from, the
segments, and the networks that judge the set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import seeds as seeds_lib
from kd.config import ConfigDict
from kd.context import Context
from kd.data import sources, standardised, synthetic
from kd.evaluators.fresh_training import Protocol
from kd.losses import segments as segments_lib
from kd.method import Method
from kd.methods.dataset.common import unraveller
from kd.methods.dataset.expert_trajectories import expert_trajectories, flatten
from kd.models.mlp import MLP
from kd.network import Network, from_linen
from kd.state import State

BATCH = 60
STEP_SIZES = (0.003, 0.01, 0.03, 0.1)


class Splits(NamedTuple):
    """Training, validation and test examples."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def digits() -> Splits:
    """1,200 training, 300 validation and 297 test images, less the mean training image."""
    config = ConfigDict({'data_dir': ''})
    load = lambda split: standardised.standardised(  # noqa: E731
        split, config, None, of='digits', kind='mean', fit_on='train[:1200]'
    )
    return Splits(
        *(standardised.everything(load(s)) for s in ('train[:1200]', 'train[1200:]', 'test'))
    )


def network() -> Network:
    """The perceptron 64-64-64-10."""
    return from_linen(MLP(widths=(64, 64)), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))


def context(splits: Splits, **rest: Any) -> Context:
    """A context for builders of dataset distillation; `rest` as of `kd.seeds.context`."""
    source = _Arrays(splits.train)
    return dataclasses.replace(
        seeds_lib.context(num_classes=10, **rest),
        source=lambda split: source,
        recipe_source=lambda split: source,
        config=ConfigDict({'seed': 0}),
        locate=lambda reference: Path(reference),
    )


class _Arrays(sources.Source):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        label, shape = arrays['label'], arrays['input'].shape[1:]
        kept = {name: arrays[name] for name in ('input', 'label')}
        data = sources.DataSet(
            'digits',
            {'train': len(label)},
            lambda _: sources.in_memory(kept),
            sources.example_spec(shape),
            10,
        )
        super().__init__(data, 'train')


def train_experts(
    splits: Splits,
    tx: optax.GradientTransformation,
    *,
    count: int = 20,
    epochs: int = 20,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Trajectories float32 [count, epochs + 1, P]; `options` as of `expert_trajectories`."""
    size = len(splits.train['label'])
    per_epoch = -(-size // BATCH)
    made = context(splits, network=network(), tx=tx, steps=epochs * per_epoch, batch_size=BATCH)
    method = expert_trajectories(made, experts=count, together=count, epochs=epochs, **options)
    arrays = {name: jnp.asarray(splits.train[name]) for name in ('input', 'label')}
    state = jax.jit(method.init)(jax.random.key(seed))

    def one_step(state, rows):
        batch = {name: value[rows] for name, value in arrays.items()}
        return method.step(state, batch)[0], None

    epoch = jax.jit(lambda state, rows: jax.lax.scan(one_step, state, rows)[0])
    snapshots = [np.asarray(flatten(state.params))]
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        rows = np.resize(rng.permutation(size), (per_epoch, BATCH))
        state = epoch(state, jnp.asarray(rows))
        snapshots.append(np.asarray(flatten(state.params)))
    return np.stack(snapshots, 1)


def accuracy_of(trajectories: np.ndarray, splits: Splits) -> np.ndarray:
    """Test accuracy of every expert after its last epoch."""
    net = network()
    unravel = unraveller(net)

    def accuracy(vector):
        logits = net.apply({'params': unravel(vector)}, splits.test['input']).logits
        return (logits.argmax(-1) == splits.test['label']).mean()

    return np.asarray(jax.vmap(accuracy)(jnp.asarray(trajectories[:, -1])))


def segments(trajectories: np.ndarray, bound: int, length: int) -> dict[str, np.ndarray]:
    """All segments as arrays, as `kd.data.trajectories.segments` gives them."""
    segments_lib.check(trajectories.shape[1] - 1, bound, length)
    experts = range(len(trajectories))
    places = [(e, t) for e in experts for t in range(bound)]
    return {
        'start': np.stack([trajectories[e, t] for e, t in places]),
        'targets': np.stack([trajectories[e, t + 1 : t + 1 + length] for e, t in places]),
        'epoch': np.array([t for _, t in places], np.int32),
    }


def random_start(splits: Splits, images_per_class: int, key: jax.Array) -> jax.Array:
    """Random real images by class, drawn under jit: float32 [10 * images_per_class, ...]."""
    label = jnp.asarray(splits.train['label'])
    scores = jax.random.uniform(key, label.shape)
    own = jnp.where(label == jnp.arange(10)[:, None], scores, -1.0)
    chosen = jax.lax.top_k(own, images_per_class)[1].reshape(-1)
    return jnp.asarray(splits.train['input'])[chosen]


def distil(
    method: Method,
    data: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    steps: int,
    start: Any,
) -> State:
    """One synthetic set per seed; `start(key) -> images` of a seed's key."""

    def init(key):
        state = method.init(key, None)
        params = {**state.params, 'images': start(key)}
        # Averages begin where the images do.
        ema = {name: {**tree, 'images': params['images']} for name, tree in state.ema.items()}
        return state.replace(params=params, ema=ema)

    if steps == 0:
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        return jax.jit(jax.vmap(init))(keys)
    return seeds_lib.train(method, data, np.asarray(seeds), steps=steps, batch_size=1, init=init)


def outer_loss(method: Method, state: State, data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean distance over all segments, per seed."""
    batch = {name: jnp.asarray(value) for name, value in data.items()}

    def one(state):
        loss = method.step(state, batch)[1]['loss']
        return loss.total / loss.count

    return np.asarray(jax.jit(lambda s: jax.lax.map(one, s))(state))


class Judge:
    """Trains networks on sets, seed by seed, under one protocol."""

    def __init__(self, splits: Splits, *, epochs: int = 300, repeats: int = 5) -> None:
        self.splits, self.repeats = splits, repeats
        self.protocol = Protocol(network(), epochs=epochs, batch_size=1000)

    def learned(self, state: State, average: str = '') -> np.ndarray:
        """Mean test accuracy per seed at the learned step size."""
        count = state.step.shape[0]
        sets = [
            synthetic.of_state(jax.tree.map(lambda x, i=i: x[i], state), average)
            for i in range(count)
        ]
        return np.array(
            [
                self._accuracy(i, one.examples, self.splits.test, float(one.step_size))
                for i, one in enumerate(sets)
            ]
        )

    def tuned(self, sets: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, float]:
        """Mean test accuracy per set at the step size that is best on validation, over all sets."""
        found = {
            rate: np.mean(
                [self._accuracy(i, one, self.splits.validation, rate) for i, one in enumerate(sets)]
            )
            for rate in STEP_SIZES
        }
        best = max(found, key=lambda rate: found[rate])
        tested = [self._accuracy(i, one, self.splits.test, best) for i, one in enumerate(sets)]
        return np.array(tested), best

    def _accuracy(self, seed, examples, on, rate) -> float:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), seed), self.repeats)
        return float(self.protocol(keys, examples, on, rate).mean())


def seed_of(key: jax.Array) -> jax.Array:
    """The seed from which `kd.seeds.train` made a key, to look something up by it."""
    return jax.random.key_data(key)[-1]
