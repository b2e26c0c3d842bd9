"""The loop of generators that follow a difference of denoisers (DMD2, arXiv:2405.14867).

A step is one move of the generator, and then `updates` moves of the critic:

1. the generator runs to one of its times, without gradient, and is asked there with gradient: x;
2. it moves along `direction`, which asks the teacher and the fake denoiser of the step before, and
   along further terms;
3. the critic, the fake denoiser and the discriminator on its features, learns to denoise samples of
   the generator: the x of this step at its first move, fresh ones of the moved generator after;
4. further players of a paper move.

Parts of the state: `generator`, the result, and `fake`, see `kd.methods.diffusion.critic`, and what
further players bring. The teacher is `state.frozen['teacher']`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from kd.context import Context
from kd.losses import adversarial, score_distillation
from kd.losses.interpolant import expand_times
from kd.losses.schedule import Schedule, convert
from kd.method import Batch, Method, Objective, Player, alternate
from kd.methods.diffusion import critic as critics
from kd.methods.diffusion.critic import FAKE, GENERATOR, TEACHER, Critic, Discriminator
from kd.metrics import Metrics, mean
from kd.ranges import Count, NonNegative
from kd.sampling import denoiser as denoisers
from kd.sampling.denoiser import Condition, Denoiser
from kd.sampling.generator import Rollout
from kd.sampling.times import TimeLaw
from kd.state import PyTree, State


class Student(Protocol):
    """What makes the samples: `kd.sampling.generator.Generator`, or another with its `rollout`."""

    def rollout(
        self,
        variables: PyTree,
        condition: Condition,
        key: jax.Array,
        shape: tuple[int, ...],
        train: bool,
        frozen: Mapping[str, PyTree],
    ) -> Rollout:
        """A call with gradient; see `Generator.rollout`."""


@dataclasses.dataclass(frozen=True)
class Views:
    """What may be asked about samples of the generator; nothing is computed before it is.

    Attributes:
      x: samples, [B, ...], with gradient.
      level: [B], the time at which the generator was asked.
      condition: of the samples.
      schedule: in which samples are noised.
      real: `real(x_t, t, scale=1.0) -> x0`, the teacher, guided.
      fake: `fake(x_t, t) -> x0`.
      both: `both(x_t, t) -> (x0, x0)`, the teacher with and without the condition, in one call.
      base: time at which samples are, where they are not clean.
      generator: `generator(x_t, t) -> x0`, with gradient.
      fake_both: as `both`, of the fake denoiser.
      state: before the generator moves: parameters of all parts, those of further players among
        them, as constants, and the frozen trees.
      part: `part(rows)`, the same of some of the examples; nothing is asked about the others.
    """

    x: jax.Array
    level: jax.Array
    condition: Condition
    schedule: Schedule
    real: Callable[..., jax.Array]
    fake: Callable[[jax.Array, jax.Array], jax.Array]
    both: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
    base: float | None = None
    generator: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    fake_both: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]] | None = None
    state: State | None = None
    part: Callable[[slice], Views] | None = None

    def noised(self, key: jax.Array, law: TimeLaw) -> tuple[jax.Array, jax.Array]:
        """(x_t, t [B]) with times and noise of their own for each sample, as constants."""
        time_key, noise_key = jax.random.split(key)
        t, x = law(time_key, self.level), jax.lax.stop_gradient(self.x)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        return noised(self.schedule, x, noise, t, self.base), t


def noised(
    schedule: Schedule, x: jax.Array, noise: jax.Array, t: jax.Array, base: float | None
) -> jax.Array:
    """x_t of x that is clean, or at the time `base`."""
    if base is None:
        return schedule.mix(x, noise, t)
    a, b = (expand_times(y, x) for y in schedule.bridge(jnp.full_like(t, base), t))
    return (a * x + b * noise).astype(x.dtype)


# (views, key) -> (g [B, ...], metrics)
Direction = Callable[[Views, jax.Array], tuple[jax.Array, Metrics]]


class Term(NamedTuple):
    """A further loss of the generator: `loss(views, batch, key) -> [B]`."""

    name: str
    weight: float
    loss: Callable[[Views, Batch, jax.Array], jax.Array]


class Further(NamedTuple):
    """What else moves in a step, after the critic.

    Attributes:
      players: by name, see `kd.method.Player`. Their batch has `out/generator`: the generator's
        samples `x` and the times `level` at which it was asked for them. One that moves the
        generator too, with `of='generator'`, has moments of its own or shares the `slot` of that
        name, and then the optimiser.
      init: `init(key, frozen)`, variables by name of the parts that they bring.
    """

    players: Mapping[str, Player] = {}
    init: Callable[[jax.Array, Mapping[str, PyTree]], dict[str, PyTree]] = lambda key, frozen: {}


def distribution_matching(
    context: Context,
    *,
    student: Student,
    teacher: Denoiser,
    critic: Critic,
    direction: Direction,
    terms: Sequence[Term] = (),
    discriminator: Discriminator | None = None,
    samples: Count | None = None,
    base: NonNegative | None = None,
    further: Further | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Method:
    """Moves a generator along a direction, and the critic that the direction asks, in turn.

        loss of the generator = mean_i (x_i - sg[x_i - g_i])^2 / 2 + sum weight term
        loss of the critic = mean_i w(t_i) (mu_fake(x_i + noise) - sg[x_i])^2 + weight L_D

    Both networks begin as `references.start`, or as the teacher where there is none; the critic's
    may begin as another, see `Critic`.

    Args:
      context: the stage; its network is the generator's. The batch has the fields that networks are
        conditioned on, and `input`, whose shape samples have, and which a discriminator and some
        terms read.
      student, teacher, critic, direction, terms, discriminator: see above.
      samples: of the generator in a step, for the conditions of the first so many examples; None
        for as many as there are. Terms see all examples.
      base: the time at which samples of the generator are, where they are not clean: the critic
        then learns by `kd.losses.score_distillation.subinterval`. Without a discriminator, whose
        real examples are clean.
      further: players that move after the critic.
      tx: of the generator; None for the stage's.
    """
    if base is not None and discriminator is not None:
        raise ValueError('distribution_matching: samples with noise are not told from clean data.')
    critics.check(context, critic)
    further = further or Further()
    network, shape = context.network, context.spec['input'].shape

    def views(state: State, made: Rollout, condition: Condition, params: PyTree) -> Views:
        known = state.frozen.get(TEACHER, {})

        def real(x, t, scale=1.0):
            of = denoisers.guided(teacher, scale)
            return jax.lax.stop_gradient(of.apply(known, x, t, condition).x0)

        def branches(of, variables, x, t):
            given = (condition, denoisers.without(of, condition))
            return jax.lax.stop_gradient(denoisers.branches(of, variables, x, t, given))

        def both(x, t):
            return branches(teacher, known, x, t)

        def tracking():
            return critics.variables(critic, state, state.params[FAKE], discriminator)

        def fake(x, t):
            return jax.lax.stop_gradient(critic.denoiser.apply(tracking(), x, t, condition).x0)

        def fake_both(x, t):
            return branches(critic.denoiser, tracking(), x, t)

        def generator(x, t):
            own = denoisers.of_network(network, context.trained_by.get('teacher'))
            variables = state.variables(part=GENERATOR, params=params)
            return own.apply(variables, x, t, condition, train=True).x0

        def part(rows):
            own, told = jax.tree.map(lambda x: x[rows], (made, dict(condition)))
            return views(state, own, told, params)

        return Views(
            made.x, made.time, condition, teacher.schedule, real, fake, both, base, generator,
            fake_both, state, part,
        )  # fmt: skip

    def asked(batch: Batch) -> dict[str, jax.Array]:
        return {name: x[:samples] for name, x in denoisers.conditions(network, batch).items()}

    def rolled(state: State, batch: Batch, key: jax.Array, params: PyTree = None) -> Rollout:
        variables = state.variables(part=GENERATOR, params=params)
        rows = (len(batch['input'][:samples]), *shape)
        train = params is not None
        return student.rollout(variables, asked(batch), key, rows, train, state.frozen)

    def generator_loss(params, state, batch, key):
        keys = jax.random.split(key, 3 + len(terms))
        made, condition = rolled(state, batch, keys[0], params), asked(batch)
        seen = views(state, made, condition, params)
        g, metrics = direction(seen, keys[1])
        losses = score_distillation.surrogate(made.x, g)
        metrics = {**metrics, 'direction': mean(jnp.abs(g)), 'level': mean(made.time)}
        for key, term in zip(keys[3:], terms, strict=True):
            value = term.loss(seen, batch, key)
            losses += term.weight * value
            metrics[term.name] = mean(value)
        if discriminator is not None:
            logits = critics.logits(
                critic, discriminator, state.params[FAKE], state, made.x, made.time, condition,
                keys[2],
            )  # fmt: skip
            value = _rows(adversarial.generator_softplus(logits))
            losses += discriminator.generator_weight * value
            metrics['adversarial'] = mean(value)
        return Objective(mean(losses), metrics, outputs={'x': made.x, 'level': made.time})

    def critic_loss(params, state, batch, key):
        keys = jax.random.split(key, 4)
        made = _seen_by_critic(batch, lambda: rolled(state, batch, keys[0]), critic)
        condition, own = asked(batch), critics.variables(critic, state, params, discriminator)
        told = denoisers.dropped(
            critic.denoiser, jax.random.fold_in(key, 4), condition, critic.dropout
        )
        time_key, noise_key = jax.random.split(keys[1])
        path, t = critic.denoiser.schedule, critic.law(time_key, made.time)
        noise = jax.random.normal(noise_key, made.x.shape, made.x.dtype)
        x_t = noised(path, made.x, noise, t, base)
        said = critic.denoiser.apply(own, x_t, t, told, train=True, key=keys[2]).x0
        if base is None:
            losses = score_distillation.denoising(
                said, made.x, path, t, critic.weight, critic.sigma_data
            )
        else:
            u, low = convert(path, said, x_t, t, 'x0', 'flow'), jnp.full_like(t, base)
            losses = score_distillation.subinterval(u, made.x, noise, path, low, t)
        metrics = {'denoising': mean(losses)}
        if discriminator is not None:
            pair = (batch['input'][:samples], made.x)
            d_real, d_fake = (
                critics.logits(critic, discriminator, params, state, x, made.time, condition, key)
                for x, key in zip(pair, jax.random.split(keys[3]), strict=True)
            )
            value = _rows(adversarial.discriminator_softplus(d_real, d_fake))
            losses += discriminator.critic_weight * value
            metrics |= {
                'discriminator': mean(value),
                'told_apart': mean(_rows((d_real > d_fake).astype(jnp.float32))),
            }
        return Objective(mean(losses), metrics)

    players = {
        GENERATOR: Player(generator_loss, context.tx if tx is None else tx),
        **critics.coupled(critic),
        FAKE: Player(
            critic_loss, critic.tx, repeats=critic.updates, rows='same', unroll=critic.unroll
        ),
        **further.players,
    }

    def init(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        made = critics.begun(context, critic, discriminator, key, frozen)
        return {**made, **further.init(jax.random.fold_in(key, 3), frozen)}

    return alternate(players, init)


def _seen_by_critic(batch: Batch, fresh: Callable[[], Rollout], critic: Critic) -> Rollout:
    """The samples of a move of the critic, as constants."""
    if critic.sample == 'fresh':
        return jax.lax.stop_gradient(fresh())
    own = batch[f'out/{GENERATOR}']
    shared = Rollout(own['x'], own['level'], own['x'])
    if 'move' not in batch:
        return shared
    # Without gradient, which of a convolution would be slow under a condition on CPU.
    return jax.lax.stop_gradient(
        jax.lax.cond(batch['move'] == 0, lambda: shared, lambda: fresh()._replace(input=shared.x))
    )


def _rows(x: jax.Array) -> jax.Array:
    """The mean of each row, [B]."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)
