"""A discriminator of clean examples: heads on these, and on what frozen networks see in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import adversarial
from kd.method import Objective, Player
from kd.methods.diffusion.critic import GENERATOR
from kd.methods.diffusion.distribution_matching import Term
from kd.metrics import mean
from kd.network import feature_names
from kd.state import PyTree, State

# Its part of the state, which holds parameters of the heads.
DISCRIMINATOR = 'discriminator'

# (params of the heads, x [B, ...], state) -> logits [B, n]
Judge = Callable[[PyTree, jax.Array, State], jax.Array]


class Adversary(NamedTuple):
    """A discriminator beside the critic, by its heads, their beginning, optimiser and weight."""

    judge: Judge
    init: Callable[[jax.Array], PyTree]
    tx: optax.GradientTransformation
    weight: float


def judged_by(
    context: Context, heads: Mapping[str, Mapping[str, Any]], reads: Mapping[str, str]
) -> tuple[Judge, Callable[[jax.Array], PyTree]]:
    """Heads on examples and on features of frozen references: (judge, key -> their parameters).

    Args:
      context: the stage.
      heads: blocks of modules [B, ...] -> logits [B] or [B, n], by name.
      reads: {head: 'reference/feature'}, of frozen networks; a head without reads examples.

    Raises:
      UserError: a head, a reference or a feature that there is none of.
    """
    modules = {
        name: config_lib.build(block, where=f'{context.stage}.method.heads.{name}')
        for name, block in heads.items()
    }
    wanted: dict[str, tuple[str, ...]] = {}
    for name, place in reads.items():
        reference, _, feature = place.partition('/')
        known = context.references.get(reference)
        if name not in modules or known is None or feature not in feature_names(known):
            raise UserError(
                f"{context.stage}.method.reads.{name}='{place}' wants a head of that name and "
                f"'reference/feature'; heads are {sorted(modules)}, references "
                + ', '.join(f'{k} with {feature_names(v)}' for k, v in context.references.items())
                + '.'
            )
        wanted[reference] = (*wanted.get(reference, ()), feature)

    def seen(x: jax.Array, variables: Callable[[str], PyTree]) -> dict[str, jax.Array]:
        found = {
            reference: context.references[reference]
            .apply(variables(reference), x, capture=features)
            .features
            for reference, features in wanted.items()
        }
        places = {name: place.partition('/') for name, place in reads.items()}
        return {
            name: found[places[name][0]][places[name][2]] if name in places else x
            for name in modules
        }

    def judge(params: PyTree, x: jax.Array, state: State) -> jax.Array:
        inputs = seen(x, lambda reference: state.frozen[reference])
        logits: list[Any] = [
            module.apply({'params': params[name]}, inputs[name]) for name, module in modules.items()
        ]
        return jnp.concatenate([each.reshape(len(x), -1) for each in logits], axis=1)

    def begin(key: jax.Array) -> PyTree:
        example = context.spec['input']
        x = jnp.zeros((1, *example.shape), example.dtype)
        shapes = jax.eval_shape(
            lambda: seen(x, lambda reference: context.references[reference].init(key))
        )
        keys = jax.random.split(key, len(modules))
        return {
            name: module.init(k, jnp.zeros(shapes[name].shape, shapes[name].dtype))['params']
            for k, (name, module) in zip(keys, modules.items(), strict=True)
        }

    return judge, begin


def fooled(adversary: Adversary, rows: slice) -> Term:
    """The generator's softplus(-D) of some examples, as a mean over these; 0 for the others."""

    def loss(views, batch, key):
        del batch, key
        logits = adversary.judge(views.state.params[DISCRIMINATOR], views.x[rows], views.state)
        value = adversarial.generator_softplus(logits).mean(1)
        whole = jnp.zeros(len(views.x), value.dtype)
        return whole.at[rows].set(value * (len(whole) / len(value)))

    return Term('adversarial', adversary.weight, loss)


def telling(adversary: Adversary, rows: slice) -> Player:
    """The discriminator's player: some of the data, and as many of the generator's samples."""

    def loss(params, state, batch, key):
        del key
        pair = (batch['input'][rows], batch[f'out/{GENERATOR}']['x'][rows])
        real, fake = (adversary.judge(params, x, state) for x in pair)
        losses = adversarial.discriminator_softplus(real, fake).mean(1)
        told = (real > fake).astype(jnp.float32).mean(1)
        return Objective(mean(losses), {'told_apart': mean(told)})

    return Player(loss, adversary.tx)
