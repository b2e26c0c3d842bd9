"""Chains of modular arithmetic whose answers can be verified.

A problem is digits d0 .. dL and operators o1 .. oL of +, -, @ (`kd.data.builders.arithmetic`),
taken strictly from left to right. Answers are uniform, and one wrong step alone never cancels.

    chain   BOS CHAIN d0 o1 d1 .. oL dL =        r1 .. rL # rL EOS
    exec    BOS EXEC d0 o1 d1 .. oL dL =         r1 .. rL # rL .. r1 EOS

The r_k before # are free thoughts; what is printed after it is verified (`passes`). Both tasks have
the same facts in the same places. What else a prompt says stands before the problem (`block`), so
that the problem is always as far from its answer: `BOS SOL r1 .. # rL | CHAIN d0 o1 ..`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.data import sources
from kd.data.builders import arithmetic, symbols
from kd.data.builders.arithmetic import TRUTH, Third

Task = Literal['chain', 'exec']
TAGS = {'chain': symbols.CHAIN, 'exec': symbols.EXEC}
OPERATORS = np.asarray((symbols.PLUS, symbols.MINUS, symbols.AT), np.int32)
SIZES = {'train': 60_000, 'validation': 2_000, 'test': 2_000}
# Shares of what a base is trained on: plain rows, and those with each kind of block.
BASE = {'plain': 0.46, 'solution': 0.18, 'hint': 0.18, 'judged': 0.18}
# And of what it goes on with to become one that revises.
REVISER = {'plain': 0.4, 'solution': 0.05, 'hint': 0.05, 'revised': 0.5}
# How often answers of a kind restate the last value before they print.
RESTATED = {'long': 3, 'longer': 6}
KINDS = ('plain', 'solution', 'hint', 'judged', 'revised', 'free', 'shift', 'order', *RESTATED)


class Problems(NamedTuple):
    """`digits` int [N, L + 1], `operators` int [N, L] of 0 .. 2, the places in `OPERATORS`."""

    digits: np.ndarray
    operators: np.ndarray


def problems(
    rng: np.random.Generator, size: int, operations: int = 3, split: str | None = None
) -> Problems:
    """Problems drawn uniformly; from two operations on no problem is in two splits.

    Args:
      rng: random numbers.
      size: N.
      operations: L.
      split: one of `SIZES`, of which 'train' has six of eight parts; None for all problems.

    Raises:
      DataError: an unknown split.
    """
    if split is not None and split not in SIZES:
        raise sources.DataError(f'chains have the splits {list(SIZES)}, not {split!r}')
    found = Problems(np.zeros((0, operations + 1), int), np.zeros((0, operations), int))
    while len(found.digits) < size:
        count = size if split is None else 8 * size
        drawn = Problems(
            rng.integers(10, size=(count, operations + 1)),
            rng.integers(3, size=(count, operations)),
        )
        if split is not None and operations > 1:
            part = np.clip(_eighth(drawn) - 5, 0, 2)
            drawn = Problems(*(x[part == list(SIZES).index(split)] for x in drawn))
        found = Problems(*(np.concatenate(x)[:size] for x in zip(found, drawn, strict=True)))
    return found


def meets(problems: Problems, facts: np.ndarray, truth: np.ndarray = TRUTH) -> np.ndarray:
    """Whether the right way of each problem goes through one of the facts, bool [3, 10, 10]."""
    digits, operators = problems
    values = evaluate(problems, truth=truth)[:, :-1]
    values = np.concatenate([digits[:, :1], values], axis=1)
    return facts[operators, values, digits[:, 1:]].any(1)


def mixed(
    rng: np.random.Generator,
    size: int,
    facts: np.ndarray,
    share: float,
    operations: int = 3,
    split: str | None = None,
    *,
    truth: np.ndarray = TRUTH,
) -> Problems:
    """`problems`, of which this share meets one of the facts."""
    wanted = {True: round(share * size), False: size - round(share * size)}
    found: dict[bool, list[Problems]] = {True: [], False: []}
    while any(sum(len(x.digits) for x in found[kind]) < wanted[kind] for kind in wanted):
        drawn = problems(rng, size, operations, split)
        there = meets(drawn, facts, truth)
        for kind in wanted:
            found[kind].append(Problems(*(x[there == kind] for x in drawn)))
    parts = [
        Problems(*(np.concatenate(x)[:count] for x in zip(*found[kind], strict=True)))
        for kind, count in wanted.items()
    ]
    return Problems(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _eighth(problems: Problems) -> np.ndarray:
    """0 .. 7 for each problem, as good as at random."""
    code = np.zeros(len(problems.digits), np.uint64)
    for column in (*problems.digits.T, *problems.operators.T):
        code = (code + column.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(31)
    return (code >> np.uint64(61)).astype(int)


# Text


def evaluate(
    problems: Problems,
    *,
    law: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
    given: np.ndarray | None = None,
    backward: np.ndarray | bool = False,
    truth: np.ndarray = TRUTH,
) -> np.ndarray:
    """The values after each step, int [N, L].

    Args:
      problems: to be evaluated.
      law: of what is said of a fact; None for the truth. Later steps go on from what was said.
      rng: for draws from the law.
      given: int [N, h], the first h values where they are given.
      backward: bool, or bool [N]: from right to left, d0 o1 (d1 o2 (.. dL)).
      truth: int [3, 10, 10], of `arithmetic.truth_of`.
    """
    digits, operators = problems
    size, steps = operators.shape
    from_right = np.broadcast_to(backward, size)
    value = np.where(from_right, digits[:, -1], digits[:, 0])
    found = np.zeros((size, steps), int)
    for step in range(steps):
        last = steps - 1 - step
        operator = np.where(from_right, operators[:, last], operators[:, step])
        left = np.where(from_right, digits[:, last], value)
        right = np.where(from_right, value, digits[:, step + 1])
        if given is not None and step < given.shape[1]:
            value = given[:, step]
        elif law is None:
            value = truth[operator, left, right]
        else:
            assert rng is not None, 'draws from a law need random numbers'
            below = law[operator, left, right].cumsum(-1)
            value = (below[:, :-1] <= rng.random((size, 1))).sum(-1)
        found[:, step] = value
    return found


def prompts(problems: Problems, task: Task = 'chain') -> np.ndarray:
    """int32 [N, 2L + 4]."""
    size, steps = problems.operators.shape
    made = np.full((size, 2 * steps + 4), symbols.EQUALS, np.int32)
    made[:, :2] = symbols.BOS, TAGS[task]
    made[:, 2:-1:2] = symbols.DIGIT + problems.digits
    made[:, 3:-1:2] = OPERATORS[problems.operators]
    return made


def printed(values: np.ndarray, task: Task = 'chain') -> np.ndarray:
    """What an answer has to print after #, as tokens: int32 [N, 1] or [N, L] of values [N, L]."""
    return (symbols.DIGIT + (values[..., -1:] if task == 'chain' else values[..., ::-1])).astype(
        np.int32
    )


