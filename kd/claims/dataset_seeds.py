"""Dataset distillation over many seeds at once, for experiments that compare means.

Experts are shared by all seeds of an arm; a seed decides the real images a set starts from, the
segments, and the networks that judge the set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import metrics
from kd.claims import seeds as seeds_lib
from kd.context import Context
from kd.data import catalogue, sources
from kd.data.distilled import synthetic
from kd.data.transforms import standardised
from kd.evaluators.fresh_training import Protocol
from kd.losses import segments as segments_lib
from kd.method import Method
from kd.methods.dataset.common import unraveller
from kd.methods.dataset.expert_trajectories import expert_trajectories, flatten
from kd.models.mlp import MLP
from kd.network import Network, from_linen
from kd.state import State

STEP_SIZES = (0.003, 0.01, 0.03, 0.1)


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and the network that is trained on it.

    Attributes:
      train, validation, test: `input` float32 [N, ...] and `label` int32 [N], classes 0..9.
      network: that of experts, students and judges.
      batch_size: of the experts.
    """

    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    network: Network
    batch_size: int


def digits() -> Task:
    """1,200 training, 300 validation and 297 test images; perceptron 64-64-64-10."""
    return _images('digits', 1_200, widths=(64, 64), batch_size=60)


def mnist() -> Task:
    """55,000 training, 5,000 validation and 10,000 test images; perceptron 784-64-64-10.

    Raises:
      DataError: no copy of MNIST in the data directory.
    """
    return _images('mnist', 55_000, widths=(64, 64), batch_size=250)


def _images(name: str, size: int, *, widths: tuple[int, ...], batch_size: int) -> Task:
    """The first `size` images of `train` and the others; all of them less the mean of the first."""
    known, test = (standardised.everything(catalogue.load(name, s)) for s in ('train', 'test'))
    mean = known['input'][:size].mean(0, dtype=np.float64).astype(np.float32)

    def centred(part, rows=slice(None)):
        return {'input': part['input'][rows] - mean, 'label': part['label'][rows]}

    one = jax.ShapeDtypeStruct((1, *mean.shape), jnp.float32)
    return Task(
        train=centred(known, slice(size)),
        validation=centred(known, slice(size, None)),
        test=centred(test),
        network=from_linen(MLP(widths=widths), one),
        batch_size=batch_size,
    )


def context(task: Task, **rest: Any) -> Context:
    """A context for builders of dataset distillation; `rest` as of `kd.claims.seeds.context`."""
    source = _Arrays(task.train)
    return dataclasses.replace(
        seeds_lib.context(num_classes=10, **{'network': task.network, **rest}),
        source=lambda split: source,
        recipe_source=lambda split: source,
        locate=lambda reference: Path(reference),
    )


class _Arrays(sources.Source):
    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        label, shape = arrays['label'], arrays['input'].shape[1:]
        kept = {name: arrays[name] for name in ('input', 'label')}
        data = sources.DataSet(
            'arrays',
            {'train': len(label)},
            lambda _: sources.in_memory(kept),
            sources.example_spec(shape),
            10,
        )
        super().__init__(data, 'train')


def train_experts(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    count: int = 20,
    epochs: int = 20,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Trajectories float32 [count, epochs + 1, P]; `options` as of `expert_trajectories`."""
    size, batch_size = len(task.train['label']), task.batch_size
    per_epoch = -(-size // batch_size)
    made = context(task, tx=tx, steps=epochs * per_epoch, batch_size=batch_size)
    method = expert_trajectories(made, experts=count, together=count, epochs=epochs, **options)
    arrays = {name: jnp.asarray(task.train[name]) for name in ('input', 'label')}
    state = jax.jit(method.init)(jax.random.key(seed))

    def one_step(state, rows):
        batch = {name: value[rows] for name, value in arrays.items()}
        return method.step(state, batch)[0], None

    epoch = jax.jit(lambda state, rows: jax.lax.scan(one_step, state, rows)[0])
    snapshots = [np.asarray(flatten(state.variables()['params']))]
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        rows = np.resize(rng.permutation(size), (per_epoch, batch_size))
        state = epoch(state, jnp.asarray(rows))
        snapshots.append(np.asarray(flatten(state.variables()['params'])))
    return np.stack(snapshots, 1)


def accuracy_of(task: Task, trajectories: np.ndarray) -> np.ndarray:
    """Test accuracy of every expert after its last epoch."""
    unravel = unraveller(task.network)

    def accuracy(vector):
        logits = task.network.apply({'params': unravel(vector)}, task.test['input']).logits
        return (logits.argmax(-1) == task.test['label']).mean()

    return np.asarray(jax.vmap(accuracy)(jnp.asarray(trajectories[:, -1])))


def segments(trajectories: np.ndarray, bound: int, length: int) -> dict[str, np.ndarray]:
    """All segments as arrays, as `kd.data.distilled.trajectories.segments` gives them."""
    segments_lib.check(trajectories.shape[1] - 1, bound, length)
    experts = range(len(trajectories))
    places = [(e, t) for e in experts for t in range(bound)]
    return {
        'start': np.stack([trajectories[e, t] for e, t in places]),
        'targets': np.stack([trajectories[e, t + 1 : t + 1 + length] for e, t in places]),
        'epoch': np.array([t for _, t in places], np.int32),
    }


def random_start(task: Task, images_per_class: int, key: jax.Array) -> jax.Array:
    """Random real images by class, drawn under jit: float32 [10 * images_per_class, ...]."""
    label = jnp.asarray(task.train['label'])
    scores = jax.random.uniform(key, label.shape)
    own = jnp.where(label == jnp.arange(10)[:, None], scores, -1.0)
    chosen = jax.lax.top_k(own, images_per_class)[1].reshape(-1)
    return jnp.asarray(task.train['input'])[chosen]


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
        images = start(key)
        state = state.with_params({**state.variables()['params'], 'images': images})
        # Averages begin where the images do.
        begun = lambda tree: {**tree, 'images': images}  # noqa: E731
        ema = {name: {p: begun(t) for p, t in parts.items()} for name, parts in state.ema.items()}
        return state.replace(ema=ema)

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

    def __init__(self, task: Task, *, epochs: int = 300, repeats: int = 5) -> None:
        self.task, self.repeats = task, repeats
        self.protocol = Protocol(task.network, epochs=epochs, batch_size=1000)

    def learned(self, state: State, average: str = '') -> np.ndarray:
        """Mean test accuracy per seed at the learned step size."""
        count = state.step.shape[0]
        sets = [
            synthetic.of_state(jax.tree.map(lambda x, i=i: x[i], state), average)
            for i in range(count)
        ]
        return np.array(
            [
                self._accuracy(i, one.examples, self.task.test, float(one.step_size))
                for i, one in enumerate(sets)
            ]
        )

    def tuned(self, sets: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, float]:
        """Mean test accuracy per set at the step size that is best on validation, over all sets."""
        found = {
            rate: np.mean(
                [self._accuracy(i, one, self.task.validation, rate) for i, one in enumerate(sets)]
            )
            for rate in STEP_SIZES
        }
        best = STEP_SIZES[metrics.best(map(float, found.values())) or 0]
        tested = [self._accuracy(i, one, self.task.test, best) for i, one in enumerate(sets)]
        return np.array(tested), best

    def _accuracy(self, seed, examples, on, rate) -> float:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), seed), self.repeats)
        return float(self.protocol(keys, examples, on, rate).mean())


def seed_of(key: jax.Array) -> jax.Array:
    """The seed from which `kd.claims.seeds.train` made a key, to look something up by it."""
    return jax.random.key_data(key)[-1]
