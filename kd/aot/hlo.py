"""What a compiled program communicates and computes, read from its text and its jaxpr."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
from jax.extend import core

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(
    r'^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|[^ ]+) '
    r'(?P<op>[\w\-]+)\((?P<rest>.*)$'
)
SHAPE = re.compile(r'(?P<type>[a-z]\w*)\[(?P<sides>[\d,]*)\](?P<layout>\{[^}]*\})?')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: without its %.
      op: what it does.
      shape: of its result, with layout.
      operands: names.
      rest: of the line, from the first operand on.
    """

    name: str
    op: str
    shape: str
    operands: list[str]
    rest: str

    @property
    def called(self) -> list[str]:
        """Computations that it names."""
        branches = ' '.join(_BRANCHES.findall(self.rest))
        return _CALLED.findall(self.rest) + re.findall(r'[\w.\-]+', branches)


Computation = dict[str, Instruction]  # by name; the last one is the root


class Program(NamedTuple):
    """A compiled program: its computations by name, and that with which it begins."""

    computations: dict[str, Computation]
    entry: str

    def runs(
        self, ops: Container[str] | None = None, cost: Callable[[str], float] | None = None
    ) -> Counter[str]:
        """How often each computation runs in one execution.

        Args:
          ops: calls by others do not count.
          cost: of one run of a computation, without its calls: of a conditional the dearest branch
            runs. Without it, all branches do.
        """

        @functools.cache
        def calls(name: str) -> list[tuple[str, int]]:
            found = []
            within = self.computations.get(name, {})
            for each in within.values():
                if ops is None or each.op in ops:
                    turns = _turns(each, within, self.computations) if each.op == 'while' else 1
                    called = each.called
                    if each.op == 'conditional' and cost is not None:
                        called = [max(called, key=whole)]
                    found += [(one, 1 if turns is None else turns) for one in called]
            return found

        @functools.cache
        def whole(name: str) -> float:
            assert cost is not None
            return cost(name) + sum(times * whole(called) for called, times in calls(name))

        found: Counter[str] = Counter()

        def count(name: str, times: int) -> None:
            found[name] += times
            for called, turns in calls(name):
                count(called, times * turns)

        count(self.entry, 1)
        return found

    def loops_of_unknown_length(self) -> int:
        """How many loops do not tell how often they run; `runs` takes each of them once."""
        runs = self.runs()
        return sum(
            each.op == 'while' and _turns(each, within, self.computations) is None
            for name, within in self.computations.items()
            if runs[name]
            for each in within.values()
        )


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


