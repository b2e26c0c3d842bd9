"""Embeddings of texts: what encoders say becomes files, files rows, and rows a null condition."""

import dataclasses
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.config import Recipe
from kd.data import catalogue, embed_images, embed_texts
from kd.data import latents as latents_lib
from kd.data.context import SourceContext
from kd.data.embed_texts import Said
from kd.data.latents import latents
from kd.data.sources import DataError
from kd.errors import UserError
from kd.losses.schedule import flow
from kd.sampling import denoiser as denoisers

PEERS = os.environ.get('KD_PEERS', '')


def encoder(size, tokens, pooled=True):
    """Says the number of characters, and the place of a token; the layer before says 10 more."""

    def encode(texts, length, masked):
        count = length or tokens
        lengths = np.array([len(text) for text in texts], np.float32)
        last = np.zeros((len(texts), count, size), np.float32)
        last += lengths[:, None, None] + np.arange(count)[:, None] / 100
        mask = np.arange(count) < lengths[:, None]
        one = np.tile(lengths[:, None], (1, size // 2)) if pooled else None
        return Said(last, last + 10, one, mask)

    return encode


def embedded(of, *encoders):
    return embed_texts.ENCODERS[of][1](['ab', 'abcd'], *encoders)


def test_encoders_are_put_together_as_their_networks_take_them():
    small, large, third = encoder(2, 3), encoder(4, 3), encoder(8, 3, pooled=False)
    assert embedded('sd15', small)['text'].shape == (2, 3, 2)
    both = embedded('sdxl', small, large)
    assert (both['text'].shape, both['pooled'].shape) == ((2, 3, 6), (2, 2))
    # The layer before the last, and the vector of the second.
    np.testing.assert_allclose(both['text'][:, 0, 0], [12, 14])
    np.testing.assert_allclose(both['pooled'], [[2, 2], [4, 4]])
    three = embedded('sd3', small, large, third)
    assert (three['text'].shape, three['pooled'].shape) == ((2, 3 + 256, 8), (2, 3))
    assert not three['text'][:, :3, 6:].any()
    assert three['text'][:, 3:].all()
    two = embedded('flux', small, third)
    assert (two['text'].shape, two['pooled'].shape) == ((2, 512, 8), (2, 1))
    masked = embedded('pixart', third)
    assert masked['mask'].sum(1).tolist() == [2, 4]
    cut = embedded('wan', third)['text']
    assert cut.any(-1).sum(1).tolist() == [2, 4]
    for of, start in (('lumina2', 'You are an assistant'), ('z_image', '<|im_start|>user')):
        asked = []

        def first(texts, length, masked, asked=asked):
            asked += texts
            return third(['abcd', 'ab'], length, masked)

        found = embedded(of, first)
        assert asked[0].startswith(start)
        assert found['mask'].sum(1).tolist() == [4, 2]
        np.testing.assert_allclose(found['text'][:, 0, 0], [14, 12])
    long = embedded('qwen_image', third)
    # 34 tokens of the instruction are cut off.
    assert long['text'].shape == (2, 1_024, 8)
    np.testing.assert_allclose(long['text'][0, 1, 0] - long['text'][0, 0, 0], 0.01, rtol=1e-2)
    with pytest.raises(UserError, match='pooled texts has none; is it the right directory'):
        embedded('sdxl', small, third)


FIELDS = {'input': (2,), 'text': (3, 6), 'pooled': (2,), 'null_text': (3, 6)}
CONSTANTS = {'input': 0.5}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp('texts'), ['x' * n for n in range(1, 8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_lib, 'PER_FILE', 3)
        embed_texts.write(folder / 'train', 'sdxl', [encoder(2, 3), encoder(4, 3)], texts, batch=2)
    return folder


def opened(folder, split='train', data_dir='', **changes):
    recipe = dataclasses.replace(Recipe(stages={}, data={}), data_dir=data_dir)
    given = dict(path=str(folder), encoder='sdxl', fields=FIELDS, constants=CONSTANTS) | changes
    return latents(SourceContext(split, recipe), **given)


def test_rows_are_read_from_their_files(written):
    source = opened(written, 'train[1:]')
    assert len(source) == 6
    assert len(list((written / 'train').glob('*.safetensors'))) == 3
    batch = source.fetch([5, 0, 3, 3])
    np.testing.assert_allclose(batch['text'][:, 0, 0], 10 + np.array([7, 2, 5, 5]))
    np.testing.assert_allclose(batch['pooled'][:, 0], [7, 2, 5, 5])
    np.testing.assert_allclose(batch['null_text'][:, 0, 0], 10)
    assert (batch['input'] == 0.5).all()
    assert batch['index'].tolist() == [5, 0, 3, 3]
    described = opened('nowhere', 'train[:90%]', data_dir=catalogue.DESCRIBED)
    assert described.spec == source.spec
    # Below the data directory.
    assert len(opened('.', data_dir=str(written))) == 7


def test_files_that_do_not_fit_are_told(written, tmp_path):
    with pytest.raises(DataError, match=r"texts as 'sdxl' says them, and the recipe wants 'sd15'"):
        opened(written, encoder='sd15')
    with pytest.raises(DataError, match=r"'text' of an example is \[3, 6\], and the recipe wants"):
        opened(written, fields=FIELDS | {'text': (4, 6)})
    with pytest.raises(DataError, match=r"'size' of an example is not there"):
        opened(written, fields=FIELDS | {'size': (6,)})
    with pytest.raises(
        DataError, match=r'no split with a manifest\.json; write it again with pyth'
    ):
        opened(tmp_path)


def test_an_empty_text_has_a_mask_of_its_own(tmp_path):
    embed_texts.write(tmp_path / 'train', 'pixart', [encoder(2, 3)], ['ab', 'c'])
    fields = {'text': (120, 2), 'mask': (120,), 'null_mask': (120,)}
    batch = opened(tmp_path, encoder='pixart', fields=fields, constants={}).fetch([1, 0])
    assert batch['mask'].sum(1).tolist() == [1, 2]
    assert (batch['null_mask'].dtype, batch['null_mask'].sum()) == (bool, 0)


def test_guidance_compares_with_the_null_text_beside_the_text():
    def apply(variables, x, t, condition, **how):
        del variables, t, how
        value = condition['text'].sum(1) + condition['size'][:, 0]
        return denoisers.Prediction(jnp.broadcast_to(value[:, None], x.shape), {})

    own = denoisers.Denoiser(flow(), apply)
    one = np.ones((2, 3), np.float32)
    told = dict(text=one, null_text=2 * one, size=one[:, :1])
    x, t = jnp.zeros((2, 4)), jnp.ones(2)
    said = denoisers.guided(own, 3.0).apply(None, x, t, told).x0
    # 7 with the null text and 4 with the text; sizes stay.
    np.testing.assert_allclose(said, 7 + 3 * (4 - 7))
    with pytest.raises(UserError, match='give it num_classes, data with the embedding of an empty'):
        denoisers.guided(own, 3.0).apply(None, x, t, dict(text=told['text']))
    kept = denoisers.dropped(own, jax.random.key(0), told, 1.0)
    np.testing.assert_array_equal(kept['text'], told['null_text'])


def test_the_command_says_what_is_missing(tmp_path, capsys):
    file = tmp_path / 'texts.txt'
    file.write_text('\n')
    arguments = [str(file), '--model=m', '--encoder=sd15', f'--to={tmp_path}']
    with pytest.raises(UserError, match=r'texts\.txt has no texts'):
        embed_texts.main(arguments)
    file.write_text('a cat\n')
    with pytest.raises(UserError, match=r'which is not installed|is no text encoder of diffusers'):
        embed_texts.main(arguments)
    assert not capsys.readouterr().out


@pytest.mark.skipif(not PEERS, reason='KD_PEERS names no Python with diffusers')
def test_a_pipeline_of_diffusers_says_the_same(tmp_path):
    texts, script = ['a cat', 'dogs and more'], Path(__file__).with_name('embeds_say.py')
    subprocess.run([PEERS, script, tmp_path, *texts], check=True)
    (tmp_path / 'texts.txt').write_text('\n'.join(texts))
    subprocess.run(
        [
            PEERS, '-m', 'kd.data.embed_texts', tmp_path / 'texts.txt', '--encoder=sdxl',
            f'--model={tmp_path}', f'--to={tmp_path}/texts/train',
        ],
        check=True,
    )  # fmt: skip
    fields = {'text': (9, 24), 'pooled': (6,), 'null_text': (9, 24)}
    found = opened(tmp_path / 'texts', fields=fields, constants={}).fetch([0, 1])
    said = np.load(tmp_path / 'said.npz')
    for name in ('text', 'pooled'):
        np.testing.assert_allclose(found[name], said[name], rtol=1e-5, atol=1e-6)


# Pictures


@pytest.fixture(scope='module')
def autoencoders(tmp_path_factory):
    """A folder with two autoencoders of diffusers."""
    folder = tmp_path_factory.mktemp('autoencoders')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/models')
        import latent_cases

        for name in ('autoencoder', 'wan_autoencoder', 'sd3'):
            latent_cases.write(name, folder / name)
        yield folder, latent_cases


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)


def test_latents_are_those_of_the_pictures_and_lie_beside_the_texts(autoencoders, tmp_path):
    folder, cases = autoencoders
    for i in range(5):
        np.save(tmp_path / f'{i}.npy', drawn(i, 8, 12))
    split = tmp_path / 'data' / 'train'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents_lib, 'PER_FILE', 3)
        embed_texts.write(
            split, 'sdxl', [encoder(2, 3), encoder(4, 3)], ['x' * n for n in range(5)]
        )
        (tmp_path / 'list.txt').write_text('\n'.join(f'{i}.npy' for i in (4, 3, 2, 1, 0)))
        arguments = [f'--model={folder / "autoencoder"}', '--size=8x12', f'--to={split}']
        embed_images.main([str(tmp_path / 'list.txt'), *arguments, '--batch=2'])
        (tmp_path / 'list.txt').write_text('4.npy')
        with pytest.raises(DataError, match=r'has 5 examples, 3 a file, and these are 1, 3 a file'):
            embed_images.main([str(tmp_path / 'list.txt'), *arguments])
    found = opened(
        tmp_path / 'data', fields=FIELDS | {'input': (4, 6, 4)}, constants={}
    ).fetch([4, 0])  # fmt: skip
    np.testing.assert_allclose(found['text'][:, 0, 0], [14, 10])
    module, variables = cases.module_of('autoencoder'), cases.variables_of('autoencoder')
    pixels = np.stack([drawn(i, 8, 12) for i in (0, 4)]) / np.float32(127.5) - 1
    mean = module.apply(variables, pixels, method='encode')[0]
    np.testing.assert_allclose(found['input'], 0.18215 * mean, rtol=1e-4, atol=1e-5)


def test_a_video_is_a_folder_of_frames_or_an_array(autoencoders, tmp_path):
    folder, cases = autoencoders
    frames = drawn(0, 6, 4, 8)
    (tmp_path / 'videos' / 'a').mkdir(parents=True)
    for i, frame in enumerate(frames):
        np.save(tmp_path / 'videos' / 'a' / f'{i:03d}.npy', frame)
    np.save(tmp_path / 'videos' / 'b.npy', frames[::-1])
    embed_images.main([
        str(tmp_path / 'videos'), f'--model={folder / "wan_autoencoder"}', '--size=4x8',
        '--frames=5', f'--to={tmp_path / "data" / "train"}',
    ])  # fmt: skip
    found = opened(tmp_path / 'data', fields={'input': (2, 1, 2, 4)}, constants={}).fetch([0, 1])
    module, variables = cases.module_of('wan_autoencoder'), cases.variables_of('wan_autoencoder')
    both = np.stack([frames[:5], frames[:0:-1]]) / np.float32(127.5) - 1
    mean = np.asarray(module.apply(variables, both, method='encode')[0])
    wanted = (mean - [0.1, 0.2, 0.3, 0.4]) / [1, 2, 3, 4]
    np.testing.assert_allclose(found['input'], wanted, rtol=1e-4, atol=1e-4)


def test_pictures_cover_their_size_and_are_cut_in_the_middle():
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 10, 1).repeat(3, 2)
    np.testing.assert_array_equal(embed_images.fitted(rows, (20, 10)), rows[10:30])
    # Twice as wide, twice as high, of which the middle half.
    wide = embed_images.fitted(rows, (20, 20))
    assert wide.shape == (20, 20, 3)
    np.testing.assert_allclose(wide[:, 0, 0], np.repeat(np.arange(15, 25), 2), atol=1)


def test_pictures_that_do_not_fit_are_told(autoencoders, tmp_path):
    folder, _ = autoencoders
    np.save(tmp_path / 'a.npy', drawn(0, 6, 4, 8))

    def told(match, *more, model='wan_autoencoder', size='4x8'):
        with pytest.raises((DataError, UserError), match=match):
            embed_images.main([
                str(tmp_path), f'--model={folder / model}', f'--size={size}', *more,
                f'--to={tmp_path / "data"}',
            ])  # fmt: skip

    told(r'a.npy has 6 frames, and --frames=9', '--frames=9')
    told(r'is uint8 \[6, 4, 8, 3\], and a picture is uint8')
    told('is a AutoencoderKL, of pictures; leave out --frames', '--frames=5', model='autoencoder')
    told('is a MMDiT and no autoencoder', '--frames=5', model='sd3')
    told('sides divisible by 4', '--frames=5', size='4x6')
    (tmp_path / 'list.txt').write_text('nothing.png')
    with pytest.raises(DataError, match=r'names .*nothing\.png, which is not there'):
        embed_images.listed(tmp_path / 'list.txt')
