"""Questions about digits: who is asked what, and the right answers."""

import numpy as np
import pytest

from kd.data.builders import digit_questions as questions
from kd.data.context import SourceContext
from kd.data.sources import DataError


def test_answers_are_those_of_the_image():
    image = np.zeros((2, 8, 8))
    image[0, 1, 6] = 5  # Top right.
    image[1, 5:, :3] = 1  # Bottom left, against one brighter pixel.
    image[1, 0, 0] = 8
    found = questions.answers(image, np.array([7, 4]))
    assert found.tolist() == [[7, 11, 13, 15], [4, 10, 12, 16]]


def test_splits_share_no_image_and_all_are_asked_everything():
    seen = []
    for split, size in questions.SIZES.items():
        made = questions.make(split, noise=0.0, seed=1)
        text = made['input']
        assert text.shape == (4 * size, 6)
        assert (text[:, :4] == questions.IMAGE).all()
        assert (text[:, 4].reshape(-1, 4) == questions.ANSWERS + np.arange(4)).all()
        digit, parity, five, _ = text[:, 5].reshape(-1, 4).T
        assert (parity == 10 + digit % 2).all()
        assert (five == 12 + (digit >= 5)).all()
        assert (made['response_mask'] == [False] * 5 + [True]).all()
        assert made['image'].min() == -1
        assert made['image'].max() == 1
        seen += [image.tobytes() for image in made['image'][::4]]
        assert (made['image'][::4] == made['image'][3::4]).all()
    assert len(seen) == len(set(seen)) == 1797


def test_noise_is_of_the_image_and_of_the_seed():
    noisy, clean, again, other = (
        questions.make('test', noise=noise, seed=seed)['image']
        for noise, seed in ((0.25, 0), (0.0, 0), (0.25, 0), (0.25, 1))
    )
    added = (noisy - clean)[::4] / 2
    assert added.std() == pytest.approx(0.25, rel=0.02)
    assert added.mean() == pytest.approx(0, abs=0.01)
    np.testing.assert_array_equal(noisy, again)
    several = questions.make('test', draws=2)
    first, second = np.split(several['image'], 2)
    np.testing.assert_array_equal(first, noisy)
    assert (second != first).all()
    np.testing.assert_array_equal(*np.split(several['input'], 2))
    assert (noisy != other).any()


def test_a_source_has_slices_and_no_other_splits():
    source = questions.digit_questions(SourceContext('train[:50%]'))
    assert len(source) == 1800
    assert set(source.fetch([0, 3])) == {'input', 'response_mask', 'image', 'index'}
    with pytest.raises(DataError, match=r"the questions have the splits .*, not 'validation'"):
        questions.make('validation')
