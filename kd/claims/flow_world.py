"""Few-step students of a flow that is known: a ring of Gaussians, for claims on flows.

Many of them at once: a seed decides network, noise and order. In units of the noise the ring has
radius 2 and modes of deviation .2; errors are in these units, whatever the noise itself is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd.claims import seeds as seeds_lib
from kd.context import Context
from kd.data.builders import mixtures
from kd.data.builders.mixtures import Mixture
from kd.evaluators import distribution, fidelity
from kd.losses.flow_map import VelocityFunction
from kd.method import Method, with_ema
from kd.methods.flow.flow_matching import flow_matching
from kd.models.conditioning import velocity_inputs
from kd.models.momentum_mlp import MomentumMLP
from kd.models.velocity_mlp import VelocityMLP
from kd.network import Network, from_linen
from kd.sampling.flow import draw_noise, euler_sample, heun_sample, time_grid
from kd.sampling.velocity import velocity_function
from kd.state import PyTree, State

BATCH, DRAWN = 256, 2_000
# Of a world that only shows that a claim runs.
SMALL = dict(width=8, depth=1, steps=8)
SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}


class ExactFlow(nn.Module):
    """`mixtures.exact_velocity` as a network without parameters."""

    mixture: Mixture
    data_scale: float

    def __call__(self, s, t, x, *, train=False):
        """Velocity [B, d] at times s [B]."""
        del train
        return mixtures.exact_velocity(self.mixture, self.data_scale)(s, t, x)


class World:
    """A ring, its exact flow, and networks of its size.

    Attributes:
      mixture: the data.
      seeds: of the runs.
      width, depth: of networks.
      scale: deviation of the noise.
      teacher: the exact flow.
      data: `input`, 50,000 examples.
      noise: of all samples, [DRAWN, 2].
      solver_steps: of the solution that students are compared with.
    """

    def __init__(
        self,
        seeds: np.ndarray,
        *,
        width: int = 128,
        depth: int = 3,
        steps: int = 300,
        scale: float = 0.5,
    ):
        self.mixture, self.scale = mixtures.ring(6, 2 * scale, 0.2 * scale), scale
        self.seeds = np.asarray(seeds)
        self.width, self.depth, self.solver_steps = width, depth, steps
        self.teacher = from_linen(ExactFlow(self.mixture, scale), *velocity_inputs(SPEC))
        self.data = {'input': self.drawn(50_000, 0)}
        self.noise = draw_noise(jax.random.key(1), DRAWN, (2,), scale=scale)

    def drawn(self, n: int, seed: int) -> np.ndarray:
        """Examples, [n, 2]."""
        return self.mixture.draw(np.random.default_rng(seed), n)[0].astype(np.float32)

    def network(self, modes: int = 0) -> Network:
        """A velocity network, or one of so many momenta."""
        size: dict[str, Any] = dict(
            width=self.width,
            depth=self.depth,
            data_scale=self.scale,
            frequencies=(0.5 / self.scale,),
        )
        module = MomentumMLP(**size, modes=modes) if modes else VelocityMLP(**size)
        return from_linen(module, *velocity_inputs(SPEC))

    def context(self, network: Network, lr: float, steps: int, **more: Any) -> Context:
        """Of a stage that distils the exact flow, by Adam with a cosine, from references.start."""
        return seeds_lib.context(
            network=network,
            teacher=self.teacher,
            references={'start': self.network()} if more.pop('starts', False) else None,
            spec=SPEC,
            steps=steps,
            optimizer=dict(name='adam', lr=lr, schedule='cosine'),
            **more,
        )

    def flows(self, steps: int) -> PyTree:
        """Parameters [R, ...] of networks that have learnt the flow from data."""
        context = self.context(self.network(), 1e-3, steps)
        return self.train(flow_matching(context), steps).params['network']

    def train(
        self, method: Method, steps: int, average: float = 0.0, started: PyTree = None
    ) -> State:
        """Runs of a method, from these parameters [R, ...] where given; an average is `slow`."""
        method = with_ema(method, {'slow': average}) if average else method
        return seeds_lib.train(
            method,
            self.data,
            self.seeds,
            steps=steps,
            batch_size=BATCH,
            frozen={'teacher': {}},
            frozen_per_run=None if started is None else {'start': {'params': started}},
        )

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """The exact flow from the noise, [solver_steps + 1, DRAWN, 2]."""
        field = velocity_function(self.teacher, {})
        grid = time_grid(self.solver_steps)
        solve = jax.jit(lambda x: heun_sample(field, x, grid, trajectory=True))
        return np.asarray(solve(self.noise))

    def ends(self, params: PyTree, steps: int) -> np.ndarray:
        """Samples [R, DRAWN, 2] by Euler steps of the diagonal of velocity networks."""
        grid = time_grid(steps)
        return self.samples(self.network(), params, lambda v, x: euler_sample(v, x, grid))

    def samples(
        self, network: Network, params: PyTree, draw: Callable[[VelocityFunction, Any], jax.Array]
    ) -> np.ndarray:
        """[R, ...], `draw(vfn, noise)` of each run."""

        @jax.jit
        @jax.vmap
        def drawn(params):
            return draw(velocity_function(network, {'params': params}), self.noise)

        return np.asarray(drawn(params))

    def apart(self, points: np.ndarray, time: float = 1.0) -> Mapping[str, list[float]]:
        """How far points [R, DRAWN, 2] are from the flow at a time: its RMSE and the median."""
        exact = self.paths[round(time * self.solver_steps)]
        away = np.linalg.norm(np.asarray(points, float) - exact, axis=-1) / self.scale
        return {
            'rmse': np.sqrt(np.mean(away**2 / 2, axis=1)).tolist(),
            'median': np.median(away, axis=1).tolist(),
        }

    def energy(self, points: np.ndarray) -> list[float]:
        """Energy distance of points [R, n, 2] to as many examples."""
        real = self.drawn(points.shape[1], 2) / self.scale
        return [distribution.energy_distance(real, x / self.scale) for x in points]

    def off_modes(self, points: np.ndarray) -> list[float]:
        """Share of points that lie on no mode."""
        radius = 3 * self.mixture.deviation
        return [1 - fidelity.modes(x, self.mixture.means, radius).hit for x in points]
