"""HierarchicalPrune: late branches go first, and what is early stays as it is in recovery.

    config.sensitivity = stage(teacher='teacher', method=dict(name='kd.methods.cache.nothing'),
        writers={'map': dict(name='kd.methods.diffusion.hierarchical_prune.sensitivity', ratio=.2)})
    config.student = stage(network=..., dropped=dict(found_by='sensitivity'), teacher='teacher',
        method=dict(name='kd.methods.diffusion.hierarchical_prune.hierarchical_prune'))

Weights of four bits come after it, by `kd.io.quantised`.

Source: 2025, arXiv:2508.04663.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from kd.losses import score_distillation
from kd.losses.feature import hint
from kd.losses.score_distillation import Weight
from kd.method import Method, Objective, minimize
from kd.methods import batches, pruning, start
from kd.methods.diffusion import common
from kd.methods.pruning import Blocks, Level
from kd.metrics import mean
from kd.models.stack import branches_there, inner_of, restricted, sizes
from kd.network import Network, parameter_count
from kd.parallel import distributed
from kd.ranges import Count, Fraction, NonNegative, StageName
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.state import PyTree, State

Recovery = Literal['all', 'pwp', 'sgdistill']
Position = Literal['late', 'quoted', 'none']
# Of SGDistill: what has a smaller share than this stays as it is. Ours.
LEAST = 0.02


def hierarchical_prune(
    context: Context,
    *,
    recovery: Recovery = 'pwp',
    costs: Literal[''] | StageName = '',
    feature: NonNegative = 1.0,
    weight: Weight = 'flow',
    law: Mapping[str, Any] | None = None,
    micro_batches: Count = 1,
) -> Method:
    """Recovery of a network of which something is dropped, from the whole one.

        loss = E w(t) mean (mu'(x_t, t) - mu(x_t, t))^2 + feature sum_i mean (f'_i - f_i)^2

    with f_i the tokens after block i, over the blocks that both have.

    | recovery | what moves |
    |---|---|
    | all | everything |
    | pwp | blocks from the first on of which something is gone, and the last layers |
    | sgdistill | the same, each branch by a = (least cost) / (its cost), or 0 below .02 |

    Args:
      context: the stage. Its network lacks what is in its `dropped`, the teacher is whole; starts
        as the teacher, or as `references.start`.
      recovery: see above; the paper has 'sgdistill' where more than a quarter is gone.
      costs: stage that has written what each branch costs (`sensitivity`), for 'sgdistill'.
      feature: weight of the second term; the paper's is 1, with a sum over blocks.
      weight: see `kd.losses.score_distillation.denoising`; 'flow' is the paper's velocity.
      law: block of `kd.sampling.times` of the times; None for all of the schedule evenly. For a
        teacher of few steps take its own times too.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: networks whose blocks cannot be addressed, or 'sgdistill' without costs.

    Source: 2025, arXiv:2508.04663.
    """
    network, own = context.network, denoisers.of_network(context.network)
    teacher, module = common.teacher(context), inner_of(network.module)
    path, draw = teacher.schedule, times.uniform(times.even(teacher.schedule))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.method.law')
    if (recovery == 'sgdistill') != bool(costs):
        raise UserError(
            f"{context.stage}.method: recovery='sgdistill' and a stage of costs go together."
        )
    sigma_data = getattr(network.module, 'sigma_data', 0.5)
    whole = inner_of(context.teacher.module)
    capture, captured = (tuple(x.groups) if feature else () for x in (module, whole))

    def loss(params: PyTree, state: State, batch: Any, key: jax.Array) -> Objective:
        time_key, noise_key, dropout = jax.random.split(key, 3)
        data, condition = batch['input'], denoisers.conditions(network, batch)
        t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
        x_t = path.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)
        told = teacher.apply(state.frozen['teacher'], x_t, t, condition, capture=captured)
        said = own.apply(
            state.variables(params=params), x_t, t, condition, train=True, key=dropout,
            capture=capture,
        )  # fmt: skip
        output = score_distillation.denoising(said.x0, told.x0, path, t, weight, sigma_data)
        tokens = feature_loss(tokens_of(module, said.features), tokens_of(whole, told.features))
        metrics = {'output': mean(output), 'feature': mean(tokens)} if feature else {}
        return Objective(mean(output + feature * tokens), metrics)

    moving = trained(module, recovery)
    tx = context.tx
    if recovery == 'sgdistill' and context.locate is not None:
        scale = factors(_costs(context, costs, module), module)
        tx = context.optimizer(**{**context.config.optimizer, 'scale': scale})
    return minimize(
        loss, tx, started(context), micro_batches=micro_batches,
        trainable=None if recovery == 'all' else moving,
    )  # fmt: skip


def tokens_of(module: Any, features: Mapping[str, Any]) -> dict[str, list[jax.Array]]:
    """{block: tokens [B, N, D] after it, of every stream}, of what was captured by group."""
    found = {}
    for group, members in module.groups.items():
        if group in features:
            streams = jax.tree.leaves(features[group])
            for place, name in enumerate(members):
                found[name] = streams if (group,) == members else [x[place] for x in streams]
    return found


def feature_loss(
    student: Mapping[str, Sequence[jax.Array]], teacher: Mapping[str, Sequence[jax.Array]]
) -> jax.Array:
    """sum_i mean (f'_i - f_i)^2 over the blocks of the student, [B]; teacher stop-gradiented.

    Of several streams of tokens their means are added. 0 without blocks. (`hint` is half the sum
    over the elements of an example.)
    """
    total: Any = 0.0
    for name, streams in student.items():
        for x, y in zip(streams, teacher[name], strict=True):
            total = total + 2 * hint(x, jax.lax.stop_gradient(y)) / (x.size // len(x))
    return total


def started(context: Context) -> Any:
    """`init` as the teacher without what the network lacks, or as `references.start`."""
    reference = context.references.get(start.START, context.optional_teacher)
    transform = restricted(reference.module, context.network.module) if reference else None
    if start.START in context.references:
        return start.from_reference(context.network.init, context, transform=transform)
    assert transform is not None

    def init(key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
        return transform(frozen['teacher'], context.network.init(key))

    return init


def trained(module: Any, recovery: Recovery) -> Callable[[str], bool]:
    """Whether the leaf at a path moves: blocks from the first on of which something is gone.

    Embedders are before these, and the last layers after them.
    """
    if recovery == 'all':
        return lambda path: True
    late = {group for group, members in module.groups.items() if _is_late(module, members[0])}

    def moves(path: str) -> bool:
        return path.partition('/')[0] in late or bool(LAST.match(path))

    return moves


def _costs(context: Context, stage: str, module: Any) -> Mapping[str, float]:
    """What each branch costs, as a stage has written it.

    Raises:
      UserError: a stage that has found no costs, or those of whole blocks.
    """
    assert context.locate is not None
    told = found.read(context.locate(stage)).get('costs', {})
    if missing := [part for part in pruning.parts_of(module.blocks) if part not in told]:
        raise UserError(
            f"{context.stage}.method.costs: the stage '{stage}' has found no cost of {missing[0]}; "
            "it must be one of `sensitivity` with level='branch'."
        )
    return told


# Modules after the blocks.
LAST = re.compile(r'(modulation|out|norm_out|proj_out)/')


def _is_late(module: Any, block: str) -> bool:
    """Whether a block is not before the first of which something is gone."""
    places = [pruning.place_of(module.blocks, part) for part in module.dropped]
    return pruning.place_of(module.blocks, block) >= min(places, default=len(module.blocks))


def factors(
    costs: Mapping[str, float], module: Any
) -> tuple[tuple[str, float | tuple[float, ...]], ...]:
    """(expression, a) pairs for `scale` of an optimiser, of the branches that move.

        a = min_j |cost_j| / |cost_i| over the branches j that move, 0 below `LEAST`

    What the branches of a block share, its modulation, has the least of theirs; all else 1. Of
    blocks that lie stacked a has an entry for each.
    """
    there = branches_there(module.blocks, module.dropped)
    late = {name: branches for name, branches in there.items() if _is_late(module, name)}
    shares = {
        (name, branch): abs(costs[f'{name}/{branch}'])
        for name, branches in late.items()
        for branch in branches
    }
    least = min(shares.values(), default=1.0)
    shares = {part: least / max(cost, 1e-30) for part, cost in shares.items()}
    shares = {part: share if share >= LEAST else 0.0 for part, share in shares.items()}
    pairs: list[tuple[str, float | tuple[float, ...]]] = []
    for group, members in module.groups.items():
        if members[0] not in late:
            continue
        alone, modules = (group,) == members, module.layout(members[0]).modules
        for branch in there[members[0]]:
            named = '|'.join(name for name, of in modules.items() if of == branch)
            own = tuple(shares[name, branch] for name in members)
            pairs.append((rf'^{group}/({named})/', own[0] if alone else own))
        own = tuple(min(shares[name, of] for of in there[name]) for name in members)
        pairs.append((rf'^{group}/', own[0] if alone else own))
    return tuple(pairs)


def score(
    costs: Mapping[str, float], blocks: Blocks, position: Position = 'late'
) -> dict[str, float]:
    """-|cost| W of each part; the highest goes first.

    | position | W of block i of n | of equal costs goes first |
    |---|---|---|
    | late | exp((n - i) / n) | the later |
    | quoted | exp((i - n) / n), as the paper writes it | the earlier, against what it says |
    | none | 1 | |
    """
    sign = {'late': 1.0, 'quoted': -1.0, 'none': 0.0}[position]
    count = len(blocks)
    return {
        part: -abs(cost) * float(np.exp(sign * (count - pruning.place_of(blocks, part)) / count))
        for part, cost in costs.items()
    }


def sensitivity(
    context: Context,
    *,
    ratio: Fraction,
    level: Level = 'branch',
    position: Position = 'late',
    examples: Count = 1_024,
    split: str = 'train',
    weight: Weight = 'flow',
    law: Mapping[str, Any] | None = None,
) -> StageWriter:
    """Writes what the teacher loses without each branch, and what is `dropped` for it.

    The cost is how much the loss of denoising rises, with the same noise and times for all. With
    it `found.json` has `dropped`, for networks of later stages, `costs`, and `removed`, the share
    of all parameters that goes.

    Args:
      context: the stage; its teacher is what is pruned.
      ratio: of all parameters that is to go at least.
      level: branches or whole blocks.
      position: see `score`.
      examples: of calibration, rounded up to whole batches.
      split: where these are from.
      weight, law: as of `hierarchical_prune`.

    Raises:
      UserError: a ratio of more than all branches have.
    """
    network, source = context.teacher, context.source(split)
    blocks, teacher = inner_of(network.module).blocks, common.teacher(context)
    parts = pruning.parts_of(blocks, level)
    gates = np.stack([pruning.gates_without(blocks, [part]) for part in parts])
    draw = times.uniform(times.even(teacher.schedule))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.writers.law')

    def compute(variables: PyTree, batch: Any, key: jax.Array) -> jax.Array:
        return costs_of(network, teacher, variables, batch, key, gates, draw, weight)

    def write(state: State, step: int, directory: Path) -> None:
        if step and (directory / found.FILE).exists():
            return
        variables, size = state.frozen['teacher'], context.batch_size
        ask, key = batches.asking(compute, variables, source, size), batches.key_of(context, split)
        numbers = range(max(min(-(-examples // size), len(source) // size), 1))
        cost = np.mean([ask(i, jax.random.fold_in(key, i)) for i in numbers], axis=0)
        costs = dict(zip(parts, map(float, cost), strict=True))
        weights = pruning.sizes_of(sizes(network.module, variables), level)
        total = parameter_count(variables)
        try:
            gone = pruning.prune_to_budget(score(costs, blocks, position), weights, ratio * total)
        except ValueError as error:
            raise UserError(f'{context.stage}.writers: {error} Lower ratio={ratio}.') from error
        removed = sum(weights[part] for part in gone) / total
        if distributed.is_first():
            found.write(directory, {'dropped': gone, 'costs': costs, 'removed': removed})
            say(context.stage, f'{", ".join(gone)} go, {removed:.1%} of the parameters')

    return write


def costs_of(
    network: Network,
    denoiser: denoisers.Denoiser,
    variables: PyTree,
    batch: Any,
    key: jax.Array,
    gates: np.ndarray,
    draw: times.TimeLaw,
    weight: Weight,
) -> jax.Array:
    """How much the loss of denoising rises without each part, [parts]; gates as of `pruning`."""
    path, data = denoiser.schedule, batch['input']
    time_key, noise_key = jax.random.split(key)
    t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
    x_t = path.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)
    condition = denoisers.conditions(network, batch)
    sigma_data = getattr(network.module, 'sigma_data', 0.5)

    def loss(gates: jax.Array) -> jax.Array:
        said = denoiser.apply(variables, x_t, t, {**condition, 'gates': gates}).x0
        return jnp.mean(score_distillation.denoising(said, data, path, t, weight, sigma_data))

    return pruning.removal_costs(loss, gates)
