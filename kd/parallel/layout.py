"""Where the arrays of a compiled step lie, by name: models and losses know of no mesh.

    with layout.inside(mesh):                              # around what is traced
        hidden = layout.lying(hidden, 'rows')              # [B, T, D], an axis after the other
        kernel = layout.gathered(kernel, None, 'features')  # [D, F]

| name | mesh axes | what is cut along them |
|---|---|---|
| 'rows' | data, fsdp | examples of a batch, and their tokens |
| 'features' | tensor | heads, hidden units, the vocabulary |
| 'copies', 'width' | data; fsdp | what every copy of the weights sees; the other side of weights |

Weights may lie along fsdp too (`sharding` of a recipe). A product then has both of its factors cut
along the same devices, and XLA left alone may move activations, of all rows to every device, or add
up logits over devices. Held to rows that stay and to weights that come, it gathers each weight for
the forward and once more for the backward pass, and adds up each gradient.

Outside of a mesh, on one device and inside `shard_map` nothing is held to anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from kd.parallel.mesh import BATCH_AXES

Name = str | None
AXES: dict[str, tuple[str, ...]] = {
    'rows': BATCH_AXES, 'copies': ('data',), 'width': ('fsdp',), 'features': ('tensor',)
}  # fmt: skip


def inside(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Tells what is traced within of the mesh that it will run on."""
    if mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def shards(count: int) -> int:
    """Over how many devices `count` rows lie; 1 where they do not divide, or outside of a mesh."""
    return parts(count, 'rows')


def lying(x: jax.Array, *names: Name) -> jax.Array:
    """x, an axis for each name and those that follow whole; so does what flows back.

    An axis that does not divide over its devices is left to XLA.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    spec: list[Any] = []
    for size, name in zip(x.shape, names, strict=False):
        divides = name is None or size % _ways(mesh, name) == 0
        spec.append(name and AXES[name] if divides else PartitionSpec.UNCONSTRAINED)
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gathered(weight: jax.Array, *names: Name) -> jax.Array:
    """A weight as it is used, cut along the names alone; its gradient lies as the weight does."""

    @jax.custom_jvp
    def used(weight):
        return lying(weight, *names)

    # A gradient that were held to the same would be whole on every device before it is cut.
    used.defjvp(lambda primals, tangents: (used(*primals), *tangents))
    return used(weight)


@dataclasses.dataclass(frozen=True)
class Product:
    """`lax.dot_general` of activations [B, ..., in] and a weight [in, out], as `flax` takes one.

    Attributes:
      inputs, outputs: along what the features lie that go in and come out; None for whole.
    """

    inputs: Name = None
    outputs: Name = None

    def __call__(self, x: jax.Array, kernel: jax.Array, *how: Any, **options: Any) -> jax.Array:
        """Activations [B, ..., out], whose rows stay where they are."""
        out = lax.dot_general(x, gathered(kernel, self.inputs, self.outputs), *how, **options)
        return lying(out, 'rows', *[None] * (out.ndim - 2), self.outputs)


# From tokens to heads or hidden units, and back.
WIDENING, NARROWING = Product(outputs='features'), Product(inputs='features')


def divides(size: int, name: str) -> bool:
    """Whether so many lie evenly on the devices of a name; outside of a mesh they do."""
    mesh = _mesh()
    return mesh is None or size % _ways(mesh, name) == 0


def parts(size: int, name: str) -> int:
    """In how many equal parts so many lie over the devices of a name: 1 where they do not divide,
    or outside of a mesh."""
    mesh = _mesh()
    ways = _ways(mesh, name) if mesh else 1
    return 1 if size % ways else ways


def by_device(
    function: Callable[..., jax.Array], *arrays: jax.Array, names: Sequence[Name]
) -> jax.Array:
    """function(*arrays), of each device's part; for kernels that XLA cannot cut itself.

    Args:
      function: of arrays that are cut along `names`, to one that is.
      *arrays: of which axes that do not divide come whole.
      names: see `lying`; of those of arrays with fewer axes the last are left out.
    """
    mesh = _mesh()
    if mesh is None:
        return function(*arrays)
    rows = names if divides(arrays[0].shape[0], 'rows') else (None, *names[1:])
    specs = [PartitionSpec(*(name and AXES[name] for name in rows[: x.ndim])) for x in arrays]
    # What a kernel returns does not say over which devices it varies.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False
    )
    return mapped(*arrays)


def _mesh() -> AbstractMesh | None:
    """The mesh that is to be heeded, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def _ways(mesh: AbstractMesh, name: str) -> int:
    return math.prod(mesh.shape[axis] for axis in AXES[name])
