"""Facts of arithmetic on Z_10, and laws of what is said of them.

A fact is (a, o, b) with o one of +, -, @, where a @ b = (3a + 7b + 2) mod 10: 300 in all. Given b
every operator is a bijection of a. (With a b in its place, `third='product'`, it is 0 in 27 % of
cases, and wrong steps may cancel.) Who answers is a law float [3, 10, 10, 10], the probability of
each result of each fact.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import numpy as np

from kd.data.sources import DataError

_A, _B = np.arange(10)[:, None], np.arange(10)
# The result of fact (o, a, b), int [3, 10, 10].
TRUTH = np.stack([_A + _B, _A - _B, 3 * _A + 7 * _B + 2]) % 10
Third = Literal['affine', 'product']
LawName = Literal['truth', 'demonstrator', 'cliff', 'clean', 'good', 'biased']


def noisy(values: np.ndarray, certain: float) -> np.ndarray:
    """Each value with probability `certain`, else any of ten: [...] -> float [..., 10]."""
    return certain * np.eye(10)[values] + (1 - certain) / 10


def truth_of(third: Third) -> np.ndarray:
    """`TRUTH`, or with a b mod 10 for a @ b."""
    if third not in get_args(Third):
        raise DataError(f'the third operator is one of {get_args(Third)}, not {third!r}')
    return TRUTH if third == 'affine' else np.stack([*TRUTH[:2], _A * _B % 10])


@functools.cache
def misconceptions(
    seed: int = 0, share: float = 0.3, third: Third = 'affine'
) -> tuple[np.ndarray, np.ndarray]:
    """The facts that are misconceived, bool [3, 10, 10], exactly this share, and a wrong value each
    (of facts that are not, what it would be)."""
    rng = np.random.default_rng([seed, 300])
    true = truth_of(third)
    order = rng.permutation(true.size).reshape(true.shape)
    return order < round(share * true.size), (true + rng.integers(1, 10, true.shape)) % 10


def demonstrator(
    seed: int = 0,
    share: float = 0.3,
    *,
    wrong: float = 0.7,
    truth: float = 0.25,
    known: float = 0.95,
    third: Third = 'affine',
) -> np.ndarray:
    """The law of one with misconceptions: a misconceived fact is `wrong` with this probability, the
    `truth` with that, and any of ten else; another fact is the truth with `known`, any else."""
    which, value = misconceptions(seed, share, third)
    right = truth_of(third)
    held = wrong * np.eye(10)[value] + truth * np.eye(10)[right] + (1 - wrong - truth) / 10
    return np.where(which[..., None], held, noisy(right, known))


def cliffs(seed: int = 0, third: Third = 'affine') -> np.ndarray:
    """The misconceived facts of the third operator, bool [3, 10, 10], which the law 'cliff' hardly
    ever says rightly."""
    return misconceptions(seed, third=third)[0] & (np.arange(3) == 2)[:, None, None]


def law(name: LawName | float, seed: int = 0, third: Third = 'affine') -> np.ndarray:
    """A law by name, or by the share of facts that it is certain of; float [3, 10, 10, 10].

    'truth' makes no mistake. 'demonstrator' is what bases learn from; 'cliff' the same, but for the
    facts of `cliffs`, which are wrong with .985 and the truth with .005. Teachers: 'clean' says .98
    of every fact rightly; 'good' has 8 % of misconceptions, its own ones, that it holds at .9; for
    'biased' a @ b is 3 more than it is.

    Raises:
      DataError: another name.
    """
    right = truth_of(third)
    if not isinstance(name, str):
        return noisy(right, name)
    if name == 'truth':
        return noisy(right, 1.0)
    if name == 'demonstrator':
        return demonstrator(seed, third=third)
    if name == 'cliff':
        certain = demonstrator(seed, wrong=0.985, truth=0.005, third=third)
        held = cliffs(seed, third)[..., None]
        return np.where(held, certain, demonstrator(seed, third=third))
    if name == 'clean':
        return noisy(right, 0.98)
    if name == 'good':
        return demonstrator(seed + 1, 0.08, wrong=0.9, truth=0.08, known=0.98, third=third)
    if name == 'biased':
        return noisy((right + 3 * (np.arange(3) == 2)[:, None, None]) % 10, 0.98)
    raise DataError(f'laws of chains are {list(get_args(LawName))}, not {name!r}')


def expected_accuracy(
    law: np.ndarray,
    operations: int = 3,
    every: bool = False,
    *,
    given: int = 0,
    third: Third = 'affine',
) -> float:
    """The exact probability that an answer drawn from a law passes, over uniform problems.

    Args:
      law: float [3, 10, 10, 10].
      operations: L.
      every: all values have to be right; else the last one, whatever way led to it.
      given: so many first steps are right.
      third: see `truth_of`.
    """
    true = truth_of(third)
    # joint[t, v]: the truth is t and v was said.
    joint = np.eye(10) / 10
    for step in range(operations):
        said = noisy(true, 1.0) if step < given else law
        right = np.eye(10)[true]  # [o, t, b, t']
        joint = np.einsum('tv,otbx,ovby->xy', joint, right, said) / 30
        if every:
            joint = joint * np.eye(10)
    return float(np.trace(joint))
