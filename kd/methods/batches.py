"""What writers compute of every batch of a split."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kd.context import Context
from kd.data import pipeline
from kd.data.sources import Source
from kd.parallel import layout
from kd.parallel import mesh as mesh_lib
from kd.state import PyTree


def asking(
    compute: Callable[..., Any],
    variables: PyTree,
    source: Source,
    size: int,
    fields: Iterable[str] | None = None,
) -> Callable[..., Any]:
    """`ask(number, *more)`, `compute(variables, batch, *more)` of a batch of a split, on the host.

    Compiled once, over the devices that the variables lie on; every process has the result of the
    whole batch. The last batch is padded, see `kd.data.pipeline.eval_batches`.

    Args:
      compute: see above; pure.
      variables: of the network that is asked.
      source: the split.
      size: of a batch, over all processes.
      fields: of a batch, that `compute` is given; None for all of the split's.
    """
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    compiled = jax.jit(compute, out_shardings=NamedSharding(mesh, PartitionSpec()))
    part, parts = mesh_lib.batch_part(mesh)
    batches = pipeline.eval_batches(source, size, host_index=part, host_count=parts)
    names = tuple(source.spec if fields is None else fields)

    def ask(number: int, *more: Any) -> Any:
        whole = batches[number]
        batch = {name: whole[name] for name in names}
        batch = mesh_lib.put_batch(batch, mesh_lib.batch_sharding(mesh))
        with layout.inside(mesh):
            return jax.device_get(compiled(variables, batch, *more))

    return ask


def key_of(context: Context, split: str) -> jax.Array:
    """A key by the recipe's seed, the stage's place in it and the split."""
    key = jax.random.key(context.recipe.seed)
    key = jax.random.fold_in(key, list(context.recipe.stages).index(context.stage))
    return jax.random.fold_in(key, zlib.crc32(split.encode()))
