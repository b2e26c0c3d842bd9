"""Pictures, and patches cut from them and from what is left of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from kd import resample
from kd.config import Recipe
from kd.data.context import SourceContext
from kd.data.patches import crops, degraded, patches
from kd.data.pictures import in_folder, pictures
from kd.data.sources import DataError
from kd.errors import UserError


@pytest.fixture(name='folder')
def _folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'some').mkdir()
    for name, side in (('a', (23, 30)), ('b', (41, 19))):
        picture = rng.integers(0, 256, (*side, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / 'some' / f'{name}.png')
    np.save(tmp_path / 'some' / 'c.npy', rng.integers(0, 256, (20, 20, 3), np.uint8))
    Image.fromarray(np.full((20, 24), 7, np.uint8)).save(tmp_path / 'some' / 'd.bmp')
    return tmp_path


def context(folder, *, checked=False, split='some'):
    recipe = Recipe(stages={}, data={}, data_dir=str(folder))
    return SourceContext(split, recipe, None if checked else Path(folder))


def test_a_folder_has_its_pictures_in_order_whatever_their_kind(folder):
    found = pictures('.', 'some', str(folder))
    assert {name: x.shape for name, x in found.items()} == {
        'a': (23, 30, 3), 'b': (41, 19, 3), 'c': (20, 20, 3), 'd': (20, 24, 3)
    }  # fmt: skip
    assert list(found) == ['a', 'b', 'c', 'd']
    assert (found['d'] == 7).all()
    assert isinstance(found['c'], np.memmap)


def test_the_two_photographs_are_cut_in_strips_that_do_not_meet():
    whole = dict(zip(('china', 'flower'), load_sample_images().images, strict=True))
    train, test = (pictures('china_flower', split) for split in ('train', 'test'))
    for name, picture in whole.items():
        parts = [train[f'{name}_left'], test[name], train[f'{name}_right']]
        np.testing.assert_array_equal(np.concatenate(parts, 1), picture)
        assert test[name].shape == (427, 160, 3)
    with pytest.raises(DataError, match="has the splits 'train' and 'test', not 'all'"):
        pictures('china_flower', 'all')


def to_bytes(x):
    return np.rint((x + 1) * 127.5).astype(np.uint8)


def places_of(patch, picture):
    """Where a patch is a slice of a picture."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, patch.shape)[:, :, 0]
    return np.argwhere((windows == patch).all((2, 3, 4)))


def test_patches_are_slices_of_the_whole_made_small(folder):
    options = dict(of='.', scale=3, size=4, augment=())
    batch = patches(context(folder), count=60, **options).fetch(np.arange(60))
    assert batch['low'].shape == (60, 4, 4, 3)
    assert batch['target'].shape == (60, 12, 12, 3)
    assert np.abs(batch['low']).max() <= 1
    pairs = [degraded(x, 3) for x in pictures('.', 'some', str(folder)).values()]
    used, borders = set(), 0
    for low, target in zip(to_bytes(batch['low']), to_bytes(batch['target']), strict=True):
        if (target == target[0, 0]).all():
            continue
        at = [(i, *place) for i, pair in enumerate(pairs) for place in places_of(low, pair[0])]
        assert len(at) == 1
        number, top, left = at[0]
        assert [3 * top, 3 * left] in places_of(target, pairs[number][1]).tolist()
        used.add(number)
        # Made small by itself, a patch has other borders.
        borders += bool((resample.resize(target, (4, 4), 'matlab') != low).any())
    assert used == {0, 1, 2}
    assert borders > 30


