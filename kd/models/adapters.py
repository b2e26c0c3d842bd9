"""Low-rank adapters (LoRA, arXiv:2106.09685): what is trained beside matrices that are not.

    h = W x + (alpha / rank) B A x          A [rank, in] random, B [out, rank] zero at the start

A network with an `adapter` has leaves `lora_a` [in, rank] and `lora_b` [rank, out] beside the
kernels that are targets; any network with dense layers has one as `Adapted`. In a recipe

    network=dict(name='kd.models.adapters.lora', base=dict(...), rank=16, targets='attention/')

wraps the network of any block. The base is the stage's `references.start`, lies in
`state.frozen['start']` and is never copied: `state.params` has the adapters alone, as have the
optimiser and the checkpoints, and a reference to the same network is free. Trees are pure: `own`
takes the adapters out of one, `joined` puts them beside a base, `merged` into it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import callables, config
from kd.errors import UserError
from kd.parallel import layout
from kd.ranges import Count, Positive
from kd.state import path_name

# Leaves beside a kernel.
DOWN, UP = 'lora_a', 'lora_b'
# Modules beside a layer begin so, see `kd.models.guided`.
GUIDANCE = 'guidance_'
# New heads, see `kd.models.momentum_mmdit`.
MOMENTUM = 'momentum'
# Which kernels have them unless a recipe says so.
TARGETS = r'attention/(query|key|value|output)/kernel$'

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which kernels have adapters, and of which kind.

    Attributes:
      rank: of B A.
      alpha: alpha / rank is the factor on B A.
      targets: regular expression to be found in the path of a kernel, 'block0/mlp/up/kernel' or of
        stacked blocks 'blocks/mlp/up/kernel'.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    targets: str = TARGETS

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def takes(self, path: tuple[str, ...]) -> bool:
        """Whether the dense layer at a path is a target."""
        return re.search(self.targets, '/'.join((*path, 'kernel'))) is not None


class Dense(nn.Dense):
    """A dense layer that may have an adapter; its factors are float32 and compute as it does.

    Attributes:
      adapter: None for none.
      dot_general: a `kd.parallel.layout.Product`.
    """

    adapter: Adapter | None = None
    dot_general: Any = layout.Product()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., in] to [..., features]."""
        out = super().__call__(inputs)
        if self.adapter is None or not self.adapter.takes(self.path):
            return out
        # Between them all ranks are whole.
        narrow = layout.Product(inputs=self.dot_general.inputs)
        wide = layout.Product(outputs=self.dot_general.outputs)
        return out + _product(self, self.adapter, inputs, out, narrow, wide)


# In +- 1 / sqrt(in), as PEFT draws A.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _product(
    layer: nn.Module, adapter: Adapter, inputs: jax.Array, out: jax.Array, narrow: Any, wide: Any
) -> jax.Array:
    """(alpha / rank) B A x, by factors that are the layer's own parameters."""
    shapes = (inputs.shape[-1], adapter.rank), (adapter.rank, out.shape[-1])
    down = layer.param(DOWN, _UNIFORM, shapes[0], jnp.float32)
    up = layer.param(UP, nn.initializers.zeros, shapes[1], jnp.float32)
    last = (((inputs.ndim - 1,), (0,)), ((), ()))
    inner = narrow(inputs.astype(out.dtype), down.astype(out.dtype), last)
    return adapter.scale * wide(inner, up.astype(out.dtype), last)


