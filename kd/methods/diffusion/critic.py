"""The fake denoiser that follows a generator, and the discriminator on its features.

What `kd.methods.diffusion.distribution_matching` knows of its critic: what it begins as, what its
parameters are, and how it is asked. These are {'network', 'head'} where there is a discriminator,
those of the network alone where there is none, and its adapters where it has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kd.context import Context
from kd.errors import UserError
from kd.losses.score_distillation import Weight
from kd.method import Objective, Player
from kd.methods import start
from kd.metrics import scalar
from kd.models import adapters
from kd.models.adapters import Adapter, merged
from kd.network import Network, feature_shape
from kd.sampling.denoiser import Condition, Denoiser
from kd.sampling.times import TimeLaw
from kd.state import PyTree, State

# Parts of the state, the frozen tree of the teacher, and the move of the critic to the generator.
GENERATOR, FAKE, TEACHER, COUPLING = 'generator', 'fake', 'teacher', 'coupling'


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
      start: name of the frozen tree that it begins as, 'teacher' or a reference of the stage; ''
        for the one that the generator begins as.
      coupling: before its moves the fake denoiser goes towards the generator, which is of its form:
        fake <- coupling fake + (1 - coupling) generator (Flash-DMD, arXiv:2511.20549).
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
    start: str = ''
    coupling: float = 1.0

    @property
    def sigma_data(self) -> float:
        """Of the weight 'edm': that of the network's preconditioning."""
        return getattr(self.network.module, 'sigma_data', 0.5)

    def beginning(self, frozen: Mapping[str, PyTree]) -> PyTree:
        """What it begins as, None for nothing."""
        return frozen[self.start] if self.start else beginning(frozen)


def beginning(frozen: Mapping[str, PyTree]) -> PyTree:
    """What a generator begins as, None for nothing."""
    return frozen.get(start.START, frozen.get(TEACHER))


def check(context: Context, critic: Critic) -> None:
    """Raises `UserError` for a critic that begins as nothing, or that no generator can pull."""
    if critic.start not in ('', TEACHER, *context.references):
        raise UserError(
            f"{context.stage}: the critic begins as '{critic.start}', and references are "
            f'{sorted(context.references)}.'
        )
    beside = critic.adapter or adapters.adapter_of(context.network.module)
    if critic.coupling < 1 and beside is not None:
        raise UserError(
            f'{context.stage}.method.coupling: of adapters critic and generator are not of one '
            'form; take 1.'
        )


def variables(
    critic: Critic, state: State, params: PyTree, discriminator: Discriminator | None
) -> PyTree:
    """Those of the fake denoiser, from the parameters of its part."""
    own = params if discriminator is None else params['network']
    if critic.adapter is not None:
        below = critic.beginning(state.frozen)
        return {**below, 'params': merged(below['params'], own, critic.adapter.scale)}
    return state.variables(part=FAKE, params=own)


def logits(
    critic: Critic,
    discriminator: Discriminator,
    params: PyTree,
    state: State,
    x: jax.Array,
    level: jax.Array,
    condition: Condition,
    key: jax.Array,
) -> jax.Array:
    """Of noised examples; their gradient goes through the trunk."""
    time_key, noise_key = jax.random.split(key)
    path, t = critic.denoiser.schedule, discriminator.law(time_key, level)
    x_t = path.mix(x, jax.random.normal(noise_key, x.shape, x.dtype), t)
    own = variables(critic, state, params, discriminator)
    feature = discriminator.feature
    found = critic.denoiser.apply(own, x_t, t, condition, capture=(feature,)).features[feature]
    said: Any = discriminator.head.apply({'params': params['head']}, found)
    return said


def coupled(critic: Critic) -> dict[str, Player]:
    """The player that pulls the fake denoiser towards the generator; none for the share 1.

    fake <- share fake + (1 - share) generator, a step down half of their squared distance.
    """
    if critic.coupling == 1:
        return {}

    def loss(params, state, batch, key):
        del batch, key
        squares = jax.tree.map(
            lambda x, y: jnp.sum(jnp.square(x - y)),
            params.get('network', params),
            state.params[GENERATOR],
        )
        return Objective(scalar(0.5 * sum(jax.tree.leaves(squares))))

    return {COUPLING: Player(loss, optax.sgd(1 - critic.coupling), of=FAKE, slot=COUPLING)}


def begun(
    context: Context,
    critic: Critic,
    discriminator: Discriminator | None,
    key: jax.Array,
    frozen: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    """Variables of generator and critic."""
    keys = jax.random.split(key, 3)
    fake = critic.network.init(keys[1])
    if adapters.adapter_of(context.network.module) is None:
        own = _begun(context, GENERATOR, context.network.init(keys[0]), beginning(frozen))
    else:
        own = start.from_reference(context.network.init, context)(keys[0], frozen)
    fake = _begun(context, FAKE, fake, critic.beginning(frozen), critic.start)
    if critic.adapter is not None:
        fake = {'params': adapters.drawn(keys[1], fake['params'], critic.adapter)}
    if discriminator is not None:
        feature = feature_shape(critic.network, discriminator.feature)
        head = discriminator.head.init(keys[2], jnp.zeros(feature.shape, feature.dtype))
        fake = {**fake, 'params': {'network': fake['params'], 'head': head['params']}}
    return {GENERATOR: own, FAKE: fake}


def _begun(context: Context, name: str, own: PyTree, given: Any, source: str = '') -> PyTree:
    """A network that begins as another, if there is one.

    Raises:
      UserError: they are not of one form.
    """
    if given is None:
        return own
    forms = [jax.tree.map(jnp.shape, tree) for tree in (own, given)]
    if forms[0] != forms[1]:
        source = f"'{source}'" if source else f'references.{start.START} or as the teacher'
        raise UserError(
            f'{context.stage}: the {name} begins as {source}, and is another network; give it the '
            'block of that one, or name another stage to start from.'
        )
    return jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), own, given)
