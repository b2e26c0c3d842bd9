"""Phased DMD: an expert for each part of the noise, one phase after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses.interpolant import expand_times
from kd.losses.schedule import convert
from kd.method import Method
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import Direction, distribution_matching
from kd.metrics import mean
from kd.ranges import Count, Finite, NonNegative, Positive
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as times_lib
from kd.sampling.denoiser import Condition, Denoiser
from kd.sampling.generator import Generator, Rollout, asked
from kd.state import PyTree


class Expert(NamedTuple):
    """A finished expert: name of its variables in `state.frozen`, and the times it is asked at."""

    name: str
    denoiser: Denoiser
    times: tuple[float, ...]


class Phase(NamedTuple):
    """The generator of a phase, behind the experts of the phases before it.

    Attributes:
      denoiser: of its network.
      times: at which it is asked, decreasing.
      end: the time at which its samples are; None for clean ones.
      before: the experts that bring a state to its first time.
    """

    denoiser: Denoiser
    times: tuple[float, ...]
    end: float | None = None
    before: Sequence[Expert] = ()

    def rollout(
        self,
        variables: PyTree,
        condition: Condition,
        key: jax.Array,
        shape,
        train: bool,
        frozen: Mapping[str, PyTree],
    ) -> Rollout:
        """As of `Generator`: a call at one of its times, and Euler's step from there to its end."""
        path, step = self.denoiser.schedule, diffusion.ddim()
        # Every expert hands over at the first time of the next one.
        ends = [expert.times[0] for expert in self.before[1:]] + [self.times[0]]

        def begin(key: jax.Array) -> jax.Array:
            first = self.before[0].times[0] if self.before else self.times[0]
            x = diffusion.noise(path, key, shape, first)
            for expert, end in zip(self.before, ends, strict=False):
                denoise = expert.denoiser.bind(frozen[expert.name], condition)
                for t, to in zip(expert.times, (*expert.times[1:], end), strict=True):
                    x, _ = step.move(path, denoise, x, jnp.float32(t), jnp.float32(to), key, ())
            return x

        own = Generator(self.denoiser, self.times, step)
        made = asked(own, variables, condition, key, train, begin)
        if self.end is None:
            return made
        # From where it was asked straight to the end, with what was said there.
        moved, _ = step.move(
            path, lambda *_: made.x, made.input, made.time, jnp.float32(self.end), key, ()
        )
        return made._replace(x=moved)


def phased_dmd(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    end: NonNegative = 0.0,
    before: tuple[tuple[str, tuple[Positive, ...]], ...] = (),
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 5,
    nested: bool = True,
    unroll: bool = False,
) -> Method:
    """One phase of Phased DMD (2025, arXiv:2510.27684); each phase is a stage.

        g = w (u_T(x_t, t) - u_fake(x_t, t)),   x_t = a x_s + b eps,   t in (s, 1),
        w = alpha_t a / (alpha_t sigma_t + sigma_t^2)

    with x_s where the phase ends, s, and u of the kind 'flow'. Generator and critic begin as the
    teacher in every phase; experts of earlier phases are references and stay as they are. A phase
    of several times draws at which of them it is asked, one of one time does not: then nothing is
    left of the random exit that makes samples alike.

    Args:
      context: the stage; `references` has the stages of the experts before.
      times: at which the phase's expert is asked, decreasing.
      optimizer, clock, guidance, updates, unroll: as of `kd.methods.diffusion.dmd.dmd`.
      end: s, where the next phase begins; 0 for the last.
      before: (name of a reference, its times), from the noisiest on.
      nested: t from s to pure noise; False for s to the first of `times`, which the paper finds
        worse.
    """
    teacher = common.teacher(context)
    own = common.student(context, times).denoiser
    experts = []
    for name, levels in before:
        if name not in context.references:
            raise UserError(
                f"{context.stage}.method.before names '{name}', and the stage's references are "
                f'{sorted(context.references)}.'
            )
        known = context.trained_by.get('teacher')
        expert = denoisers.of_network(context.references[name], known)
        experts.append(Expert(name, expert, tuple(levels)))
    base = end or None
    measure = common.clock(clock, teacher)
    low = 0.02 if base is None else float(measure.rank(jnp.float32(end)))
    high = 0.98 if nested else float(measure.rank(jnp.float32(times[0])))
    law = times_lib.uniform(measure, low, high)
    return distribution_matching(
        context,
        student=Phase(own, tuple(times), base, experts),
        teacher=teacher,
        critic=common.critic(
            context,
            optimizer,
            law,
            weight='flow',
            updates=updates,
            sample='fresh',
            unroll=unroll,
        ),
        direction=velocities(law, guidance),
        base=base,
    )


def velocities(law: times_lib.TimeLaw, guidance: float) -> Direction:
    """The direction of a phase, see `phased_dmd`."""

    def direction(views, key):
        x_t, t = views.noised(key, law)
        path, x = views.schedule, views.x
        u, fake = (
            convert(path, said, x_t, t, 'x0', 'flow')
            for said in (views.real(x_t, t, guidance), views.fake(x_t, t))
        )
        alpha, sigma = path.coefficients(t, x)
        share = alpha
        if views.base is not None:
            share = expand_times(path.bridge(jnp.full_like(t, views.base), t)[0], x)
        weight = alpha * share / (alpha * sigma + sigma**2)
        gap = jax.lax.stop_gradient(u - fake)
        return jax.lax.stop_gradient(weight) * gap, {'gap': mean(jnp.abs(gap))}

    return direction