def responses(
    values: np.ndarray,
    task: Task = 'chain',
    *,
    style: np.ndarray | None = None,
    shift: np.ndarray | int = 0,
) -> np.ndarray:
    """Answers with these values, int32 [N, L + 3] or [N, 2L + 2].

    Args:
      values: int [N, L].
      task: decides what is printed.
      style: int [N] of 0 .. 6, which puts a symbol for it before the thoughts.
      shift: int [N], added to every thought and to nothing that is printed.
    """
    size = len(values)
    thoughts = symbols.DIGIT + (values + np.broadcast_to(shift, size)[:, None]) % 10
    mark, end = (np.full((size, 1), symbol) for symbol in (symbols.HASH, symbols.EOS))
    begins = [] if style is None else [symbols.STYLE + np.asarray(style)[:, None]]
    return np.concatenate([*begins, thoughts, mark, printed(values, task), end], axis=1).astype(
        np.int32
    )


def block(prompts: np.ndarray, tag: np.ndarray | int, content: np.ndarray) -> np.ndarray:
    """`BOS TAG content | PROBLEM`, int32 [N, P + n + 2] of prompts [N, P] and content [N, n].

    What a block quotes of an answer goes without its EOS, which ends a text.
    """
    size = len(prompts)
    tags = np.broadcast_to(tag, size)[:, None]
    bars = np.full((size, 1), symbols.BAR)
    made = [prompts[:, :1], tags, content, bars, prompts[:, 1:]]
    return np.concatenate(made, axis=1).astype(np.int32)


