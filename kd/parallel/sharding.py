"""Sharding rules: regular expressions over the paths of a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd.errors import UserError
from kd.parallel.mesh import BATCH_AXES
from kd.state import path_name

Rules = Iterable[tuple[str, Any]]


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding per leaf; the first rule whose expression is found in a path decides.

    Args:
      tree: arrays or abstract arrays.
      rules: (regular expression, spec) pairs. A spec is a tuple as for PartitionSpec, e.g.
        (None, 'tensor'), or 'fsdp': the largest dimension that divides over the fsdp axis, none
        if there is none. Leaves that no rule matches are replicated, as are those with fewer
        dimensions than the spec.
      mesh: the device mesh.

    Raises:
      UserError: a bad expression or spec, an unknown axis, or a dimension that does not divide.
    """
    try:
        compiled = [(re.compile(expression), spec) for expression, spec in rules]
    except (re.error, ValueError, TypeError) as error:
        raise UserError(f'sharding must be (regular expression, spec) pairs: {error}') from error

    def sharding(path, leaf) -> NamedSharding:
        name = path_name(path)
        for expression, spec in compiled:
            if leaf.ndim and expression.search(name):
                return NamedSharding(mesh, _spec(name, leaf.shape, spec, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def rollout_rules(sharding: Rules, rollout: Rules = ()) -> tuple[tuple[str, Any], ...]:
    """Rules for weights that a loop reads at every turn, as in decoding token by token.

    Those of `rollout`, or without any those of `sharding` less the axes that share the batch: what
    lies along these would be gathered at every turn, what lies along 'tensor' need not be.
    """
    return tuple(rollout) or tuple((expression, _kept(spec)) for expression, spec in sharding)


def rollout(tree: Any, prefix: str = '', *, rules: Rules, mesh: Mesh, dtype: str = '') -> Any:
    """A tree of weights in the layout of a rollout, inside a compiled step.

    The compiler is held to the layout at this point, so that what has to be gathered is gathered
    once, before the loop.

    Args:
      tree: of arrays, such as variables or parameters.
      prefix: what their paths begin with in the state, such as 'params', for rules that say so.
      rules: see `rollout_rules` and `tree_shardings`.
      mesh: of the step.
      dtype: of floating-point leaves, such as 'bfloat16'; '' keeps theirs.

    Raises:
      UserError: as `tree_shardings`, or a type that there is not.
    """
    if dtype:
        wanted = floating(dtype, 'rollout_dtype')
        tree = jax.tree.map(
            lambda x: x.astype(wanted) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )
    shardings = tree_shardings({prefix: tree} if prefix else tree, rules, mesh)
    return jax.lax.with_sharding_constraint(tree, shardings[prefix] if prefix else shardings)


def floating(name: str, of: str) -> jnp.dtype:
    """The floating-point type of a name, such as 'bfloat16'; `of` is what is given by it.

    Raises:
      UserError: no such type.
    """
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = jnp.dtype(bool)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{of}='{name}' is no floating-point type such as 'bfloat16'.")
    return dtype


def _kept(spec: Any) -> Any:
    """A spec without the axes that share the batch."""
    if not isinstance(spec, tuple | list):
        return () if spec in BATCH_AXES else spec
    axes = [(each,) if isinstance(each, str) else tuple(each or ()) for each in spec]
    return tuple(tuple(axis for axis in each if axis not in BATCH_AXES) or None for each in axes)


def _spec(name: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> PartitionSpec:
    if spec == 'fsdp':
        size = mesh.shape['fsdp']
        candidates = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not candidates:
            return PartitionSpec()
        largest = max(candidates, key=lambda axis: shape[axis])
        return PartitionSpec(*(None if axis != largest else 'fsdp' for axis in range(largest + 1)))
    if not isinstance(spec, tuple | list):
        raise UserError(
            f"sharding {spec!r} of '{name}' must be a tuple of mesh axes or 'fsdp', "
            "such as (None, 'tensor')."
        )
    if len(spec) > len(shape):
        # Optimiser states hold vectors beside matrices under one path; a spec made for the
        # matrix does not apply to them.
        return PartitionSpec()
    used: list[str] = []
    for length, axes in zip(shape, spec, strict=False):
        ways = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis in used:
                raise UserError(f"sharding {tuple(spec)} of '{name}' names '{axis}' twice.")
            used.append(axis)
            if axis not in mesh.shape:
                raise UserError(
                    f"sharding of '{name}' names mesh axis '{axis}'; axes: {mesh.axis_names}."
                )
            ways *= mesh.shape[axis]
        if length % ways:
            raise UserError(
                f"sharding {tuple(spec)} of '{name}' {shape}: {length} does not divide over {ways}."
            )
    return PartitionSpec(*spec)
