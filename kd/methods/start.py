"""Starting a stage from the weights of an earlier one.

    minimize(loss, context.tx, start.from_reference(network.init, context))

A transform says how the variables of the reference become the stage's own, where the two are not
alike: `transform(reference, own) -> variables`, both trees {'params': ..., **mutables}, or those of
each part by name where the method has several. Write your own, or use

    pick('encoder')                                    the encoder of an autoencoder
    copy_blocks({'block0': 'block1', ...}, keep='.')   blocks of a deeper network, the rest anew
    to_parts(generator=whole, fake=whole)              one tree into several parts
    all_but('^head')                                   all but a head of other classes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.method import Init
from kd.method.base import call_init
from kd.models import adapters, moe
from kd.references import START
from kd.state import PyTree, path_name

Transform = Callable[[PyTree, PyTree], PyTree]


def whole(reference: PyTree, own: PyTree) -> PyTree:
    """The reference as it is."""
    del own
    return reference


def from_reference(
    init: Init,
    context: Context,
    *,
    transform: Transform | None = None,
    beside: Transform | None = None,
) -> Init:
    """`init` with the variables of `references.start`, if the stage has one.

    Of a network with adapters that reference stays the base, and the adapters alone are what a
    method starts from and trains. Of a network with experts and a dense reference each expert
    starts as a copy of the reference's MLP, and routers anew (`kd.models.moe.upcycle`).

    Args:
      init: what a method would start from; as it is if there is no such reference.
      context: of the stage.
      transform: see above; by default the reference is the network, or where the method has
        several parts, the part that is the stage's result.
      beside: of a network with adapters, how these and its new heads begin; as they are drawn
        without.

    Raises:
      UserError: the variables are not of the names and shapes of the method's own.
    """
    network = context.optional_network
    adapter = adapters.adapter_of(network.module) if network else None
    if adapter is not None:
        return _adapters(init, context, transform, beside, adapter.targets)
    if START not in context.references:
        return init

    def started(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        own = call_init(init, key, frozen)
        if transform is not None:
            made = transform(frozen[START], own)
        elif 'params' in own:
            made = _grown(frozen[START], own)
        else:
            result = context.config.result
            made = {**own, result: _grown(frozen[START], own[result])}
        return as_own(own, made, f'{context.stage}.references.{START}')

    return started


def _adapters(
    init: Init,
    context: Context,
    transform: Transform | None,
    beside: Transform | None,
    targets: str,
) -> Init:
    """`init` of the adapters of the result alone."""
    where = f'{context.stage}.references.{START}'
    if START not in context.references or transform is not None:
        raise UserError(
            f'{context.stage}.network has adapters, which stand beside a whole network: name it as '
            f'{where}, and take no blocks of it.'
        )

    def started(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        made = call_init(init, key, frozen)
        whole = made if 'params' in made else made[context.config.result]
        _check({**whole, 'params': adapters.without(whole['params'])}, frozen[START], where)
        ours = {**whole, 'params': adapters.own(whole['params'])}
        if not set(ours['params']) - {adapters.MOMENTUM}:
            raise UserError(f"{context.stage}.network.targets='{targets}' matches no kernel.")
        if beside is not None:
            ours = as_own(ours, beside(frozen[START], ours), where)
        return ours if 'params' in made else {**made, context.config.result: ours}

    return started


def _grown(reference: PyTree, own: PyTree) -> PyTree:
    """The reference, with experts where the own network has them."""
    return {**reference, 'params': moe.upcycle(reference['params'], own['params'])}


def copy_blocks(paths: Mapping[str, str], *, keep: str = '', drop: str = '') -> Transform:
    """Own subtrees as copies of subtrees of the reference, in every collection.

    Args:
      paths: {own path: path in the reference}, such as 'encoder/block0'; '' is the whole tree.
      keep: regular expression of own paths that stay as they are.
      drop: regular expression of paths of the reference that need not go anywhere.

    The transform raises `UserError` for an own leaf that is neither filled nor kept, and for a leaf
    under one of the paths in the reference that is neither used nor dropped.
    """

    def transform(reference: PyTree, own: PyTree) -> PyTree:
        theirs, used = _leaves(reference), set[str]()

        def leaf(path: tuple, x: Any) -> Any:
            collection, _, name = path_name(path).partition('/')
            for to, source in paths.items():
                if name == to or name.startswith(f'{to}/' if to else ''):
                    rest = name.removeprefix(to).removeprefix('/')
                    found = '/'.join(filter(None, (collection, source, rest)))
                    if found in theirs:
                        used.add(found)
                        return theirs[found]
            if not _matches(keep, name):
                raise UserError(f"Of the own '{collection}/{name}' the reference has nothing.")
            return x

        made = jax.tree_util.tree_map_with_path(leaf, own)
        for name in set(theirs) - used:
            inside = name.partition('/')[2]
            taken = any(
                inside.startswith(f'{source}/' if source else '') for source in paths.values()
            )
            if taken and not _matches(drop, inside):
                raise UserError(f"'{name}' of the reference goes nowhere.")
        return made

    return transform


def pick(path: str, *, keep: str = '', drop: str = '') -> Transform:
    """A subtree of the reference as the whole network; `keep` and `drop` as of `copy_blocks`."""
    return copy_blocks({'': path}, keep=keep, drop=drop)


def all_but(fresh: str) -> Transform:
    """The reference, but for leaves whose path is matched by `fresh`, which begin anew.

    What the reference has there goes nowhere, whether or not the own network has such leaves. The
    transform raises `UserError` for any other leaf of the reference that the own network lacks, and
    the other way round.
    """

    def transform(reference: PyTree, own: PyTree) -> PyTree:
        theirs = _leaves(reference)

        def leaf(path: tuple, x: Any) -> Any:
            name = path_name(path)
            if _matches(fresh, name.partition('/')[2]):
                return x
            if name not in theirs:
                raise UserError(f"Of the own '{name}' the reference has nothing.")
            return theirs[name]

        made = jax.tree_util.tree_map_with_path(leaf, own)
        for name in sorted(set(theirs) - set(_leaves(own))):
            if not _matches(fresh, name.partition('/')[2]):
                raise UserError(f"'{name}' of the reference goes nowhere.")
        return made

    return transform


def to_parts(**transforms: Transform) -> Transform:
    """The reference into parts by name, each by a transform of its own; others stay as they are."""

    def transform(reference: PyTree, own: PyTree) -> PyTree:
        made = {part: one(reference, own[part]) for part, one in transforms.items()}
        return {**own, **made}

    return transform


def as_own(own: PyTree, made: PyTree, where: str) -> PyTree:
    """`made` in the types of `own`, if it has the same names and shapes."""
    _check(own, made, where)
    return jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), own, made)


def _check(own: PyTree, made: PyTree, where: str) -> None:
    """Raises `UserError` for the first name or shape in which two trees differ."""
    ours, theirs = _leaves(own), _leaves(made)
    for name in sorted(set(ours) | set(theirs)):
        shapes = [jnp.shape(x[name]) if name in x else 'nothing' for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where}: '{name}' is {shapes[1]} in what the stage would start from and "
                f'{shapes[0]} in the method; name another stage, or a transform.'
            )


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _matches(expression: str, name: str) -> bool:
    return bool(expression) and re.search(expression, name) is not None