def parse(text: str) -> Program:
    """The program of a text, `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry = name = ''
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match['name']
            entry = name if match['entry'] else entry
            computations[name] = {}
        elif (match := _INSTRUCTION.match(line)) and name:
            operands = _OPERAND.findall(match['rest'].partition(')')[0])
            each = Instruction(match['name'], match['op'], match['shape'], operands, match['rest'])
            computations[name][each.name] = each
            if match['root']:
                roots[name] = each.name
    for name, root in roots.items():
        computations[name][root] = computations[name].pop(root)
    return Program(computations, entry)


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`), loops taken into account.

    Of a conditional those of one branch, that with the most bytes.
    """
    program = parse(text)

    def sent(name: str) -> float:
        own = program.computations.get(name, {}).values()
        return sum(_result(each) for each in own if each.op.removesuffix('-start') in KINDS)

    runs = program.runs(cost=sent)
    named = [
        (name, each)
        for name, computation in program.computations.items()
        for each in computation.values()
        if runs[name] and each.op.removesuffix('-start') in KINDS
    ]
    starts = {
        name
        for name, computation in program.computations.items()
        if any('"AsyncCollectiveStart"' in each.rest for each in computation.values())
    }
    # Done in pieces beside other work, each of which names it again: it counts where it starts.
    pieces = {_channel(each) for name, each in named if name in starts}
    found = []
    for name, each in named:
        if name in starts or _channel(each) not in pieces:
            kind = each.op.removesuffix('-start')
            found.append(Collective(kind, _result(each), runs[name], each.shape))
    return found


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
    of a loop once. A multiply-add is two. Of a conditional the dearest branch counts; the body of a
    while loop, whose length a jaxpr does not tell, counts once (see `while_loops`). The body of a
    `shard_map` counts for one device.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _turns(
    loop: Instruction, within: Computation, computations: dict[str, Computation]
) -> int | None:
    """How often a loop runs: as it says, or by its counter; None where neither tells.

    Programs for TPUs do not say it. There the condition is `counter < bound`, and the body adds a
    constant to the counter.
    """
    if told := _TRIPS.search(loop.rest):
        return int(told[1])
    condition, body = (
        computations[re.search(rf'{part}=%?([\w.\-]+)', loop.rest)[1]]  # type: ignore[index]
        for part in ('condition', 'body')
    )
    initial = _origin(loop.operands[0], within)

    def value(name: str, computation: Computation) -> int | None:
        """Of a constant, or of an element of the state as the loop begins."""
        made = _origin(name, computation)
        if made is not None and made.op == 'get-tuple-element':
            made = initial and _origin(initial.operands[_place(made)], within)
        number = re.match(r'\d+', made.rest) if made is not None and made.op == 'constant' else None
        return int(number[0]) if number else None

    test = next(reversed(condition.values()))
    if test.op != 'compare' or 'direction=LT' not in test.rest:
        return None
    counter = _origin(test.operands[0], condition)
    first, bound = (value(name, condition) for name in test.operands)
    if counter is None or counter.op != 'get-tuple-element' or first is None or bound is None:
        return None
    after = _origin(next(reversed(body.values())).operands[_place(counter)], body)
    step = value(after.operands[1], body) if after is not None and after.op == 'add' else None
    return max(-(-(bound - first) // step), 0) if step else None


def _origin(name: str, within: Computation) -> Instruction | None:
    """What made a value, through copies and bitcasts."""
    made = within.get(name)
    while made is not None and made.op in ('copy', 'bitcast'):
        made = within.get(made.operands[0])
    return made


def _place(element: Instruction) -> int:
    """The place in a tuple of what `get-tuple-element` takes from it."""
    found = re.search(r'index=(\d+)', element.rest)
    assert found is not None
    return int(found[1])


def _channel(each: Instruction) -> str:
    """The number of a collective, or its own name."""
    found = re.search(r'channel_id=\d+', each.rest)
    return found[0] if found else each.name


def _result(each: Instruction) -> int:
    """Bytes of a collective, see `Collective`."""
    kind, starts, rest = each.op.removesuffix('-start'), each.op.endswith('-start'), each.rest
    sizes = [_bytes(m) for m in SHAPE.finditer(each.shape)]
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
            # Of an input spread out with zeros, as in gradients of strided convolutions, these do
            # not count.
            spread = math.prod(parameters['lhs_dilation'] or (1,))
            total += 2 * equation.outvars[0].aval.size * (kernel.size // outputs) // spread
        elif name == 'scan':
            total += parameters['length'] * sum(inner)
        elif name == 'cond':
            total += max(inner)
        else:
            total += sum(inner)
    return total


def while_loops(jaxpr: Any) -> int:
    """How many while loops have operations that `jaxpr_flops` counts once."""
    return sum(
        (equation.primitive.name == 'while' and any(map(jaxpr_flops, inner)))
        + sum(map(while_loops, inner))
        for equation in jaxpr.eqns
        for inner in [_inner(equation.params)]
    )


def largest_square(jaxpr: Any, side: int, slack: int, platform: str) -> int:
    """Bytes of the largest softmax over arrays with two last sides of `side`; 0 for none.

    Or up to `slack` more, for rows that are padded, and over all devices. Such is a map of
    attention between all tokens of a row. What a softmax is known by is its exponential: other
    arrays may be as wide as rows are long. Insides of kernels, which stay on the chip, are left
    out, and so is what is for another platform (`jax.lax.platform_dependent`).
    """
    largest, platforms = 0, {}
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, _inner(equation.params)
        if name == 'platform_index':
            platforms[equation.outvars[0]] = equation.params['platforms']
        elif name == 'cond' and equation.invars[0] in platforms:
            of = [each is None or platform in each for each in platforms[equation.invars[0]]]
            inner = [inner[of.index(True)]]
        last = equation.outvars[0].aval.shape[-2:] if name == 'exp' else ()
        if len(last) == 2 and all(side <= each <= side + slack for each in last):
            made = equation.outvars[0].aval
            largest = max(largest, made.size * made.dtype.itemsize)
        if name != 'pallas_call':
            found = [largest_square(x, side, slack, platform) for x in inner]
            largest = max([largest, *found])
    return largest


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
