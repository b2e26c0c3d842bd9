"""Two generators one after the other: a base model lays out what a distilled one then finishes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError
from kd.sampling import diffusion
from kd.sampling.denoiser import Condition
from kd.sampling.generator import Generator
from kd.state import PyTree


def switch_index(base: Sequence[float], student: Sequence[float], switch: int) -> int:
    """m = argmin_j |base_j - student_switch|: steps of the base before the student takes over.

    With the grids of the released script it is 0: the first time of the base, 751 of 1000, is
    already the nearest to the student's second, 759, and the base is never asked.

    Args:
      base, student: times, decreasing.
      switch: index of the student's first own time.

    Source: arXiv:2503.10637, the hybrid sampler as released.
    """
    return int(np.argmin(np.abs(np.asarray(base, float) - student[switch])))


class Hybrid(NamedTuple):
    """The first steps by a base, the others by a student; no noise is added at the switch.

    Attributes:
      base, student: with their own times and steps; of one schedule.
      switch: index of the student's first own time; 0 for the student alone.
      calls: of the base; None for `switch_index`. 0 for noise at the student's own time: the steps
        before the switch are skipped.
    """

    base: Generator
    student: Generator
    switch: int = 1
    calls: int | None = None

    @property
    def steps(self) -> int:
        """Of the base."""
        if self.calls is not None:
            return self.calls
        return switch_index(self.base.times, self.student.times, self.switch)

    @property
    def first(self) -> float:
        """The time of the noise that it starts from."""
        return self.base.times[0] if self.steps else self.student.times[self.switch]

    def sample(
        self, base: PyTree, student: PyTree, condition: Condition, key: jax.Array, shape
    ) -> jax.Array:
        """Samples of a shape [B, ...], from the variables of both."""
        noise_key, key = jax.random.split(key)
        z = diffusion.noise(self.student.denoiser.schedule, noise_key, shape, self.first)
        return self.finish(base, student, condition, key, z)

    def finish(
        self, base: PyTree, student: PyTree, condition: Condition, key: jax.Array, z: jax.Array
    ) -> jax.Array:
        """What becomes of noise [B, ...] at the first time."""
        path, times = self.student.denoiser.schedule, self.student.times
        # The keys of the student alone, whoever makes a step.
        keys = jax.random.split(key, len(times))[1:]
        x, memory = z, self.base.step.memory(z)
        denoise = self.base.denoiser.bind(base, condition)
        for i, (t, to) in enumerate(itertools.pairwise(self.base.times[: self.steps + 1])):
            fresh = keys[i] if i < self.switch else jax.random.fold_in(key, i)
            x, memory = self.base.step.move(
                path, denoise, x, jnp.float32(t), jnp.float32(to), fresh, memory
            )
            x = x.astype(z.dtype)
        denoise = self.student.denoiser.bind(student, condition)
        memory = self.student.step.memory(z)
        for i, (t, to) in enumerate(itertools.pairwise(times[self.switch :]), self.switch):
            x, memory = self.student.step.move(
                path, denoise, x, jnp.float32(t), jnp.float32(to), keys[i], memory
            )
            x = x.astype(z.dtype)
        return denoise(x, jnp.float32(times[-1])).astype(z.dtype)


def hybrid(
    base: Generator, student: Generator, switch: int = 1, *, skip: bool = False, where: str
) -> Hybrid:
    """A base and a student, held to fit.

    Args:
      base, student, switch: see `Hybrid`.
      skip: the student alone, from its own time `switch` on.
      where: place in the config, for messages.

    Raises:
      UserError: no such time, or two schedules.
    """
    if not 0 <= switch < len(student.times):
        raise UserError(
            f'{where}.switch={switch}: the generator has {len(student.times)} times, the first of '
            'which is 0.'
        )
    if base.denoiser.schedule != student.denoiser.schedule:
        raise UserError(
            f'{where}: base and generator have two schedules of noise, '
            f"'{base.denoiser.schedule.name}' and '{student.denoiser.schedule.name}'."
        )
    return Hybrid(base, student, switch, 0 if skip else None)
