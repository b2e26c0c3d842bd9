"""Adapter guidance distillation: one call for the two of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Batch, Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.diffusion.critic import TEACHER
from kd.metrics import mean
from kd.ranges import Count, Finite
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.sampling.denoiser import Denoiser
from kd.sampling.times import TimeLaw
from kd.state import PyTree

# Fields of a state on a trajectory, see `kd.data.sampled.states`.
FIELDS = ('time', 'target', denoisers.GUIDANCE)


def agd(
    context: Context,
    *,
    states: Literal['stored', 'noised'] = 'stored',
    weight: Weight = 'eps',
    guidance: tuple[Finite, Finite] = (1.0, 6.0),
    law: Mapping[str, Any] | None = None,
    micro_batches: Count = 1,
) -> Method:
    """Adapters learn what guidance says of the states on its own trajectories (AGD).

        loss = E w(t) mean (mu(x_t, t, c, omega) - mu_cfg)^2,
        mu_cfg = mu_u + omega (mu_c - mu_u)

    Of stored states there is no teacher at hand: (x_t, t, c, omega, mu_cfg) are the data. Of noised
    ones x_t is an example with noise, which is the practice before AGD, and its control here.

    Args:
      context: the stage. Its network is told its guidance (`kd.models.guided`), `references.start`
        is its base; with noised states it has a teacher.
      states: see above; stored ones are those of `kd.data.sampled.states`.
      weight: see `kd.losses.score_distillation.denoising`; the paper's is 'eps'.
      guidance: range of the scale, evenly, of noised states; stored ones bring theirs.
      law: block of `kd.sampling.times`, of noised states; None for the natural clock, evenly.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: a network that is not told its guidance, data without states.

    Source: 2025, arXiv:2503.07274.
    """
    network, own = context.network, denoisers.of_network(context.network)
    if not own.told:
        raise UserError(
            f'{context.stage}.network takes no guidance; wrap it in kd.models.guided.guided.'
        )
    missing = [name for name in FIELDS if name not in context.spec]
    if states == 'stored' and missing:
        raise UserError(
            f"{context.stage}: the data have no '{missing[0]}'; name a stage of trajectories as "
            "their source (kd.data.sampled.states), or take states='noised'."
        )
    sigma_data = getattr(network.module, 'sigma_data', 0.5)

    def loss(params, state, batch, key):
        condition = denoisers.conditions(network, batch)
        said = own.apply(
            state.variables(params=params), batch['input'], batch['time'], condition,
            train=True, key=key,
        ).x0  # fmt: skip
        losses = score_distillation.denoising(
            said, batch['target'], own.schedule, batch['time'], weight, sigma_data
        )
        return Objective(mean(losses))

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    if states == 'stored':
        return method
    teacher = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    draw = times.uniform(times.natural(own.schedule))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.method.law')

    def collect(state, batch, key):
        return noised(teacher, state.frozen[TEACHER], batch, key, draw, guidance)

    return with_collect(method, collect)


def noised(
    teacher: Denoiser,
    variables: PyTree,
    batch: Batch,
    key: jax.Array,
    law: TimeLaw,
    guidance: tuple[float, float],
) -> Batch:
    """Examples with noise, as states with what the guided teacher says of them."""
    keys = jax.random.split(key, 3)
    x, rows = batch['input'], len(batch['input'])
    t, path = law(keys[0], jnp.zeros(rows)), teacher.schedule
    x_t = path.mix(x, jax.random.normal(keys[1], x.shape, x.dtype), t)
    omega = jax.random.uniform(keys[2], (rows,), minval=guidance[0], maxval=guidance[1])
    condition = {name: batch[name] for name in teacher.null or {}}
    target = denoisers.guided(teacher, omega).apply(variables, x_t, t, condition).x0
    return {**batch, 'input': x_t, 'time': t, 'guidance': omega, 'target': target}
