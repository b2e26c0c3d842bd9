"""Denoisers as functions, whatever network is behind them, and their guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.errors import UserError
from kd.losses.interpolant import get_interpolant
from kd.losses.schedule import Schedule, of_interpolant
from kd.network import Network
from kd.sampling.velocity import NULL, noise_scale, num_classes
from kd.state import PyTree

# Fields of a batch by name; {} for none.
Condition = Mapping[str, jax.Array]


# The field of a network that is told the scale of its guidance.
GUIDANCE = 'guidance'


class Prediction(NamedTuple):
    """What a denoiser says.

    Attributes:
      x0: [B, ...], E[x0 | x_t], float32 at least.
      features: that were asked for, by name.
      share: [B, ...], where that was asked for: see `kd.sampling.guided.posterior`.
    """

    x0: jax.Array
    features: dict[str, jax.Array]
    share: jax.Array | None = None


class Denoiser(NamedTuple):
    """E[x0 | x_t].

    Attributes:
      schedule: of the noise.
      apply: `apply(variables, x_t, t, condition, *, train=False, key=None, capture=()) ->
        Prediction` of x_t [B, ...], t [B] and fields [B, ...] of the condition; of a network of
        such `variance` with `variances=True` it has the `share`.
      null: the condition that is none, a row of each field; None where there is none.
      told: whether it takes the scale of its guidance, as the field `GUIDANCE` of the condition.
    """

    schedule: Schedule
    apply: Callable[..., Prediction]
    null: Mapping[str, ArrayLike] | None = None
    told: bool = False

    def bind(
        self, variables: PyTree, condition: Condition | None = None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(x_t, t) -> x0`, for samplers; t is [B] or a scalar."""

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            times = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
            return self.apply(variables, x, times, condition or {}).x0

        return denoise


def of_network(network: Network, trained_by: Mapping[str, Any] | None = None) -> Denoiser:
    """The denoiser of a network of `kd.models.denoiser`, or of a flow.

    Args:
      network: either.
      trained_by: block of the method that trained a flow, which names its path and noise.

    Raises:
      UserError: a network that is neither.
    """
    module: Any = network.module
    if getattr(module, 'causal', 0) and len(network.inputs) == 3:
        raise UserError(
            f'{type(module).__name__} makes videos frame by frame, and denoises none as a whole: '
            'take a method, a probe and a teacher of videos (kd.methods.diffusion.asd_video).'
        )
    classes = num_classes(network)
    null = None if classes is None else {'label': classes}
    if isinstance(getattr(module, 'schedule', None), Schedule):

        def apply(variables, x, t, condition, *, train=False, key=None, capture=(), **how):
            own = {name: x for name, x in condition.items() if not name.startswith(NULL)}
            said = network.apply(
                variables, t, x, train=train, key=key, capture=capture, **own, **how
            )
            if not how.get('variances'):
                return Prediction(said.logits, said.features)
            x0, share = jnp.split(said.logits, 2, axis=-1)
            return Prediction(x0, said.features, share)

        told = GUIDANCE in getattr(module, 'conditions', ())
        return Denoiser(module.schedule, apply, null, told)
    if len(network.inputs) != 3:
        raise UserError(
            f'{type(module).__name__} is no denoiser: wrap it in kd.models.denoiser.denoiser, or '
            'take a velocity network v(s, t, x).'
        )
    block = trained_by or {}
    path = get_interpolant(block.get('interpolant', 'linear'))
    schedule = of_interpolant(path.name, noise_scale(network, block.get('noise_scale')))

    def apply_flow(variables, x, t, condition, *, train=False, key=None, capture=()):
        own = schedule.condition(t)
        said = network.apply(
            variables, own, own, x, train=train, key=key, capture=capture, **condition
        )
        return Prediction(path.to_data(own, x, said.logits), said.features)

    return Denoiser(schedule, apply_flow, null)


