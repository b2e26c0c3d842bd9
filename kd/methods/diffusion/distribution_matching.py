"""The loop of generators that follow a difference of denoisers (DMD2, arXiv:2405.14867).

A step is one move of the generator, and then `updates` moves of the critic:

1. the generator runs to one of its times, without gradient, and is asked there with gradient: x;
2. it moves along `direction`, which asks the teacher and the fake denoiser of the step before, and
   along further terms;
3. the critic, the fake denoiser and the discriminator on its features, learns to denoise samples of
   the generator: the x of this step at its first move, fresh ones of the moved generator after.

Parts of the state: `generator`, the result, and `fake`, whose parameters are {'network', 'head'}
where there is a discriminator. The teacher is `state.frozen['teacher']`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kd.context import Context
from kd.errors import UserError
from kd.losses import adversarial, score_distillation
from kd.losses.interpolant import expand_times
from kd.losses.schedule import Schedule, convert
from kd.losses.score_distillation import Weight
from kd.method import Batch, Method, Objective, Player, alternate
from kd.methods import start
from kd.metrics import Metrics, mean
from kd.models import adapters
from kd.models.adapters import Adapter, merged
from kd.network import Network
from kd.ranges import Count, NonNegative
from kd.sampling import denoiser as denoisers
from kd.sampling.denoiser import Condition, Denoiser
from kd.sampling.generator import Rollout
from kd.sampling.times import TimeLaw
from kd.state import PyTree, State

GENERATOR, FAKE, TEACHER = 'generator', 'fake', 'teacher'


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


class Discriminator(NamedTuple):
    """A head on features of the fake denoiser, which sees noised real and generated examples.

    Attributes:
      head: features [B, ...] -> logits [B] or [B, n].
      feature: path of a feature of the fake network.
      generator_weight, critic_weight: of its loss in those of generator and critic.
      law: of the times of the noise.
    """

    head: nn.Module
    feature: str
    generator_weight: float
    critic_weight: float
    law: TimeLaw


class Critic(NamedTuple):
    """How the fake denoiser learns.

    Attributes:
      network: the fake denoiser's.
      denoiser: the same as a function.
      tx: its optimiser.
      law: of the times of its noise.
      weight: of its loss, see `kd.losses.score_distillation.denoising`.
      updates: moves in a step.
      sample: 'shared', the first move sees the generator's own sample, or 'fresh', none does.
      unroll: the moves are no loop, for convolutions on CPU.
      dropout: share of the samples whose condition it is not told; what is asked without one has to
        be trained so.
      adapter: it is what the networks begin as with these beside, which alone are trained.
    """

    network: Network
    denoiser: Denoiser
    tx: optax.GradientTransformation
    law: TimeLaw
    weight: Weight
    updates: int = 5
    sample: Literal['shared', 'fresh'] = 'shared'
    unroll: bool = False
    dropout: float = 0.0
    adapter: Adapter | None = None

    @property
    def sigma_data(self) -> float:
        """Of the weight 'edm': that of the network's preconditioning."""
        return getattr(self.network.module, 'sigma_data', 0.5)


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
) -> Method:
    """Moves a generator along a direction, and the critic that the direction asks, in turn.

        loss of the generator = mean_i (x_i - sg[x_i - g_i])^2 / 2 + sum weight term
        loss of the critic = mean_i w(t_i) (mu_fake(x_i + noise) - sg[x_i])^2 + weight L_D

    Both networks begin as `references.start`, or as the teacher where there is none.

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
    """
    if base is not None and discriminator is not None:
        raise ValueError('distribution_matching: samples with noise are not told from clean data.')
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
            return _fake_variables(critic, state, state.params[FAKE], discriminator)

        def fake(x, t):
            return jax.lax.stop_gradient(critic.denoiser.apply(tracking(), x, t, condition).x0)

        def fake_both(x, t):
            return branches(critic.denoiser, tracking(), x, t)

        def generator(x, t):
            own = denoisers.of_network(network, context.trained_by.get('teacher'))
            variables = state.variables(part=GENERATOR, params=params)
            return own.apply(variables, x, t, condition, train=True).x0

        return Views(
            made.x, made.time, condition, teacher.schedule, real, fake, both, base, generator,
            fake_both,
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
            logits = _logits(
                critic, discriminator, state.params[FAKE], state, made, condition, keys[2]
            )
            value = _rows(adversarial.generator_softplus(logits))
            losses += discriminator.generator_weight * value
            metrics['adversarial'] = mean(value)
        return Objective(mean(losses), metrics, outputs={'x': made.x, 'level': made.time})

    def critic_loss(params, state, batch, key):
        keys = jax.random.split(key, 4)
        made = _seen_by_critic(batch, lambda: rolled(state, batch, keys[0]), critic)
        condition, own = asked(batch), _fake_variables(critic, state, params, discriminator)
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
            data = batch['input'][:samples]
            real = Rollout(data, made.time, data)
            d_real, d_fake = (
                _logits(critic, discriminator, params, state, which, condition, key)
                for which, key in zip((real, made), jax.random.split(keys[3]), strict=True)
            )
            value = _rows(adversarial.discriminator_softplus(d_real, d_fake))
            losses += discriminator.critic_weight * value
            metrics |= {
                'discriminator': mean(value),
                'told_apart': mean(_rows((d_real > d_fake).astype(jnp.float32))),
            }
        return Objective(mean(losses), metrics)

    players = {
        GENERATOR: Player(generator_loss, context.tx),
        FAKE: Player(
            critic_loss, critic.tx, repeats=critic.updates, rows='same', unroll=critic.unroll
        ),
    }
    return alternate(players, _init(context, critic, discriminator))


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


def _fake_variables(
    critic: Critic, state: State, params: PyTree, discriminator: Discriminator | None
) -> PyTree:
    own = params if discriminator is None else params['network']
    if critic.adapter is not None:
        below = _beginning(state.frozen)
        return {**below, 'params': merged(below['params'], own, critic.adapter.scale)}
    return state.variables(part=FAKE, params=own)


def _beginning(frozen: Mapping[str, PyTree]) -> PyTree:
    """What the networks begin as, None for nothing."""
    return frozen.get(start.START, frozen.get(TEACHER))


def _logits(critic, discriminator, params, state, made, condition, key):
    """Of noised examples; their gradient goes through the trunk."""
    time_key, noise_key = jax.random.split(key)
    path, t = critic.denoiser.schedule, discriminator.law(time_key, made.time)
    x_t = path.mix(made.x, jax.random.normal(noise_key, made.x.shape, made.x.dtype), t)
    own = _fake_variables(critic, state, params, discriminator)
    feature = discriminator.feature
    found = critic.denoiser.apply(own, x_t, t, condition, capture=(feature,)).features[feature]
    return discriminator.head.apply({'params': params['head']}, found)


def _rows(x: jax.Array) -> jax.Array:
    """The mean of each row, [B]."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)


def _init(context: Context, critic: Critic, discriminator: Discriminator | None):
    network = context.network

    def init(key: jax.Array, frozen: Any) -> PyTree:
        keys = jax.random.split(key, 3)
        own, fake = network.init(keys[0]), critic.network.init(keys[1])
        given = _beginning(frozen)
        if given is not None:
            own, fake = (
                _begun(context, name, variables, given)
                for name, variables in ((GENERATOR, own), (FAKE, fake))
            )
        seen = fake
        if critic.adapter is not None:
            fake = {'params': adapters.drawn(keys[1], fake['params'], critic.adapter)}
        if discriminator is not None:
            wanted = discriminator.feature
            feature = jax.eval_shape(
                lambda v, *inputs: critic.network.apply(v, *inputs, capture=(wanted,)),
                seen,
                *critic.network.inputs,
            ).features[wanted]
            head = discriminator.head.init(keys[2], jnp.zeros(feature.shape, feature.dtype))
            fake = {**fake, 'params': {'network': fake['params'], 'head': head['params']}}
        return {GENERATOR: own, FAKE: fake}

    return init


def _begun(context: Context, name: str, own: PyTree, given: PyTree) -> PyTree:
    """A network that begins as another.

    Raises:
      UserError: they are not of one form.
    """
    forms = [jax.tree.map(jnp.shape, tree) for tree in (own, given)]
    if forms[0] != forms[1]:
        raise UserError(
            f'{context.stage}: the {name} begins as references.{start.START} or as the teacher, '
            'and is another network; give it the block of that one, or name a stage to start from.'
        )
    return jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), own, given)
