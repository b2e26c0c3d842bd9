"""Networks of which smaller ones are parts, so that one training makes them all.

An elastic network is the largest of a space of architectures; every other one has the leading
channels of its layers and the first blocks of its stages. A module says

    space()             what may be chosen
    sizes(arch)         how many channels each layer has then, 0 for blocks that are left out
    plain(arch)         the network of an architecture by itself, a linen module
    groups()            inner channels whose order does not matter

and is called as `network.apply(variables, x, arch=arch)`, without `arch` for the largest. `arch`
are arrays, so one program serves all architectures: channels beyond the live ones are set to 0,
after the norm, as a channel of zeros has a shift. Where a block is left out all of its channels
are, and what remains is the shortcut. Running statistics of what is not live stay as they are.

Norms must not mix channels: batch norm or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.errors import UserError
from kd.models import layers
from kd.models.elastic_space import Architecture, Space
from kd.state import PyTree, path_name

STATISTICS = 'batch_stats'
MOMENTUM, EPSILON = 0.9, 1e-5
COST = 'multiply_adds'
# How many channels are live; None for all.
Live = jax.Array | int | None


class Applied(Protocol):
    """A `kd.network.Network`, which lies above."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]: ...

    @property
    def apply(self) -> Callable[..., Any]: ...


class Group(NamedTuple):
    """Inner channels of a block, which may change places together.

    Attributes:
      block: index in `sizes(arch)[size]`.
      outs: (path, axis) of what makes them, without the collection; those of norms too.
      into: (path, axis) of the kernel that reads them.
      size: what says how many of them are live.
    """

    block: int
    outs: tuple[tuple[str, int], ...]
    into: tuple[str, int]
    size: str = 'inner'


class Elastic(nn.Module):
    """What all elastic networks share: the largest network, in the scope of this one."""

    @nn.nowrap
    def space(self) -> Space:
        raise NotImplementedError

    @nn.nowrap
    def sizes(self, arch: Architecture) -> dict[str, Any]:
        raise NotImplementedError

    @nn.nowrap
    def plain(self, arch: Architecture | None = None) -> nn.Module:
        raise NotImplementedError

    @nn.nowrap
    def groups(self) -> tuple[Group, ...]:
        raise NotImplementedError

    @nn.nowrap
    def cut(self, variables: PyTree, arch: Architecture) -> PyTree:
        """Changes of variables before leading slices of them are taken."""
        del arch
        return variables

    def setup(self) -> None:
        self.whole = self.plain()
        nn.share_scope(self, self.whole)

    def __call__(
        self, x: jax.Array, *, train: bool = False, arch: Architecture | None = None
    ) -> jax.Array:
        """Logits [B, num_classes] of an architecture, of the largest without one."""
        return self.whole(x, train=train, sizes=None if arch is None else self.sizes(arch))


def live(x: jax.Array, count: Live) -> jax.Array:
    """x [..., C] with zeros from channel `count` on."""
    if count is None:
        return x
    return jnp.where(jnp.arange(x.shape[-1]) < count, x, jnp.zeros((), x.dtype))


def where_there(inner: Live, count: Live) -> Live:
    """`count`, or 0 for a block without inner channels."""
    return count if inner is None or count is None else jnp.where(inner > 0, count, 0)


