"""Videos made one block after the other, each told of the clean ones before it by a cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError
from kd.losses.schedule import Schedule
from kd.network import Network
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling.denoiser import NULL, Condition
from kd.sampling.generator import Rollout, rollout
from kd.state import PyTree


class Causal(NamedTuple):
    """A denoiser of blocks in their order.

    Attributes:
      schedule: of the noise of a block.
      denoise: `denoise(variables, cache, x_t [B, f, ...], t [B]) -> x0`, of the next block.
      remember: `remember(variables, cache, x [B, f, ...]) -> cache`, of a clean one that is done.
      empty: `empty(z [B, F, ...], condition) -> cache`, before the first of videos like z.
      frames: f, of a block.
      conditions: `conditions(batch) -> condition` of the fields that it is told.
    """

    schedule: Schedule
    denoise: Callable[[PyTree, Any, jax.Array, jax.Array], jax.Array]
    remember: Callable[[PyTree, Any, jax.Array], Any]
    empty: Callable[[jax.Array, Condition], Any]
    frames: int = 1
    conditions: Callable[[Mapping[str, Any]], Condition] = lambda batch: {}

    def bind(self, variables: PyTree, cache: Any) -> diffusion.Denoise:
        """`(x_t, t) -> x0` of the next block, for samplers; t is [B] or a scalar."""
        return lambda x, t: self.denoise(
            variables, cache, x, jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        )


class CausalGenerator(NamedTuple):
    """A student of `kd.methods.diffusion.distribution_matching` that makes block after block.

    Attributes:
      causal: of its network.
      times: at which it is asked of each block, decreasing.
      step: from one to the next.
    """

    causal: Causal
    times: tuple[float, ...]
    step: diffusion.Step = diffusion.restart()

    def rollout(
        self,
        variables: PyTree,
        condition: Condition,
        key: jax.Array,
        shape: tuple[int, ...],
        train: bool,
        frozen: Mapping[str, PyTree],
    ) -> Rollout:
        """Of one number of calls, drawn for the whole batch; as of `Generator.rollout`."""
        del train, frozen
        exit_key, key = jax.random.split(key)
        exit = jax.random.randint(exit_key, (), 0, len(self.times))
        return self.made(variables, condition, key, shape, exit)

    def made(
        self, variables: PyTree, condition: Condition, key: jax.Array, shape, exit: jax.Array
    ) -> Rollout:
        """Of `exit` + 1 calls for each block."""
        noise_key, key = jax.random.split(key)
        z = jax.random.normal(noise_key, shape, jnp.float32)
        return causal_rollout(
            self.causal, variables, self.times, z, key, exit, condition, step=self.step
        )

    def exit(self, time: jax.Array) -> jax.Array:
        """Which of its times each one of [B] is, int32 [B]."""
        return jnp.argmin(jnp.abs(time[:, None] - jnp.asarray(self.times, time.dtype)), axis=1)


def of_network(network: Network, *, where: str) -> Causal:
    """A network of the form of `kd.models.causal_video.CausalVideo`, or a denoiser in it such.

    Raises:
      UserError: another network.
    """
    module: Any = network.module
    if not is_causal(network):
        raise UserError(
            f'{where}: {type(module).__name__} makes no video frame by frame; take a network with '
            'a memory, such as kd.models.causal_video.causal_video or a causal kd.models.wan.'
        )

    def denoise(variables, cache, x, t):
        memory, number, told = cache
        return module.apply(variables, t, x, memory, number, method='say', **told)

    def remember(variables, cache, x):
        memory, number, told = cache
        memory = module.apply(variables, x, memory, number, method='remember', **told)
        return memory, number + 1, told

    def empty(z, condition):
        told = {name: x for name, x in condition.items() if not name.startswith(NULL)}
        return module.empty(z), jnp.int32(0), told

    conditions = functools.partial(denoisers.conditions, network)
    return Causal(module.schedule, denoise, remember, empty, module.causal, conditions)


def is_causal(network: Network) -> bool:
    """Whether a network makes videos block by block."""
    return getattr(network.module, 'causal', 0) > 0


def generator(
    network: Network, times: Sequence[float], step: str = 'restart', *, where: str
) -> CausalGenerator:
    """A network that is asked of each block at these times.

    Raises:
      UserError: a network that is not causal, or times that do not decrease.
    """
    own = of_network(network, where=where)
    if not len(times) or np.any(np.diff(times) >= 0):
        raise UserError(f'{where}.times must decrease, got {tuple(times)}.')
    return CausalGenerator(own, tuple(map(float, times)), diffusion.STEPS[step]())


def causal_rollout(
    causal: Causal,
    variables: PyTree,
    times: Sequence[float],
    z: jax.Array,
    key: jax.Array,
    exit: jax.Array,
    condition: Condition | None = None,
    *,
    step: diffusion.Step | None = None,
) -> Rollout:
    """Videos x [B, F, ...], each block by `exit` calls without gradient and one with.

    The cache is filled with what is said of a block, without gradient, so that no block learns from
    those after it; one program for all exits, which is one for all blocks (the default of
    Self-Forcing), and (exit + 1) calls of the denoiser for each.

    Args:
      causal, variables: the generator.
      times: its own, [N], decreasing.
      z: noise N(0, I), [B, F, ...].
      key: of fresh noise.
      exit: int32, 0 asks at the first time; n-step samples have exit n - 1.
      condition: of the videos.
      step: `restart()` if None.

    Source: Self-Forcing, arXiv:2506.08009, algorithm 1.
    """
    still = jax.lax.stop_gradient(variables)
    first = causal.schedule.sigma(jnp.float32(times[0]))

    def block(cache, given):
        number, noise = given
        made = rollout(
            causal.schedule,
            causal.bind(still, cache),
            times,
            first * noise,
            jax.random.fold_in(key, number),
            exit,
            step=step,
            call=causal.bind(variables, cache),
        )
        cache = causal.remember(still, cache, jax.lax.stop_gradient(made.x))
        return cache, (made.input, made.x)

    cache = causal.empty(z, condition or {})
    _, (given, x) = jax.lax.scan(block, cache, _blocks(z, causal.frames))
    time = jnp.broadcast_to(jnp.asarray(times, jnp.float32)[exit], z.shape[:1])
    return Rollout(_joined(given), time, _joined(x))


def times_of_blocks(
    times: Sequence[float], steps: int, blocks: int, *, whole: Sequence[int] = ()
) -> list[tuple[float, ...]]:
    """The first `steps` of the times for each block, and all of them for those of `whole`.

    `whole=(0,)` is first-frame enhancement: the first frame has none before it, and its errors are
    inherited by all after it; N + (F - 1) n calls (arXiv:2511.01419).
    """
    return [tuple(times) if f in whole else tuple(times[:steps]) for f in range(blocks)]


def causal_sample(
    causal: Causal,
    variables: PyTree,
    times: Sequence[Sequence[float]],
    z: jax.Array,
    key: jax.Array,
    condition: Condition | None = None,
    *,
    step: diffusion.Step | None = None,
) -> jax.Array:
    """Videos [B, F, ...], each block through times of its own: as many calls as there are times.

    Args:
      causal, variables: the generator.
      times: of each block, decreasing; each should have been trained at.
      z: noise N(0, I), [B, F, ...].
      key: of fresh noise.
      condition: of the videos.
      step: `restart()` if None.
    """
    parts = causal_said(causal, variables, times, z, key, condition, step=step)
    return jnp.concatenate([said[-1] for said in parts], axis=1)


def causal_said(
    causal: Causal,
    variables: PyTree,
    times: Sequence[Sequence[float]],
    z: jax.Array,
    key: jax.Array,
    condition: Condition | None = None,
    *,
    step: diffusion.Step | None = None,
) -> list[jax.Array]:
    """What is said of clean blocks at all times: [N, B, F', ...] for each run of equal times.

    Args:
      causal, variables, times, z, key, condition, step: as of `causal_sample`.
    """
    step = step or diffusion.restart()

    def block(grid, cache, given):
        number, noise = given
        x = causal.schedule.sigma(jnp.float32(grid[0])) * noise
        _, said = diffusion.recorded(
            causal.schedule, causal.bind(variables, cache), x, grid,
            jax.random.fold_in(key, number), step=step,
        )  # fmt: skip
        return causal.remember(variables, cache, said[-1]), said

    cache, first, parts = causal.empty(z, condition or {}), 0, []
    for grid, same in itertools.groupby(map(tuple, times)):
        count = len(list(same))
        given = jax.tree.map(lambda x: x[first : first + count], _blocks(z, causal.frames))  # noqa: B023
        cache, said = jax.lax.scan(lambda c, x: block(grid, c, x), cache, given)  # noqa: B023
        parts.append(jax.vmap(_joined, in_axes=1)(said))
        first += count
    return parts


def _blocks(z: jax.Array, frames: int) -> tuple[jax.Array, jax.Array]:
    """Numbers [F / f] and noises [F / f, B, f, ...] of the blocks, for scans."""
    z = z.reshape(len(z), -1, frames, *z.shape[2:])
    return jnp.arange(z.shape[1]), jnp.swapaxes(z, 0, 1)


def _joined(x: jax.Array) -> jax.Array:
    """Videos [B, F, ...] of blocks [F / f, B, f, ...]."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])
