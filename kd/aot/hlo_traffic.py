"""Bytes that a compiled program moves between the chip and its memory, read from its text.

As in XLA's own analysis an instruction reads its operands and writes its result once, and a fusion
is one instruction; of what is sliced, gathered or updated in place only the part counts. Other than
there, the body of a loop counts as often as it runs, of a conditional the dearest branch, and what
lies in the memory on the chip (space 1 of a TPU) does not count.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import NamedTuple

from kd.aot import hlo

# They move nothing themselves.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional',
    'call', 'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier',
}  # fmt: skip
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_SLICES = {'dynamic-slice', 'slice', 'gather'}
# What others call, a fusion, a reduction or a sort, is part of them.
_CALLING = {'while', 'conditional', 'call', 'async-start'}


class _Instruction(NamedTuple):
    op: str
    sizes: list[int]  # in HBM, of each array of the result
    whole: list[int]  # wherever they lie
    operands: list[str]
    rest: str
    name: str

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


_Computation = dict[str, _Instruction]  # the last one is the root


def traffic(text: str) -> int:
    """Bytes read and written by one execution of a compiled program on one device."""
    program = hlo.parse(text)
    computations = {
        name: {key: _sized(each) for key, each in computation.items()}
        for name, computation in program.computations.items()
    }

    @functools.cache
    def moved(name: str) -> int:
        within = computations.get(name, {})
        return sum(_moved(each, within, computations) for each in within.values())

    runs = program.runs(_CALLING, cost=moved)
    return sum(times * moved(name) for name, times in runs.items())


def _sized(each: hlo.Instruction) -> _Instruction:
    arrays = list(hlo.SHAPE.finditer(each.shape))
    return _Instruction(
        each.op,
        [hlo.bytes_in_memory(array) for array in arrays],
        [hlo.bytes_in_memory(array, on_chip=True) for array in arrays],
        each.operands,
        each.rest,
        each.name,
    )


def _moved(each: _Instruction, within: _Computation, computations: dict[str, _Computation]) -> int:
    if each.op in _FREE or each.op.endswith('-done'):
        return 0
    if each.op == 'custom-call' and _FREE_CALLS.search(each.rest):
        return 0
    if each.op in _SLICES:
        return each.bytes + (sum(each.whole) if _size(within, each.operands[:1]) else 0)
    if each.op == 'dynamic-update-slice':
        return 2 * _size(within, each.operands[1:2])
    if each.op == 'slice-start':
        # (operand, slice, context): of the operand only the slice.
        return each.sizes[1] + (each.whole[1] if each.sizes[0] else 0)
    if each.op.endswith('-start'):
        # (operands, results, context): each array once.
        return sum(size for size in each.sizes if size > 4)
    if each.op == 'fusion':
        called = re.search(r'calls=%?([\w.\-]+)', each.rest)
        if called and called[1] in computations:
            return _fused(each, within, computations[called[1]])
    return each.bytes + _size(within, each.operands)


def _size(within: _Computation, names: list[str]) -> int:
    return sum(within[name].bytes for name in names if name in within)


def _fused(each: _Instruction, within: _Computation, inside: _Computation) -> int:
    """Bytes of a fusion, less what its slices and updates leave alone."""
    users: dict[str, list[_Instruction]] = defaultdict(list)
    for inner in inside.values():
        for name in inner.operands:
            users[name].append(inner)
    numbers = {
        int(inner.rest.partition(')')[0]): inner.name
        for inner in inside.values()
        if inner.op == 'parameter'
    }
    total = 0
    for number, operand in enumerate(each.operands):
        whole = _size(within, [operand])
        part = _read(numbers.get(number, ''), users, inside) if whole else 0
        total += whole if part is None else min(whole, part)
    root = next(reversed(inside.values()))
    written = root.operands if root.op == 'tuple' else [root.name]
    for size, name in zip(each.sizes, written, strict=False):
        made = _behind(name, inside)
        updates = made is not None and made.op == 'dynamic-update-slice'
        total += min(size, _whole(inside, made.operands[1])) if updates and made else size
    return total


def _read(name: str, users: dict[str, list[_Instruction]], inside: _Computation) -> int | None:
    """Bytes read of a parameter that is only sliced or updated; None for all of it."""
    total = 0
    for user in users[name]:
        if user.op == 'bitcast':
            part = _read(user.name, users, inside)
            if part is None:
                return None
            total += part
        elif user.op in _SLICES and user.operands[0] == name:
            total += _whole(inside, user.name)
        elif user.op != 'dynamic-update-slice' or user.operands[0] != name:
            return None
    return total


def _behind(name: str, inside: _Computation) -> _Instruction | None:
    """The instruction that made a value, through bitcasts."""
    made = inside.get(name)
    while made is not None and made.op == 'bitcast':
        made = inside.get(made.operands[0])
    return made


def _whole(inside: _Computation, name: str) -> int:
    return sum(inside[name].whole) if name in inside else 0
