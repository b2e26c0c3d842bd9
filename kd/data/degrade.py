"""Writes what restorers of latents learn from: crops of pictures, degraded, and latents of both.

    python -m kd.data.degrade PICTURES --encoder=hf:DIR --to=DATA/imagenet256_realesrgan/train \\
        --count=240000
    python -m kd.data.degrade PICTURES --encoder=hf:DIR --to=DATA/sr_x4/train --nested --scale=4 \\
        --size=512 --name=none --count=100000

| field | what |
|---|---|
| input | latents of a crop of `--size` pixels, turned from left to right by a coin |
| low | the picture that `kd.data.degradation.second_order` leaves of it, in [-1, 1] |
| anchor | latents of the low picture, enlarged as PyTorch does (bicubic) |

or, with `--nested`, of a cascade of scales (YONOS-SR), whose first picture is that which
`second_order` leaves at half of the sides, and each further one half of the one before (PyTorch's
antialiased bicubic), so that it is made of that alone:

| field | what |
|---|---|
| input | as above |
| low | latents of the picture at `--scale`, enlarged to the size of the crop |
| easier | the same of the one before, from a scale of 4 on |
| image | the crop, in [-1, 1] |

Example i is drawn by `--seed` and i alone: which picture, where, and how it is degraded; cascades
of one seed that end at several scales have the same pictures. The encoder is a directory of
diffusers, `VQModel` or `AutoencoderKL`; without one the crops themselves are written, and the
enlarged pictures. `kd.data.latents` reads the files; their `encoder` is called as `--name` says.
With `--keep` the low picture is enlarged too, as of faces (a scale of 1).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kd import files, resample
from kd.data import pictures as pictures_lib
from kd.data.degradation import second_order
from kd.data.latents import MANIFEST, file_of
from kd.data.patches import LOW, to_unit
from kd.data.transforms.low_resolution import EASIER
from kd.errors import UserError
from kd.io.coder import coder
from kd.io.progress import Progress
from kd.process import command, path_argument

PER_FILE = 1_024
# Pictures that are drawn for a crop until one is large enough.
_TRIES = 100
# Latents of pictures [B, H, W, 3] in [-1, 1].
Encode = Callable[[jax.Array], jax.Array]


def drawn(found: Sequence[Path], size: int, seed: int, number: int) -> np.ndarray:
    """The crop of example `number`, float32 [size, size, 3] in [-1, 1], of one of these files.

    Raises:
      UserError: a hundred pictures, one after the other, are smaller than that.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    for _ in range(_TRIES):
        picture = pictures_lib.read(found[int(rng.integers(len(found)))])
        if min(picture.shape[:2]) >= size:
            break
    else:
        raise UserError(f'--size={size}: {_TRIES} pictures, drawn by lot, are all smaller.')
    top, left = (int(rng.integers(side - size + 1)) for side in picture.shape[:2])
    crop = to_unit(picture[top : top + size, left : left + size])
    return crop[:, ::-1] if rng.integers(2) else crop


def made(
    crops: jax.Array, keys: jax.Array, encode: Encode, scale: int, keep: bool = False
) -> dict[str, jax.Array]:
    """Fields of examples, see the module."""
    low = jax.vmap(lambda key, crop: second_order(key, crop, scale))(keys, crops)
    large = enlarged(low, crops.shape[1:3])
    return {
        'input': encode(crops),
        'low': large if keep else low,
        'anchor': encode(large),
    }


def nested(crops: jax.Array, keys: jax.Array, encode: Encode, scale: int) -> dict[str, jax.Array]:
    """Fields of examples of a cascade, see the module."""
    small = jax.vmap(lambda key, crop: second_order(key, crop, 2))(keys, crops)
    found = [small]
    for _ in range(scale.bit_length() - 2):
        sides = found[-1].shape[1] // 2, found[-1].shape[2] // 2
        found.append(resample.resize(found[-1], sides, 'torch_antialias'))
    told = dict(zip((LOW, EASIER), found[::-1], strict=False))
    latents = {name: encode(enlarged(x, crops.shape[1:3])) for name, x in told.items()}
    return {'input': encode(crops), **latents, 'image': crops}


