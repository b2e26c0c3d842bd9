"""A folder scored and pictures enlarged from the command line, with random weights."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from kd import process, resample, restore
from kd.data.pictures import in_folder
from kd.evaluators import restoration
from kd.io import torch_weights
from kd.models.imdn import IMDN, IMDNAnyScale, IMDNSmall
from kd.network import from_linen
from kd.sampling.tiles import adaptive_crop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LOW = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)


@pytest.fixture(name='folder')
def _folder(tmp_path):
    (tmp_path / 'pictures').mkdir()
    for name, side in (('a', (29, 34)), ('b', (29, 35))):
        rng = np.random.default_rng(len(name))
        coarse = rng.integers(0, 256, (8, 9, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(side[::-1], Image.Resampling.BICUBIC)
        picture.save(tmp_path / 'pictures' / f'{name}.png')
    return tmp_path


def saved(module, folder):
    """(file with the names of PyTorch, variables) of a network as it begins."""
    variables = from_linen(module, LOW).init(jax.random.key(0))
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables['params'])[0]:
        *modules, last = (key.key for key in path)
        name = module.released_name('.'.join([*modules, torch_weights.LEAVES[last]]))
        leaf = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim > 1 else leaf)
    file = folder / f'{type(module).__name__}.safetensors'
    safetensors.numpy.save_file(tensors, file)
    return file, variables


def command(module, file, *more, scale, **given):
    network = f'kd.models.imdn.{type(module).__name__}'
    flags = [f'--network={network}', f'--weights={file}', f'--scale={scale}']
    return restore.main([*flags, f'--arguments={json.dumps(given)}', *map(str, more)])


def test_a_folder_is_scored_and_the_last_line_is_its_mean(folder, capsys):
    module = IMDN(2, channels=8, blocks=1)
    file, variables = saved(module, folder)
    more = (f'--pictures={folder / "pictures"}', '--protocol=imdn_script')
    assert command(module, file, *more, scale=2, channels=8, blocks=1) == 0
    lines = capsys.readouterr().out.splitlines()
    apply = jax.jit(lambda low: module.apply(variables, low))
    expected = restoration.pictures_scored(
        apply, in_folder(folder / 'pictures'), scale=2, protocol='imdn_script'
    )
    mean = np.mean([*expected.values()], axis=0)
    assert lines[:2] == [f'{n}: {s.psnr:.2f} dB, {s.ssim:.4f}' for n, s in expected.items()]
    word, psnr, other, ssim = lines[-1].split()
    assert (word, other) == ('PSNR', 'SSIM')
    np.testing.assert_allclose([float(psnr), float(ssim)], mean, atol=2e-4)
    assert restore.main([f'--pictures={folder / "pictures"}', '--scale=2']) == 0
    assert float(capsys.readouterr().out.split()[-3]) > float(psnr) + 5


def test_a_picture_is_the_same_whole_and_by_tiles(folder, capsys):
    module = IMDNSmall(channels=8, blocks=1)
    file, variables = saved(module, folder)
    low = in_folder(folder / 'pictures')['b']
    flags = (f'--input={folder / "pictures" / "b.png"}', f'--output={folder / "high.png"}')
    given = dict(scale=2, channels=8, blocks=1)
    expected = module.apply(variables, low[None] / np.float32(127.5) - 1)[0]
    for tile in (512, 34):
        assert command(module, file, *flags, f'--tile={tile}', **given) == 0
        high = np.asarray(Image.open(folder / 'high.png'))
        assert high.shape == (58, 70, 3)
        away = high / 127.5 - 1 - np.clip(expected, -1, 1)
        assert np.abs(away).max() <= 0.5 / 127.5 + 1e-5
    said = capsys.readouterr()
    assert said.out.endswith('high.png: 70 x 58 pixels, from 35 x 29\n')
    assert '[tiles] 2/2' in said.err


def test_any_scale_enlarges_first_and_crops_where_sides_are_no_multiples(folder):
    module = IMDNAnyScale(channels=8, blocks=1)
    file, variables = saved(module, folder)
    low = in_folder(folder / 'pictures')['b']
    flags = (f'--input={folder / "pictures" / "b.png"}', f'--output={folder / "high.png"}')
    apply = jax.jit(lambda x: module.apply(variables, x))
    for scale in (1, 3):
        assert command(module, file, *flags, scale=scale, channels=8, blocks=1) == 0
        high = np.asarray(Image.open(folder / 'high.png'))
        assert high.shape == (29 * scale, 35 * scale, 3)
        large = resample.resize(low, high.shape[:2], 'matlab') / np.float32(127.5) - 1
        if scale == 3:
            expected = adaptive_crop(apply, large[None])[0]
        else:
            padded = np.pad(large[None], ((0, 0), (0, 3), (0, 1), (0, 0)), mode='edge')
            expected = apply(padded)[0, :29, :35]
        away = high / 127.5 - 1 - np.clip(expected, -1, 1)
        assert np.abs(away).max() <= 0.5 / 127.5 + 1e-5


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (['--scale=2'], 'Give --pictures, a folder to be scored, or --input, a picture.'),
        (['--input=a.png', '--scale=0'], 'Give --scale, a whole number.'),
        (['--input=a.png', '--weights=x'], '--weights needs --network.'),
        (['--input=a.png', '--network=kd.models.imdn.IMDN'], '--network needs --weights.'),
        (['--input=a.png', '--run=runs/none'], "'runs/none' is not the directory of a"),
        (['--input=a.png', '--scale=2', '--protocol=x'], "There is no protocol 'x', only"),
        (['--input=none.png', '--scale=2'], 'none.png cannot be read as a picture'),
    ],
)
def test_what_does_not_go_together_is_told_in_a_line(flags, told, capsys):
    assert process.entry(lambda: restore.main(flags)) == process.EXIT_USER
    assert told in capsys.readouterr().err
