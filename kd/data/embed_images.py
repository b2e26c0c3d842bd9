"""Writes the latents of pictures or videos, beside texts or alone, for `kd.data.latents`.

    python -m kd.data.embed_images PICTURES --model=/models/sdxl/vae --size=1024x1024 \
        --to=DATA/sdxl/train
    python -m kd.data.embed_images videos.txt --model=/models/wan/vae --size=480x832 --frames=81 \
        --to=DATA/wan/train

Pictures are those of a folder in the order of their names, or of a file with a place in each line,
as captions lie in the file of `kd.data.embed_texts`; relative places are below that file. A video
is a folder of its frames, or uint8 [T, H, W, 3] in a file of NumPy, of which the first `--frames`
are taken. All are scaled to cover `--size`, and cut in the middle.

The model is an autoencoder of diffusers, `AutoencoderKL`, `VQModel`, `AutoencoderKLWan` or that of
Qwen-Image. The field `input` is the mean of the latents, scaled as networks of latents take them.
Texts that are there already stay, and must be as many.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import files
from kd.data import latents, pictures
from kd.data.sources import DataError
from kd.errors import UserError
from kd.io import pretrained
from kd.models.autoencoder_wan import WanAutoencoder
from kd.process import command, path_argument

FIELD = 'input'

# uint8 [n, H, W, 3], or [n, T, H, W, 3] -> latents of these.
Encode = Callable[[np.ndarray], np.ndarray]


def encoder(model: str, batch: int) -> Encode:
    """The autoencoder of a directory of diffusers, as a function of at most `batch` pictures.

    Raises:
      UserError: another network, or pictures of sides that it does not take.
    """
    module: Any = pretrained.network(f'hf:{model}')
    if not hasattr(module, 'scaled'):
        raise UserError(
            f'{model} is a {type(module).__name__} and no autoencoder; name the folder `vae` of a '
            'model.'
        )
    of_videos, held = isinstance(module, WanAutoencoder), dict[str, Any]()

    @jax.jit
    def encoded(variables, x):
        single = of_videos and x.ndim == 4
        x = (x[:, None] if single else x).astype(jnp.float32) / 127.5 - 1
        mean = module.scaled(module.apply(variables, x, method='encode')[0])
        return mean[:, 0] if single else mean

    def encode(x: np.ndarray) -> np.ndarray:
        if x.ndim == 5 and not of_videos:
            raise UserError(
                f'{model} is a {type(module).__name__}, of pictures; leave out --frames.'
            )
        if not held:
            shape = (1, 1, *x.shape[1:]) if of_videos and x.ndim == 4 else (1, *x.shape[1:])
            given = jax.ShapeDtypeStruct(shape, jnp.float32)
            try:
                abstract = jax.eval_shape(module.init, jax.random.key(0), given)
            except ValueError as error:
                raise UserError(f'{model}: {error}') from error
            held['variables'] = pretrained.load(f'hf:{model}', abstract, dtype=jnp.float32)
        whole = np.concatenate([x, np.repeat(x[-1:], batch - len(x), axis=0)])
        return np.asarray(encoded(held['variables'], whole))[: len(x)]

    return encode


def write(
    folder: Path, found: Sequence[Path], encode: Encode, size: tuple[int, int], *, frames: int = 0,
    batch: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Writes the latents of pictures into a split; returns the manifest.

    Args:
      folder: of a split.
      found: the pictures, or videos.
      encode: see `Encode`.
      size: height and width to which they are brought.
      frames: of a video; 0 for pictures.
      batch: at a time.
    """
    read = partial(_video, size=size, frames=frames) if frames else partial(_picture, size=size)

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(found), latents.PER_FILE):
            some = found[start : start + latents.PER_FILE]
            said = [
                encode(np.stack([read(file) for file in some[i : i + batch]]))
                for i in range(0, len(some), batch)
            ]
            yield {FIELD: np.concatenate(said)}

    return latents.write(folder, len(found), parts())


def listed(place: Path) -> list[Path]:
    """What a folder holds, in the order of names, or a file names, a line each.

    Raises:
      DataError: nothing, or what is not there.
    """
    if place.is_dir():
        found = sorted(
            each
            for each in place.iterdir()
            if each.is_dir() or each.suffix.lower() in pictures.SUFFIXES
        )
    else:
        lines = files.local(place, 'the list of pictures').read_text(encoding='utf-8').splitlines()
        found = [place.parent / line.strip() for line in lines if line.strip()]
    if missing := [each for each in found if not each.exists()]:
        raise DataError(f'{place} names {missing[0]}, which is not there.')
    if not found:
        raise DataError(f'{place} has no pictures.')
    return found


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture uint8 [H, W, 3], scaled to cover a size and cut in the middle."""
    from PIL import Image

    height, width = size
    factor = max(height / picture.shape[0], width / picture.shape[1])
    sides = [
        max(round(factor * side), least)
        for side, least in zip(picture.shape[:2], size, strict=True)
    ]
    scaled = Image.fromarray(np.asarray(picture)).resize(sides[::-1], Image.Resampling.LANCZOS)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return np.asarray(scaled)[top : top + height, left : left + width]


def _picture(file: Path, size: tuple[int, int]) -> np.ndarray:
    if file.is_dir():
        raise DataError(f'{file} is a folder, as a video is; say how many --frames.')
    return fitted(pictures.read(file), size)


def _video(file: Path, size: tuple[int, int], frames: int) -> np.ndarray:
    if file.is_dir():
        there: Any = list(pictures.in_folder(file).values())
    else:
        there = np.load(file, mmap_mode='r')
        if there.dtype != np.uint8 or there.ndim != 4 or there.shape[-1] != 3:
            raise DataError(
                f'{file} is {there.dtype} {list(there.shape)}, and a video is uint8 [T, H, W, 3].'
            )
    if len(there) < frames:
        raise DataError(f'{file} has {len(there)} frames, and --frames={frames}.')
    return np.stack([fitted(frame, size) for frame in there[:frames]])


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is no size, such as 480x832')
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.data.embed_images', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('pictures', type=path_argument, metavar='FOLDER|FILE')
    parser.add_argument('--model', type=path_argument, required=True, metavar='DIRECTORY')
    parser.add_argument('--size', type=_size, required=True, metavar='HEIGHTxWIDTH')
    parser.add_argument('--frames', type=int, default=0, help='of a video; 0 for pictures')
    parser.add_argument('--to', type=path_argument, required=True, metavar='DIRECTORY')
    parser.add_argument('--batch', type=int, default=8, help='pictures at a time; default 8')
    arguments = parser.parse_args(argv)
    batch = max(arguments.batch, 1)
    manifest = write(
        Path(arguments.to), listed(Path(arguments.pictures)), encoder(arguments.model, batch),
        arguments.size, frames=arguments.frames, batch=batch,
    )  # fmt: skip
    print(f'{manifest["examples"]} of {manifest["fields"][FIELD]} in {arguments.to}')
    return 0


if __name__ == '__main__':
    command(main)