def conditions(network: Network, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a batch that a network is conditioned on, and those of a null condition.

    Raises:
      UserError: the data lack one.
    """
    own = () if num_classes(network) is None else ('label',)
    named = tuple(getattr(network.module, 'conditions', own))
    if missing := [name for name in named if name not in batch]:
        raise UserError(
            f'the network is conditioned on {missing[0]!r}, which the data do not have; they have '
            f'{sorted(batch)}.'
        )
    nulls = (f'{NULL}{name}' for name in named)
    return {name: batch[name] for name in (*named, *nulls) if name in batch}


def branches(
    denoiser: Denoiser,
    variables: PyTree,
    x: jax.Array,
    t: jax.Array,
    given: Sequence[Condition],
) -> tuple[jax.Array, ...]:
    """E[x0 | x_t] under several conditions, in one call on so many times the rows."""
    count = len(given)
    stacked = {name: jnp.concatenate([one[name] for one in given]) for name in given[0]}
    wide = jnp.concatenate([x] * count), jnp.concatenate([t] * count)
    return tuple(jnp.split(denoiser.apply(variables, *wide, stacked).x0, count))


def without(denoiser: Denoiser, condition: Condition) -> dict[str, jax.Array]:
    """The null condition, for as many rows.

    It is the denoiser's own, or stands beside the condition: 'null_text' for 'text'; the fields of
    a condition without one, sizes for example, stay.

    Raises:
      UserError: there is none.
    """
    beside = {name[len(NULL) :]: x for name, x in condition.items() if name.startswith(NULL)}
    null = denoiser.null or beside
    if not null:
        raise UserError(
            'guidance compares with a network that is told nothing, and this one has no null '
            'condition; give it num_classes, data with the embedding of an empty text beside, or '
            'guidance=1.'
        )
    return {
        name: jnp.broadcast_to(jnp.asarray(null.get(name, x), x.dtype), x.shape)
        for name, x in condition.items()
    }


def dropped(denoiser: Denoiser, key: jax.Array, condition: Condition, share: float) -> Condition:
    """The condition, left out for a share of the examples, which are drawn one by one."""
    if not share or not condition:
        return condition
    null = without(denoiser, condition)
    rows = len(next(iter(condition.values())))
    drops = jax.random.bernoulli(key, share, (rows,))

    def chosen(name: str) -> jax.Array:
        where = drops.reshape(drops.shape + (1,) * (condition[name].ndim - 1))
        return jnp.where(where, null[name], condition[name])

    return {name: chosen(name) for name in condition}


def guided(denoiser: Denoiser, scale: ArrayLike) -> Denoiser:
    """Classifier-free guidance, mu_u + scale (mu_c - mu_u), in one call on twice the rows.

    1 is the conditional denoiser, 0 the unconditional one. In x0 it is what it is in any other kind
    of prediction, see `kd.losses.schedule.convert`. Where a source writes c + s (c - u), scale is
    1 + s. A denoiser that is told its guidance is asked once.

    Args:
      denoiser: to be guided; with 1 it is returned as it is.
      scale: a number, or [B].

    Source: Ho and Salimans 2022, arXiv:2207.12598.
    """
    if isinstance(scale, int | float) and scale == 1:
        return denoiser
    if denoiser.told:

        def apply_told(variables, x, t, condition, **how):
            weight = jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape[:1])
            return denoiser.apply(variables, x, t, {**condition, GUIDANCE: weight}, **how)

        return denoiser._replace(apply=apply_told, told=False)

    def apply(variables, x, t, condition, *, train=False, key=None, capture=()):
        if train or capture:
            raise ValueError('guided: a guided denoiser is not trained and has no features.')
        del key
        given = (condition, without(denoiser, condition))
        told, untold = branches(denoiser, variables, x, t, given)
        weight = jnp.broadcast_to(jnp.asarray(scale, told.dtype), x.shape[:1])
        weight = weight.reshape(weight.shape + (1,) * (x.ndim - 1))
        return Prediction(untold + weight * (told - untold), {})

    return denoiser._replace(apply=apply)
