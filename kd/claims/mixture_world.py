"""Generators of points from mixtures whose denoiser is known, for claims on score distillation.

Many of them at once: a seed decides network, noise and order. Networks are perceptrons, with the
preconditioning of EDM or of velocities, first trained as denoisers of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.claims import seeds as seeds_lib
from kd.context import Context
from kd.data.builders.mixtures import Mixture, exact_denoiser
from kd.evaluators import distribution, fidelity
from kd.losses.schedule import Schedule, edm
from kd.losses.score_distillation import Weight
from kd.method import Method
from kd.methods.diffusion.critic import GENERATOR, Critic
from kd.methods.diffusion.denoising import denoising
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.sampling.generator import Generator, of_network
from kd.state import PyTree

BATCH = 256


class World:
    """A mixture, its exact denoiser, and networks of its size.

    Attributes:
      mixture: the data.
      path: the schedule.
      clock: its natural one.
      weight: of denoising.
      network, denoiser: of generators and critics.
      exact: the teacher, E[x0 | x_t].
      seeds: of the runs.
      data: `input` and, of a conditional network, `label`, of 50,000 examples.
    """

    def __init__(
        self,
        mixture: Mixture,
        seeds: np.ndarray,
        *,
        path: Schedule | None = None,
        width: int = 128,
        conditional: bool = False,
    ):
        self.mixture, self.seeds = mixture, np.asarray(seeds)
        self.path = path or edm(0.02, 5.0)
        inner = VelocityMLP(
            width=width, depth=3, num_classes=mixture.num_classes if conditional else None
        )
        self.clock = times.natural(self.path)
        # How networks of the schedule are made and trained.
        deviations = self.path.name == 'edm'
        self.weight: Weight = 'edm' if deviations else 'flow'
        module = Denoised(inner, self.path, 'flow', 'edm' if deviations else 'none')
        self.spec = {'input': jax.ShapeDtypeStruct((mixture.means.shape[1],), jnp.float32)}
        self.network = from_linen(module, *module.example_inputs(self.spec))
        self.denoiser = denoisers.of_network(self.network)
        self.exact = exact_denoiser(mixture, self.path)
        self.data = self.drawn(50_000, 0)
        if not conditional:
            self.data.pop('label')

    def drawn(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """Examples of the mixture."""
        points, label = self.mixture.draw(np.random.default_rng(seed), n)
        return {'input': points.astype(np.float32), 'label': label.astype(np.int32)}

    def context(self, lr: float, references: Sequence[str] = (), **more: Any) -> Context:
        """Of a stage that trains a generator with Adam from references.start; others of its form
        may be named."""
        return seeds_lib.context(
            network=self.network,
            references=dict.fromkeys(('start', *references), self.network),
            spec=self.spec,
            optimizer=dict(name='adam', lr=lr) | more.pop('optimizer', {}),
            **more,
        )

    def critic(self, context: Context, lr: float = 1e-3, **more: Any) -> Critic:
        """A critic with Adam, whose times are those of the clock evenly."""
        updates = more.get('updates', 5)
        given = dict(
            network=self.network,
            denoiser=self.denoiser,
            tx=context.optimizer(name='adam', lr=lr, updates=updates),
            law=times.uniform(self.clock),
            weight=self.weight,
        )
        return Critic(**given | more)

    def student(self, *levels: float) -> Generator:
        """A generator that is asked at these times; at the noisiest alone if there are none."""
        return Generator(self.denoiser, levels or (self.path.high,))

    def denoisers(self, steps: int = 3_000, batch_size: int = 512) -> PyTree:
        """Parameters [R, ...] of networks that have learnt to denoise the data."""
        context = seeds_lib.context(
            network=self.network,
            spec=self.spec,
            steps=steps,
            optimizer=dict(name='adam', lr=1e-3, schedule='cosine'),
        )
        law = dict(name='kd.sampling.times.lognormal', mean=-0.8, deviation=1.4)
        method = denoising(context, law=law if self.weight == 'edm' else None, weight=self.weight)
        state = seeds_lib.train(method, self.data, self.seeds, steps=steps, batch_size=batch_size)
        return state.params['network']

    def train(
        self,
        method: Method,
        started: PyTree,
        steps: int,
        batch_size: int = BATCH,
        average: str = '',
        part: str = GENERATOR,
        **more: Any,
    ) -> PyTree:
        """Parameters [R, ...] of generators, a part of the state, that a method trains, or an
        average's."""
        frozen = {'start': {'params': started}} | more.pop('frozen_per_run', {})
        state = seeds_lib.train(
            method, self.data, self.seeds, steps=steps, batch_size=batch_size,
            frozen_per_run=frozen, **more,
        )  # fmt: skip
        return (state.ema[average] if average else state.params)[part]

    def samples(
        self, params: PyTree, student: Generator, n: int = 4_000, step: str = 'restart'
    ) -> np.ndarray:
        """[R, n, d], the same noise for every run and arm."""
        return np.asarray(_sampled(self.network, student.times, step, n)(params))

    def measure(self, samples: np.ndarray) -> Mapping[str, list[float]]:
        """Distance to the data and share of samples on a mode, of each run."""
        real = self.drawn(samples.shape[1], 1)['input']
        radius = 3 * self.mixture.deviation
        hits = [fidelity.modes(x, self.mixture.means, radius) for x in samples]
        return {
            'swd': [distribution.sliced_wasserstein(real, x) for x in samples],
            'hit': [found.hit for found in hits],
            'modes': [float(found.covered) for found in hits],
            'entropy': [found.entropy for found in hits],
        }

    def spread(self, samples: np.ndarray) -> np.ndarray:
        """Deviation of the samples of each run over that of the data, [R]."""
        real = self.drawn(samples.shape[1], 1)['input']
        return np.asarray([fidelity.spread(real, x)[0] for x in samples])

    def accuracy(self, samples: np.ndarray) -> list[float]:
        """Share of samples, whose classes go round, that are of their class: the nearest mode."""
        wanted = np.arange(samples.shape[1]) % self.mixture.num_classes
        away = np.linalg.norm(samples[:, :, None] - self.mixture.means, axis=-1)
        said = self.mixture.labels[away.argmin(-1)]
        return (said == wanted).mean(1).tolist()


@functools.cache
def _sampled(network, times, step, n):
    student = of_network(network, times, step, where='student')
    shape = network.inputs[1].shape[1:]
    classes = denoisers.num_classes(network)

    @jax.jit
    @jax.vmap
    def draw(params):
        condition = {} if classes is None else {'label': jnp.arange(n) % classes}
        return student.sample({'params': params}, condition, jax.random.key(0), (n, *shape))

    return draw
