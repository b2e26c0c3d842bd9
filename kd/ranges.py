"""Which numbers an argument takes, declared where it is: `temperature: Positive = 4.0`.

    def logit_kd(context, *, temperature: Positive = 4.0, micro_batches: Count = 1) -> Method: ...

The numbers of a recipe are held to these declarations before anything is built (`kd.config.build`),
so that a temperature of 0 is one line at the start and not a loss that is not finite at the end.
Numbers are finite, and no Booleans. Texts that name a stage, a split or a row of the recipe are
declared in the same way, and held where the recipe is known; so are blocks of keywords.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union

from kd.errors import UserError

P = ParamSpec('P')
R = TypeVar('R')


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without an end that is open; `whole` for integers."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        try:
            value = value if self.whole else float(value)
        except OverflowError:
            return False
        if not self.whole and not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        kind = 'an integer' if self.whole else 'a number'
        if math.isinf(self.low) and math.isinf(self.high):
            return f'{kind} that is finite'
        # The largest counter is no bound that anybody thinks of, unless it is passed.
        if math.isinf(self.high):
            return f'{kind} {"above" if self.above else "from"} {self.low:g}'
        if self.whole:
            return f'{kind} from {self.low} to {self.high}'
        opening, closing = '(' if self.above else '[', ')' if self.below else ']'
        return f'{kind} in {opening}{self.low:g}, {self.high:g}{closing}'


@dataclasses.dataclass(frozen=True)
class Name:
    """Marks a text that names something of the recipe, a `kind` of thing."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Keywords:
    """Marks a block of keywords for `function`, without those `reserved`, which it gets anyway."""

    function: Callable
    reserved: tuple[str, ...] = ()


# Steps and sizes are counted in int32; seeds from 2^32 on would lose their upper bits in a key.
_MOST, _LAST_SEED = 2**31 - 1, 2**32 - 1

Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range()]
# A weight or probability in [0, 1], and one that stays below 1, such as a momentum.
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Count = Annotated[int, Range(1, _MOST, whole=True)]
Size = Annotated[int, Range(0, _MOST, whole=True)]
Whole = Annotated[int, Range(-_MOST, _MOST, whole=True)]
Seed = Annotated[int, Range(0, _LAST_SEED, whole=True)]
StageName = Annotated[str, Name('stage')]
SplitName = Annotated[str, Name('split')]
# The title of one of a report's `rows`.
RowTitle = Annotated[str, Name('row')]


def check(function: Callable, arguments: Mapping[str, Any], *, where: str) -> None:
    """Raises `UserError` for a number outside what `function` declares for it.

    Args:
      function: a function or class; what its annotations do not declare by a `Range` may be
        anything.
      arguments: its keywords.
      where: place in the config, for the message.
    """
    declared = hints(function)
    for name, value in arguments.items():
        if name in declared:
            check_value(declared[name], value, where=f'{where}.{name}' if where else name)


def check_value(hint: Any, value: Any, *, where: str) -> None:
    """Raises `UserError` unless `value` fits `hint`, if that declares a range."""
    wanted = _misfit(hint, value) if declares(hint) else ''
    if wanted:
        raise UserError(f'{where} must be {wanted}, got {value!r}.')


def held(function: Callable[P, R]) -> Callable[P, R]:
    """Holds every call of `function` to its declarations; for what no block of a config names."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        check(function, signature.bind(*args, **kwargs).arguments, where='')
        return function(*args, **kwargs)

    return wrapper


def hints(function: Callable) -> dict[str, Any]:
    """Annotations by the name of the argument; none of a function whose names are not known."""
    target: Any = function
    if inspect.isclass(function) and not dataclasses.is_dataclass(function):
        target = function.__init__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def names(hint: Any, value: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of every text in `value` that its annotation marks by a `Name`.

    Of a union the first part that fits decides: `Literal[''] | StageName` is a stage or none.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for extra in hint.__metadata__:
            if isinstance(extra, Name):
                yield extra.kind, value
    elif origin in (Union, types.UnionType):
        fitting = (part for part in parts if not _misfit(part, value))
        yield from names(next(fitting, None), value)
    elif isinstance(value, Sequence) and not isinstance(value, str) and parts:
        one = len(parts) == 1 or parts[1:] == (...,)
        for part, item in zip((parts[0],) * len(value) if one else parts, value, strict=False):
            yield from names(part, item)


def keywords(hint: Any) -> Keywords | None:
    """What an annotation says of a block of keywords, if it does."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(keywords, typing.get_args(hint))), None)
    marks = getattr(hint, '__metadata__', ())
    return next((mark for mark in marks if isinstance(mark, Keywords)), None)


def declares(hint: Any) -> bool:
    """Whether an annotation has one of these marks somewhere in it."""
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(extra, Range | Name | Keywords) for extra in hint.__metadata__)
    return any(declares(part) for part in typing.get_args(hint))


def _misfit(hint: Any, value: Any) -> str:
    """What was wanted instead of `value`, in words; '' where it fits."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        known = [extra for extra in hint.__metadata__ if isinstance(extra, Range)]
        marked = [extra.kind for extra in hint.__metadata__ if isinstance(extra, Name)]
        if marked and not isinstance(value, str):
            return f'the name of a {marked[0]}'
        if keywords(hint):
            return _misfit(parts[0], value)
        return next((str(one) for one in known if value not in one), '')
    if origin in (Union, types.UnionType):
        wanted = [_misfit(part, value) for part in parts]
        return '' if '' in wanted else ' or '.join(wanted)
    if origin is Literal:
        return '' if value in parts else ' or '.join(map(repr, parts))
    if origin is not None and issubclass(origin, Sequence):
        return _misfit_of_sequence(parts, value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return 'a block'
        return next((w for item in value.values() if (w := _misfit(parts[1], item))), '')
    if hint is None or hint is types.NoneType:
        return '' if value is None else 'None'
    if hint in (bool, str):
        return '' if isinstance(value, hint) else f'a {hint.__name__}'
    return ''


def _misfit_of_sequence(parts: tuple[Any, ...], value: Any) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return 'a sequence'
    if len(parts) == 1 or parts[1:] == (...,):
        wanted = {_misfit(parts[0], item) for item in value} - {''}
        return f'a sequence, each {" or ".join(sorted(wanted))}' if wanted else ''
    if len(parts) != len(value):
        return f'a sequence of {len(parts)}'
    wanted = {_misfit(part, item) for part, item in zip(parts, value, strict=True)} - {''}
    return f'a sequence of {len(parts)}, each {" or ".join(sorted(wanted))}' if wanted else ''
