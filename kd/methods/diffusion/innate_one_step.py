"""GDD: a diffusion model becomes a generator of one step by a discriminator alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import adversarial
from kd.method import Batch, Method, Objective, Player, alternate
from kd.methods import start
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import GENERATOR
from kd.methods.diffusion.judge import DISCRIMINATOR, judged_by
from kd.metrics import mean
from kd.ranges import Count, NonNegative, Positive
from kd.sampling import denoiser as denoisers
from kd.state import PyTree, State, paths

PENALTY = 'r1'
# What GDD-I freezes: convolutions and projections of a UNet's blocks, resamplers among them.
CONVOLUTIONS = '(?=.*(block|up|down|in))(?=.*(conv|proj))'


def innate_one_step(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Any]],
    reads: Mapping[str, str] | None = None,
    gamma: NonNegative = 1e-4,
    lazy: Count = 16,
    freeze: str = '',
) -> Method:
    """Diffusion models are innate one-step generators (2024, arXiv:2405.20750): GDD and GDD-I.

        L_G = sum_n softplus(-D_n(G(z))),   L_D = sum_n softplus(D_n(G(z'))) + softplus(-D_n(x))

    and at every `lazy`-th step a move of D of its own along lazy gamma R1(D, x). Nothing is
    compared with a teacher: what it knows is where the generator begins, `references.start`. A step
    is a move of the generator, and one of the discriminator on samples of the moved generator.

    The released code sums L_G and L_D over a batch and takes the mean of R1; here all are means, so
    that its gamma is this one times the batch of a device. Labels do not reach the heads, and
    features of one scale are not mixed with those of another, which theirs are.

    Args:
      context: the stage; its network is a denoiser, `result='generator'`.
      times: of the generator, (80.0,) for one step of EDM.
      optimizer: of the discriminator, as of a stage. As in StyleGAN2 (arXiv:1912.04958) its rate
        and decays are those of lazy / (lazy + 1) of a move.
      heads: blocks of modules [B, ...] -> logits [B] or [B, n], by name.
      reads: {head: 'reference/feature'}, of frozen networks; a head without reads examples.
      gamma: of the penalty; 0 for none.
      lazy: steps between its moves; there is none at the first.
      freeze: regular expression of the generator's leaves that stay as they are; '' for GDD, and
        `CONVOLUTIONS` for GDD-I on a UNet.
    """
    network, shape = context.network, context.spec['input'].shape
    student = common.student(context, times)
    judge, begin = judged_by(context, heads, reads or {})

    def rolled(state: State, batch: Batch, key: jax.Array, params: PyTree = None) -> jax.Array:
        variables = state.variables(part=GENERATOR, params=params)
        condition = denoisers.conditions(network, batch)
        rows = (len(batch['input']), *shape)
        train = params is not None
        return student.rollout(variables, condition, key, rows, train, state.frozen).x

    def generator_loss(params, state, batch, key):
        logits = judge(state.params[DISCRIMINATOR], rolled(state, batch, key, params), state)
        losses = adversarial.generator_softplus(logits).sum(1)
        return Objective(mean(losses), {'adversarial': mean(losses)})

    def discriminator_loss(params, state, batch, key):
        made = jax.lax.stop_gradient(rolled(state, batch, key))
        real, fake = (judge(params, x, state) for x in (batch['input'], made))
        losses = adversarial.discriminator_softplus(real, fake).sum(1)
        told = (real > fake).astype(jnp.float32).mean(1)
        return Objective(mean(losses), {'told_apart': mean(told)})

    def penalty(params, state, batch, key):
        del key
        found = adversarial.r1(lambda x: judge(params, x, state), batch['input'])
        return Objective(mean(lazy * gamma * found), {'penalty': mean(found)})

    tx = context.optimizer(**(corrected(optimizer, lazy) if gamma else optimizer))
    players = {
        GENERATOR: Player(generator_loss, context.tx, trainable=moving(context, freeze)),
        DISCRIMINATOR: Player(discriminator_loss, tx),
    }
    if gamma:
        players[PENALTY] = Player(
            penalty, tx, of=DISCRIMINATOR, slot=DISCRIMINATOR, period=lazy, offset=lazy
        )

    def init(key: jax.Array) -> PyTree:
        own, head = jax.random.split(key)
        return {GENERATOR: network.init(own), DISCRIMINATOR: {'params': begin(head)}}

    begun = start.from_reference(
        init, context, transform=start.to_parts(**{GENERATOR: start.whole})
    )
    return alternate(players, begun)


def corrected(optimizer: Mapping[str, Any], lazy: int) -> dict[str, Any]:
    """The block of an optimiser that moves lazy + 1 times where others move `lazy` times.

    Its rate times c and its decays to the power of c = lazy / (lazy + 1).
    """
    share = lazy / (lazy + 1)
    decays = {name: optimizer[name] ** share for name in ('b1', 'b2') if name in optimizer}
    return {**optimizer, 'lr': optimizer['lr'] * share, **decays}


def moving(context: Context, freeze: str) -> Callable[[str], bool] | None:
    """Which leaves of the generator move: all that `freeze` is not found in.

    Raises:
      UserError: a regular expression that is none, or that is found nowhere.
    """
    if not freeze:
        return None
    try:
        expression = re.compile(freeze)
    except re.error as error:
        raise UserError(
            f"{context.stage}.method.freeze='{freeze}' is no regular expression: {error}."
        ) from error
    own = paths(jax.eval_shape(context.network.init, jax.random.key(0))['params'])
    if not any(expression.search(path) for path in own):
        raise UserError(
            f"{context.stage}.method.freeze='{freeze}' is found in no leaf of the network; there "
            f'are {sorted(own)[:6]}.'
        )
    return lambda path: expression.search(path) is None
