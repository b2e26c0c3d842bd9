"""What a network of which something is dropped still says, and what it takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import config as config_lib
from kd import figures
from kd.context import Context, Probe
from kd.io import found, quantised
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.models import quantise
from kd.network import parameter_count
from kd.ranges import Count, Seed, StageName
from kd.sampling import denoiser as denoisers
from kd.sampling import times
from kd.state import PyTree, State

# Times that are taken of each network, in turns.
REPEATS = 9


def pruned(
    context: Context,
    *,
    costs: Literal[''] | StageName = '',
    weights: str = 'final',
    weight: Weight = 'flow',
    law: Mapping[str, Any] | None = None,
    examples: Count = 256,
    rules: str = r'kernel$',
    levels: Literal['nf4', 'int4'] = 'nf4',
    seed: Seed = 0,
) -> Probe:
    """The stage's network against its teacher, as it is and with weights of four bits.

    Metrics:
      error: w(t) mean (mu' - mu)^2 on noised examples of the split; `error_four_bits` of the same
        with matrices in four bits;
      parameters: of the network, and `parameters_share` of the teacher's;
      faster: the teacher's time of a call over the network's, on as many examples, the least of
        several taken in turns;
      bits: of the file of four bits, for each parameter; `bytes_share`, bytes of that file over
        those of the teacher in 16 bits.
    And a figure of what each part costs, where a stage has found it.

    Args:
      context: the stage, with a teacher; both are denoisers or flows.
      costs: stage whose `found.json` has `costs`.
      weights: 'final' for the parameters, or the name of an average.
      weight, law: of the errors, as of the stage's method.
      examples: of the split at most.
      rules, levels: of the matrices of four bits, see `kd.models.quantise.quantise_tree`.
      seed: of noise and times.
    """
    own = denoisers.of_network(context.network, context.config.method)
    teacher = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    draw = times.uniform(times.even(teacher.schedule))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.evaluators.law')
    sigma_data = getattr(context.network.module, 'sigma_data', 0.5)

    @jax.jit
    def asked(batch, key):
        path, data = teacher.schedule, batch['input']
        time_key, noise_key = jax.random.split(key)
        t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
        noise = jax.random.normal(noise_key, data.shape, data.dtype)
        return path.mix(data, noise, t), t, denoisers.conditions(context.network, batch)

    say = jax.jit(lambda variables, x, t, told: own.apply(variables, x, t, told).x0)
    tell = jax.jit(lambda variables, x, t, told: teacher.apply(variables, x, t, told).x0)

    def apart(said, told, t, mask):
        each = score_distillation.denoising(said, told, teacher.schedule, t, weight, sigma_data)
        return float(jnp.sum(each * mask)), float(jnp.sum(mask))

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, Any]:
        variables = state.variables(None if weights == 'final' else weights)
        theirs = state.frozen['teacher']
        packed = jax.jit(lambda v: quantise.quantise_tree(v, rules, levels=levels))(variables)
        coarse = jax.jit(quantise.dequantised)(packed)
        sums = np.zeros((2, 2))
        first: tuple[Any, ...] = ()
        for i, batch in enumerate(batches):
            x, t, told = asked(batch, jax.random.fold_in(jax.random.key(seed), i))
            first = first or (x, t, told)
            wanted = tell(theirs, x, t, told)
            for place, tree in enumerate((variables, coarse)):
                sums[place] += apart(say(tree, x, t, told), wanted, t, batch['mask'])
            if (i + 1) * len(t) >= examples:
                break
        error, error_four = sums[:, 0] / np.maximum(sums[:, 1], 1)
        count, whole = parameter_count(variables), parameter_count(theirs)
        size = _file(packed)
        measured: dict[str, Any] = {
            'error': error,
            'error_four_bits': error_four,
            'parameters': count,
            'parameters_share': count / whole,
            'faster': _faster(lambda: tell(theirs, *first), lambda: say(variables, *first)),
            'bits': 8 * size / count,
            'bytes_share': size / (2 * whole),
        }
        if costs and context.locate is not None:
            measured['costs'] = cost_map(found.read(context.locate(costs)))
        return measured

    return Probe(run)


def _file(packed: PyTree) -> int:
    """Bytes of the file of a tree in four bits."""
    with tempfile.TemporaryDirectory() as folder:
        return quantised.save(Path(folder) / 'weights.safetensors', packed)


def _faster(slow: Callable[[], jax.Array], fast: Callable[[], jax.Array]) -> float:
    """Time of one call over that of another."""
    best = [np.inf, np.inf]
    for _ in range(REPEATS):
        for i, call in enumerate((slow, fast)):
            began = time.perf_counter()
            call().block_until_ready()
            best[i] = min(best[i], time.perf_counter() - began)
    return best[0] / best[1]


def cost_map(values: Mapping[str, Any]) -> Figure:
    """What each part costs, in order, and which are dropped."""
    costs, gone = values['costs'], set(values['dropped'])
    figure = figures.new_figure(7, 3.2)
    axis = figure.subplots()
    kinds = list(dict.fromkeys(part.partition('/')[2] for part in costs))
    blocks = list(dict.fromkeys(part.partition('/')[0] for part in costs))
    for colour, kind in zip(figures.COLOURS, kinds, strict=False):
        parts = [part for part in costs if part.partition('/')[2] == kind]
        places = [blocks.index(part.partition('/')[0]) for part in parts]
        heights = [max(abs(costs[part]), 1e-9) for part in parts]
        axis.plot(places, heights, 'o-', color=colour, label=kind or 'block')
        dropped = [i for i, part in enumerate(parts) if part in gone]
        axis.plot(
            [places[i] for i in dropped], [heights[i] for i in dropped], 'x', color='black', ms=9
        )
    axis.plot([], [], 'x', color='black', label='dropped')
    axis.set(xlabel='block', ylabel='rise of the loss without it', yscale='log')
    axis.legend(fontsize=8)
    return figure
