"""Optimisers and learning-rate schedules from plain arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd.callables import check_arguments
from kd.errors import UserError, did_you_mean
from kd.ranges import Count, Decay, Finite, Fraction, NonNegative, Size, check_value, held
from kd.state import path_name

SCHEDULES = ('constant', 'cosine', 'linear', 'step', 'rsqrt')
# What the arguments of optax may be, whose names are the same in all its optimisers.
_FURTHER: dict[str, Any] = {}
_FURTHER |= dict.fromkeys(('b1', 'b2', 'b3', 'decay', 'decay_rate', 'momentum'), Decay | None)
_FURTHER |= dict.fromkeys(('eps', 'eps_root', 'weight_decay_rate'), NonNegative | None)


@held
def schedule(
    name: str,
    lr: NonNegative,
    steps: Count,
    *,
    warmup_steps: Size = 0,
    end: NonNegative = 0.0,
    boundaries: tuple[Fraction, ...] = (),
    factor: NonNegative = 0.1,
    timescale: Count = 1,
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate as a function of the step.

    The following, times min((step + 1) / warmup_steps, 1), with u in [0, 1] the progress after the
    warm-up:
      constant: lr
      cosine:   end lr + (1 - end) lr (1 + cos(pi u)) / 2
      linear:   end lr + (1 - end) lr (1 - u)
      step:     lr factor^{number of boundaries <= step / steps}
      rsqrt:    lr / sqrt(max(step / timescale, 1))

    Args:
      name: one of the above.
      lr: peak learning rate.
      steps: length of training.
      warmup_steps: steps of the warm-up.
      end: final learning rate as a fraction of `lr`.
      boundaries: fractions of `steps` at which `step` drops the rate.
      factor: by how much it drops.
      timescale: steps before `rsqrt` starts to decay.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"optimizer.schedule '{name}' is unknown.{did_you_mean(name, SCHEDULES)} "
            f'Schedules: {", ".join(SCHEDULES)}.'
        )

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
        if name == 'cosine':
            decay = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif name == 'linear':
            decay = end + (1 - end) * (1 - progress)
        elif name == 'step':
            passed = sum((step >= fraction * steps).astype(jnp.float32) for fraction in boundaries)
            decay = jnp.float32(factor) ** passed
        elif name == 'rsqrt':
            decay = jax.lax.rsqrt(jnp.maximum(step / timescale, 1.0))
        else:
            decay = jnp.float32(1.0)
        warm = jnp.minimum((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        return lr * decay * warm

    return rate


@held
def optimizer(
    steps: Count,
    *,
    name: str = 'adamw',
    lr: NonNegative,
    schedule: str = 'constant',
    schedule_args: dict[str, Any] | None = None,
    warmup_steps: Size = 0,
    weight_decay: NonNegative = 0.0,
    clip_norm: NonNegative = 0.0,
    scale: Sequence[tuple[str, NonNegative | tuple[NonNegative, ...]]] = (),
    updates: Count = 1,
    **arguments: Any,
) -> optax.GradientTransformation:
    """An optax optimiser with clipping, weight decay and a schedule.

    Args:
      steps: length of training.
      name: an optimiser of optax: 'sgd', 'adam', 'adamw', 'radam', 'lion', ...
      lr: peak learning rate.
      schedule, schedule_args, warmup_steps: see `kd.training.optimizer.schedule`.
      weight_decay: applied to matrices and convolutions only, not to biases and norms; in the
        optimiser's own way where it has a `weight_decay` with a mask (decoupled in adamw, lion,
        ...), otherwise added to the gradient.
      clip_norm: global norm to which gradients are clipped; 0 for none.
      scale: (regular expression, factor) pairs; the first that is found in the path of a parameter
        ('block0/mlp/up/kernel') multiplies its update, at the end of all. With factor 0 a parameter
        keeps every bit, has no state here, and does not count in the norm. Several factors are
        those of the layers of stacked blocks. See `layer_decay`.
      updates: how many the optimiser makes in a step; the schedule goes by steps.
      **arguments: further arguments of the optax function (`momentum`, `b1`, ...).
    """
    factory = getattr(optax, name, None)
    if factory is None:
        raise UserError(f"optax has no optimiser '{name}'.{did_you_mean(name, dir(optax))}")
    options = {'warmup_steps': warmup_steps, **(schedule_args or {})}
    check_arguments(
        _schedule, options, where='optimizer.schedule_args', reserved=('name', 'lr', 'steps')
    )
    check_arguments(factory, arguments, where='optimizer', reserved=('learning_rate',))
    _check_further(arguments)
    of_step = _schedule(schedule, lr, steps, **options)
    rate = of_step if updates == 1 else lambda count: of_step(count // updates)
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    takes = inspect.signature(factory).parameters
    mask = next((m for m in ('mask', 'weight_decay_mask') if m in takes), None)
    if 'weight_decay' in takes and mask:
        arguments |= {'weight_decay': weight_decay, mask: _is_matrix}
    elif weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=_is_matrix))
    return scaled(optax.chain(*parts, factory(rate, **arguments)), scale)


_schedule = schedule


def layer_decay(
    depth: Count, rate: NonNegative, *, block: str = 'block', top: str = 'head|encoder_norm'
) -> tuple[tuple[str, float], ...]:
    """Factors for `scale` that fall with the distance from the output, as in fine-tuning.

        rate^(depth - i) for block i, 1 for the `top`, rate^(depth + 1) for all below the blocks

    Args:
      depth: number of blocks.
      rate: in (0, 1], as a rule.
      block: their name, without its number.
      top: regular expression of what lies above them.

    Source: Clark et al. 2020, arXiv:2003.10555; Bao et al. 2022, arXiv:2106.08254.
    """
    blocks = tuple((rf'(^|/){block}{i}(/|$)', rate ** (depth - i)) for i in range(depth))
    return (*blocks, (top, 1.0), ('.', rate ** (depth + 1)))


def scaled(
    tx: optax.GradientTransformation, factors: Sequence[tuple[str, float | tuple[float, ...]]]
) -> optax.GradientTransformation:
    """`tx` with its updates multiplied by factors; see `scale` of `optimizer`."""
    if not factors:
        return tx
    try:
        compiled = [(re.compile(expression), factor) for expression, factor in factors]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f'scale must be (regular expression, factor) pairs: {error}') from error

    def factor(path: tuple) -> float | tuple[float, ...]:
        name = path_name(path)
        return next((factor for expression, factor in compiled if expression.search(name)), 1.0)

    def multiplied(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: _times(factor(path), u), updates)

    tx = optax.chain(tx, optax.stateless(multiplied))
    if not all(factor for _, factor in factors):
        tx = optax.partition(
            {True: tx, False: optax.stateless(_nothing)},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: factor(path) != 0, params
            ),
        )

    def init(params: Any) -> Any:
        names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        for expression, _ in compiled:
            if not any(expression.search(name) for name in names):
                raise UserError(
                    f"scale: '{expression.pattern}' matches no parameter; there are: {names[:6]}."
                )
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _times(factor: float | tuple[float, ...], u: jax.Array) -> jax.Array:
    """An update, or each of those along its first axis, by its factor."""
    if not isinstance(factor, tuple):
        return factor * u
    return jnp.asarray(factor, u.dtype).reshape(-1, *(1,) * (u.ndim - 1)) * u


def _nothing(updates: Any, params: Any) -> Any:
    """Updates that leave every bit as it is: -0, since adding 0 turns -0 into 0."""
    del params
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)


def _check_further(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        a_number = isinstance(value, int | float) and not isinstance(value, bool)
        check_value(_FURTHER.get(name, Finite if a_number else Any), value, where=name)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)
