"""Super-resolution from pairs of a small picture and the one it was made of (arXiv 1909.11856)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.patches import LOW, TARGET
from kd.errors import UserError
from kd.method import Batch, Method, Objective, minimize
from kd.methods import start
from kd.metrics import mean
from kd.ranges import Count
from kd.state import PyTree, State, path_name

# The one convolution of a network that a scale gives its shape.
_UPSAMPLER = 'upsampler'


def restoration(context: Context, *, micro_batches: Count = 1) -> Method:
    """A network learns what a small picture was made of, pixel by pixel.

        loss = mean |f(low) - target|

    over pictures in [0, 1]: half of the distances in [-1, 1], in which data and networks are.
    There is no teacher; what is called distillation is inside of the network, see
    `kd.models.imdn`. A stage with `references.start` goes on from there, also from a network of
    another scale: then the convolution before the pixels are shuffled begins anew.

    Args:
      context: the stage; data with `low` and `target` (`kd.data.patches.patches`), and a network of
        their scale.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: data of another kind.
    """
    if LOW not in context.spec or TARGET not in context.spec:
        raise UserError(
            f"{context.stage} wants pairs of pictures, '{LOW}' and '{TARGET}'; name "
            "kd.data.patches.patches as the data's source."
        )
    network = context.network

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        output = network.apply(
            state.variables(params=params), *network.of(batch), train=True, key=key
        )
        if output.logits.shape != batch[TARGET].shape:
            raise UserError(
                f'{context.stage}.network makes pictures of {output.logits.shape[1:3]} pixels, and '
                f'the data have {batch[TARGET].shape[1:3]}; give both the same scale.'
            )
        away = 0.5 * (output.logits - batch[TARGET])
        losses = mean(jnp.abs(away).mean((1, 2, 3)))
        error = mean(jnp.square(away).mean((1, 2, 3)))
        return Objective(losses, {'squared_error': error}, output.mutables)

    init = start.from_reference(network.init, context, transform=other_scale)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def other_scale(reference: PyTree, own: PyTree) -> PyTree:
    """The reference, but for an upsampler of another shape, which stays as it is begun."""
    if len({str(jax.tree.structure(tree)) for tree in (reference, own)}) > 1:
        return reference

    def leaf(path: tuple, theirs: jax.Array, mine: jax.Array) -> jax.Array:
        anew = _UPSAMPLER in path_name(path) and theirs.shape != mine.shape
        return mine if anew else theirs

    return jax.tree_util.tree_map_with_path(leaf, reference, own)
