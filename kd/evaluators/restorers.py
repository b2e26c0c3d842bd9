"""Finished stages that restore images, as functions of whole pictures: for `kd.restore`.

Students of one call and what taught them, of `kd.methods.sr`: flows from what is left of an image,
denoisers that are told it, with a decoder or without, and denoisers of residuals. They have images
of one size; pictures of any size are restored by tiles of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd import files, resample
from kd.config import Recipe, StageConfig
from kd.data import catalogue, sources
from kd.data.context import source_loader, splits
from kd.data.patches import LOW, degraded
from kd.data.transforms.low_resolution import LowResolution
from kd.errors import UserError
from kd.evaluators import ways
from kd.evaluators.restoration import Restore
from kd.io import finished, safetensors
from kd.io.coder import Coder, coder, of_pixels
from kd.io.progress import Progress
from kd.losses.schedule import Schedule
from kd.methods.sr.oftsr import SHARE
from kd.models.shifted import Shifted
from kd.network import Network
from kd.networks import build_network
from kd.sampling import tiles
from kd.state import PyTree

# Of methods, by the ends of their names.
_STUDENT, _DECODER = 'oftsr.oftsr', 'yonos_sr.decoder_tuning'
# Data of a stage that are made by another one: what they are of are the recipe's own.
_MADE = 'kd.data.sampled.'


class Asked(NamedTuple):
    """How a stage is asked.

    Attributes:
      scale: by which pictures are enlarged; 0 for that of the stage's data.
      average: 'final', or the name of an average that the stage kept.
      steps: calls of the network.
      time: of a student of OFTSR, from fidelity (0) to realism (1).
      autoencoder: 'hf:DIR', of a stage of latents.
      seed: of the noise.
    """

    scale: int = 0
    average: str = 'final'
    steps: int = 1
    time: float = 0.5
    autoencoder: str = ''
    seed: int = 0


class Restorer(NamedTuple):
    """A finished stage.

    Attributes:
      restore: low pictures [1, h, w, 3] in [-1, 1] of any size, enlarged.
      scale: by which.
      degraded: a uint8 picture [H, W, 3] as (low, original), as the stage's data have it.
      variables: of its network.
    """

    restore: Restore
    scale: int
    degraded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    variables: PyTree


class _Stage(NamedTuple):
    network: Network
    source: sources.Source
    config: StageConfig
    recipe: Recipe
    variables: PyTree


def of_stage(directory: Path, asked: Asked) -> Restorer:
    """The stage in a directory.

    Raises:
      UserError: no finished stage, one that restores nothing, or not what it wants to be asked.
    """
    stage = _loaded(directory, asked.average)
    block, of = dict(stage.config.method), stage
    if block['name'].endswith(_DECODER):
        of = _loaded(
            stage.recipe.locate(stage.config.teacher, directory.parent),
            stage.config.teacher_weights,
        )
    way = _way(stage, of, asked, str(directory))
    variables = stage.variables
    if of is not stage:
        variables = {'of': of.variables, 'mend': stage.variables}
    left, image = _left(stage.source), of.source.spec['input']
    code = of_pixels()
    if left is None:
        if not asked.autoencoder:
            raise UserError(
                f'{directory} is of latents; name their autoencoder, --autoencoder=hf:DIR.'
            )
        code = coder(asked.autoencoder, 8 * image.shape[0])
    elif asked.autoencoder:
        raise UserError(f'{directory} is of pixels; leave --autoencoder out.')
    scale = _scale(left, asked.scale, str(directory))
    fields_of, side = _fields(of, code, left, scale)

    @jax.jit
    def restored(variables: PyTree, low: jax.Array, noise: jax.Array) -> jax.Array:
        images = way(variables, fields_of(low), noise)
        # A decoder says the image itself.
        return images if left is not None or of is not stage else code.decode(images)

    def call(low: jax.Array, noise: jax.Array) -> np.ndarray:
        if left is None or image.shape[-1] != 1:
            return np.asarray(restored(variables, low, noise))
        # Of a network of grey images each colour is one, and all have one noise.
        found = restored(variables, jnp.moveaxis(low, -1, 0)[:, 0, ..., None], noise.repeat(3, 0))
        return np.moveaxis(np.asarray(found)[..., 0], 0, -1)[None]

    restore = _by_tiles(call, image.shape, side // scale, scale, asked.seed)
    return Restorer(restore, scale, _degraded(left, scale), variables)


def _loaded(directory: Path, average: str) -> _Stage:
    file = directory.parent / 'config.json'
    if finished.read_done(directory) is None or not file.is_file():
        raise UserError(f"--run='{directory}' is not the directory of a finished stage.")
    recipe = config_lib.parse(
        config_lib.to_plain(files.read_json(file, 'manifest.json beside it holds it too'))
    )
    # Of its data the shapes alone are asked for.
    recipe = dataclasses.replace(recipe, data_dir=catalogue.DESCRIBED)
    stage = recipe.stages[directory.name]
    data = config_lib.data_of(recipe.data, stage.data)
    if str(data.get('source', {}).get('name', '')).startswith(_MADE):
        data = recipe.data
    source = source_loader(data, recipe, None)(splits(data)[0])
    network = build_network(
        stage.network,
        source,
        where=f'{directory.name}.network',
        locate=lambda reference: recipe.locate(reference, directory.parent),
    )
    if network is None:
        raise UserError(f'{directory} trains no network.')
    variables = safetensors.stage_variables(directory, average)
    return _Stage(network, source, stage, recipe, variables)


def _way(stage: _Stage, of: _Stage, asked: Asked, where: str) -> ways.Way:
    network, block = of.network, of.config.method
    module: Any = network.module
    if LOW not in getattr(module, 'conditions', ()):
        raise UserError(f'{where} has no network of super-resolution.')
    if isinstance(module, Shifted):
        return ways.of_residuals(network, steps=asked.steps)
    if isinstance(getattr(module, 'schedule', None), Schedule):
        mend = None if of is stage else stage.network
        return ways.of_denoiser(network, steps=asked.steps, trained_by=block, mend=mend)
    share = block.get('share', SHARE)
    if not block['name'].endswith(_STUDENT):
        return ways.of_flow(network, share=share, steps=asked.steps)
    if asked.steps != 1:
        raise UserError(f'{where} is a student of one call; leave --steps out.')
    return ways.of_one_call(network, share=share, time=asked.time)


def _left(source: Any) -> LowResolution | None:
    """What makes the low images of a source; None of latents."""
    while source is not None and not isinstance(source, LowResolution):
        source = getattr(source, '_source', None)
    return source


def _scale(left: LowResolution | None, given: int, where: str) -> int:
    own = left.scales[-1] if left is not None else given
    if own < 1 or given not in (0, own):
        raise UserError(
            f'{where} enlarges by {own}, not by --scale={given}.' if left is not None else
            f'{where} is of latents; give --scale, a whole number.'
        )  # fmt: skip
    return own


def _fields(
    of: _Stage, code: Coder, left: LowResolution | None, scale: int
) -> tuple[Callable[[jax.Array], dict[str, jax.Array]], int]:
    """(what the network is told of low pictures [B, h, w, C], the side of its images in pixels)."""
    spec, told = of.source.spec, of.network.module.conditions
    side = spec['input'].shape[0]
    if left is not None:

        def of_images(low: jax.Array) -> dict[str, jax.Array]:
            size = (low.shape[1] * scale, low.shape[2] * scale)
            if left.up == 'repeat':
                return {LOW: resample.repeat(low, scale)}
            return {LOW: resample.resize(low, size, left.up)}

        return of_images, side
    abstract = jax.ShapeDtypeStruct((1, 8 * side, 8 * side, 3), jnp.float32)
    side = 8 * side * side // jax.eval_shape(code.encode, abstract).shape[1]
    constants = _constants(of.recipe.data if not of.config.data else of.config.data)

    def of_latents(low: jax.Array) -> dict[str, jax.Array]:
        large = resample.resize(low, (side, side), 'torch')
        fields = {
            name: jnp.broadcast_to(jnp.asarray(constants[name], x.dtype), (len(low), *x.shape))
            for name, x in spec.items()
            if name in told and name in constants
        }
        anchor = ways.anchor_of(of.network)
        if anchor != LOW:
            fields[LOW] = low if spec[LOW].shape[:2] == low.shape[1:3] else large
        return {**fields, anchor: code.encode(large)}

    return of_latents, side


def _constants(block: Any) -> Mapping[str, Any]:
    """Of the block of `kd.data.latents.latents`, wherever it is in another."""
    if not isinstance(block, Mapping):
        return {}
    found = dict(block.get('constants') or {})
    for inner in block.values():
        found |= _constants(inner)
    return found


def _by_tiles(
    call: Callable[[jax.Array, jax.Array], np.ndarray],
    shape: tuple[int, ...],
    tile: int,
    scale: int,
    seed: int,
) -> Restore:
    """Pictures of any size by tiles of one, with one noise for the picture.

    Each pixel of a low picture brings the noise of its own place, so that tiles have the same where
    they overlap; where images of the network have fewer places than low pictures, every second.
    """
    more = max(shape[0] // tile, 1)
    every = max(tile // shape[0], 1)

    def fn(part: jax.Array) -> np.ndarray:
        low, noise = part[..., :3], part[:, ::every, ::every, 3:]
        noise = noise.reshape(1, *noise.shape[1:3], more, more, shape[-1])
        noise = noise.transpose(0, 1, 3, 2, 4, 5).reshape(1, *shape)
        return call(low, noise)

    def restore(low: Any) -> np.ndarray:
        low = np.asarray(low, np.float32)
        height, width = low.shape[1:3]
        pad = [(0, max(tile - side, 0)) for side in (height, width)]
        low = np.pad(low, [(0, 0), *pad, (0, 0)], mode='edge')
        size = (1, *low.shape[1:3], more * more * shape[-1])
        noise = np.asarray(jax.random.normal(jax.random.key(seed), size))
        total = tiles.count(low.shape[1:3], tile, tile // 4)
        progress = Progress('tiles', start=0, total=total)
        out = tiles.tiled(
            fn, np.concatenate([low, noise], -1), scale=scale, tile=tile, overlap=tile // 4,
            said=progress.update,
        )  # fmt: skip
        progress.close()
        return out[:, : scale * height, : scale * width]

    return restore


def _degraded(
    left: LowResolution | None, scale: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def by_box(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = (side // scale * scale for side in picture.shape[:2])
        target = picture[:height, :width]
        return np.rint(resample.box(target.astype(np.float64), scale)).astype(np.uint8), target

    if left is None:
        return lambda picture: degraded(picture, scale)
    down = left.down
    return by_box if down == 'box' else lambda picture: degraded(picture, scale, down)
