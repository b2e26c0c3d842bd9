"""Pictures by networks of super-resolution: a folder is scored, or a small picture enlarged.

    python -m kd.restore --network=kd.models.imdn.IMDN --scale=4 --weights=IMDN_x4.safetensors \\
        --pictures=Set5 --protocol=matlab
    python -m kd.restore --network=kd.models.imdn.IMDN --scale=4 --weights=IMDN_x4.safetensors \\
        --input=low.png --output=high.png
    python -m kd.restore --run=runs/imdn/imdn --input=low.png --output=high.png
    python -m kd.restore --run=runs/oftsr/student --average=slow --time=0.9 --pictures=Set5
    python -m kd.restore --run=runs/tad_sr/full --average=slow --autoencoder=hf:VQ_F4 --scale=4 \\
        --input=low.png --output=high.png
    python -m kd.restore --scale=4 --pictures=Set5

The pictures of a folder are made small by MATLAB's bicubic, restored and compared; the last line is
the mean of each one's PSNR and SSIM. Without a network it is bicubic enlargement that is scored.
`--weights` are safetensors with the names of the authors' PyTorch (see `kd.io.torch_weights` for
how files of PyTorch become such), `--run` is a finished stage. Pictures of any size are taken,
large ones by tiles that overlap; attention, which looks at a whole picture, then sees a tile.

A stage of `kd.methods.sr` may be a student of one call too, or what taught it (OFTSR, YONOS-SR,
TAD-SR): `--steps` is then its calls, `--time` that of OFTSR's student, `--seed` of the noise; tiles
have the size of its images, and pictures of a folder are made small as its data were. Grey networks
restore the colours one by one. Stages of latents are told their `--autoencoder` and the `--scale`,
and pictures are then made small by MATLAB's bicubic again, not as the network learnt it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd import callables, files, loading, process
from kd import config as config_lib
from kd.data import pictures as pictures_lib
from kd.data.patches import degraded, to_unit
from kd.errors import UserError, one_line
from kd.evaluators import restoration as scores
from kd.evaluators import restorers
from kd.evaluators.restoration import Restore
from kd.evaluators.restorers import Restorer
from kd.io import safetensors, torch_weights
from kd.io.progress import Progress, say
from kd.network import from_linen, parameter_count
from kd.sampling import tiles
from kd.state import PyTree

# Of what is trained on pairs of pictures.
_METHOD = 'sr.restoration.restoration'
# Sides of the picture by which variables are given their shapes.
_SIDE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Scores a folder or writes a picture; returns the exit status."""
    arguments = _parse(argv)
    if bool(arguments.pictures) == bool(arguments.input):
        raise UserError('Give --pictures, a folder to be scored, or --input, a picture.')
    scores.named(arguments.protocol)
    restorer = load(arguments)
    if arguments.input:
        _enlarge(restorer.restore, arguments.input, arguments.output)
        return 0
    shown = pictures_lib.in_folder(arguments.pictures)
    progress = Progress('restore', start=0, total=len(shown))
    found = []
    for i, (name, picture) in enumerate(shown.items(), 1):
        low, target = map(to_unit, restorer.degraded(picture))
        one = scores.score(
            restorer.restore(low[None])[0],
            target,
            scale=restorer.scale,
            protocol=arguments.protocol,
        )
        print(f'{name}: {one.psnr:.2f} dB, {one.ssim:.4f}', flush=True)
        found.append(one)
        progress.update(i)
    progress.close()
    mean = scores.mean_score(found)
    print(f'PSNR {mean.psnr:.4f} SSIM {mean.ssim:.4f}')
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m kd.restore', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    path: Any = dict(type=process.path_argument, default=None)
    parser.add_argument('--network', default='', help='import path, such as kd.models.imdn.IMDN')
    parser.add_argument('--arguments', default='{}', help="""of the network: '{"channels": 16}'""")
    parser.add_argument('--scale', type=int, default=0)
    parser.add_argument('--weights', **path, help='safetensors with names of PyTorch')
    parser.add_argument('--run', **path, help='a finished stage, in place of network and weights')
    parser.add_argument('--average', default='final', help="of --run: 'final' or its name")
    parser.add_argument('--steps', type=int, default=1, help='calls of a stage of few steps')
    parser.add_argument('--time', type=float, default=0.5, help='fidelity at 0, realism at 1')
    parser.add_argument('--autoencoder', default='', metavar='hf:DIR', help='of latents')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--pictures', **path, help='a folder, to be scored')
    parser.add_argument('--protocol', default='matlab', help=', '.join(scores.PROTOCOLS))
    parser.add_argument('--input', **path, help='a picture')
    parser.add_argument(
        '--output', type=process.file_argument, default=Path('restored.png'), help='its place'
    )
    parser.add_argument('--tile', type=int, default=512, help='largest side at once, in pixels')
    return parser.parse_args(argv)


