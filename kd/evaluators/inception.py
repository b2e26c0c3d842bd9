"""Features of Inception-v3, for the Frechet inception distance (FID)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd import files
from kd.errors import UserError
from kd.io import safetensors, torch_weights
from kd.models.inception import InceptionV3

# Images at a time: at 299 pixels the first layers' activations are 20 MB an image.
_BATCH = 50
# Of the weights of December 2015; torchvision's have 1,000.
_CLASSES = 1008
# Classifiers, which features are taken before.
_LEFT = rf'^(fc|AuxLogits)\.|{torch_weights.COUNTERS}'


def inception_features(file: str | Path) -> Callable[[ArrayLike], np.ndarray]:
    """Images [N, H, W, 1 or 3] in [-1, 1] -> features float32 [N, 2048].

    Images are rounded to 8 bits, as those are that FID is computed of, and resized to 299 pixels.

    Args:
      file: the published weights as safetensors. PyTorch's port of them,
        `pt_inception-2015-12-05-6726825d.pth` of the package pytorch-fid, becomes such a file by
        the command in `kd.io.torch_weights`.

    Raises:
      UserError: no such file, or other weights, such as those of torchvision, whose features give
        other distances.
    """
    module, file = InceptionV3(), files.local(file, 'the weights')
    _check_origin(file)
    example = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), example)
    variables = torch_weights.load(file, abstract, dtype=jnp.float32, ignore=_LEFT)

    @jax.jit
    def apply(variables, images):
        return module.apply(variables, eight_bits(images))

    def features(images: ArrayLike) -> np.ndarray:
        images = np.asarray(images, np.float32)
        parts = []
        for first in range(0, len(images), _BATCH):
            part = images[first : first + _BATCH]
            # The last batch is filled up, so that nothing is recompiled.
            filled = np.resize(part, (_BATCH, *part.shape[1:]))
            parts.append(np.asarray(apply(variables, filled))[: len(part)])
        return np.concatenate(parts)

    return features


def eight_bits(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] as they are after being stored with 256 levels; clipped to the range."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5) / 127.5 - 1.0


def _check_origin(file: Path) -> None:
    """Refuses weights of another training by the number of their classes."""
    head = safetensors.load(file).get('fc.weight')
    if head is not None and head.shape[0] != _CLASSES:
        raise UserError(
            f'{file} has {head.shape[0]:,} classes: these are not the weights that FID is defined '
            f'with, which have {_CLASSES:,}. Take pt_inception-2015-12-05-6726825d.pth of the '
            'package pytorch-fid and convert it as kd/io/torch_weights.py says.'
        )