class Adapted(nn.Module):
    """A network whose dense layers have adapters, in its parameters and beside them.

    Attributes:
      base: the network, that of `diffusers` for example; convolutions have no adapters.
      adapter: which of its layers are targets.
    """

    base: nn.Module
    adapter: Adapter

    @property
    def num_classes(self) -> int | None:
        """Of the network, as all else that it says of itself."""
        return getattr(self.base, 'num_classes', None)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that it is told."""
        own = ('label',) if self.num_classes is not None else ()
        return tuple(getattr(self.base, 'conditions', own))

    @property
    def data_scale(self) -> float:
        """Deviation of the noise."""
        return getattr(self.base, 'data_scale', 1.0)

    @property
    def modes(self) -> int:
        """Of a mixture of momenta; 0 for a network that says none."""
        return getattr(self.base, 'modes', 0)

    def example_inputs(self, spec: Mapping[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch of one."""
        base: Any = self.base
        return base.example_inputs(spec)

    def setup(self) -> None:
        nn.share_scope(self, self.base)

    def __call__(self, *inputs: jax.Array, **told: Any) -> Any:
        """What the network says with its adapters."""

        def beside(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out, layer = call(*args, **kwargs), context.module
            dense = type(layer) is nn.Dense and context.method_name == '__call__'
            if not dense or not self.adapter.takes(layer.path):
                return out
            plain = jax.lax.dot_general
            return out + _product(layer, self.adapter, args[0], out, plain, plain)

        with nn.intercept_methods(beside):
            return self.base(*inputs, **told)


def lora(
    num_classes: int | None = None,
    *,
    base: Mapping[str, Any],
    rank: Count = 8,
    alpha: Positive = 16.0,
    targets: str = TARGETS,
) -> nn.Module:
    """The network of a block with adapters.

    Args:
      num_classes: of the data, for a base that takes it and does not say.
      base: block of the network.
      rank, alpha, targets: see `Adapter`.

    Raises:
      UserError: an expression that is none.
    """
    block = dict(base)
    takes = inspect.signature(callables.resolve(block.get('name', ''))).parameters
    if num_classes is not None and 'num_classes' in takes:
        block.setdefault('num_classes', num_classes)
    module = config.build(block, where='base')
    try:
        re.compile(targets)
    except re.error as error:
        raise UserError(f"targets='{targets}' is no regular expression: {error}.") from error
    adapter = Adapter(rank, alpha, targets)
    if 'adapter' in type(module).__dataclass_fields__:
        return module.clone(adapter=adapter)
    return Adapted(module, adapter)


def adapter_of(module: nn.Module) -> Any:
    """What a network trains beside its base, an `Adapter` or one of another kind with `targets`.

    None for a network that is trained itself.
    """
    return getattr(module, 'adapter', None)


def plain(module: Any) -> Any:
    """A network without its adapters, which has the parameters of its base."""
    if isinstance(module, Adapted):
        return module.base
    if 'adapter' in type(module).__dataclass_fields__:
        return module.clone(adapter=None)
    return module.clone(inner=plain(module.inner))


def check_merges(module: nn.Module, where: str) -> None:
    """Refuses adapters that are part of no kernel.

    Raises:
      UserError: adapters of another kind than `Adapter`.
    """
    adapter = adapter_of(module)
    if adapter is not None and not isinstance(adapter, Adapter):
        raise UserError(
            f'{where}: a {type(adapter).__name__} becomes part of no kernel, so that its stage is '
            'no teacher and no start; name the stage of its base.'
        )


def own(params: Tree) -> dict[str, Any]:
    """What is trained in a tree, the adapters and new heads, without all else."""
    return _kept(params, True)


def without(params: Tree) -> dict[str, Any]:
    """A tree without what `own` takes."""
    return _kept(params, False)


def _kept(params: Tree, beside: bool, top: bool = True) -> dict[str, Any]:
    found = {}
    for name, x in params.items():
        # Networks have modules of such names further down: 'guidance_embedder'.
        of_top = top and (name == MOMENTUM or name.startswith(GUIDANCE))
        if name in (DOWN, UP) or of_top:
            if beside:
                found[name] = x
        elif not isinstance(x, Mapping):
            if not beside:
                found[name] = x
        elif (inside := _kept(x, beside, False)) or not beside:
            found[name] = inside
    return found


def drawn(key: jax.Array, params: Tree, adapter: Adapter) -> dict[str, Any]:
    """Adapters beside the kernels [in, out] of any tree that are targets: A random, B zero.

    Also beside those of stacked blocks, [depth, in, out], each layer with its own A.

    With `merged` a network of any kind has them, whose matrices are then made at every call.

    Raises:
      UserError: there is no such kernel.
    """
    made: dict[str, Any] = {}
    for path, kernel in jax.tree_util.tree_flatten_with_path(params)[0]:
        *above, last = path_name(path).split('/')
        if last != 'kernel' or kernel.ndim not in (2, 3) or not adapter.takes(tuple(above)):
            continue
        key, own = jax.random.split(key)
        place = made
        for name in above:
            place = place.setdefault(name, {})
        place[DOWN] = _down(own, kernel.shape, adapter.rank)
        place[UP] = jnp.zeros((*kernel.shape[:-2], adapter.rank, kernel.shape[-1]), jnp.float32)
    if not made:
        raise UserError(f"targets='{adapter.targets}' matches no kernel.")
    return made


def _down(key: jax.Array, shape: tuple[int, ...], rank: int) -> jax.Array:
    """A beside a kernel of a shape."""
    if len(shape) == 2:
        return _UNIFORM(key, (shape[0], rank), jnp.float32)
    return jax.vmap(lambda one: _down(one, shape[1:], rank))(jax.random.split(key, shape[0]))


def merged(base: Tree, adapters: Tree, scale: float) -> dict[str, Any]:
    """The base's parameters with W + scale A B for each kernel W [..., in, out] that has adapters.

    Heads that the base does not have stay what they are. In float32, or in the base's type if that
    is wider, and then in the base's type. Also of stacked blocks, [depth, in, out].
    """
    made = dict(base)
    for name, x in adapters.items():
        if name == MOMENTUM:
            made[name] = x
        elif isinstance(x, Mapping):
            made[name] = merged(base[name], x, scale)
    if DOWN in adapters:
        kernel = jnp.asarray(base['kernel'])
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        change = jnp.matmul(adapters[DOWN], adapters[UP], precision='highest')
        made['kernel'] = (kernel.astype(wide) + scale * change.astype(wide)).astype(kernel.dtype)
    return made
