"""Attention away from what a negative text says, inside of a network (NASA of SNOOPI).

    own = negative.away(own, {'text': y}, strength=0.5)      a denoiser as before

Source: arXiv:2412.02687. Generators of one step, of which there is no more guidance between two
outputs, leave out what the negative text names.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models.latent_parts import Attention
from kd.sampling.denoiser import Condition, Denoiser

# Fields along whose tokens a negative text follows.
TEXT, MASK = 'text', 'mask'


def away(denoiser: Denoiser, negative: Condition, strength: jax.Array | float) -> Denoiser:
    """A denoiser whose attentions to the text are Z = Z+ - strength Z-; see `attend_away`.

    Both texts go through the network as one, with projections token by token, and the image
    attends to each by itself: one call, and a little more than it was. Of networks with attention
    to a text alone, such as UNets, PixArt and Wan; where text and image attend as one nothing is
    done.

    Args:
      denoiser: told a text.
      negative: `text` [B or 1, M, C] and, where the network has one, `mask` bool [B or 1, M].
      strength: alpha, a number or [B]. The paper has .1 for Stable Diffusion 1.5, .2 for 2.1 and .5
        for PixArt-alpha; 0 is the denoiser itself.

    Raises:
      ValueError: a denoiser without such attention.
    """

    def apply(variables: Any, x: jax.Array, t: jax.Array, condition: Condition, **how: Any) -> Any:
        count, told, seen = condition[TEXT].shape[1], dict(condition), list[str]()
        for name in (TEXT, MASK):
            if name in condition:
                other = jnp.broadcast_to(
                    negative[name], (len(x), *jnp.shape(negative[name])[1:])
                )  # fmt: skip
                told[name] = jnp.concatenate([condition[name], other], axis=1)

        def both(call, args, kwargs, context):
            module = context.module
            to_text = isinstance(module, Attention) and module.joint == 'none' and len(args) > 1
            if context.method_name == '__call__' and to_text and args[1] is not None:
                seen.append(module.name or '')
                kwargs = {**kwargs, 'away': (count, strength)}
            return call(*args, **kwargs)

        with nn.intercept_methods(both):
            said = denoiser.apply(variables, x, t, told, **how)
        if not seen:
            raise ValueError('away: the network has no attention to its text alone.')
        return said

    return denoiser._replace(apply=apply)
