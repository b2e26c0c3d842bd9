"""What restorers of latents learn from, written beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from kd import resample
from kd.config import Recipe
from kd.data import degrade
from kd.data.context import SourceContext
from kd.data.latents import latents
from kd.data.patches import to_unit
from kd.errors import UserError
from kd.io.coder import coder
from kd.process import entry

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp('pictures')
    picture = load_sample_image('china.jpg')
    (place / 'deeper').mkdir()
    Image.fromarray(picture[:40, :50]).save(place / 'deeper' / 'a.png')
    Image.fromarray(picture[100:148, 200:250]).save(place / 'b.png')
    Image.fromarray(picture[:8, :8]).save(place / 'small.png')
    return place


def worse(key, picture, scale):
    """In the place of what takes long to compile, which has tests of its own."""
    return picture[::scale, ::scale] + 0.1 * jax.random.normal(key, (3,))


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    monkeypatch.setattr(degrade, 'second_order', worse)


def started(folder, to, *more):
    arguments = [str(folder), f'--to={to}', '--count=5', '--size=32', '--batch=2', *more]
    return entry(lambda: degrade.main(arguments))


def test_examples_are_crops_and_what_is_left_of_them(folder, tmp_path, capsys):
    assert started(folder, tmp_path / 'some' / 'train', '--seed=3') == 0
    assert '5 examples in' in capsys.readouterr().out
    context = SourceContext('train', Recipe(stages={}, data={}, data_dir=str(tmp_path)))
    shapes = dict(input=(32, 32, 3), low=(8, 8, 3), anchor=(32, 32, 3))
    batch = latents(context, path='some', encoder='vq_f4', fields=shapes).fetch(np.arange(5))
    key = jax.random.key(3)
    for i, (crop, low, anchor) in enumerate(zip(*(batch[k] for k in shapes), strict=True)):
        wanted = worse(jax.random.fold_in(key, i), crop, 4)
        np.testing.assert_allclose(low, wanted, atol=1e-5)
        large = resample.resize(low.astype(np.float64), (32, 32), 'torch')
        np.testing.assert_allclose(anchor, large, atol=1e-5)
        whole = [
            to_unit(np.asarray(Image.open(f))) for f in (folder / 'deeper/a.png', folder / 'b.png')
        ]
        views = [np.lib.stride_tricks.sliding_window_view(x, (32, 32, 3))[:, :, 0] for x in whole]
        assert any((np.abs(v - c).max((-3, -2, -1)) < 1e-6).any()
                   for v in views for c in (crop, crop[:, ::-1]))  # fmt: skip
    # By the example alone, whatever the batches.
    again = [degrade.drawn(sorted(folder.rglob('*.png')), 32, 3, i) for i in (4, 1)]
    np.testing.assert_array_equal(again, batch['input'][[4, 1]])


def test_low_pictures_may_keep_their_size_and_latents_be_of_an_encoder():
    crops = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    made = jax.jit(lambda c, k: degrade.made(c, k, lambda x: x[:, ::4, ::4, :2], 4, True))
    found = made(crops, keys)
    assert {k: x.shape for k, x in found.items()} == {
        'input': (2, 8, 8, 2), 'low': (2, 32, 32, 3), 'anchor': (2, 8, 8, 2)
    }  # fmt: skip
    np.testing.assert_array_equal(found['input'], crops[:, ::4, ::4, :2])
    np.testing.assert_array_equal(found['anchor'], found['low'][:, ::4, ::4, :2])


def test_pictures_of_a_cascade_are_each_made_of_the_one_before(folder, tmp_path):
    shapes = dict(input=(32, 32, 3), low=(32, 32, 3), image=(32, 32, 3))
    context = SourceContext('train', Recipe(stages={}, data={}, data_dir=str(tmp_path)))
    batches = {}
    for scale in (2, 4, 8):
        more = ('--nested', f'--scale={scale}', '--name=none')
        assert started(folder, tmp_path / f'x{scale}' / 'train', *more) == 0
        fields = shapes if scale == 2 else {**shapes, 'easier': (32, 32, 3)}
        source = latents(context, path=f'x{scale}', encoder='none', fields=fields)
        batches[scale] = source.fetch(np.arange(5))
    crop = batches[2]['image']
    key, left = jax.random.key(0), {}
    left[2] = np.stack([worse(jax.random.fold_in(key, i), x, 2) for i, x in enumerate(crop)])
    for scale in (4, 8):
        small = left[scale // 2].astype(np.float64)
        left[scale] = resample.resize(small, (32 // scale, 32 // scale), 'torch_antialias')
    for scale, batch in batches.items():
        np.testing.assert_array_equal(batch['image'], crop)
        np.testing.assert_array_equal(batch['input'], crop)
        told = {'low': scale, 'easier': scale // 2} if scale > 2 else {'low': 2}
        for name, of in told.items():
            large = resample.resize(left[of].astype(np.float64), (32, 32), 'torch')
            np.testing.assert_allclose(batch[name], large, atol=1e-5)


def test_what_cannot_be_made_is_told(folder, tmp_path, capsys):
    for more, words in (
        (['--size=30', '--scale=4'], '--size=30 must be a multiple of --scale=4'),
        (['--size=64'], '--size=64: 100 pictures, drawn by lot, are all smaller'),
        (['--nested', '--size=36', '--scale=6'], '--nested is of scales 2, 4, 8, got --scale=6'),
        (['--nested', '--keep'], '--nested is of scales 2, 4, 8, got --scale=4, and without'),
        (['--seed=-1'], '--seed=-1 must be a whole number from 0'),
        (['--batch=0'], '--count, --size, --scale and --batch are whole numbers from 1'),
    ):
        assert started(folder, tmp_path / 'x', *more) == 2
        assert words in capsys.readouterr().err
    (tmp_path / 'none').mkdir()
    assert started(tmp_path / 'none', tmp_path / 'x') == 2
    assert 'has no pictures of .png' in capsys.readouterr().err
    with pytest.raises(UserError, match='absent'):
        coder(f'hf:{tmp_path / "absent"}', 32)