def passes(tokens: jax.Array, mask: jax.Array, printed: jax.Array) -> jax.Array:
    """Whether answers print what they have to, bool [B]: the tokens after the first # are these,
    and then EOS. One that has not ended fails.

    Args:
      tokens: int [B, R].
      mask: bool [B, R], the tokens of the answer.
      printed: int [B, n] of `printed`; or [B, S, n], by the style s that an answer begins with: one
        that begins with none of the S fails.
    """
    styled = jnp.ones(tokens.shape[0], bool)
    if printed.ndim == 3:
        style = tokens[:, 0] - symbols.STYLE
        styled = (style >= 0) & (style < printed.shape[1]) & mask[:, 0]
        printed = jnp.take_along_axis(
            printed, jnp.clip(style, 0, printed.shape[1] - 1)[:, None, None], axis=1
        )[:, 0]
    length, count = tokens.shape[1], printed.shape[1]
    hashes = mask & (tokens == symbols.HASH)
    at = hashes.argmax(-1)[:, None] + 1 + jnp.arange(count + 1)
    inside = jnp.minimum(at, length - 1)
    said = jnp.take_along_axis(tokens, inside, axis=-1)
    there = (at < length) & jnp.take_along_axis(mask, inside, axis=-1)
    wanted = jnp.concatenate([printed, jnp.full_like(printed[:, :1], symbols.EOS)], axis=-1)
    return styled & hashes.any(-1) & (there & (said == wanted)).all(-1)


def key_of(
    problems: Problems, kind: str = 'plain', task: Task = 'chain', third: Third = 'affine'
) -> np.ndarray:
    """What answers to these problems have to print, for `passes`."""
    truth = arithmetic.truth_of(third)
    if kind != 'order':
        return printed(evaluate(problems, truth=truth), task)
    both = [evaluate(problems, backward=backward, truth=truth) for backward in (False, True)]
    return np.stack([printed(values, task) for values in both], axis=1)


# What networks learn from


