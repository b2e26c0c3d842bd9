"""What DMAE's teacher costs where it stops at its tap, on the patches that are seen.

    python -m kd.benchmarks.dmae

Operations of a forward pass of ViT-L/16 at 224 pixels by XLA's cost analysis, per image, as ratios:
to a pass of the whole encoder over the whole image and of its decoder of 8 blocks, 512 wide, which
is what distillation from complete outputs would take; and to the same on the seen patches, which
the released loop runs although it uses neither output.

| 75 % hidden | target | found |
|---|---|---|
| over the whole encoder, all patches, and the decoder | at most .35 | .17 |
| over the released loop | at most .60 | .56 |
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd import process
from kd.methods.vision.dmae import features
from kd.models.masked_autoencoder import Decoder, Encoder, preset, visible_patches
from kd.network import from_linen

WHOLE, RELEASED = 0.35, 0.60


def measure(
    encoder: Encoder, decoder: dict[str, Any], *, side: int, ratio: float, batch: int = 8
) -> dict[str, float]:
    """Operations of the stopped teacher over those of `whole` and of `released`.

    Args:
      encoder: the teacher, tapped at three quarters of its depth.
      decoder: keywords of its `Decoder`.
      side: of the images, of three channels.
      ratio: share of hidden patches.
      batch: images.
    """
    grid = side // encoder.patch
    patches = grid**2
    visible = visible_patches(patches, ratio)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    keep, restore = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (visible, patches))
    network = from_linen(encoder, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    head = Decoder(grid=(grid, grid), outputs=encoder.patch**2 * 3, **decoder)
    tokens = jax.ShapeDtypeStruct((batch, 1 + visible, encoder.width), jnp.float32)
    beside = jax.eval_shape(head.init, jax.random.key(0), tokens, restore)
    tap = (f'block{3 * encoder.depth // 4 - 1}',)

    def stopped(variables, images, keep):
        return features(network, variables, images, keep, tap)

    def encoded(variables, images, keep=None):
        return network.apply(variables, images, keep=keep).logits

    decoded = _flops(head.apply, beside, tokens, restore)
    taught = _flops(stopped, variables, images, keep)
    return {
        'whole': taught / (_flops(encoded, variables, images) + decoded),
        'released': taught / (_flops(encoded, variables, images, keep) + decoded),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the ratios; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.dmae')
    parser.add_argument('--encoder', default='vit_l', help='a preset')
    parser.add_argument('--ratio', type=float, default=0.75, help='share of hidden patches')
    arguments = parser.parse_args(argv)
    decoder = dict(width=512, depth=8, heads=16)
    found = measure(preset(arguments.encoder), decoder, side=224, ratio=arguments.ratio)
    print(f'{arguments.encoder}, {arguments.ratio:.0%} hidden: operations of the stopped teacher')
    for name, target in (('whole', WHOLE), ('released', RELEASED)):
        print(f'over {name}: {found[name]:.3f}, target at most {target}')
    return int(found['whole'] > WHOLE or found['released'] > RELEASED)


def _flops(function: Any, *arguments: Any) -> float:
    analysis: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return analysis['flops']


if __name__ == '__main__':
    process.command(main)