class Norm(nn.Module):
    """Batch norm of the live channels; as `kd.models.layers.norm` for all of them.

    Others are 0 and keep their running statistics. Parameters and statistics have the names of
    `flax.linen.BatchNorm`.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, count: Live = None) -> jax.Array:
        shape, axes = (x.shape[-1],), tuple(range(x.ndim - 1))
        scale = self.param('scale', nn.initializers.ones, shape)
        bias = self.param('bias', nn.initializers.zeros, shape)
        running = [
            self.variable(STATISTICS, name, fill, shape, jnp.float32)
            for name, fill in (('mean', jnp.zeros), ('var', jnp.ones))
        ]
        if train:
            wide = x.astype(jnp.float32)
            center = wide.mean(axes)
            found = center, jnp.square(wide - center).mean(axes)
            alive = True if count is None else jnp.arange(x.shape[-1]) < count
            for variable, new in zip(running, found, strict=True):
                mixed = MOMENTUM * variable.value + (1 - MOMENTUM) * new
                variable.value = jnp.where(alive, mixed, variable.value)
        else:
            found = running[0].value, running[1].value
        factor = scale * lax.rsqrt(found[1] + EPSILON)
        y = x.astype(jnp.float32) * factor + (bias - found[0] * factor)
        return live(y.astype(self.dtype), count)


class ConvNorm(nn.Module):
    """A convolution and a norm, with the first `count` channels live; reads `read` of its input."""

    width: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, read: Live = None, count: Live = None
    ) -> jax.Array:
        y = layers.conv(self.width, self.size, self.stride, dtype=self.dtype, name='conv')(x)
        reads = x.shape[-1] if read is None else read
        spend(self, y.shape[1] * y.shape[2] * self.size**2, reads, self.width, count)
        return Norm(self.dtype, name='norm')(y, train, count)


def spend(
    module: nn.Module, each: jax.Array | int, read: jax.Array | int, width: int, count: Live
) -> None:
    """Notes multiply-adds: `each` for every pair of a live input and a live output."""
    outputs = width if count is None else count
    cost = jnp.float32(1) * each * read * outputs
    module.sow('intermediates', COST, cost)


def elastic(network: Applied, where: str) -> Elastic:
    """The module of an elastic network.

    Raises:
      UserError: the network is none.
    """
    if not isinstance(network.module, Elastic):
        raise UserError(
            f'{where} must be an elastic network, such as kd.models.elastic_mlp.ElasticMLP, not '
            f'{type(network.module).__name__}.'
        )
    return network.module


def multiply_adds(network: Applied, arch: Architecture) -> jax.Array:
    """Multiply-adds of products and convolutions for one example, float32 [].

    Traced with the network, of which nothing else is computed: under jit and vmap it costs nothing.
    (Papers on efficient networks call these FLOPs.)
    """
    zeros = [jnp.zeros(x.shape, x.dtype) for x in network.inputs]
    variables = network.module.init(jax.random.key(0), *zeros)
    _, noted = network.module.apply(variables, *zeros, arch=arch, mutable=['intermediates'])
    leaves = jax.tree_util.tree_flatten_with_path(noted)[0]
    return sum((x for path, x in leaves if COST in path_name(path)), jnp.float32(0))


def slice_variables(network: Applied, variables: PyTree, arch: Architecture) -> PyTree:
    """Variables of `kd.networks.sliced(network, arch)` from those of the elastic network."""
    module = elastic(network, 'the network')
    wanted = jax.eval_shape(module.plain(arch).init, jax.random.key(0), *network.inputs)
    found = _by_path(module.cut(variables, arch))

    def leading(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        return found[path_name(path)][tuple(slice(0, n) for n in x.shape)]

    return jax.tree_util.tree_map_with_path(leading, wanted)


def sort_channels(
    network: Applied, variables: PyTree, tiers: Sequence[float] = (), choice: str = 'expansion'
) -> PyTree:
    """Variables of the same largest network, with inner channels in order of importance.

    The importance of a channel is the sum of |kernel| over all that reads it. Of several kernels in
    a block the last is sorted first. Channels within a squeeze-and-excitation are put in order too;
    the release does not keep these within tiers, where networks with these options change.

    Args:
      network: elastic.
      variables: of it.
      tiers: options of the choice between which channels do not change places, so that networks
        with these options stay as they are too.
      choice: which options decide how many inner channels there are.

    Source: Cai et al. 2019, Once for All, arXiv 1908.09791.
    """
    module = elastic(network, 'the network')
    space, leaves = module.space(), _by_path(variables)
    ends = [module.sizes({**space.largest(), **_only(space, choice, option)}) for option in tiers]
    for group in module.groups():
        path, axis = group.into
        kernel = leaves[f'params/{path}']
        others = tuple(i for i in range(kernel.ndim) if i != axis)
        importance = jnp.sum(jnp.abs(kernel), axis=others)
        tier = np.zeros(kernel.shape[axis], np.int32)
        for sizes in ends:
            tier += np.arange(len(tier)) >= int(sizes[group.size][group.block])
        order = jnp.lexsort((-importance, jnp.asarray(tier)))
        for name, at in (*group.outs, group.into):
            for collection in ('params', STATISTICS):
                full = f'{collection}/{name}'
                if full in leaves:
                    leaves[full] = jnp.take(leaves[full], order, axis=at)
    return jax.tree_util.tree_map_with_path(lambda p, _: leaves[path_name(p)], variables)


def _only(space: Space, choice: str, option: float) -> Mapping[str, np.ndarray]:
    return {choice: space.restrict({choice: (option,)}).largest()[choice]}


def recalibrate(
    network: Applied,
    variables: PyTree,
    batches: Iterable[ArrayLike] | jax.Array,
    arch: Architecture,
) -> PyTree:
    """Variables whose running statistics are the means over some batches of clean inputs.

    Those of training are of other architectures and of attacked inputs. Where there is no norm the
    variables are as they were.

    Args:
      network: elastic, or plain with `arch` {}.
      variables: of it.
      batches: inputs [B, ...], one after the other.
      arch: of whom.
    """
    if STATISTICS not in variables:
        return variables
    before, sums, count = variables[STATISTICS], None, 0
    # Dropout wants a key; it lies behind all norms, whose statistics it does not change.
    given = {'key': jax.random.key(0)} | ({'arch': arch} if arch else {})
    for x in batches:
        after = network.apply(variables, jnp.asarray(x), train=True, **given).mutables[STATISTICS]
        # What the batch has said, undone of the mixing; of what is not live, what was there.
        said = jax.tree.map(lambda a, b: (a - MOMENTUM * b) / (1 - MOMENTUM), after, before)
        sums = said if sums is None else jax.tree.map(jnp.add, sums, said)
        count += 1
    if sums is None:
        raise ValueError('recalibrate needs at least one batch.')
    return {**variables, STATISTICS: jax.tree.map(lambda x: x / count, sums)}


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