def load(arguments: argparse.Namespace) -> Restorer:
    """What the flags name.

    Raises:
      UserError: flags that go together in no way, a network or weights that are not there.
    """
    if arguments.run:
        if arguments.network or arguments.weights:
            raise UserError('--run has its network and weights; leave --network and --weights out.')
        module = _of_stage(arguments.run)
        if module is None:
            return _of_few_steps(arguments)
        variables = safetensors.stage_variables(arguments.run, arguments.average)
    elif arguments.network:
        if not arguments.weights:
            raise UserError('--network needs --weights.')
        module = _named(arguments)
        low = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
        with one_line('--network'):
            abstract = jax.eval_shape(from_linen(module, low).init, jax.random.key(0))
        rename = getattr(module, 'released_name', str)
        variables = torch_weights.load(arguments.weights, abstract, rename=rename)
    elif arguments.weights:
        raise UserError('--weights needs --network.')
    else:
        module, variables = None, {}
    own = getattr(module, 'scale', 0) if getattr(module, 'enlarges', True) else 0
    scale = own or arguments.scale
    if scale < 1 or (arguments.scale and arguments.scale != scale):
        raise UserError(
            f'--scale={arguments.scale} is not that of the network, {own}.' if own else
            'Give --scale, a whole number.'
        )  # fmt: skip
    if module is not None:
        _say(module, variables)
    restore = restoring(module, variables, scale, arguments.tile)
    return Restorer(restore, scale, lambda picture: degraded(picture, scale), variables)


def _say(module: nn.Module, variables: PyTree) -> None:
    say('restore', f'{type(module).__name__}, {parameter_count(variables):,} parameters')


def _of_few_steps(arguments: argparse.Namespace) -> Restorer:
    if arguments.steps < 1 or arguments.seed < 0 or not 0 <= arguments.time <= 1:
        raise UserError('--steps is from 1, --seed from 0, and --time between 0 and 1.')
    asked = restorers.Asked(
        arguments.scale, arguments.average, arguments.steps, arguments.time,
        arguments.autoencoder, arguments.seed,
    )  # fmt: skip
    return restorers.of_stage(arguments.run, asked)


def _named(arguments: argparse.Namespace) -> nn.Module:
    try:
        given = json.loads(arguments.arguments)
    except ValueError as error:
        raise UserError(f'--arguments must be JSON: {error}.') from error
    if not isinstance(given, dict):
        raise UserError(f'--arguments must be an object, got {given!r}.')
    factory = callables.resolve(arguments.network)
    if arguments.scale and getattr(factory, 'enlarges', True):
        given.setdefault('scale', arguments.scale)
    return config_lib.build({'name': arguments.network, **given}, where='--network')


def _of_stage(directory: Path) -> nn.Module | None:
    """The network of a stage that takes low pictures alone; None of another kind."""
    stage = loading.recipe_of(directory).stages[directory.name]
    if not stage.method['name'].endswith(_METHOD):
        return None
    return config_lib.build(stage.network, where='network')


def restoring(module: nn.Module | None, variables: PyTree, scale: int, tile: int) -> Restore:
    """(low [1, h, w, 3]) -> [1, scale h, scale w, 3] on the host, both in [-1, 1], of any size.

    Args:
      module, variables: a network; None for bicubic enlargement.
      scale: by which it enlarges.
      tile: larger pictures are restored by parts of this side.
    """
    if module is None:
        return scores.bicubic(scale)
    apply = jax.jit(lambda low: module.apply(variables, low))
    multiple = getattr(module, 'multiple', 1)

    def whole(low: Any) -> np.ndarray:
        """Sides that the network does not take get more of their last pixels."""
        height, width = low.shape[1:3]
        more = [(0, -side % multiple) for side in (height, width)]
        out = np.asarray(apply(np.pad(low, [(0, 0), *more, (0, 0)], mode='edge')))
        factor = out.shape[1] // (height + more[0][1])
        return out[:, : factor * height, : factor * width]

    def large(low: Any, factor: int) -> np.ndarray:
        if max(low.shape[1:3]) <= tile:
            return whole(low)
        progress = Progress('tiles', start=0, total=tiles.count(low.shape[1:3], tile))
        out = tiles.tiled(whole, low, scale=factor, tile=tile, said=progress.update)
        progress.close()
        return out

    def enlarged(low: Any) -> np.ndarray:
        return large(np.asarray(low), scale)

    def same_size(low: Any) -> np.ndarray:
        first = np.asarray(scores.bicubic(scale)(low)) if scale > 1 else np.asarray(low)
        odd = any(side % multiple for side in first.shape[1:3])
        if odd and min(first.shape[1:3]) >= 2 * tiles.SHAVE and max(first.shape[1:3]) <= tile:
            return np.asarray(tiles.adaptive_crop(apply, first, multiple=multiple))
        return large(first, 1)

    return enlarged if getattr(module, 'enlarges', True) else same_size


def _enlarge(restore: Restore, source: Path, output: Path) -> None:
    from PIL import Image

    picture = pictures_lib.read(source)
    restored = scores.to_bytes(np.asarray(restore(to_unit(picture)[None]))[0])
    with files.naming(output):
        try:
            Image.fromarray(restored).save(output)
        except ValueError as error:
            raise UserError(f'--output={output}: {error}; name a .png.') from error
    height, width = restored.shape[:2]
    print(f'{output}: {width} x {height} pixels, from {picture.shape[1]} x {picture.shape[0]}')


if __name__ == '__main__':
    process.command(main)
