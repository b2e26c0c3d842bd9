"""Latent Shadows: consistency distillation of masked diffusion (2026, arXiv:2602.00792).

The masks of two times are made of one draw, so that what the student sees at the later time the
teacher sees at the earlier one, and more: a path without a solver of differential equations. The
student learns to say at once what the teacher says a step of the path later, and becomes the
teacher of a step twice as long.

The paper's own code was not to be had: what it leaves open is as in its closest relatives (MDLM,
Duo), and marked as reconstructed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.losses import masked_diffusion as losses
from kd.losses import signal
from kd.losses.masked_diffusion import ScheduleName
from kd.method import Method, Objective, minimize, with_collect, with_ema
from kd.methods import start
from kd.methods.discrete import common
from kd.methods.lm.common import TOKEN_WEIGHT, said_by, token_losses
from kd.metrics import mean, scalar
from kd.ranges import Count, Fraction, Positive, Size

# Name of the teacher, the student of the round before, in `state.ema`.
TEACHER = 'teacher'


class Pace(NamedTuple):
    """How far the teacher is ahead: `delta` doubles with every round of so many steps, up to 1, and
    its `temperature` goes along a line over all of them (reconstructed)."""

    delta: float
    round_steps: int
    temperature: tuple[float, float]
    steps: int

    def gap(self, step: jax.Array) -> jax.Array:
        """t - s at a step."""
        doubled = self.delta * 2.0 ** (step // self.round_steps)
        return jnp.minimum(jnp.float32(doubled), 1.0)

    def tau(self, step: jax.Array) -> jax.Array:
        """The teacher's temperature at a step."""
        first, last = self.temperature
        return first + (last - first) * jnp.float32(step) / max(self.steps - 1, 1)


def latent_shadows(
    context: Context,
    *,
    delta: Fraction = 1 / 512,
    round_steps: Count = 10_000,
    temperature: tuple[Positive, Positive] = (0.96, 0.75),
    coupling: Literal['coupled', 'independent'] = 'coupled',
    schedule: ScheduleName = 'log_linear',
    mask: Size | None = None,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Masked consistency distillation.

        t ~ U[delta, 1],  s = t - delta,  z_s and z_t of one uniform a symbol
        loss = mean over i hidden in z_t of KL(q_i || p_i(. | z_t))

    with q of `kd.losses.masked_diffusion.consistency`, averaged over the rows of the batch. The
    teacher, `state.ema['teacher']`, begins as the student and becomes it again after every round.

    Args:
      context: the stage; needs a network that is not causal, and an optimiser. Starts from
        `references.start`, the masked diffusion model that is distilled.
      delta: t - s of the first round.
      round_steps: steps of a round, after which delta doubles.
      temperature: tau of the teacher at the first and at the last step; (1, 1) for no sharpening,
        which lowers the entropy of samples.
      coupling: 'independent' hides anew at s, as a control: the teacher then lacks symbols that the
        student sees.
      schedule, mask, chunk, micro_batches: as of
        `kd.methods.discrete.masked_diffusion.masked_diffusion`.

    Raises:
      UserError: a network that has no mask or is causal, or a start of another schedule.
    """
    common.check_start(context, schedule)
    network, noise = context.network, common.noise(context, schedule, mask)
    pace = Pace(delta, round_steps, (temperature[0], temperature[1]), context.steps)

    def collect(state, batch, key):
        times, coins, others = jax.random.split(key, 3)
        gap = pace.gap(state.step)
        t = losses.stratified(times, len(batch['input']), gap)
        uniform = jax.random.uniform(coins, batch['input'].shape)
        earlier = uniform
        if coupling == 'independent':
            earlier = jax.random.uniform(others, uniform.shape)
        later, before = noise(batch, uniform, t), noise(batch, earlier, jnp.maximum(t - gap, 0.0))
        hidden = later['response_mask']
        return {
            **later,
            'teacher_input': before['input'],
            'shown': before['input'] != noise.mask,
            TOKEN_WEIGHT: common.share(hidden.astype(jnp.float32), hidden),
        }

    def loss(params, state, batch, key) -> Objective:
        tau = pace.tau(state.step)

        def of_token(logits, teacher, labels, weight, shown):
            where = losses.outcomes(logits.shape[-1], noise.mask)
            said = signal.all_logits('latent_shadows', teacher)
            found = losses.consistency(logits, said, labels, shown, temperature=tau, where=where)
            return weight * found, {'consistency': found}

        earlier = {**batch, 'input': batch['teacher_input']}
        found = token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=said_by(network, state.variables(TEACHER), earlier),
            per_token=(batch[TOKEN_WEIGHT], batch['shown']), key=key, chunk=chunk,
        )  # fmt: skip
        metrics = {
            **found.metrics,
            'agreement': mean(batch['shown'], found.where),
            'delta': scalar(pace.gap(state.step)),
            'temperature': scalar(tau),
        }
        return Objective(mean(found.sums), metrics, found.mutables)

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    method = with_collect(method, collect)
    return with_ema(method, {TEACHER: {'decay': 0.0, 'every': round_steps}})
