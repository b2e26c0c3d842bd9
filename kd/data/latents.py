"""Embeddings of texts, and latents of their images.

`kd.data.embed_texts` and `kd.data.embed_images` write them, each beside the other's.

What a recipe says, and what lies in PATH:

    data = dict(
        source=dict(
            name='kd.data.latents.latents', path='sdxl', encoder='sdxl',
            fields=dict(input=(128, 128, 4), text=(77, 2_048), pooled=(1_280,), size=(6,)),
            constants=dict(size=(1_024, 1_024, 0, 0, 1_024, 1_024), input=0.0)),
        train='train')

    PATH/train/manifest.json        {"encoder": "sdxl", "per_file": 1024, "examples": 2500, ...}
    PATH/train/00002.safetensors    the examples from 2048 on: text [452, 77, 2048], input, ...
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from kd import files
from kd.data import catalogue, sources
from kd.data.context import SourceContext
from kd.data.sources import Batch, DataError
from kd.io import safetensors as safetensors_lib
from kd.ranges import Count
from kd.sampling.velocity import NULL

__all__ = ['MANIFEST', 'PER_FILE', 'file_of', 'latents', 'write']

MANIFEST, PER_FILE = 'manifest.json', 1_024
_AGAIN = 'write it again with python -m kd.data.embed_texts'


def file_of(folder: Path, number: int) -> Path:
    """The file of the examples from number S .. number S + S - 1."""
    return folder / f'{number:05d}.safetensors'


def write(
    folder: Path,
    examples: int,
    parts: Iterable[Mapping[str, np.ndarray]],
    shared: Mapping[str, np.ndarray] | None = None,
    **said: Any,
) -> dict[str, Any]:
    """Writes fields of examples, beside those of other names that are there; the manifest.

    Args:
      folder: of a split.
      examples: how many.
      parts: fields [n, ...] of `PER_FILE` examples after another.
      shared: fields [...] that all have alike.
      **said: more of the manifest, such as the encoder.

    Raises:
      DataError: there is another number of examples already.
    """
    before: dict[str, Any] = dict(fields={}, per_file=PER_FILE, examples=examples)
    if (folder / MANIFEST).is_file():
        before = files.read_json(folder / MANIFEST, _AGAIN)
    if (before['examples'], before['per_file']) != (examples, PER_FILE):
        raise DataError(
            f'{folder} has {before["examples"]} examples, {before["per_file"]} a file, and these '
            f'are {examples}, {PER_FILE} a file; they must be those of each other.'
        )
    shared, fields = shared or {}, {name: list(x.shape) for name, x in (shared or {}).items()}
    for number, part in enumerate(parts):
        fields |= {name: list(x.shape[1:]) for name, x in part.items()}
        folder.mkdir(parents=True, exist_ok=True)
        own, file = _plain({**part, **shared}), file_of(folder, number)
        if kept := set(before['fields']) - set(own):
            there = safetensors_lib.load(file)
            own |= {name: there[name].read() for name in kept}
        with files.replacing(file) as partial:
            safetensors.numpy.save_file(own, partial)
    manifest = {**before, **said, 'fields': {**before['fields'], **fields}}
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def _plain(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: np.ascontiguousarray(x, bool if x.dtype == bool else np.float32)
        for name, x in tensors.items()
    }


def latents(
    context: SourceContext,
    *,
    path: str,
    encoder: str,
    fields: Mapping[str, tuple[Count, ...]],
    constants: Mapping[str, Any] | None = None,
) -> sources.Source:
    """Examples of several fields, float32, and bool where its name ends in 'mask'.

    Args:
      context: a split, a slice of one of the folders of `path`.
      path: the folder; a relative path lies below `--data_dir`, if that is given.
      encoder: that of the texts, which the files must have been written with.
      fields: shapes of one example's fields.
      constants: fields that all examples have alike, numbers or arrays of their shapes.

    Raises:
      DataError: no such files, files of another encoder, or fields of other shapes.
    """
    constants = constants or {}
    spec = {
        name: jax.ShapeDtypeStruct(tuple(shape), bool if name.endswith('mask') else np.float32)
        for name, shape in fields.items()
    }
    if context.recipe.data_dir == catalogue.DESCRIBED:
        # Imports tfds, which takes most of a second: only where it is asked for.
        from kd.data.builders import described

        return described.of_spec(path, context.split, spec)
    folder = Path(files.local(path, 'the embeddings'))
    if context.recipe.data_dir:
        folder = Path(files.local(context.recipe.data_dir, 'the data directory')) / folder
    found = sorted(each.parent for each in folder.glob(f'*/{MANIFEST}'))
    if not found:
        raise DataError(f'{folder} has no split with a {MANIFEST}; {_AGAIN}.')
    manifests = {each.name: _manifest(each, encoder, spec, constants) for each in found}

    def reader(split: str) -> sources.Reader:
        return functools.partial(_read, folder / split, manifests[split], spec, constants)

    sizes = {split: manifest['examples'] for split, manifest in manifests.items()}
    return sources.Source(sources.DataSet(path, sizes, reader, spec, None), context.split)


def _manifest(
    folder: Path, encoder: str, spec: Mapping[str, Any], constants: Mapping[str, Any]
) -> dict[str, Any]:
    manifest = files.read_json(folder / MANIFEST, _AGAIN)
    if manifest.get('encoder', encoder) != encoder:
        raise DataError(
            f"{folder} holds texts as '{manifest['encoder']}' says them, and the recipe wants "
            f"'{encoder}'; {_AGAIN} --encoder={encoder}."
        )
    for name, field in spec.items():
        have = manifest['fields'].get(name)
        if name not in constants and have != list(field.shape):
            raise DataError(
                f"{folder}: '{name}' of an example is {have or 'not there'}, and the recipe wants "
                f'{list(field.shape)}.'
            )
    return manifest


def _read(
    folder: Path,
    manifest: Mapping[str, Any],
    spec: Mapping[str, jax.ShapeDtypeStruct],
    constants: Mapping[str, Any],
    rows: np.ndarray,
) -> Batch:
    batch = {name: np.empty((len(rows), *x.shape), x.dtype) for name, x in spec.items()}
    for name, value in constants.items():
        batch[name][:] = np.asarray(value)
    numbers, places = np.divmod(rows, manifest['per_file'])
    for number in np.unique(numbers):
        at = np.flatnonzero(numbers == number)
        tensors = safetensors_lib.load(file_of(folder, int(number)))
        for name in set(spec) - set(constants):
            if name.startswith(NULL):
                batch[name][at] = tensors[name].read()
                continue
            for row, place in zip(at, places[at], strict=True):
                batch[name][row] = tensors[name].read((slice(place, place + 1),))[0]
    return batch
