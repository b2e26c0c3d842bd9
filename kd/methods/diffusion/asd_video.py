"""ASD: causal generators of videos that also learn from themselves with a step more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.losses import adversarial, score_distillation
from kd.losses.schedule import Schedule
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, Player, minimize
from kd.methods import start
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import GENERATOR, TEACHER, Critic
from kd.methods.diffusion.distribution_matching import (
    Direction,
    Further,
    Term,
    distribution_matching,
)
from kd.metrics import mean
from kd.network import Network, from_linen, output_shape
from kd.ranges import Count, Finite, Fraction, NonNegative, Positive
from kd.sampling import causal
from kd.sampling import denoiser as denoisers
from kd.sampling import times as times_lib
from kd.sampling.causal import CausalGenerator
from kd.sampling.denoiser import Denoiser
from kd.sampling.times import TimeLaw
from kd.state import PyTree

DISCRIMINATOR = 'discriminator'


class Adversary(NamedTuple):
    """What tells samples of n calls from those of a call more.

    Attributes:
      network: videos [B, F, ...] -> logits [B, N], the n-th of which is of the pair n, n + 1.
      tx: its optimiser.
      law: of the times of the noise that it sees videos with.
      weight: of its loss in the generator's.
      penalty, scale: of its finite differences: penalty (D(x) - D(x + scale noise))^2.
      together: both samples of a pair have one time of noise.
      beyond: calls of the preferred samples more than n; 0 is a control, with nothing to be told.
    """

    network: Network
    tx: optax.GradientTransformation
    law: TimeLaw
    weight: float
    penalty: float = 600.0
    scale: float = 0.05
    together: bool = False
    beyond: int = 1


def asd_video(
    context: Context,
    *,
    times: tuple[Positive, ...],
    optimizer: Mapping[str, Any],
    discriminator: Mapping[str, Any] | None = None,
    weight: NonNegative = 30.0,
    penalty: NonNegative = 600.0,
    scale: Positive = 0.05,
    together: bool = False,
    clock: Mapping[str, Any] | None = None,
    guidance: Finite = 1.0,
    updates: Count = 5,
    between: tuple[Fraction, Fraction] = (0.02, 0.98),
    critic_between: tuple[Fraction, Fraction] = (0.02, 0.98),
    denoising: Weight = 'flow',
    step: Literal['restart', 'ddim', 'ancestral'] = 'restart',
    critic: str = TEACHER,
) -> Method:
    """Towards One-step Causal Video Generation (2025, arXiv:2511.01419); with weight 0 Self-Forcing
    (2506.08009).

        L = L_DMD(G^n) + weight softplus(D^n(x^(n+1)) - D^n(x^n)),    x^n = G^n(z) + noise
        L_D = softplus(D^n(x^n) - D^n(x^(n+1))) + penalty (finite differences at both)

    G^n makes every block by n of its calls, n drawn for the batch; the sample of a call more, of
    noise of its own and without gradient, is what the generator's should be taken for. There is no
    pair for the last n. The discriminator moves once in a step, with an n of its own.

    The paper has D as heads on the frozen critic's layers; here it is a network of its own. As
    there, each sample of a pair has a time of noise of its own.

    Args:
      context: the stage; its network is causal (`kd.models.causal_video`, or a causal
        `kd.models.wan` in a denoiser), its teacher a denoiser of whole videos,
        `result='generator'`. The generator begins as `references.start`.
      times, optimizer, clock, guidance, updates, between, critic_between, step: as of
        `kd.methods.diffusion.dmd.dmd`; `optimizer` is the discriminator's too.
      discriminator: block of a network with as many logits as there are times.
      weight: 30 is the best of the paper's sweep of 0, 10, 20 and 30, according to a review.
      penalty, scale: see `Adversary`; lambda = 600 and .05 of the paper.
      together: a pair has one time of noise.
      denoising: weight of the critic's loss.
      critic: a reference that the critic begins as, for one smaller than the teacher.
    """
    where = f'{context.stage}.method'
    student = causal.generator(context.network, times, step, where=where)
    teacher = common.teacher(context)
    measure = common.clock(clock, teacher)
    law, adversary = times_lib.uniform(measure, *between), None
    if start.START not in context.references:
        raise UserError(
            f'{context.stage}: a causal generator does not begin as its teacher; train one as '
            f'references.{start.START}, by kd.methods.diffusion.asd_video.forced.'
        )
    if weight:
        network = _judge(context, discriminator, len(student.times), where)
        tx = context.optimizer(**optimizer)
        adversary = Adversary(network, tx, law, weight, penalty, scale, together)
    tracking = common.critic(
        context, optimizer, times_lib.uniform(measure, *critic_between), weight=denoising,
        updates=updates, sample='fresh', start=critic,
    )  # fmt: skip
    if critic in context.references:
        of = context.references[critic]
        tracking = tracking._replace(network=of, denoiser=denoisers.of_network(of))
    matched = common.matching(law, guidance)
    return self_distilled(context, student, teacher, tracking, matched, adversary)


def _judge(context: Context, block: Mapping[str, Any] | None, logits: int, where: str) -> Network:
    if block is None:
        raise UserError(f'{where}.discriminator is missing; give one, or weight=0.')
    module = config_lib.build(block, where=f'{where}.discriminator')
    x = context.spec['input']
    network = from_linen(module, jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
    if output_shape(network) != (1, logits):
        raise UserError(
            f'{where}.discriminator has outputs of the shape {output_shape(network)[1:]}, and '
            f'there are {logits} times: give it a logit for each.'
        )
    return network


def self_distilled(
    context: Context,
    student: CausalGenerator,
    teacher: Denoiser,
    critic: Critic,
    direction: Direction,
    adversary: Adversary | None = None,
) -> Method:
    """The method of `asd_video`, of its parts; without an adversary that of Self-Forcing."""
    given: dict[str, Any] = {}
    if adversary is not None:
        network, player = adversary.network, told_apart(adversary, student, teacher.schedule)
        given = dict(
            terms=[fooled(adversary, student, teacher.schedule)],
            further=Further(
                {DISCRIMINATOR: player}, lambda key, frozen: {DISCRIMINATOR: network.init(key)}
            ),
        )
    return distribution_matching(
        context, student=student, teacher=teacher, critic=critic, direction=direction, **given
    )


def fooled(adversary: Adversary, student: CausalGenerator, path: Schedule) -> Term:
    """softplus(D^n(x^(n+1)) - D^n(x^n)) for the generator, [B]; 0 for the last n."""

    def loss(views, batch, key):
        del batch
        roll_key, noise_key = jax.random.split(key)
        number, last = student.exit(views.level), len(student.times) - 1
        variables = views.state.variables(part=GENERATOR)
        ahead = jnp.minimum(number[0] + adversary.beyond, last)
        more = jax.lax.stop_gradient(
            student.made(variables, views.condition, roll_key, views.x.shape, ahead).x
        )
        params = views.state.params[DISCRIMINATOR]
        seen = noised(adversary, path, (views.x, more), noise_key)
        few, many = (_one(adversary, params, x, number) for x in seen)
        return jnp.where(number < last, adversarial.relativistic(few, many), 0.0)

    return Term('self_distillation', adversary.weight, loss)


def told_apart(adversary: Adversary, student: CausalGenerator, path: Schedule) -> Player:
    """softplus(D^n(x^n) - D^n(x^(n+1))) and the penalties, for the discriminator."""

    def loss(params, state, batch, key):
        keys = jax.random.split(key, 6)
        shape = batch['input'].shape
        number = jax.random.randint(keys[0], (), 0, len(student.times) - 1)
        variables, told = state.variables(part=GENERATOR), student.causal.conditions(batch)
        pair = tuple(
            jax.lax.stop_gradient(student.made(variables, told, k, shape, n).x)
            for k, n in ((keys[1], number), (keys[2], number + adversary.beyond))
        )
        numbers = jnp.full(shape[0], number)
        seen = noised(adversary, path, pair, keys[3])

        def judge(x):
            return _one(adversary, params, x, numbers)

        few, many = map(judge, seen)
        losses = adversarial.relativistic(many, few)
        for k, x in zip(keys[4:], seen, strict=True):
            losses += adversary.penalty * adversarial.finite_difference(
                judge, x, k, adversary.scale
            )
        return Objective(mean(losses), {'told_apart': mean((many > few).astype(jnp.float32))})

    return Player(loss, adversary.tx)


def _one(adversary: Adversary, params: PyTree, x: jax.Array, number: jax.Array) -> jax.Array:
    said = adversary.network.apply({'params': params}, x).logits
    return jnp.take_along_axis(said, number[:, None], axis=1)[:, 0]


def noised(
    adversary: Adversary, path: Schedule, pair: tuple[jax.Array, ...], key: jax.Array
) -> tuple[jax.Array, ...]:
    """Both of a pair with noise of their own, at times of their own unless they are together."""
    keys = jax.random.split(key, 4)
    made = []
    for x, time_key, noise_key in zip(pair, keys[:2], keys[2:], strict=True):
        t = adversary.law(keys[0] if adversary.together else time_key, jnp.zeros(len(x)))
        made.append(path.mix(x, jax.random.normal(noise_key, x.shape, x.dtype), t))
    return tuple(made)


def forced(
    context: Context,
    *,
    law: Mapping[str, Any] | None = None,
    weight: Weight = 'flow',
    micro_batches: Count = 1,
) -> Method:
    """A causal denoiser of data, told of the clean frames before each: teacher forcing.

        loss = E w(t_f) mean (mu(x_f + noise, t_f; x_1 .. x_(f-1)) - x_f)^2

    With a time and noise of their own for each frame. It stands for the regression of a teacher's
    trajectories, by which CausVid (arXiv:2412.07772) and Self-Forcing begin.

    Args:
      context: the stage; a causal network and an optimiser. Starts from `references.start`, if
        there is one.
      law: block of `kd.sampling.times` of the times; None for all of the schedule evenly.
      weight: see `kd.losses.score_distillation.denoising`.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.network
    path = causal.of_network(network, where=context.stage).schedule
    draw = times_lib.uniform(times_lib.natural(path))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.method.law')

    def loss(params, state, batch, key):
        time_key, noise_key, dropout = jax.random.split(key, 3)
        data = batch['input']
        frames = data.reshape(-1, *data.shape[2:])
        t = jnp.clip(draw(time_key, jnp.zeros(len(frames))), path.low, path.high)
        x_t = path.mix(frames, jax.random.normal(noise_key, frames.shape, frames.dtype), t)
        inputs = t.reshape(data.shape[:2]), x_t.reshape(data.shape), data
        variables = state.variables(params=params)
        said = network.apply(variables, *inputs, train=True, key=dropout).logits
        losses = score_distillation.denoising(said.reshape(frames.shape), frames, path, t, weight)
        return Objective(mean(losses))

    init = start.from_reference(network.init, context)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)
