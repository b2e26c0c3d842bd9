"""Four questions about scikit-learn's digits, whose images are noisy, as text around an image.

    [image] x 4, question, answer

The questions are which digit it is, whether that is even, whether it is five or more, and in which
quadrant the image without noise is brightest. A row has a token for each of four squares of 4 x 4
pixels, and an answer of one token.
"""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Count, NonNegative

# Answers come first: ten digits, even and odd, below five and not, four quadrants.
EVEN, BELOW, QUADRANT, ANSWERS = 10, 12, 14, 18
QUESTIONS, IMAGE, TOKENS = 4, 22, 23
PATCHES, LENGTH = 4, 6
NOISE = 0.25
# Images of each split; the test has the rest of 1,797.
SIZES = {'teacher': 500, 'train': 900, 'test': 397}


def answers(images: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """The right answers, int32 [N, 4], to images [N, 8, 8] without noise, of digits int [N]."""
    halves = images.reshape(-1, 2, 4, 2, 4).sum((2, 4)).reshape(-1, 4)
    return np.stack(
        [digits, EVEN + digits % 2, BELOW + (digits >= 5), QUADRANT + halves.argmax(1)], axis=1
    ).astype(np.int32)


def make(split: str, *, noise: float = NOISE, draws: int = 1, seed: int = 0) -> sources.Batch:
    """All questions about the images of a split.

    Args:
      split: one of `SIZES`; the seed shares the images out.
      noise: standard deviation of what is added to pixels in [0, 1].
      draws: of the noise for each image, one after the other.
      seed: of the splits and the noise.

    Returns:
      `input` int32 [N, 6]; `response_mask` bool [N, 6], the answer; `image` float32 [N, 8, 8, 1],
      pixels in [-1, 1] and a little beyond. An image stands with its four questions in turn.

    Raises:
      DataError: an unknown split.
    """
    if split not in SIZES:
        raise sources.DataError(f'the questions have the splits {list(SIZES)}, not {split!r}')
    from sklearn.datasets import load_digits

    digits = load_digits()
    place = list(SIZES).index(split)
    order = np.random.default_rng([seed, 54]).permutation(len(digits.target))
    ends = np.cumsum([0, *SIZES.values()])
    rows = order[ends[place] : ends[place + 1]]
    clean, rng = digits.images[rows] / 16, np.random.default_rng([seed, 55, place])
    images = ((clean + noise * rng.normal(size=(draws, *clean.shape))) * 2 - 1).reshape(-1, 8, 8)
    said = np.tile(answers(clean, digits.target[rows]).reshape(-1), draws)
    text = np.full((len(said), LENGTH), IMAGE, np.int32)
    text[:, -2] = ANSWERS + np.tile(np.arange(QUESTIONS), len(images))
    text[:, -1] = said
    return {
        'input': text,
        'response_mask': np.broadcast_to(np.arange(LENGTH) == LENGTH - 1, text.shape),
        'image': np.repeat(images, QUESTIONS, axis=0)[..., None].astype(np.float32),
    }


def digit_questions(
    context: SourceContext, *, noise: NonNegative = NOISE, draws: Count = 1
) -> sources.Source:
    """`make` as a source, a question a row; the recipe's seed decides splits and noise.

    Args:
      context: names the split, a slice of 'teacher', 'train' or 'test'.
      noise: see `make`.
      draws: of the noise for the teacher's images; others have one.

    Raises:
      DataError: an unknown split.
    """
    often = {split: draws if split == 'teacher' else 1 for split in SIZES}
    known = {split: QUESTIONS * size * often[split] for split, size in SIZES.items()}
    seed = context.recipe.seed
    first = make('test', noise=noise, seed=seed)
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in first.items()}
    data = sources.DataSet(
        'digit_questions',
        known,
        lambda split: sources.in_memory(make(split, noise=noise, draws=often[split], seed=seed)),
        spec,
        TOKENS,
    )
    return sources.Source(data, context.split)
