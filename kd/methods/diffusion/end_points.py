"""Few-step generators by regression of where a teacher's flow ends."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.diffusion import common
from kd.metrics import mean
from kd.ranges import Count, Finite, Positive
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as times_lib
from kd.sampling.diffusion import Step
from kd.sampling.generator import Generator


def end_points(
    context: Context,
    *,
    times: tuple[Positive, ...],
    guidance: Finite = 1.0,
    solver: Literal['ddim', 'heun'] = 'ddim',
    solver_steps: Count = 12,
    weight: Weight = 'x0',
    step: Literal['restart', 'ddim', 'ancestral'] = 'restart',
) -> Method:
    """The generator says at each of its times where the teacher's deterministic flow ends.

        loss = E w(t) mean (G(x_t, t) - Phi(x_t, t))^2,   t of `times`, x_t noised data

    With Phi of a guided teacher it is a guidance-distilled student, which is quick to train and
    loses modes: what diversity distillation (arXiv:2503.10637) repairs and PSO (arXiv:2410.03190)
    begins with. At the first time it is the regression of DMD (arXiv:2311.18828) with squares.

    Args:
      context: the stage; network and teacher are denoisers or flows of one schedule. Starts from
        `references.start`, if there is one.
      times: at which the generator is asked, decreasing.
      guidance: of the teacher.
      solver, solver_steps: of Phi; steps are even on the clock of the schedule.
      weight: see `kd.losses.score_distillation.denoising`.
      step: of the generator when it samples.
    """
    student, teacher = common.student(context, times, step), common.teacher(context)
    solve = solver_of(denoisers.guided(teacher, guidance), diffusion.STEPS[solver](), solver_steps)
    return regression(context, student, solve, weight)


def solver_of(teacher: denoisers.Denoiser, step: Step, steps: int):
    """`solve(variables, x_t, t [B], condition) -> x0`, from a time of each example's own."""
    path, clock = teacher.schedule, times_lib.natural(teacher.schedule)

    def solve(variables, x, t, condition):
        denoise, key = teacher.bind(variables, condition), jax.random.key(0)
        rank = clock.rank(t)

        def at(i: jax.Array | int) -> jax.Array:
            # The natural clock of integers rounds; the last time is one that has noise.
            return clock.at(rank * (1 - i / steps))

        def body(carry, i):
            x, memory = carry
            moved, memory = step.move(path, denoise, x, at(i), at(i + 1), key, memory)
            return (moved.astype(x.dtype), memory), None

        (x, _), _ = jax.lax.scan(body, (x, step.memory(x)), jnp.arange(steps - 1))
        return denoise(x, at(steps - 1)).astype(x.dtype)

    return solve


def regression(context: Context, student: Generator, solve, weight: Weight) -> Method:
    """The method, of what `solver_of` gives; `state.frozen['teacher']` has its variables."""
    network, own = context.network, student.denoiser
    law = times_lib.among(student.times)

    def collect(state, batch, key):
        time_key, noise_key = jax.random.split(key)
        data, condition = batch['input'], denoisers.conditions(network, batch)
        t = law(time_key, jnp.zeros(len(data)))
        x_t = own.schedule.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)
        end = solve(state.frozen.get('teacher', {}), x_t, t, condition)
        return {**batch, 'noised': x_t, 'time': t, 'end': end}

    def loss(params, state, batch, key):
        condition, t = denoisers.conditions(network, batch), batch['time']
        variables = state.variables(params=params)
        said = own.apply(variables, batch['noised'], t, condition, train=True, key=key).x0
        return Objective(
            mean(score_distillation.denoising(said, batch['end'], own.schedule, t, weight))
        )

    made = minimize(loss, context.tx, start.from_reference(network.init, context))
    return with_collect(made, collect, 'end_points')
