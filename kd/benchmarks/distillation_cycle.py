"""What `kd.benchmarks.score_distillation` measures: networks, a cycle of DMD2, and its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.claims import seeds
from kd.losses import schedule
from kd.methods.diffusion.dmd import dmd
from kd.models.denoiser import Denoised
from kd.models.dit import DiT
from kd.models.unet_conditional import UNetConditional
from kd.models.velocity_mlp import VelocityMLP
from kd.network import Network, from_linen
from kd.sampling import denoiser as denoisers

ADAM = dict(name='adamw', lr=1e-5)


class Case(NamedTuple):
    """A network, and how it is distilled.

    Attributes:
      module: the denoiser.
      shape: of an example.
      batch: examples of a step.
      time: at which the generator is asked.
      fields: {field: shape of a row} of its condition, floats, or the number of classes.
      guidance: of the teacher.
      feature: of the discriminator; '' for none.
      unroll: the critic's moves are no loop.
    """

    module: nn.Module
    shape: tuple[int, ...]
    batch: int
    time: float
    fields: Mapping[str, Any] = {}
    guidance: float = 1.0
    feature: str = ''
    unroll: bool = False


def cases() -> dict[str, Case]:
    """What is measured, small enough for a CPU."""
    noise = schedule.edm()
    unet = UNetConditional(
        channels=(64, 128), blocks=1, depths=(0, 1), heads=(4, 4), context=64, groups=16
    )
    return {
        'mlp': Case(
            Denoised(VelocityMLP(width=512, depth=4), noise, 'flow', 'edm'), (64,), 512, 80.0,
        ),
        'dit': Case(
            Denoised(DiT(width=192, depth=6, heads=3, num_classes=10), noise, 'flow', 'edm'),
            (16, 16, 3), 16, 80.0, {'label': 10}, 2.0, 'block3',
        ),
        'unet': Case(
            Denoised(unet, schedule.discrete(), 'eps'), (16, 16, 4), 8, 999.0,
            {'text': (8, 64)}, unroll=True,
        ),
    }  # fmt: skip


class Cycle(NamedTuple):
    """A compiled cycle and what it is run on.

    Attributes:
      method: of `kd.methods.diffusion.dmd`.
      network: of all three players.
      state, batch: its arguments.
      traces: how often the step has been traced.
    """

    method: Any
    network: Network
    state: Any
    batch: dict[str, jax.Array]
    traces: Callable[[], int]


def cycle(case: Case, updates: int, teacher: Any = None) -> Cycle:
    """The method of a case on a random batch; `teacher` variables, or random ones."""
    spec = {'input': jax.ShapeDtypeStruct(case.shape, jnp.float32)}
    network = from_linen(case.module, *case.module.example_inputs(spec))
    context = seeds.context(
        network=network, teacher=network, spec=spec, steps=10**6, optimizer=ADAM
    )
    method = dmd(
        context, times=(case.time,), optimizer=ADAM, guidance=case.guidance, updates=updates,
        gan=1e-2 if case.feature else 0.0, feature=case.feature, unroll=case.unroll,
    )  # fmt: skip
    rng, batch = np.random.default_rng(0), {}
    batch['input'] = jnp.asarray(rng.normal(size=(case.batch, *case.shape)), jnp.float32)
    for name, field in case.fields.items():
        if isinstance(field, int):
            batch[name] = jnp.asarray(rng.integers(0, field, case.batch), jnp.int32)
        else:
            batch[name] = jnp.asarray(rng.normal(size=(case.batch, *field)), jnp.float32)
    if teacher is None:
        teacher = jax.jit(network.init)(jax.random.key(0))
    state = jax.jit(method.init)(jax.random.key(1), {'teacher': teacher})
    count = 0

    def step(state, batch):
        nonlocal count
        count += 1
        return method.step(state, batch)

    return Cycle(method._replace(step=step), network, state, batch, lambda: count)


def passes(case: Case, made: Cycle, updates: int) -> dict[str, tuple[int, Callable, tuple]]:
    """{name: (how often, function, arguments)} of what a cycle needs."""
    own, params = denoisers.of_network(made.network), made.state.params['generator']
    condition, x = denoisers.conditions(made.network, made.batch), made.batch['input']
    t = jnp.full(case.batch, case.time)
    tx = optax.adamw(1e-5)

    def forward(of, params, x, t, condition):
        return of.apply({'params': params}, x, t, condition).x0

    def features(params, x):
        captured = own.apply({'params': params}, x, t, condition, capture=(case.feature,))
        return jnp.mean(jnp.square(captured.features[case.feature]))

    def moved(loss, params, moments):
        updates, moments = tx.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    def generator(params, moments, fake, x, t, condition):
        def loss(params):
            said = own.apply({'params': params}, x, t, condition, train=True).x0
            return jnp.mean(jnp.square(said)) + (features(fake, said) if case.feature else 0.0)

        return moved(loss, params, moments)

    def critic(params, moments, other, x, t, condition):
        def loss(params):
            said = own.apply({'params': params}, x, t, condition, train=True).x0
            told = features(params, x) + features(params, other) if case.feature else 0.0
            return jnp.mean(jnp.square(said)) + told

        return moved(loss, params, moments)

    asked = (params, x, t, condition)
    moments = jax.jit(tx.init)(params)
    guided = denoisers.guided(own, case.guidance)
    found: dict[str, tuple[int, Callable[..., Any], tuple[Any, ...]]] = {
        'generator': (1, generator, (params, moments, params, x, t, condition)),
        'teacher': (1, partial(forward, guided), asked),
        'critic asked': (1, partial(forward, own), asked),
        'fresh samples': (updates - 1, partial(forward, own), asked),
        'critic': (updates, critic, (params, moments, x + 1, x, t, condition)),
    }
    return {name: each for name, each in found.items() if each[0]}
