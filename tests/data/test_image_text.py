"""Text about images: what stands where, which images come with it, and what is left out."""

import json

import numpy as np
import pytest
import toy_tokenizers as toys
from PIL import Image

from kd.config import Recipe
from kd.data import catalogue, image_text
from kd.data.context import SourceContext
from kd.data.sources import DataError
from kd.text import templates, tokenizer

IMAGE, PATCHES, LENGTH, SIZE = 3, 4, 40, 6


def conversation(question, answer, image=''):
    turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
    return {'conversations': turns, **({'image': image} if image else {})}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('seen')
    toys.write_directory(folder, toys.fields())
    (folder / 'images').mkdir()
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = (255, 0, 0)
    Image.fromarray(wide).save(folder / 'images' / 'wide.png')
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(folder / 'images' / 'white.png')
    chats = [
        conversation('<image>\nWhat?', 'Red.', 'wide.png'),
        conversation('<image>' + 'Very long. ' * 40, 'Left out.', 'white.png'),
        conversation('No image', 'Text.'),
        conversation('So?\n<image>', 'White.', 'white.png'),
    ]
    (folder / 'chats.json').write_text(json.dumps(chats))
    pair = dict(question='<image>\nWhat?', image='white.png', chosen='White.', rejected='Red.')
    (folder / 'pairs.jsonl').write_text(json.dumps(pair) + '\n')
    return folder


def opened(folder, kind='chats', path='chats.json', split='train', data_dir=None, **more):
    recipe = Recipe(stages={}, data={}, data_dir=str(folder) if data_dir is None else data_dir)
    return getattr(image_text, kind)(
        SourceContext(split, recipe), path=path, tokenizer=f'hf:{folder}', length=LENGTH,
        image_token=IMAGE, patches=PATCHES, size=SIZE, images='images', **more,
    )  # fmt: skip


def rendered(folder, question, answer):
    taken = tokenizer.load(f'hf:{folder}')
    messages = [
        {'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}
    ]  # fmt: skip
    return templates.render(taken, messages, turns='all')


def test_the_image_stands_before_the_chat_and_is_no_answer(folder):
    source = opened(folder)
    # The one that is too long is left out.
    assert len(source) == 3
    rows = source.fetch([0, 1, 2])
    for row, (question, answer, count) in enumerate(
        [('What?', 'Red.', PATCHES), ('No image', 'Text.', 0), ('So?', 'White.', PATCHES)]
    ):
        ids, mask = rendered(folder, question, answer)
        used = rows['segments'][row] > 0
        assert rows['input'][row][used].tolist() == [IMAGE] * count + list(ids)
        assert rows['response_mask'][row][used].tolist() == [False] * count + list(mask)
    assert rows['image'].shape == (3, SIZE, SIZE, 3)
    assert (rows['image'][1] == -1).all()
    np.testing.assert_allclose(rows['image'][2], 1, atol=1e-6)
    # A slice has its own images.
    again = opened(folder, split='train[66%:]').fetch([0])
    for name in ('input', 'image'):
        np.testing.assert_array_equal(again[name][0], rows[name][2])


def test_an_image_is_padded_to_a_square_with_its_mean_colour(folder):
    found = image_text.load(folder / 'images' / 'wide.png', 8)
    # Rows 2 .. 5 are the image, 8 pixels wide; above and below (127, 0, 0), the mean.
    mean = np.array([127 / 127.5 - 1, -1, -1])
    for row in (0, 7):
        np.testing.assert_allclose(found[row], np.broadcast_to(mean, (8, 3)), atol=1e-6)
    np.testing.assert_allclose(found[3, 0], [-1, -1, -1], atol=1e-6)
    np.testing.assert_allclose(found[3, 7], [1, -1, -1], atol=1e-6)
    assert image_text.load(folder / 'images' / 'wide.png', 3).shape == (3, 3, 3)


def test_both_answers_of_a_pair_come_with_the_image(folder):
    source = opened(folder, 'preferences', 'pairs.jsonl', fields=('question',))
    assert source.pairs
    row = source.fetch([0])
    for side, answer in enumerate(('White.', 'Red.')):
        ids, mask = rendered(folder, 'What?', answer)
        used = row['segments'][0, side] > 0
        assert row['input'][0, side][used].tolist() == [IMAGE] * PATCHES + list(ids)
        assert row['response_mask'][0, side][used].tolist() == [False] * PATCHES + list(mask)
    assert row['image'].shape == (1, 2, SIZE, SIZE, 3)


def test_nothing_is_read_where_only_shapes_count(folder):
    for kind, shape in (('chats', ()), ('preferences', (2,))):
        source = opened(folder, kind, 'absent.json', data_dir=catalogue.DESCRIBED, vocabulary=50)
        assert source.spec['image'].shape == (*shape, SIZE, SIZE, 3)
        assert source.spec['input'].shape == (*shape, LENGTH)
        assert source.num_classes == 50


def test_a_file_that_is_no_image_is_named(folder):
    with pytest.raises(DataError, match=r'chats\.json cannot be read as an image'):
        image_text.load(folder / 'chats.json', SIZE)
