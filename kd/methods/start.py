"""Starting a stage from the weights of an earlier one.

    minimize(loss, context.tx, start.from_reference(network.init, context))

A transform says how the variables of the reference become the stage's own, where the two are not
alike: `transform(reference, own) -> variables`, both trees {'params': ..., **mutables}, or those of
each part by name where the method has several. Write your own, or use

    pick('encoder')                                    the encoder of an autoencoder
    copy_blocks({'block0': 'block1', ...}, keep='.')   blocks of a deeper network, the rest anew
    to_parts(generator=whole, fake=whole)              one tree into several parts
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
from kd.state import PyTree, path_name

# Name of the reference, in a stage's `references`, whose weights a stage starts from.
START = 'start'

Transform = Callable[[PyTree, PyTree], PyTree]


def whole(reference: PyTree, own: PyTree) -> PyTree:
    """The reference as it is."""
    del own
    return reference


def from_reference(init: Init, context: Context, *, transform: Transform | None = None) -> Init:
    """`init` with the variables of `references.start`, if the stage has one.

    Args:
      init: what a method would start from; as it is if there is no such reference.
      context: of the stage.
      transform: see above; by default the reference is the network, or where the method has
        several parts, the part that is the stage's result.

    Raises:
      UserError: the variables are not of the names and shapes of the method's own.
    """
    if START not in context.references:
        return init

    def started(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        own = call_init(init, key, frozen)
        if transform is not None:
            made = transform(frozen[START], own)
        elif 'params' in own:
            made = frozen[START]
        else:
            made = {**own, context.config.result: frozen[START]}
        return _as(own, made, f'{context.stage}.references.{START}')

    return started


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


def to_parts(**transforms: Transform) -> Transform:
    """The reference into parts by name, each by a transform of its own; others stay as they are."""

    def transform(reference: PyTree, own: PyTree) -> PyTree:
        made = {part: one(reference, own[part]) for part, one in transforms.items()}
        return {**own, **made}

    return transform


def _as(own: PyTree, made: PyTree, where: str) -> PyTree:
    """`made` in the types of `own`, if it has the same names and shapes."""
    ours, theirs = _leaves(own), _leaves(made)
    for name in sorted(set(ours) | set(theirs)):
        shapes = [jnp.shape(x[name]) if name in x else 'nothing' for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where}: '{name}' is {shapes[1]} in what the stage would start from and "
                f'{shapes[0]} in the method; name another stage, or a transform.'
            )
    return jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), own, made)


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _matches(expression: str, name: str) -> bool:
    return bool(expression) and re.search(expression, name) is not None
