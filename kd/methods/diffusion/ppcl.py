"""PPCL: runs of blocks become one block each, which may be put in or left out afterwards.

    detect    a writer: finds the runs, as the blocks that are `dropped`
    depth     a method: the first block of each run learns to do for all of it
    width     a method: linear maps after these blocks, and in the place of MLPs

What a block learns from is the teacher's alone, its input and its target, so that runs are
independent of each other: `plugged` has any of them in the teacher.

Source: 2025, arXiv:2511.16156.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd.context import Context
from kd.context import Writer as StageWriter
from kd.errors import UserError
from kd.io import found
from kd.io.progress import say
from kd.losses.feature_maps import direction
from kd.method import Batch, Method, Objective, minimize
from kd.methods import batches, contiguous, start
from kd.methods.diffusion import common
from kd.metrics import mean
from kd.models.stack import Stack, inner_of, replaced, restricted, stack
from kd.parallel import distributed
from kd.ranges import Count, NonNegative, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.state import PyTree, State

Point = tuple[str, str]


def depth(
    context: Context,
    *,
    sequential: bool = False,
    initial: Literal['first', 'middle'] = 'first',
    order: Count = 2,
    law: Mapping[str, Any] | None = None,
    micro_batches: Count = 1,
) -> Method:
    """The first block S of each run [u, v] learns what the teacher's blocks u .. v do together.

        loss = sum_[u,v] sum_streams mean_tokens sum_d |N(S(T_{u-1})) - N(T_v)|^2

    with T_i the teacher's state after block i and N the scaling to unit length. Nothing else moves,
    and nothing is asked of the output.

    Args:
      context: the stage. Of its network the blocks of each run but the first are `dropped`; it has
        a teacher, and starts as it.
      sequential: S has the student's state before u, with the runs before it in one block each: the
        practice that PPCL is compared with.
      initial: which of the teacher's blocks S starts as: u, as in the paper, or (u + v) // 2, as
        released.
      order: of the distance, 2 for 2 - 2 cos.
      law: block of `kd.sampling.times` of the times; None for all of the schedule evenly.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: a network of which nothing is dropped, or not what runs leave out.
    """
    where = f'{context.stage}.network'
    points = contiguous.runs_of(context.network.module, where)
    if not points:
        raise UserError(f'{where}: no blocks are dropped, so that there are no runs to learn.')
    transform = restricted(context.teacher.module, context.network.module)
    whole = stack(context.teacher.module)
    copied = {
        u: whole.names[(whole.names.index(u) + whole.names.index(v)) // 2]
        for u, v in points
        if initial == 'middle'
    }

    def init(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        made = transform(frozen['teacher'], context.network.init(key))
        blocks = {u: whole.params(frozen['teacher'], name) for u, name in copied.items()}
        return replaced(context.network.module, made, blocks)

    groups = [_group(context.network.module, u) for u, _ in points]
    return _minimized(
        context, points, init, rf'^({"|".join(map(re.escape, groups))})/', law, micro_batches,
        order=order, sequential=sequential,
    )  # fmt: skip


def width(
    context: Context,
    *,
    order: Count = 1,
    examples: Size = 64,
    ridge: NonNegative = 1e-6,
    law: Mapping[str, Any] | None = None,
    micro_batches: Count = 1,
) -> Method:
    """Linear maps, x + l(x), after the blocks of runs and in the place of MLPs; all else stays.

        loss = sum_j sum_streams mean_tokens sum_d |N(S_j(T_{j-1})) - N(T_j)|^order

    They start from least squares on one batch.

    Args:
      context: the stage. Its network has maps in its `linear`, and the runs of `references.start`,
        the student of `depth`, or of the teacher where there is no such reference.
      order: 1, as released.
      examples: of the batch of least squares; 0 for maps that start at 0.
      ridge: see `kd.methods.contiguous.residual_probe`.
      law, micro_batches: as of `depth`.

    Raises:
      UserError: a network without linear maps.
    """
    inner = inner_of(context.network.module)
    if not inner.linear:
        raise UserError(f'{context.stage}.network has no `linear` maps to learn.')
    ends = dict(contiguous.runs_of(inner, f'{context.stage}.network'))
    named = dict.fromkeys(name.partition('/')[0] for name in inner.linear)
    order_of = list(inner.blocks).index
    points = [(u, ends.get(u, u)) for u in sorted(named, key=order_of)]
    reference = context.references.get(start.START, context.teacher)
    label = start.START if start.START in context.references else 'teacher'
    transform = restricted(reference.module, context.network.module)

    def init(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        made = transform(frozen[label], context.network.init(key))
        if not examples or context.locate is None:  # A recipe that is only traced.
            return made
        source = context.source('train')
        batch = source.fetch(np.arange(min(examples, len(source))))
        fields = {name: jnp.asarray(x) for name, x in batch.items() if name in context.spec}
        return least_squares(context, points, made, frozen['teacher'], fields, key, ridge, law)

    maps = '|'.join(inner.maps)
    return _minimized(
        context, points, init, rf'/({maps})/', law, micro_batches, order=order, sequential=False
    )


def _group(module: Any, block: str) -> str:
    """Name of the parameters that a block alone has.

    Raises:
      UserError: it lies among others.
    """
    for name, members in inner_of(module).groups.items():
        if block in members:
            if len(members) > 1:
                raise UserError(f"'{block}' lies among others in '{name}' and cannot move alone.")
            return name
    raise UserError(f"there is no '{block}'.")


def _minimized(context, points, init, trainable, law, micro_batches, **how) -> Method:
    network, draw = context.network, _law(context, law)
    nets, path = (stack(context.teacher.module), stack(network.module)), _schedule(context)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        asked = noised(path, draw, batch['input'], key)
        condition = denoisers.conditions(network, batch)
        both = state.frozen['teacher'], state.variables(params=params)
        by_run = contiguous_losses(nets, both, points, asked, condition, **how)
        names = {f'run_{u}': mean(losses) for (u, _), losses in by_run.items()}
        return Objective(mean(sum(by_run.values())), names)

    return minimize(loss, context.tx, init, micro_batches=micro_batches, trainable=trainable)


def _law(context: Context, block: Mapping[str, Any] | None) -> times.TimeLaw:
    if block is not None:
        return config_lib.build(block, where=f'{context.stage}.method.law')
    return times.uniform(times.even(_schedule(context)))


def _schedule(context: Context):
    return common.teacher(context).schedule


def noised(path: Any, draw: times.TimeLaw, data: jax.Array, key: jax.Array):
    """(t [B], x_t [B, ...]) of examples."""
    time_key, noise_key = jax.random.split(key)
    t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
    return t, path.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)


def contiguous_losses(
    nets: tuple[Stack, Stack],
    both: tuple[PyTree, PyTree],
    points: Sequence[Point],
    asked: tuple[jax.Array, ...],
    condition: Mapping[str, jax.Array],
    *,
    order: int = 2,
    sequential: bool = False,
) -> dict[Point, jax.Array]:
    """{(u, v): distances [B] of the student's block u from what the teacher has after v}.

    Args:
      nets: teacher and student as stacks.
      both: their variables; the teacher's are constants.
      points: (u, v), in order, which do not overlap.
      asked: (t, x_t).
      condition: fields; `mask` [B, M], if there is one, says which tokens of a text count.
      order: of the distance.
      sequential: see `depth`.
    """
    (teacher, student), (theirs, ours) = nets, both
    theirs = jax.lax.stop_gradient(theirs)
    carry, context = teacher.embed(theirs, *asked, **condition)
    mine, at, losses = carry, 0, {}
    for u, v in points:
        first, last = teacher.names.index(u), teacher.names.index(v)
        between = teacher.names[at:first]
        carry = teacher.fold(theirs, between, carry, context)
        mine = teacher.fold(theirs, between, mine, context) if sequential else carry
        mine = student.block(student.params(ours, u), u, mine, context)
        carry = teacher.fold(theirs, teacher.names[first : last + 1], carry, context)
        losses[u, v] = _apart(mine, carry, condition.get('mask'), order)
        at = last + 1
    return losses


def _streams(carry: Any) -> tuple[jax.Array, ...]:
    return carry if isinstance(carry, tuple) else (carry,)


def _apart(student: Any, teacher: Any, mask: jax.Array | None, order: int) -> jax.Array:
    """Sum over streams of the mean over tokens, [B]; a mask is of the second stream's tokens."""
    total: Any = 0.0
    for i, (x, y) in enumerate(zip(_streams(student), _streams(teacher), strict=True)):
        each = direction(x, y, order=order)
        if i == 1 and mask is not None:
            total = total + jnp.sum(each * mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1)
        else:
            total = total + jnp.mean(each, -1)
    return total


def least_squares(
    context: Context,
    points: Sequence[Point],
    variables: PyTree,
    teacher: PyTree,
    batch: Batch,
    key: jax.Array,
    ridge: float,
    law: Mapping[str, Any] | None = None,
) -> PyTree:
    """Variables whose linear maps fit the teacher's states on a batch.

    One after the other, from zero: a map after a block has what those within it leave. Padding of
    a text does not count.
    """
    whole, own = stack(context.teacher.module), stack(context.network.module)
    maps, made = inner_of(context.network.module).maps, {}
    asked = noised(_schedule(context), _law(context, law), batch['input'], key)
    condition = denoisers.conditions(context.network, batch)
    mask = condition.get('mask')
    carry, at_context = whole.embed(teacher, *asked, **condition)
    at = 0
    for u, v in points:
        first, last = whole.names.index(u), whole.names.index(v)
        carry = whole.fold(teacher, whole.names[at:first], carry, at_context)
        params, begun = dict(own.params(variables, u)), carry
        params |= {x: jax.tree.map(jnp.zeros_like, params[x]) for x in maps if x in params}
        carry = whole.fold(teacher, whole.names[first : last + 1], carry, at_context)
        after, at = _streams(carry), last + 1
        for name, stream in maps.items():
            if name not in params:
                continue
            before = _streams(own.block(params, u, begun, at_context))
            x, y = (z[stream].reshape(-1, z[stream].shape[-1]) for z in (before, after))
            there = jnp.ravel(mask) if stream == 1 and mask is not None else None
            kernel, bias = contiguous.residual_probe(x, y, ridge, where=there)
            params[name] = dict(kernel=kernel, bias=bias)
        made[u] = params
    return replaced(context.network.module, variables, made)


def plugged(
    teacher: Any, student: Any, both: tuple[PyTree, PyTree], active: Sequence[bool]
) -> tuple[Any, PyTree]:
    """The teacher with some of its runs in one block each: (module, variables).

    Args:
      teacher, student: modules; of the second runs are dropped.
      both: their variables.
      active: whether each run is in one block.
    """
    inner, runs = inner_of(teacher), contiguous.runs_of(student)
    names, own = list(inner.blocks), stack(student)
    kept = [run for run, on in zip(runs, active, strict=True) if on]
    places = [(names.index(u), names.index(v)) for u, v in kept]
    smaller = inner.clone(dropped=contiguous.without_runs(names, places))
    module = smaller if inner is teacher else teacher.clone(inner=smaller)
    theirs, ours = both
    made = restricted(teacher, module)(theirs, theirs)
    return module, replaced(module, made, {u: own.params(ours, u) for u, _ in kept})


def detect(
    context: Context,
    *,
    longest: Count = 4,
    examples: Count = 256,
    tokens: Count = 4_096,
    split: str = 'train',
    law: Mapping[str, Any] | None = None,
) -> StageWriter:
    """Writes the runs of the teacher's blocks, and what is `dropped` when each is one block.

    Of the first stream of tokens, with noise of many levels. With it `found.json` has `dropped`,
    `runs` and `deltas`, the first differences of similarity from the start of each run.

    Args:
      context: the stage; its teacher is what is looked at.
      longest: blocks of a run at most.
      examples: rounded up to whole batches.
      tokens: of all these, evenly; the probes have one number for each pair of features.
      split: where the examples are from.
      law: as of `depth`.
    """
    network, source = context.teacher, context.source(split)
    net, draw, path = stack(network.module), _law(context, law), _schedule(context)
    size = context.batch_size
    count = max(min(-(-examples // size), len(source) // size), 1)
    each = max(tokens // (count * size), 1)

    def compute(variables: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
        asked = noised(path, draw, batch['input'], key)
        condition = denoisers.conditions(network, batch)
        carry, at = net.embed(variables, *asked, **condition)
        kept = [_streams(carry)[0]]
        for name in net.names:
            carry = net.fold(variables, (name,), carry, at)
            kept.append(_streams(carry)[0])
        states = jnp.stack(kept)
        step = max(states.shape[2] // each, 1)
        return states[:, :, ::step].reshape(len(kept), -1, states.shape[-1]).astype(jnp.float32)

    def write(state: State, step: int, directory: Path) -> None:
        if step and (directory / found.FILE).exists():
            return
        variables, key = state.frozen['teacher'], batches.key_of(context, split)
        ask = batches.asking(compute, variables, source, size)
        states = np.concatenate([ask(i, jax.random.fold_in(key, i)) for i in range(count)], axis=1)
        fitted = contiguous.probes(jnp.asarray(states))
        deltas: dict[int, list[float]] = {}

        def of(u: int) -> list[float]:
            most = min(longest, len(net.names) - u) - 1
            deltas[u] = contiguous.cka_deltas(fitted, jnp.asarray(states), u, most).tolist()
            return deltas[u]

        runs = contiguous.contiguous_runs(of, len(net.names), longest)
        gone = contiguous.without_runs(net.names, runs)
        if distributed.is_first():
            found.write(directory, {'dropped': gone, 'runs': runs, 'deltas': deltas})
            say(context.stage, f'runs {runs}: {len(gone)} of {len(net.names)} blocks go')

    return write
