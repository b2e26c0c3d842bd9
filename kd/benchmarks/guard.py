"""What the guard against non-finite steps costs, over the same step without it.

    python -m kd.benchmarks guard

A supervised step of a perceptron with AdamW, at batches large enough that arithmetic outweighs the
update, as it does in training: CPU seconds in turns, and XLA's temporaries.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kd.benchmarks import turns
from kd.claims import seeds
from kd.method import Method, with_nonfinite_guard
from kd.methods.vision.supervised import supervised
from kd.models.mlp import MLP
from kd.network import from_linen

TIME, MEMORY = 1.05, 1.05
WIDTH, BATCH, PIXELS = 512, 512, (16, 16, 1)


def method(width: int) -> Method:
    """Supervised training of an MLP with two layers of a width."""
    spec = {'input': jax.ShapeDtypeStruct(PIXELS, jnp.float32)}
    spec['label'] = jax.ShapeDtypeStruct((), jnp.int32)
    network = from_linen(MLP((width, width)), jax.ShapeDtypeStruct((1, *PIXELS), jnp.float32))
    return supervised(
        seeds.context(
            network=network, spec=spec, num_classes=10, steps=10**6,
            optimizer=dict(name='adamw', lr=1e-4),
        )
    )  # fmt: skip


class Step:
    """A compiled step that donates its state."""

    def __init__(self, made: Method, batch: dict[str, jax.Array]) -> None:
        self._state, self._batch = jax.jit(made.init)(jax.random.key(0)), batch
        lowered = jax.jit(made.step, donate_argnums=0).lower(self._state, batch)
        self._run: Any = lowered.compile()
        held = self._run.memory_analysis()
        assert held is not None
        self.temporaries = held.temp_size_in_bytes

    def __call__(self) -> None:
        self._state, metrics = self._run(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))


def steps(width: int, batch: int) -> dict[str, Step]:
    """'guarded' and 'plain'."""
    keys = jax.random.split(jax.random.key(1))
    given = {
        'input': jax.random.normal(keys[0], (batch, *PIXELS)),
        'label': jax.random.randint(keys[1], (batch,), 0, 10),
    }
    plain = method(width)
    return {
        name: Step(made, given)
        for name, made in dict(guarded=with_nonfinite_guard(plain, 'stop'), plain=plain).items()
    }


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratios: see `kd.benchmarks`."""
    made = steps(WIDTH, BATCH)
    took = turns.seconds({name: partial(step) for name, step in made.items()}, options.rounds, 10)
    work = f'supervised step, MLP of width {WIDTH}, batch {BATCH}, AdamW'
    row = partial(turns.Row, work, 'the step without a guard')
    held = made['guarded'].temporaries / made['plain'].temporaries
    return [
        row(turns.over(took['guarded'], took['plain']), TIME),
        row([held], MEMORY, 'temporary memory'),
    ]
