"""Sharding rules: regular expressions over the paths of a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd.errors import UserError

Rules = Iterable[tuple[str, Any]]


def path_name(path: tuple) -> str:
    """'params/Dense_0/kernel' for a key path of `jax.tree_util`."""
    return '/'.join(_key_name(key) for key in path)


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


def _key_name(key: Any) -> str:
    for attribute in ('key', 'name', 'idx'):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
