"""Everything that survives a training step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

PyTree = Any


class State(flax.struct.PyTreeNode):
    """The state of a method; a pytree that is donated to every step.

    Attributes:
      step: int32 scalar, the number of steps taken.
      key: typed random key of the run. Never split: a step uses `fold_in(key, step)`, so the
        randomness of step n does not depend on how the run reached it.
      params: what is trained, as the optimiser sees it.
      opt_state: state of the optimiser(s).
      mutables: other variable collections of the network, `batch_stats` for example.
      ema: averaged copies of `params` by name.
      frozen: variables that are read and never written (teachers, references), by name. They are
        not part of a checkpoint: the stage that trained them has saved them.
      extra: whatever else a method keeps, by name.
      guard: 'stop' or 'skip' where updates are guarded, see `kd.method.guard`; no array.
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    opt_state: PyTree
    mutables: PyTree = flax.struct.field(default_factory=dict)
    ema: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    frozen: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    extra: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    guard: str = flax.struct.field(pytree_node=False, default='')

    @classmethod
    def create(cls, key, params, opt_state, **rest) -> State:
        return cls(jnp.zeros((), jnp.int32), key, params, opt_state, **rest)

    def variables(self, ema: str | None = None) -> PyTree:
        """The network's variables; `ema` names an averaged copy to use for `params`."""
        params = self.params if ema is None else self.ema[ema]
        return {'params': params, **self.mutables}

    def step_key(self) -> jax.Array:
        """The key of this step."""
        return jax.random.fold_in(self.key, self.step)