def enlarged(low: jax.Array, size: Sequence[int]) -> jax.Array:
    """Low pictures [B, h, w, C] at another size, as PyTorch does it (bicubic)."""
    return resample.resize(low, (size[0], size[1]), 'torch')


def write(
    folder: Path,
    found: Sequence[Path],
    encode: Encode,
    *,
    name: str,
    count: int,
    size: int,
    scale: int = 4,
    keep: bool = False,
    cascade: bool = False,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes examples in files of `PER_FILE`; returns the manifest.

    Raises:
      UserError: pictures smaller than a crop, sides that do not divide, or a cascade to a scale
        that is no power of 2.
    """
    if size % scale:
        raise UserError(f'--size={size} must be a multiple of --scale={scale}.')
    if cascade and (scale < 2 or scale & (scale - 1) or keep):
        raise UserError(f'--nested is of scales 2, 4, 8, got --scale={scale}, and without --keep.')
    folder.mkdir(parents=True, exist_ok=True)
    base, shapes = jax.random.key(seed), {}
    of = nested if cascade else functools.partial(made, keep=keep)
    compiled = jax.jit(lambda crops, keys: of(crops, keys, encode, scale))
    progress = Progress('degrade', start=0, total=count)
    for start in range(0, count, PER_FILE):
        place = file_of(folder, start // PER_FILE)
        stop = min(start + PER_FILE, count)
        parts = []
        for first in range(start, stop, batch):
            # The last batch is filled up with examples that are left out again.
            numbers = first + np.arange(batch)
            crops = np.stack([drawn(found, size, seed, int(i)) for i in numbers])
            keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(numbers))
            fields = jax.device_get(compiled(crops, keys))
            parts.append({k: x[: stop - first] for k, x in fields.items()})
            progress.update(min(first + batch, stop))
        tensors = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        shapes = {k: list(x.shape[1:]) for k, x in tensors.items()}
        with files.replacing(place) as partial:
            safetensors.numpy.save_file(tensors, partial)
    progress.close()
    manifest = dict(encoder=name, examples=count, per_file=PER_FILE, fields=shapes)
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.data.degrade', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('pictures', type=path_argument, metavar='DIRECTORY')
    parser.add_argument('--encoder', default='', metavar='hf:DIRECTORY')
    parser.add_argument('--name', default='vq_f4', help='of the encoder; default vq_f4')
    parser.add_argument('--to', type=path_argument, required=True, metavar='DIRECTORY')
    parser.add_argument('--count', type=int, required=True, help='examples')
    parser.add_argument('--size', type=int, default=256, help='of a crop; default 256')
    parser.add_argument('--scale', type=int, default=4, help='default 4')
    parser.add_argument('--keep', action='store_true', help='low pictures of the size of crops')
    parser.add_argument('--nested', action='store_true', help='pictures of a cascade of scales')
    parser.add_argument('--batch', type=int, default=16, help='examples at a time; default 16')
    parser.add_argument('--seed', type=int, default=0)
    of = parser.parse_args(argv)
    if min(of.count, of.size, of.scale, of.batch) < 1:
        raise UserError('--count, --size, --scale and --batch are whole numbers from 1.')
    if of.seed < 0:
        raise UserError(f'--seed={of.seed} must be a whole number from 0.')
    places = sorted(Path(of.pictures).rglob('*'))
    found = [place for place in places if place.suffix.lower() in pictures_lib.SUFFIXES]
    if not found:
        raise UserError(f'{of.pictures} has no pictures of {", ".join(pictures_lib.SUFFIXES)}.')
    options = dict(count=of.count, size=of.size, scale=of.scale, keep=of.keep, batch=of.batch)
    encode = coder(of.encoder, of.size).encode
    manifest = write(
        Path(of.to), found, encode, name=of.name, seed=of.seed, cascade=of.nested, **options
    )
    print(f'{manifest["examples"]} examples in {of.to}')
    return 0


if __name__ == '__main__':
    command(main)