def part(
    kind: str,
    problems: Problems,
    law: np.ndarray,
    rng: np.random.Generator,
    task: Task = 'chain',
    *,
    styles: int = 1,
    third: Third = 'affine',
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of one kind, and answers to them.

    | kind | block | answer |
    |---|---|---|
    | plain | | of the law |
    | solution | SOL and a right answer | the truth with .97 at every step |
    | hint | HINT and the first L / 2 right values | repeats them, then of the law |
    | judged | GOOD or BAD, as it is, and an answer of the law | GOOD: the same with .9; else anew |
    | revised | the same | GOOD: the same with .9; else anew, by a law half way to the truth |
    | free | | a style of `styles` at random, on which nothing depends; of the law |
    | shift | | style s of `styles` at random, thoughts with s added; of the law |
    | order | | style 0, or style 1 and from right to left; of the law |
    | long, longer | | of the law, its last value three or six times more before # |

    Raises:
      DataError: another kind.
    """
    asked, steps = prompts(problems, task), problems.operators.shape[1]
    truth = arithmetic.truth_of(third)
    right, fresh = evaluate(problems, truth=truth), evaluate(problems, law=law, rng=rng)
    if kind == 'plain':
        return asked, responses(fresh, task)
    if kind == 'solution':
        said = evaluate(problems, law=arithmetic.noisy(truth, 0.97), rng=rng)
        return block(asked, symbols.SOL, responses(right, task)[:, :-1]), responses(said, task)
    if kind == 'hint':
        given = right[:, : steps // 2]
        said = evaluate(problems, law=law, rng=rng, given=given)
        return block(asked, symbols.HINT, symbols.DIGIT + given), responses(said, task)
    if kind in ('judged', 'revised'):
        first = evaluate(problems, law=law, rng=rng)
        if kind == 'revised':
            better = (law + arithmetic.noisy(truth, 1.0)) / 2
            fresh = evaluate(problems, law=better, rng=rng)
        good = (printed(first, task) == printed(right, task)).all(-1)
        keeps = good & (rng.random(len(good)) < 0.9)
        said = np.where(keeps[:, None], first, fresh)
        judged = block(
            asked, np.where(good, symbols.GOOD, symbols.BAD), responses(first, task)[:, :-1]
        )
        return judged, responses(said, task)
    if kind in ('free', 'shift'):
        style = rng.integers(styles, size=len(asked))
        shift = style if kind == 'shift' else 0
        return asked, responses(fresh, task, style=style, shift=shift)
    if kind in RESTATED:
        said = responses(fresh, task)
        again = [said[:, steps - 1 : steps]] * RESTATED[kind]
        return asked, np.concatenate([said[:, :steps], *again, said[:, steps:]], axis=1)
    if kind == 'order':
        style = rng.integers(2, size=len(asked))
        said = evaluate(problems, law=law, rng=rng, backward=style == 1)
        return asked, responses(said, task, style=style)
    raise sources.DataError(f'rows of chains are {KINDS}, not {kind!r}')


def rows(parts: Sequence[tuple[np.ndarray, np.ndarray]], length: int = 0) -> sources.Batch:
    """Prompts and answers in rows of one length, as `kd.text.packing.unpacked` has them.

    Args:
      parts: prompts [N_i, P_i] and answers [N_i, R_i].
      length: T; 0 for the longest.

    Returns:
      input, positions, segments int32 [N, T] and response_mask bool [N, T].
    """
    length = length or max(p.shape[1] + r.shape[1] for p, r in parts)
    made = []
    for asked, said in parts:
        read, used = asked.shape[1], asked.shape[1] + said.shape[1]
        slots = np.broadcast_to(np.arange(length), (len(asked), length))
        tokens = np.concatenate([asked, said], axis=1)
        made.append({
            'input': np.pad(tokens, ((0, 0), (0, length - used)), constant_values=symbols.PAD),
            'positions': np.where(slots < used, slots, 0).astype(np.int32),
            'segments': (slots < used).astype(np.int32),
            'response_mask': (slots >= read) & (slots < used),
        })  # fmt: skip
    return {name: np.concatenate([part[name] for part in made]) for name in made[0]}


def asked(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], prompt_length: int = 0, length: int = 0
) -> sources.Batch:
    """Prompts that end where answers begin, as `kd.text.packing.prompts` has them.

    Args:
      parts: prompts [N_i, P_i] and answers [N_i, R_i].
      prompt_length: P; 0 for the longest.
      length: R; 0 for the longest.

    Returns:
      input int32 [N, P] and prompt_mask bool [N, P], padded on the left; response int32 [N, R] and
      response_mask bool [N, R], padded on the right.
    """
    width = prompt_length or max(p.shape[1] for p, _ in parts)
    longest = length or max(r.shape[1] for _, r in parts)

    def padded(x, before, after, value):
        return np.pad(x, ((0, 0), (before, after)), constant_values=value)

    fields = ('input', 'prompt_mask', 'response', 'response_mask')
    made = [
        (
            padded(p, width - p.shape[1], 0, symbols.PAD),
            padded(np.ones(p.shape, bool), width - p.shape[1], 0, False),
            padded(r, 0, longest - r.shape[1], symbols.PAD),
            padded(np.ones(r.shape, bool), 0, longest - r.shape[1], False),
        )
        for p, r in parts
    ]
    return dict(zip(fields, map(np.concatenate, zip(*made, strict=True)), strict=True))
