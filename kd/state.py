"""Everything that survives a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kd.errors import UserError

PyTree = Any
# The part of a state that is its result unless a stage says otherwise.
NETWORK = 'network'


class State(flax.struct.PyTreeNode):
    """The state of a method; a pytree that is donated to every step.

    What is trained has parts: `network` alone as a rule, `network` and `projector`, or `generator`,
    `fake` and `discriminator`. One of them is the result of the stage, which evaluators, later
    stages and exports see through `variables()`; they know nothing of the others.

    Attributes:
      step: int32 scalar, the number of steps taken.
      key: typed random key of the run. Never split: a step uses `fold_in(key, step)`, so the
        randomness of step n does not depend on how the run reached it.
      params: what is trained, by part.
      opt_state: state of the optimiser(s).
      mutables: other variable collections, `batch_stats` for example, by part; a part without any
        is left out.
      ema: {name: {part: tree}}, averaged copies of parts of `params`.
      frozen: variables that are read and never written (teachers, references), by name. They are
        not part of a checkpoint: the stage that trained them has saved them.
      extra: whatever else a method keeps, by name.
      result: the part that is the stage's result; no array.
      base: name of a frozen tree that the result's parameters stand beside, as adapters do (see
        `kd.models.adapters`); '' for none, no array.
      guard: 'stop' or 'skip' where updates are guarded, see `kd.method.guard`; no array.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, PyTree]
    opt_state: PyTree
    mutables: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    ema: dict[str, dict[str, PyTree]] = flax.struct.field(default_factory=dict)
    frozen: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    extra: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    result: str = flax.struct.field(pytree_node=False, default=NETWORK)
    base: str = flax.struct.field(pytree_node=False, default='')
    guard: str = flax.struct.field(pytree_node=False, default='')

    @classmethod
    def create(
        cls, key: jax.Array, variables: Mapping[str, Any], opt_state: PyTree = (), **rest: Any
    ) -> State:
        """The state at step 0.

        Args:
          key: of the run.
          variables: {'params': ..., **mutables} of one network, the part `network`; or such
            variables of several parts by name.
          opt_state: of the optimiser(s).
          **rest: further attributes.

        Raises:
          UserError: variables of neither form.
        """
        params, mutables = _by_part(variables)
        return cls(jnp.zeros((), jnp.int32), key, params, opt_state, mutables, **rest)

    def variables(
        self, ema: str | None = None, *, part: str = '', params: PyTree | None = None
    ) -> dict[str, PyTree]:
        """The variables of a part, {'params': ..., **mutables}, by default of the result.

        Those of a result with a `base` hold the base's parameters too.

        Args:
          ema: name of an averaged copy to use for the parameters.
          part: another part than the result.
          params: to be used instead of the state's own; those a loss is differentiated by.

        Raises:
          UserError: there is no such part, or it has no such average.
        """
        part = part or self.result
        trees = self.params if ema is None else self.ema.get(ema, {})
        if params is None:
            if part not in trees:
                kind = 'part' if ema is None else f"average '{ema}' of a part"
                raise UserError(f"The state has no {kind} '{part}', only {sorted(trees)}.")
            params = trees[part]
        if self.base and part == self.result:
            params = joined(self.frozen[self.base]['params'], params)
        return {'params': params, **self.mutables.get(part, {})}

    def with_params(self, params: PyTree) -> State:
        """The state with other parameters of its result."""
        return self.replace(params={**self.params, self.result: params})

    def step_key(self) -> jax.Array:
        """The key of this step."""
        return jax.random.fold_in(self.key, self.step)


def joined(base: PyTree, own: PyTree) -> PyTree:
    """The leaves of two trees of mappings in one; they share none."""
    made = dict(base)
    for name, x in own.items():
        made[name] = joined(base.get(name, {}), x) if isinstance(x, Mapping) else x
    return made


def alone(trees: Mapping[str, PyTree]) -> PyTree:
    """The tree of the one part there is, or all of them by name."""
    return next(iter(trees.values())) if len(trees) == 1 else dict(trees)


def path_name(path: tuple) -> str:
    """'params/network/Dense_0/kernel' for a key path of `jax.tree_util`."""
    return '/'.join(_key_name(key) for key in path)


def paths(tree: PyTree) -> list[str]:
    """`path_name` of every leaf."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _key_name(key: Any) -> str:
    for attribute in ('key', 'name', 'idx'):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_variables(tree: Any) -> bool:
    return isinstance(tree, Mapping) and 'params' in tree


def _by_part(variables: Mapping[str, Any]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """(params, mutables), each by part; see `State.create`."""
    parts = {NETWORK: variables} if 'params' in variables else variables
    params, mutables = {}, {}
    for part, of_part in parts.items():
        rest = dict(of_part) if isinstance(of_part, Mapping) else {}
        strays = [c for c, tree in rest.items() if c != 'params' and _is_variables(tree)]
        if 'params' not in rest or strays:
            raise UserError(
                f"Of the variables {sorted(variables)} '{(strays or [part])[0]}' is out of place: "
                "there are those of one network, {'params': ...}, or those of each part by name, "
                "{'network': {'params': ...}, 'projector': {'params': ...}}."
            )
        params[part] = rest.pop('params')
        if rest:
            mutables[part] = rest
    return params, mutables
