"""A diffusion transformer of ten blocks on digits, for claims on what may be left out of it.

Flow matching as SD 3 has it, (1 - t) x0 + t eps, told the class. Errors of velocities are against
the teacher's, on the same noised test digits at times evenly between 0 and 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from kd.claims import seeds as seeds_lib
from kd.context import Context
from kd.data import catalogue
from kd.evaluators import distribution
from kd.losses.schedule import flow
from kd.method import with_ema
from kd.methods.diffusion.denoising import denoising
from kd.models.denoiser import Denoised
from kd.models.dit import DiT
from kd.network import Network, from_linen
from kd.state import PyTree

BATCH = 32
# Of a world that only shows that a claim runs.
SMALL = dict(depth=4, width=8, examples=64)


class World:
    """A teacher for each seed.

    Attributes:
      seeds: of the runs.
      network: the whole one.
      data: training digits, `input` and `label`.
      test: as many noised test digits as asked for: (t, x_t, label, eps - x0).
    """

    def __init__(self, seeds: np.ndarray, *, depth: int = 10, width: int = 32, examples: int = 512):
        self.seeds = np.asarray(seeds)
        self.module = DiT(
            patch=2, width=width, depth=depth, heads=4, num_classes=10, data_scale=1.0
        )
        self.network = self.less()
        self.data, test = _digits('train'), _digits('test')
        rows = np.arange(examples) % len(test['label'])
        x, rng = test['input'][rows], np.random.default_rng(0)
        t = rng.uniform(size=examples).astype(np.float32)
        noise = rng.standard_normal(x.shape).astype(np.float32)
        share = t[:, None, None, None]
        self.test = t, (1 - share) * x + share * noise, test['label'][rows], noise - x

    def less(self, **changes: Any) -> Network:
        """The network with something dropped, or maps."""
        module = Denoised(self.module.clone(**changes), flow(1.0), kind='flow')
        spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in _spec().items()}
        return from_linen(module, *module.example_inputs(spec))

    def context(self, network: Network, lr: float, steps: int, **more: Any) -> Context:
        """Of a stage whose teacher is the whole network, with Adam and a cosine."""
        spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self.data.items()}
        given = dict(optimizer=dict(name='adam', lr=lr, schedule='cosine', clip_norm=1.0)) | more
        return seeds_lib.context(
            network=network, teacher=self.network, spec=spec, steps=steps, **given
        )

    def teachers(self, steps: int) -> PyTree:
        """Parameters [R, ...], averages of a training on the data."""
        method = denoising(self.context(self.network, 2e-3, steps), weight='flow')
        method = with_ema(method, {'slow': 0.995})
        return self.train(method, steps).ema['slow']['network']

    def train(self, method: Any, steps: int, seeds: np.ndarray | None = None, **more: Any):
        """Runs of a method on the digits."""
        return seeds_lib.train(
            method, self.data, self.seeds if seeds is None else seeds, steps=steps,
            batch_size=BATCH, **more,
        )  # fmt: skip

    def velocity(self, network: Network) -> Callable[..., jax.Array]:
        """(params, t, x_t, label, gates) -> eps - x0 as a network says it."""
        inner = network.module.inner

        def said(params, t, x_t, label, gates=None):
            return inner.apply({'params': params}, t, t, x_t, label=label, gates=gates)

        return said

    @functools.cached_property
    def _classifier(self) -> LogisticRegression:
        x = self.data['input'].reshape(len(self.data['input']), -1)
        return LogisticRegression(max_iter=500).fit(x, self.data['label'])

    def judged(self, samples: np.ndarray, label: np.ndarray) -> dict[str, list[float]]:
        """Accuracy of a classifier on samples [R, n, 8, 8, 1], and their energy distance."""
        real = _digits('test')['input'].reshape(-1, 64)
        flat = samples.reshape(len(samples), -1, 64)
        return {
            'accuracy': [float(np.mean(self._classifier.predict(x) == label)) for x in flat],
            'energy': [distribution.energy_distance(real, x) for x in flat],
        }

    def sampled(self, network: Network, count: int, steps: int) -> Callable[..., jax.Array]:
        """(params, gates) -> samples [count, 8, 8, 1] by Euler, of the same noises and classes."""
        rng, label = np.random.default_rng(1), np.arange(count) % 10
        noise = rng.standard_normal((count, *self.test[1].shape[1:])).astype(np.float32)
        said, grid = self.velocity(network), np.linspace(1, 0, steps + 1)

        def ends(params, gates=None):
            def one(x, t):
                v = said(params, jnp.full(count, t, jnp.float32), x, label, gates)
                return x - v / steps, None

            return jax.lax.scan(one, jnp.asarray(noise), jnp.asarray(grid[:-1], jnp.float32))[0]

        return ends


def _spec() -> dict[str, np.ndarray]:
    return {name: x[:1] for name, x in _digits('test').items()}


@functools.cache
def _digits(split: str) -> dict[str, np.ndarray]:
    source = catalogue.load('digits', split)
    batch = source.fetch(np.arange(len(source)))
    return {name: np.asarray(batch[name]) for name in ('input', 'label')}
