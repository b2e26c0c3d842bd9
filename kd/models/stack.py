"""Networks as stacks of blocks that can be addressed, gated, dropped and folded one by one.

    net = stack(module)
    carry, context = net.embed(variables, *inputs, **told)
    for name in net.names:
        carry = net.block(net.params(variables, name), name, carry, context)
    out = net.head(variables, carry, context)        # what module.apply says, bit for bit

A module that is one has

    blocks      {block: its branches} of the network of which nothing is dropped, in order
    dropped     names of blocks and branches that are not there: 'block3', 'block5/mlp'
    groups      {name of parameters: blocks in them}; of another name than the block they hold, the
                parameters have a leading axis
    layout      layout(block), whose the parameters of a block are, see `Layout`
    maps        {linear map: which of the streams of the carry it is of}
    embedded, said and block_of(block), the parts; call_block(apply, block, carry, context, gates,
    train) and entered(block, carry), how a block is called

Names of what is left when something is dropped stay as they were, so that `restricted` finds the
weights of a smaller network among those of a larger one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError
from kd.models.denoiser import Denoised
from kd.state import PyTree

__all__ = [
    *('Layout', 'Stack', 'assembled', 'branches_there', 'check_names', 'inner_of', 'replaced'),
    *('restricted', 'sizes', 'stack'),
]


class Layout(NamedTuple):
    """Whose the parameters of a block are.

    Attributes:
      modules: {name of a module: its branch}; others belong to the block.
      modulations: {name of a module whose dense layer has slices: the branch of each slice}; those
        of branches that are dropped are not there.
    """

    modules: Mapping[str, str]
    modulations: Mapping[str, tuple[str, ...]]


class Stack(NamedTuple):
    """A network by its blocks.

    Attributes:
      names: of the blocks that are there, in order.
      branches: {block: its branches that are there}.
      embed: `embed(variables, *inputs, **told) -> (carry, context)`.
      params: `params(variables, name)`, the parameters of one block alone.
      block: `block(params, name, carry, context, *, gates=None, train=False) -> carry`, with gates
        [branches] that these are multiplied by, None for ones.
      fold: `fold(variables, names, carry, context) -> carry`, blocks one after the other; those
        that lie stacked are scanned.
      head: `head(variables, carry, context) -> out`.
    """

    names: tuple[str, ...]
    branches: dict[str, tuple[str, ...]]
    embed: Callable[..., tuple[Any, Any]]
    params: Callable[[PyTree, str], PyTree]
    block: Callable[..., Any]
    fold: Callable[[PyTree, Sequence[str], Any, Any], Any]
    head: Callable[[PyTree, Any, Any], jax.Array]


def stack(module: Any) -> Stack:
    """The stack that a module is.

    That of a denoiser (`kd.models.denoiser`) takes (t, x_t) and says E[x0 | x_t].

    Raises:
      UserError: a module without addressable blocks.
    """
    if isinstance(module, Denoised):
        return _denoising(module)
    check_stack(module)
    there = branches_there(module.blocks, module.dropped)

    def embed(variables, *inputs, **told):
        return module.apply(variables, *inputs, method='embedded', **told)

    def block(params, name, carry, context, *, gates=None, train=False):
        one = module.block_of(name)

        def apply(*inputs, **how):
            return one.apply({'params': params}, *inputs, **how)

        return module.call_block(apply, name, carry, context, gates=gates, train=train)

    def head(variables, carry, context):
        return module.apply(variables, carry, context, method='said')

    def fold(variables, names, carry, context):
        for group, members in module.groups.items():
            places = [members.index(name) for name in names if name in members]
            if not places:
                continue
            if places != list(range(places[0], places[-1] + 1)):
                raise ValueError(f'fold: {list(names)} are not blocks one after the other.')
            params = variables['params'][group]
            if (group,) == members:
                carry = block(params, group, carry, context)
                continue

            def one(carry, params, name=members[0]):
                return block(params, name, carry, context), None

            own = jax.tree.map(lambda x, at=slice(places[0], places[-1] + 1): x[at], params)
            carry = jax.lax.scan(one, module.entered(members[0], carry), own)[0]
        return carry

    return Stack(tuple(there), there, embed, _params_of(module), block, fold, head)


def _denoising(module: Denoised) -> Stack:
    inner = stack(module.inner)

    def embed(variables, t, x, **told):
        carry, context = inner.embed(variables, *module.asked(t, x), **told)
        return carry, (context, t, x)

    def block(params, name, carry, context, **how):
        return inner.block(params, name, carry, context[0], **how)

    def head(variables, carry, context):
        inside, t, x = context
        return module.answered(inner.head(variables, carry, inside), t, x)

    def fold(variables, names, carry, context):
        return inner.fold(variables, names, carry, context[0])

    return inner._replace(embed=embed, block=block, fold=fold, head=head)


def inner_of(module: Any) -> Any:
    """The network whose blocks are a module's: that within a denoiser, or the module itself."""
    inner = module.inner if isinstance(module, Denoised) else module
    check_stack(inner)
    return inner


def check_stack(module: nn.Module, where: str = 'stack') -> None:
    """Refuses a module without addressable blocks.

    Raises:
      UserError: it is one.
    """
    if not hasattr(module, 'call_block'):
        raise UserError(
            f'{where}: the blocks of a {type(module).__name__} cannot be addressed; those of '
            'kd.models.dit.DiT and kd.models.mmdit.MMDiT can.'
        )


