"""Generators of few steps, and what they are asked while they are trained."""

from __future__ import annotations

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
from kd.sampling.denoiser import Condition, Denoiser
from kd.state import PyTree


class Rollout(NamedTuple):
    """What one call with gradient came from, and what it said.

    Attributes:
      input: what the generator was asked about, [B, ...], a constant.
      time: [B].
      x: what it said, [B, ...], with gradient.
    """

    input: jax.Array
    time: jax.Array
    x: jax.Array


class Generator(NamedTuple):
    """A denoiser that is asked at few times.

    Attributes:
      denoiser: of its network.
      times: decreasing; one for a generator of one step.
      step: from one time to the next.
      exits: `exits(key, B) -> int32` [] or [B], which of the times a rollout ends at; None for one
        of all, drawn for the whole batch.
    """

    denoiser: Denoiser
    times: tuple[float, ...]
    step: diffusion.Step = diffusion.restart()
    exits: Callable[[jax.Array, int], jax.Array] | None = None

    def sample(self, variables: PyTree, condition: Condition, key: jax.Array, shape) -> jax.Array:
        """Samples of a shape [B, ...], by all steps."""
        noise_key, key = jax.random.split(key)
        path = self.denoiser.schedule
        z = diffusion.noise(path, noise_key, shape, self.times[0])
        return diffusion.sample(
            path, self.denoiser.bind(variables, condition), z, self.times, key, step=self.step
        )

    def rollout(
        self,
        variables: PyTree,
        condition: Condition,
        key: jax.Array,
        shape,
        train: bool,
        frozen: Mapping[str, PyTree],
    ) -> Rollout:
        """Its state at one of its times, and what it says there.

        Args:
          variables: of the generator.
          condition: of the samples.
          key: of the noise and the time.
          shape: [B, ...].
          train: whether the call with gradient is in training mode.
          frozen: variables of other networks, for generators that need them.
        """
        del frozen
        path, first = self.denoiser.schedule, self.times[0]
        return asked(
            self,
            variables,
            condition,
            key,
            train,
            lambda key: diffusion.noise(path, key, shape, first),
        )


def asked(
    own: Generator,
    variables: PyTree,
    condition: Condition,
    key: jax.Array,
    train: bool,
    begin: Callable[[jax.Array], jax.Array],
) -> Rollout:
    """`rollout` of a generator whose first state is `begin(key)`, [B, ...], with a drawn exit.

    Args:
      own, variables, condition, key, train: as of `Generator.rollout`.
      begin: see above.
    """
    noise_key, exit_key, key, dropout = jax.random.split(key, 4)
    z = begin(noise_key)
    if own.exits is None:
        exit = jax.random.randint(exit_key, (), 0, len(own.times))
    else:
        exit = own.exits(exit_key, len(z))

    def call(x, t):
        return own.denoiser.apply(variables, x, t, condition, train=train, key=dropout).x0

    return rollout(
        own.denoiser.schedule,
        own.denoiser.bind(variables, condition),
        own.times,
        z,
        key,
        exit,
        step=own.step,
        call=call,
    )


def of_network(
    network: Network,
    times: Sequence[float],
    step: str = 'restart',
    trained_by: Mapping[str, Any] | None = None,
    *,
    where: str,
) -> Generator:
    """A network that is asked at these times.

    Args:
      network: see `kd.sampling.denoiser.of_network`, as `trained_by`.
      times: decreasing.
      step: from one to the next, a name of `kd.sampling.diffusion.STEPS`.
      trained_by: block of the method that trained what it began as.
      where: place in the config, for messages.

    Raises:
      UserError: times that do not decrease, or that its schedule does not have.
    """
    own = denoisers.of_network(network, trained_by)
    if not len(times) or np.any(np.diff(times) >= 0):
        raise UserError(f'{where}.times must decrease, got {tuple(times)}.')
    if times[0] > own.schedule.high or times[-1] < own.schedule.low:
        raise UserError(
            f"{where}.times={tuple(times)} leaves the times of the schedule '{own.schedule.name}', "
            f'{own.schedule.low:g} to {own.schedule.high:g}.'
        )
    return Generator(own, tuple(map(float, times)), diffusion.STEPS[step]())


def of_block(
    network: Network, block: Mapping[str, Any], trained_by: Mapping[str, Any], *, where: str
) -> Generator:
    """What a method has trained, by the `times` and the `step` of its block.

    Raises:
      UserError: as of `of_network`; one phase of several, which makes no samples alone.
    """
    if block.get('end') or block.get('before'):
        raise UserError(
            f'{where}: this is one phase of a generator of several, and makes no samples alone.'
        )
    return of_network(
        network, block['times'], block.get('step', 'restart'), trained_by, where=where
    )


def rollout(
    schedule: Schedule,
    denoise: diffusion.Denoise,
    times: Sequence[float],
    z: jax.Array,
    key: jax.Array,
    exit: jax.Array,
    *,
    step: diffusion.Step | None = None,
    call: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Rollout:
    """Runs a generator without gradient to one of its times, and asks it there with gradient.

    One program for all exits, and as many calls as an exit needs: a loop of a length that is known
    when it runs, and the one call after it.

    Args:
      schedule: of the generator.
      denoise: the generator, `(x_t, t [B]) -> x0`.
      times: its own, [N], decreasing.
      z: noise at the first time, [B, ...].
      key: of fresh noise.
      exit: int32, one for the batch, or one for each example, [B], which takes the calls that the
        latest of them needs; 0 asks at z itself.
      step: `restart()` if None.
      call: the generator of the one call with gradient, where it is not `denoise`.

    Source: DMD2, arXiv:2405.14867, section 4.5.
    """
    step = step or diffusion.restart()
    grid = jnp.asarray(times, jnp.promote_types(z.dtype, jnp.float32))

    def body(i, x):
        moved, _ = step.move(
            schedule, denoise, x, grid[i], grid[i + 1], jax.random.fold_in(key, i), ()
        )
        if jnp.ndim(exit):
            moved = jnp.where(jnp.reshape(i < exit, (-1,) + (1,) * (x.ndim - 1)), moved, x)
        return moved.astype(x.dtype)

    # Its length is not known before, so there is no gradient through it.
    x = z if len(times) == 1 else jax.lax.fori_loop(0, jnp.max(exit), body, z)
    x = jax.lax.stop_gradient(x)
    time = jnp.broadcast_to(grid[exit], x.shape[:1])
    return Rollout(x, time, (call or denoise)(x, time))
