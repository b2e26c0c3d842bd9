"""Problems with answers that can be verified, of rising difficulty.

A problem is a point x in R^12 and one of six families; its answer, three digits of 0..4, is the
argmax of (1 - m) linear(x) + m nonlinear(x), with more of the random network `nonlinear` in every
family. The teacher knows the logits behind the answers up to noise, but in the last family it is
confident and incoherent: its answers there have nothing to do with the problem.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Fraction, Size

DIMENSION, FAMILIES, DIGITS, VALUES = 12, 6, 3, 5
NONLINEARITY = (0.0, 0.15, 0.35, 0.6, 0.9, 1.0)
HIDDEN = 64
# What a student is pre-trained on, and what it is then distilled on.
PRETRAINING_MIX = (0.4, 0.2, 0.15, 0.15, 0.1, 0.0)
DISTILLATION_MIX = (0.3, 0.1, 0.1, 0.05, 0.05, 0.4)
SIZES = {'train': 80_000, 'validation': 4_000, 'test': 10_000}


@functools.cache
def _rule(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 0])
    linear = rng.normal(size=(DIMENSION, DIGITS * VALUES)) / np.sqrt(DIMENSION)
    first = 1.5 * rng.normal(size=(DIMENSION, HIDDEN)) / np.sqrt(DIMENSION)
    second = 1.5 * rng.normal(size=(HIDDEN, DIGITS * VALUES)) / np.sqrt(HIDDEN)
    return linear, first, second


def true_logits(x: np.ndarray, family: np.ndarray, seed: int = 0) -> np.ndarray:
    """The logits [N, 3, 5] whose argmax is the answer, from x [N, 12] and family int [N]."""
    linear, first, second = _rule(seed)
    share = np.asarray(NONLINEARITY)[family][:, None]
    logits = (1 - share) * (x @ linear) + share * (np.tanh(2 * x @ first) @ second)
    return logits.reshape(len(x), DIGITS, VALUES)


def make(
    split: str,
    mix: tuple[float, ...],
    *,
    size: int = 0,
    seed: int = 0,
    coherent: bool = False,
) -> sources.Batch:
    """Draws a split.

    Args:
      split: 'train', 'validation' or 'test'; decides, with the seed, the random numbers.
      mix: probabilities of the six families.
      size: number of problems; 0 for `SIZES[split]`.
      seed: of the rule behind the answers and of the problems.
      coherent: let the teacher know the last family as well as the others.

    Returns:
      {'input': f32 [N, 18], 'label': i32 [N, 3], 'family': i32 [N], 'teacher_logits': f32
      [N, 3, 5]}; an input is x and the family one-hot.

    Raises:
      DataError: an unknown split, or a mix that is no distribution over six families.
    """
    if split not in SIZES:
        raise sources.DataError(f'verifiable problems have the splits {list(SIZES)}, not {split!r}')
    if len(mix) != FAMILIES or min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
        raise sources.DataError(f'mix must be {FAMILIES} probabilities that sum to 1, got {mix}')
    size = size or SIZES[split]
    rng = np.random.default_rng([seed, 1 + list(SIZES).index(split)])
    x = rng.normal(size=(size, DIMENSION))
    family = rng.choice(FAMILIES, size=size, p=np.asarray(mix) / sum(mix))
    logits = true_logits(x, family, seed)
    teacher = 4 * logits + 0.5 * rng.normal(size=logits.shape)
    incoherent = 4 * rng.normal(size=logits.shape)
    if not coherent:
        teacher = np.where((family == FAMILIES - 1)[:, None, None], incoherent, teacher)
    return {
        'input': np.concatenate([x, np.eye(FAMILIES)[family]], 1).astype(np.float32),
        'label': logits.argmax(-1).astype(np.int32),
        'family': family.astype(np.int32),
        'teacher_logits': teacher.astype(np.float32),
    }


def problems(
    context: SourceContext,
    *,
    mix: tuple[Fraction, ...] = DISTILLATION_MIX,
    size: Size = 0,
    coherent: bool = False,
) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's or a stage's data."""
    arrays = make(context.split, tuple(mix), size=size, seed=context.recipe.seed, coherent=coherent)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: len(arrays['input'])}
    data = sources.DataSet(
        'verifiable', sizes, lambda _: sources.in_memory(arrays), spec, VALUES
    )  # fmt: skip
    return sources.Source(data, context.split)
