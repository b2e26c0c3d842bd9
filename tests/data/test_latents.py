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
from kd.data import catalogue, embed_texts
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
    with pytest.raises(UserError, match='pooled texts has none; is it the right directory'):
        embedded('sdxl', small, third)


FIELDS = {'input': (2,), 'text': (3, 6), 'pooled': (2,), 'null_text': (3, 6)}
CONSTANTS = {'input': 0.5}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp('texts'), ['x' * n for n in range(1, 8)]
    embed_texts.PER_FILE, before = 3, embed_texts.PER_FILE
    try:
        embed_texts.write(folder / 'train', 'sdxl', [encoder(2, 3), encoder(4, 3)], texts, batch=2)
    finally:
        embed_texts.PER_FILE = before
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