def _params_of(module: Any) -> Callable[[PyTree, str], PyTree]:
    """(variables, block) -> its parameters."""

    def params(variables: PyTree, name: str) -> PyTree:
        for group, members in module.groups.items():
            if name in members:
                found = variables['params'][group]
                place = members.index(name)
                return found if group == name else jax.tree.map(lambda x, at=place: x[at], found)
        raise KeyError(name)

    return params


def restricted(module: Any, own: Any) -> Callable[[PyTree, PyTree], PyTree]:
    """A transform for `kd.methods.start.from_reference`: of a network of which more is left.

    Args:
      module: of the reference.
      own: a module of the same kind, of which more is dropped.

    Parameters that the reference does not have, linear maps, stay as the own network begins.

    Raises:
      UserError: networks of other kinds; blocks that the reference does not have.
    """
    module, own = inner_of(module), inner_of(own)
    of = _params_of(module)
    theirs = branches_there(module.blocks, module.dropped)
    ours = branches_there(own.blocks, own.dropped)
    lost = [name for name in ours if not set(ours[name]) <= set(theirs.get(name, ()))]
    if type(module) is not type(own) or lost:
        raise UserError(
            f'the network is no part of the one that it would start from'
            f'{f", which has no whole {lost[0]}" if lost else ""}.'
        )

    def transform(reference: PyTree, start: PyTree) -> PyTree:
        blocks = {
            name: _kept(
                of(reference, name), (module.layout(name), own.layout(name)),
                (theirs[name], ours[name]),
            )
            for name in ours
        }  # fmt: skip
        rest = {name: x for name, x in reference['params'].items() if name not in module.groups}
        made = assembled(own, blocks)
        begun = {name: _filled(start['params'][name], x) for name, x in made.items()}
        return {**reference, 'params': rest | begun}

    return transform


def assembled(module: Any, blocks: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Parameters by group, of those of each block."""
    made = {}
    for group, members in inner_of(module).groups.items():
        own = [blocks[name] for name in members]
        made[group] = own[0] if (group,) == members else jax.tree.map(_stacked, *own)
    return made


def replaced(module: Any, variables: PyTree, blocks: Mapping[str, PyTree]) -> PyTree:
    """Variables of a network with other parameters of some of its blocks."""
    net = stack(module)
    every = {name: blocks.get(name) or net.params(variables, name) for name in net.names}
    return {**variables, 'params': {**variables['params'], **assembled(module, every)}}


def _stacked(*leaves: Any) -> jax.Array:
    return jnp.stack(leaves)


def _filled(own: PyTree, found: PyTree) -> PyTree:
    """The own tree with what was found in it."""
    made = {}
    for name, x in own.items():
        if name not in found:
            made[name] = x
        else:
            made[name] = _filled(x, found[name]) if isinstance(x, Mapping) else found[name]
    return made


def _kept(
    params: PyTree, layouts: tuple[Layout, Layout], branches: tuple[Sequence[str], Sequence[str]]
) -> PyTree:
    """Parameters of a block, whose layout and branches are the first, as far as the second go."""
    (theirs, ours), (before, left) = layouts, branches
    made = {}
    for name, tree in params.items():
        if name in theirs.modulations:
            stay = set(left) & set(ours.modulations[name])
            keep = [of in stay for of in theirs.modulations[name] if of in before]
            if any(keep):
                made[name] = jax.tree.map(lambda x, keep=keep: _slices(x, keep), tree)
        elif theirs.modules.get(name) is None or ours.modules.get(name) in left:
            made[name] = tree
    return made


def _slices(x: Any, keep: Sequence[bool]) -> Any:
    """The slices of the last axis that are kept."""
    parts = jnp.split(x, len(keep), axis=-1)
    return jnp.concatenate([p for p, k in zip(parts, keep, strict=True) if k], axis=-1)


def sizes(module: Any, variables: PyTree) -> dict[str, int]:
    """{'block3/mlp': parameters that go with it} of all branches that are there.

    What belongs to no branch of a block goes with its last one, and is counted nowhere.

    Args:
      module: the network.
      variables: of it, or their shapes.
    """
    module = inner_of(module)
    of, found = _params_of(module), {}
    for name, branches in branches_there(module.blocks, module.dropped).items():
        layouts = (module.layout(name),) * 2
        params = jax.eval_shape(lambda v, block=name: of(v, block), variables)
        for branch in branches:
            rest = [other for other in branches if other != branch]
            kept = functools.partial(_kept, layouts=layouts, branches=(branches, rest))
            found[f'{name}/{branch}'] = _count(params) - _count(jax.eval_shape(kept, params))
    return found


def _count(tree: PyTree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def branches_there(
    blocks: Mapping[str, Sequence[str]], dropped: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """{block: branches} of what is left when blocks and branches are dropped by name.

    Args:
      blocks: {block: its branches}, in order.
      dropped: 'block3' for a block, 'block5/mlp' for a branch of one. A block without branches is
        dropped.

    Raises:
      ValueError: a name that is not there.
    """
    check_names(dropped, blocks)
    left = {
        block: tuple(branch for branch in branches if f'{block}/{branch}' not in dropped)
        for block, branches in blocks.items()
        if block not in dropped
    }
    return {block: branches for block, branches in left.items() if branches}


def check_names(names: Sequence[str], blocks: Mapping[str, Sequence[str]]) -> None:
    """Refuses names that are neither of a block nor of one of its branches.

    Raises:
      ValueError: there is one.
    """
    for name in names:
        block, slash, branch = name.partition('/')
        if block not in blocks or (slash and branch not in blocks[block]):
            with_branches = f', with {list(blocks[block])}' if block in blocks else ''
            raise ValueError(
                f"there is no '{name}': blocks are {', '.join(blocks) or 'none'}{with_branches}."
            )