def test_an_example_is_the_same_whoever_asks_and_augmentations_turn_both_parts(folder):
    options = dict(of='.', scale=2, size=5, count=40)
    plain = patches(context(folder), augment=(), **options).fetch(np.arange(40))
    turned = patches(context(folder), **options)
    every = turned.fetch(np.arange(40))
    np.testing.assert_array_equal(turned.fetch([7, 3])['low'], every['low'][[7, 3]])
    ways = {
        (flip, flop, swap): lambda x, f=flip, g=flop, h=swap: _turned(x, f, g, h)
        for flip in (0, 1) for flop in (0, 1) for swap in (0, 1)
    }  # fmt: skip
    seen = set()
    for i in range(40):
        same = [
            [way for way, turn in ways.items() if np.array_equal(turn(plain[k][i]), every[k][i])]
            for k in ('low', 'target')
        ]
        assert set(same[0]) & set(same[1])
        seen |= {same[1][0]} if len(same[1]) == 1 else set()
    assert seen == set(ways)
    other = patches(context(folder), seed=1, **options).fetch(np.arange(40))
    assert (other['low'] != every['low']).any((1, 2, 3)).mean() > 0.5


def _turned(x, flip, flop, swap):
    x = x[:, ::-1] if flip else x
    x = x[::-1] if flop else x
    return x.swapaxes(0, 1) if swap else x


def test_other_conventions_are_rounded_once(folder):
    picture = pictures('.', 'some', str(folder))['a']
    for convention in ('torch', 'torch_antialias'):
        low, target = degraded(picture, 2, convention)
        assert target.shape == (22, 30, 3)
        exact = resample.resize(target.astype(float), (11, 15), convention)
        np.testing.assert_allclose(low, np.clip(exact, 0, 255), atol=0.5 + 1e-9)
    expected = Image.fromarray(picture[:22, :30]).resize((15, 11), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(degraded(picture, 2, 'pillow')[0], np.asarray(expected))


def test_what_is_not_there_is_refused_and_a_check_alone_needs_no_files(folder):
    checked = patches(context('/nowhere', checked=True), of='DIV2K', scale=2, size=96)
    assert checked.spec['target'].shape == (192, 192, 3)
    assert len(checked) == 1_000_000
    with pytest.raises(DataError, match=r'there is no folder of pictures .*none'):
        patches(context(folder, split='none'), of='.', scale=2, size=4)
    with pytest.raises(DataError, match=r"a of '\.' has 23 x 30 pixels, and a patch 24 x 24"):
        patches(context(folder), of='.', scale=4, size=6)
    with pytest.raises(UserError, match=r"no augmentation \['turn'\], only \['flip', 'flop'"):
        patches(context(folder), of='.', scale=2, size=4, augment=('turn',))
    (folder / 'some' / 'e.png').write_text('no picture')
    with pytest.raises(DataError, match=r'e\.png cannot be read as a picture'):
        in_folder(folder / 'some')
    (folder / 'some' / 'e.png').unlink()
    np.save(folder / 'some' / 'f.npy', np.zeros((3, 4)))
    with pytest.raises(DataError, match=r'is float64 \[3, 4\], and a picture is uint8'):
        in_folder(folder / 'some')
    (folder / 'empty').mkdir()
    with pytest.raises(DataError, match=r'has no pictures; those of \.png'):
        in_folder(folder / 'empty')


def test_crops_are_slices_of_pictures_and_grey_as_pillow_has_it(folder):
    options = dict(of='.', size=8, count=50)
    found = crops(context(folder), **options).fetch(np.arange(50))
    assert {name: x.shape for name, x in found.items()} == {'input': (50, 8, 8, 3), 'index': (50,)}
    shown = list(pictures('.', 'some', str(folder)).values())
    for patch in to_bytes(found['input']):
        assert any(len(places_of(patch, picture)) for picture in shown)
    grey = crops(context(folder), channels='grey', **options).fetch([7, 3])['input']
    assert grey.shape == (2, 8, 8, 1)
    for row, place in enumerate((7, 3)):
        expected = Image.fromarray(to_bytes(found['input'][place])).convert('L')
        np.testing.assert_allclose((grey[row, ..., 0] + 1) * 127.5, expected, atol=0.51)
    turned = crops(context(folder), augment=('flip',), **options).fetch(np.arange(50))['input']
    same = (turned == found['input']).all((1, 2, 3))
    np.testing.assert_array_equal(turned[~same], found['input'][~same][:, :, ::-1])
    assert 15 < (~same).sum() < 35
    with pytest.raises(DataError, match=r'has 23 x 30 pixels, and a patch 24 x 24'):
        crops(context(folder), of='.', size=24)
