"""A contextual bandit whose rewards are corrupted: the best of four candidates, seen through noise.

A context x in R^8 comes with four candidates phi in R^8 of utility x^T W phi, which are the clean
rewards. Three kinds of noise, at levels 1/2, 1 and 2 as a rule:

    gaussian  R + level N(0, 1), and one reward in ten gets another 5 level N(0, 1)
    cauchy    R + level / 2 * Cauchy
    flip      all rewards of a context change sign with probability 0.15 level
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import NonNegative

DIMENSION, CANDIDATES = 8, 4
NOISES = ('none', 'gaussian', 'cauchy', 'flip')
SIZES = {'train': 40_000, 'validation': 2_000, 'test': 5_000}


@functools.cache
def utility_matrix(seed: int) -> np.ndarray:
    """W [8, 8] of N(0, 1/8): utilities have a variance of about 8."""
    entries = np.random.default_rng([seed, 0]).normal(size=(DIMENSION, DIMENSION))
    return entries / np.sqrt(DIMENSION)


def make(
    split: str, *, noise: str = 'gaussian', level: float = 1.0, scale: float = 1.0, seed: int = 0
) -> sources.Batch:
    """Draws a split.

    Args:
      split: 'train', 'validation' or 'test'; decides, with the seed, the random numbers. Contexts
        and candidates are the same whatever the noise.
      noise: one of `NOISES`; the validation and test splits have none, whatever it says.
      level: of the noise.
      scale: factor of the utilities.
      seed: of W and of the draws.

    Returns:
      {'input': f32 [N, 4, 16], context and candidate side by side; 'rewards': f32 [N, 4]; 'label':
      i32 [N], the truly best candidate}.

    Raises:
      DataError: an unknown split or noise, or a negative level.
    """
    if split not in SIZES:
        raise sources.DataError(f'the bandit has the splits {list(SIZES)}, not {split!r}')
    if noise not in NOISES or level < 0:
        raise sources.DataError(f'noise must be one of {NOISES} of level >= 0, got {noise} {level}')
    rng = np.random.default_rng([seed, 1 + list(SIZES).index(split)])
    size = SIZES[split]
    x = rng.normal(size=(size, DIMENSION))
    phi = rng.normal(size=(size, CANDIDATES, DIMENSION))
    utility = scale * np.einsum('ni,ij,npj->np', x, utility_matrix(seed), phi)
    inputs = np.concatenate([np.broadcast_to(x[:, None], phi.shape), phi], axis=-1)
    rewards = corrupt(rng, utility, noise if split == 'train' else 'none', level)
    return {
        'input': inputs.astype(np.float32),
        'rewards': rewards.astype(np.float32),
        'label': utility.argmax(-1).astype(np.int32),
    }


def corrupt(rng: np.random.Generator, rewards: np.ndarray, noise: str, level: float) -> np.ndarray:
    """Corrupted rewards [N, P]; see the module for the kinds of noise."""
    if noise == 'gaussian':
        outliers = rng.random(rewards.shape) < 0.1
        noisy = rewards + level * rng.normal(size=rewards.shape)
        return noisy + 5 * level * outliers * rng.normal(size=rewards.shape)
    if noise == 'cauchy':
        return rewards + 0.5 * level * rng.standard_cauchy(size=rewards.shape)
    if noise == 'flip':
        return np.where(rng.random((len(rewards), 1)) < 0.15 * level, -rewards, rewards)
    return rewards


def candidates(
    context: SourceContext,
    *,
    noise: str = 'gaussian',
    level: NonNegative = 1.0,
) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's or a stage's data."""
    arrays = make(context.split, noise=noise, level=level, seed=context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: SIZES[context.split]}
    data = sources.DataSet('bandit', sizes, lambda _: sources.in_memory(arrays), spec, CANDIDATES)
    return sources.Source(data, context.split)
