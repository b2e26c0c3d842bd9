"""TAD-SR: a network that restores pictures in many steps, distilled into one (arXiv 2408.07476).

The teacher is a diffusion of residuals (ResShift, see `kd.losses.schedule.residual_shift`): a stage
of `kd.methods.diffusion.denoising.denoising`. Its solutions are the samples that
`kd.methods.sampled.trajectories` makes of it with keep='ends'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data import sampled
from kd.errors import UserError
from kd.losses import adversarial as adversarial_lib
from kd.losses import score_distillation
from kd.losses.schedule import Schedule, convert
from kd.method import Batch, Method, Objective, Player, alternate, with_collect
from kd.methods import start
from kd.methods.flow.common import mean_square
from kd.metrics import mean
from kd.models.discriminator import TimeAwareHeads
from kd.network import feature_names, feature_shape
from kd.ranges import NonNegative, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as times_lib
from kd.sampling.denoiser import Condition, Denoiser
from kd.state import NETWORK, PyTree, State

DISCRIMINATOR = 'discriminator'


def tad_sr(
    context: Context,
    *,
    reg: NonNegative = 1.0,
    hsd: NonNegative = 1.0,
    score: Literal['hsd', 'sds'] = 'hsd',
    times: tuple[Size, ...] = (0, 1, 2),
    adversarial: NonNegative = 0.02,
    features: tuple[str, ...] = (),
    optimizer: Mapping[str, Any] | None = None,
    unroll: bool = False,
) -> Method:
    """One step r = f(z, T - 1), from noise z and what the teacher's T steps make of the same, s.

        loss = reg mean (r - s)^2 + hsd mean r sg[g] - adversarial mean D(r + noise)
        g = eps(r_t) - eps(s_t), t of `times`, one noise;       loss of D: hinge

    and D, `kd.models.discriminator.TimeAwareHeads` on features of the frozen teacher, sees examples
    of the data and the student's with one noise at one time, the last excepted. D moves first. Each
    loss is logged but g's, which says nothing: `gap` is mean |g|.

    Where the batch has no `sample` the teacher is solved in the step, from the batch's `noise` or a
    fresh one: T calls more.

    Args:
      context: the stage; network and teacher are denoisers of one schedule with integer times, and
        `references.start` is where the student begins, as a rule the teacher.
      reg, hsd, adversarial: weights; 0 leaves a part out.
      score: 'sds' compares with the noise in place of eps(s_t).
      times: drawn evenly, one for an example; the paper has the three of least noise of 15.
      features: of the teacher, which D reads.
      optimizer: of D, as of a stage; None for the stage's own.
      unroll: of the loop of T calls, for convolutions on CPU.

    Raises:
      UserError: a teacher of another schedule, times or features that it does not have.
    """
    own, teacher, steps = _denoisers(context)
    path, whole = teacher.schedule, times_lib.sampling(teacher.schedule, steps)
    heads = TimeAwareHeads()
    _check(context, whole, times)
    shown = _shown(context, heads, features) if adversarial else []
    near, far = times_lib.among(times), times_lib.among(range(steps - 1))

    def condition_of(batch: Batch) -> Condition:
        return denoisers.conditions(context.network, batch)

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        if sampled.SAMPLE in batch:
            return batch
        given = batch.get(sampled.NOISE)
        z = diffusion.noise(path, key, batch['input'].shape, path.high) if given is None else given
        denoise = teacher.bind(state.frozen['teacher'], condition_of(batch))

        def solved(z: jax.Array) -> jax.Array:
            return diffusion.sample(path, denoise, z, whole, key, unroll=unroll)

        # Always so; under a condition it is rounded as in a program of its own, bit for bit.
        made = jax.lax.cond(state.step >= 0, solved, jnp.zeros_like, z)
        return {**batch, sampled.NOISE: z, sampled.SAMPLE: made}

    def restored(params: PyTree, state: State, batch: Batch, key: jax.Array) -> jax.Array:
        z = batch[sampled.NOISE]
        variables, t = state.variables(part=NETWORK, params=params), jnp.full(len(z), path.high)
        return own.apply(variables, z, t, condition_of(batch), train=True, key=key).x0

    def seen(state: State, x: jax.Array, t: jax.Array, batch: Batch) -> list[jax.Array]:
        """Features of the frozen teacher."""
        known = state.frozen['teacher']
        found = teacher.apply(known, x, t, condition_of(batch), capture=features).features
        return [found[name] for name in features]

    def discriminator_loss(params, state, batch, key):
        time_key, noise_key, dropout = jax.random.split(key, 3)
        fake = jax.lax.stop_gradient(restored(state.params[NETWORK], state, batch, dropout))
        t = far(time_key, jnp.zeros(len(fake)))
        noise = jax.random.normal(noise_key, fake.shape, fake.dtype)
        pair = [seen(state, path.mix(x, noise, t), t, batch) for x in (batch['input'], fake)]
        # Together, so that the vectors of power iteration move once.
        both = [jnp.concatenate(x) for x in zip(*pair, strict=True)]
        variables = state.variables(part=DISCRIMINATOR, params=params)
        logits, moved = heads.apply(
            variables, both, jnp.concatenate([t, t]), update=True, mutable=['batch_stats']
        )
        d_real, d_fake = jnp.split(logits, 2)
        losses = adversarial_lib.discriminator_hinge(d_real, d_fake).mean(1)
        told = mean((d_real > d_fake).astype(jnp.float32).mean(1))
        return Objective(mean(losses), {'told_apart': told}, moved)

    def student_loss(params, state, batch, key):
        time_key, noise_key, far_key, other_key, dropout = jax.random.split(key, 5)
        r, s = restored(params, state, batch, dropout), batch[sampled.SAMPLE]
        square = mean_square(r - s)
        losses, metrics = reg * square, {'regression': mean(square)}
        noise = jax.random.normal(noise_key, r.shape, r.dtype)
        if hsd:
            denoise = teacher.bind(state.frozen['teacher'], condition_of(batch))
            t = near(time_key, jnp.zeros(len(r)))
            g = gap(denoise, r, s, path, t, noise, score)
            losses += hsd * score_distillation.surrogate(r, g)
            metrics['gap'] = mean(jnp.abs(g).reshape(len(r), -1).mean(1))
        if adversarial:
            t = far(far_key, jnp.zeros(len(r)))
            x_t = path.mix(r, jax.random.normal(other_key, r.shape, r.dtype), t)
            variables = state.variables(part=DISCRIMINATOR)
            logits: Any = heads.apply(variables, seen(state, x_t, t, batch), t)
            value = adversarial_lib.generator_hinge(logits).mean(1)
            losses += adversarial * value
            metrics['adversarial'] = mean(value)
        return Objective(mean(losses), metrics)

    def init(key: jax.Array) -> dict[str, PyTree]:
        own_key, head_key = jax.random.split(key)
        made = {NETWORK: context.network.init(own_key)}
        if adversarial:
            zeros = [jnp.zeros(x.shape, x.dtype) for x in shown]
            made[DISCRIMINATOR] = heads.init(head_key, zeros, jnp.zeros(1))
        return made

    players = {NETWORK: Player(student_loss, context.tx)}
    if adversarial:
        tx = context.optimizer(**optimizer) if optimizer else context.tx
        players = {DISCRIMINATOR: Player(discriminator_loss, tx), **players}
    method = alternate(players, start.from_reference(init, context))
    return with_collect(method, collect, 'solutions')


def gap(
    denoise: diffusion.Denoise,
    x: jax.Array,
    target: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    noise: jax.Array,
    score: Literal['hsd', 'sds'] = 'hsd',
) -> jax.Array:
    """g of `tad_sr`, [B, ...], a constant; see `kd.losses.score_distillation.hsd_gap`."""
    if score == 'hsd':
        return score_distillation.hsd_gap(denoise, x, target, schedule, t, noise)
    x_t = schedule.mix(jax.lax.stop_gradient(x), noise, t)
    said = convert(schedule, denoise(x_t, t), x_t, t, 'x0', 'eps')
    return score_distillation.vsd(said, noise)


def _denoisers(context: Context) -> tuple[Denoiser, Denoiser, int]:
    """Of the student and of its teacher, and the steps of their schedule."""
    own = denoisers.of_network(context.network)
    teacher = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    steps = teacher.schedule.steps
    if own.schedule is not teacher.schedule or steps is None:
        raise UserError(
            f'{context.stage}: student and teacher are denoisers of one schedule with integer '
            f"times, and these have '{own.schedule.name}' and '{teacher.schedule.name}'; give both "
            'one block of kd.models.shifted.shifted.'
        )
    return own, teacher, steps


def _shown(context: Context, heads: TimeAwareHeads, features: tuple[str, ...]) -> list[Any]:
    """Shapes and types of the features of the teacher that heads read, for a batch of one."""
    known = feature_names(context.teacher)
    if not features or set(features) - set(known):
        raise UserError(
            f'{context.stage}.method.features={tuple(features)} must be some of the '
            f"teacher's, which are {', '.join(known)}; or set adversarial=0."
        )
    shapes = [feature_shape(context.teacher, name) for name in features]
    try:
        jax.eval_shape(heads.init, jax.random.key(0), shapes, jnp.zeros(1))
    except ValueError as error:
        raise UserError(f'{context.stage}.method.features={tuple(features)}: {error}') from None
    return shapes


def _check(context: Context, whole, times) -> None:
    steps = len(whole)
    if not times or max(times) >= steps:
        raise UserError(
            f'{context.stage}.method.times={tuple(times)} must be some of 0 .. {steps - 1}.'
        )
    for split in context.splits:
        grid = getattr(context.source(split), 'grid', None)
        if grid is not None and tuple(grid) != tuple(map(float, whole)):
            raise UserError(
                f"{context.stage}: the data's samples were made at the times {tuple(grid)}, and "
                f'the teacher has {steps} of its own; make them with steps={steps}.'
            )
