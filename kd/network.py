"""A network as a pair of pure functions, so that methods know nothing of Flax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.state import PyTree


class Output(NamedTuple):
    """What a network returns.

    Attributes:
      logits: float32 [B, classes] (or whatever the network computes).
      mutables: updated variable collections in training mode, {} otherwise.
      features: captured intermediates by module path, {} unless asked for.
    """

    logits: jax.Array
    mutables: PyTree
    features: dict[str, jax.Array]


class Network(NamedTuple):
    """`init(key) -> variables`; `apply(variables, *inputs, train=, key=, capture=) -> Output`.

    Attributes:
      init, apply: as above; `init` is jitted.
      module: the linen module.
      inputs: shapes and dtypes of a batch of one.
      fields: names of the fields of a batch that are the inputs, in order.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., Output]
    module: nn.Module
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    fields: tuple[str, ...] = ('input',)

    def of(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        """The inputs in a batch: `network.apply(variables, *network.of(batch))`."""
        return tuple(batch[name] for name in self.fields)


def from_linen(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Network:
    """Wraps a linen module whose `__call__` takes `*inputs` and the keyword `train`.

    Equal modules get the same functions, so that JAX traces their shapes once.

    Args:
      module: the linen module. One that takes other fields of a batch than `input` names them, in
        the order of its arguments, in an attribute `fields`: ('input', 'positions', 'segments').
      *inputs: shapes and dtypes of a batch of one, e.g. `ShapeDtypeStruct((1, 8, 8, 1), f32)`.
    """
    try:
        hash(module)
    except TypeError:  # There is a list or an array among its attributes.
        return _network(module, inputs)
    return _shared(module, inputs)


def _network(module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Network:
    @jax.jit
    def init(key: jax.Array) -> PyTree:
        examples = [jnp.zeros(x.shape, x.dtype) for x in inputs]
        return module.init(key, *examples, train=False)

    def apply(
        variables: PyTree,
        *arrays: jax.Array,
        train: bool = False,
        key: jax.Array | None = None,
        capture: tuple[str, ...] = (),
        **kwargs,
    ) -> Output:
        collections = [name for name in variables if name != 'params'] if train else []
        rngs = {'dropout': key} if key is not None else None
        outputs, updated = module.apply(
            variables,
            *arrays,
            train=train,
            rngs=rngs,
            mutable=[*collections, 'intermediates'],
            capture_intermediates=(lambda m, _: '/'.join(m.path) in capture) if capture else False,
            **kwargs,
        )
        updated = dict(updated)
        features = _flatten(updated.pop('intermediates', {}))
        missing = set(capture) - set(features)
        if missing:
            raise ValueError(
                f'{type(module).__name__} has no feature {sorted(missing)}; '
                f'see feature_names(network) for its features.'
            )
        return Output(outputs, updated, {name: features[name] for name in capture})

    fields = getattr(module, 'fields', None) or ('input',)
    return Network(init, apply, module, inputs, tuple(fields))


_shared = lru_cache(maxsize=64)(_network)


def output_shape(network: Network) -> tuple[int, ...]:
    """Shape of what a network returns for a batch of one, such as (1, classes)."""
    try:
        begin = _shared_begin(network.module)
    except TypeError:  # As of `from_linen`.
        begin = _begin(network.module)
    return jax.eval_shape(begin, jax.random.key(0), *network.inputs)[0].shape


def feature_names(network: Network) -> tuple[str, ...]:
    """Names accepted by `apply(..., capture=names)`, in the order of computation."""
    names: list[str] = []

    def record(module: nn.Module, method: str) -> bool:
        if method == '__call__' and module.path:
            names.append('/'.join(module.path))
        return False

    _begun(network, capture_intermediates=record)
    return tuple(dict.fromkeys(names))


def feature_shape(network: Network, name: str) -> Any:
    """Shape and type of a feature for a batch of one."""
    _, variables = _begun(
        network, mutable=True, capture_intermediates=lambda m, _: '/'.join(m.path) == name
    )
    return _flatten(variables['intermediates'])[name]


def _begun(network: Network, **options: Any) -> Any:
    """(output, variables) as shapes while a network is initialised, when it needs no condition."""

    begin = _begin(network.module, **options)
    return jax.eval_shape(begin, jax.random.key(0), *network.inputs)


def _begin(module: nn.Module, **options: Any) -> Callable[..., Any]:
    def begin(key, *inputs):
        return module.init_with_output(key, *inputs, train=False, **options)

    return begin


_shared_begin = lru_cache(maxsize=64)(_begin)


def operations(network: Network) -> float:
    """Of a forward pass of a batch of one, by XLA's count before it optimises; loops count once."""
    variables = jax.eval_shape(network.init, jax.random.key(0))

    def forward(variables: PyTree, *inputs: jax.Array) -> jax.Array:
        return network.apply(variables, *inputs).logits

    analysis: Any = jax.jit(forward).lower(variables, *network.inputs).cost_analysis()
    return float(analysis['flops'])


def parameter_count(variables: PyTree) -> int:
    """Number of trained scalars."""
    return sum(x.size for x in jax.tree.leaves(variables['params']))


def _flatten(tree: Mapping, prefix: str = '') -> dict[str, jax.Array]:
    flat: dict[str, jax.Array] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f'{prefix}{name}/')
        elif name == '__call__':
            flat[prefix.rstrip('/')] = value[0]
    return flat
