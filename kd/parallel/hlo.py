"""What a compiled program communicates and computes, read from its text and its jaxpr."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$')
INSTRUCTION = re.compile(
    r'^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|[^ ]+) '
    r'(?P<op>[\w\-]+)\((?P<rest>.*)$'
)
SHAPE = re.compile(r'(?P<type>[a-z]\w*)\[(?P<sides>[\d,]*)\](?P<layout>\{[^}]*\})?')
OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its result on one device; of what goes in for a reduce-scatter.
      times: how often it runs in one execution of the program, as far as trip counts are known.
      shape: of its result.
    """

    kind: str
    bytes: int
    times: int
    shape: str


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`), loops taken into account."""
    found: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    current, entry, bounds = '', '', loop_bounds(text)
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current = match['name']
            entry = current if match['entry'] else entry
        elif match := INSTRUCTION.match(line):
            calls[current] += calls_of(match['op'], match['rest'], bounds)
            kind = match['op'].removesuffix('-start')
            if kind in KINDS:
                starts = match['op'].endswith('-start')
                size = _size(kind, match['shape'], starts, match['rest'])
                found[current].append((kind, size, match['shape']))
    runs = count_runs(entry, calls)
    return [
        Collective(kind, size, runs[name], shape)
        for name, listed in found.items()
        for kind, size, shape in listed
        if runs[name]
    ]


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (how many run, bytes)} of one execution on one device."""
    result = {}
    for kind in KINDS:
        of_kind = [c for c in found if c.kind == kind]
        if of_kind:
            result[kind] = (sum(c.times for c in of_kind), sum(c.times * c.bytes for c in of_kind))
    return result


def wire_bytes(found: list[Collective]) -> int:
    """Bytes that one device sends, for rings much longer than 2: twice for an all-reduce."""
    return sum((2 if c.kind == 'all-reduce' else 1) * c.times * c.bytes for c in found)


def flops(function: Any, *arguments: Any) -> int:
    """Operations in the matrix products and convolutions of a function, over all devices.

    Counted on the jaxpr, where the length of a loop is known: XLA's own analysis counts the body
    of a loop once. A multiply-add is two. Of a conditional the dearest branch counts; a while loop
    of unknown length counts once.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_runs(entry: str, calls: Mapping[str, list[tuple[str, int]]]) -> Counter[str]:
    """How often each computation runs in one execution of the program."""
    runs: Counter[str] = Counter()

    def count(name: str, times: int) -> None:
        runs[name] += times
        for called, trips in calls.get(name, ()):
            count(called, times * trips)

    count(entry, 1)
    return runs


def calls_of(op: str, rest: str, bounds: Mapping[str, int]) -> list[tuple[str, int]]:
    """(computation, times) that an instruction calls; `bounds` are those of `loop_bounds`."""
    times = 1
    if op == 'while':
        told, condition = _TRIPS.search(rest), _CONDITION.search(rest)
        times = int(told[1]) if told else bounds.get(condition[1], 1) if condition else 1
    called = _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        called += re.findall(r'[\w.\-]+', branches)
    return [(name, times) for name in called]


def loop_bounds(text: str) -> dict[str, int]:
    """{condition of a loop: n} for conditions `counter < n`.

    The counters of `lax.scan` and `fori_loop` begin at 0. Programs for TPUs say nowhere else how
    often their loops run.
    """
    bounds: dict[str, int] = {}
    constants: dict[str, int] = {}
    current = ''
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current, constants = match['name'], {}
        elif match := INSTRUCTION.match(line):
            if match['op'] == 'constant' and (value := re.match(r'(\d+)\)', match['rest'])):
                constants[match['name']] = int(value[1])
            elif match['root'] and match['op'] == 'compare' and 'direction=LT' in match['rest']:
                last = OPERAND.findall(match['rest'].partition(')')[0])[-1]
                if last in constants:
                    bounds[current] = constants[last]
    return bounds


def _size(kind: str, shape: str, starts: bool, rest: str) -> int:
    sizes = [_bytes(m) for m in SHAPE.finditer(shape)]
    if kind == 'reduce-scatter':
        operands = rest.partition(')')[0]
        into = [_bytes(m) for m in SHAPE.finditer(operands)]
        # Newer texts do not repeat the operands' shapes: take the groups' size instead.
        if into:
            return sum(into)
        return sum(sizes) * _group_size(rest)
    if starts and kind in ('all-gather', 'collective-permute'):
        # (operands, results, and for permutations two words of context).
        sizes = [size for size in sizes if size > 4] or sizes
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _group_size(rest: str) -> int:
    if match := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
        return int(match[1])
    if match := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
        return match[1].count(',') + 1
    return 1


def _bytes(match: re.Match[str]) -> int:
    sides = [int(side) for side in match['sides'].split(',') if side]
    return _BYTES.get(match['type'], 4) * math.prod(sides)


def bytes_in_memory(match: re.Match[str], *, on_chip: bool = False) -> int:
    """Bytes that an array (a match of `SHAPE`) takes of a chip's large memory.

    None where its layout puts it in memory on the chip, unless that is asked for too; elsewhere the
    smaller sides are rounded up to the layout's tiles.
    """
    layout = match['layout'] or ''
    if 'S(1)' in layout and not on_chip:
        return 0
    order, _, rest = layout.strip('{}').partition(':')
    tile = re.match(r'T\(([\d,]+)\)', rest)
    if not tile or not order:
        return _bytes(match)
    sides = [int(side) for side in match['sides'].split(',')]
    for axis, size in zip(order.split(','), reversed(tile[1].split(',')), strict=False):
        sides[int(axis)] = -(-sides[int(axis)] // int(size)) * int(size)
    return _BYTES.get(match['type'], 4) * math.prod(sides)


def jaxpr_flops(jaxpr: Any) -> int:
    """As `flops`, of a function that is traced already."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inner = [jaxpr_flops(x) for x in _inner(parameters)]
        if name == 'dot_general':
            (contracted, _), _ = parameters['dimension_numbers']
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * depth
        elif name == 'conv_general_dilated':
            kernel = equation.invars[1].aval
            outputs = kernel.shape[parameters['dimension_numbers'].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * (kernel.size // outputs)
        elif name == 'scan':
            total += parameters['length'] * sum(inner)
        elif name == 'cond':
            total += max(inner)
        else:
            total += sum(inner)
    return total


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
