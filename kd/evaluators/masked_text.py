"""How likely is a text to a masked diffusion model, and how good are its samples by steps?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import config as config_lib
from kd.config import Block
from kd.context import Context, Evaluator, Probe
from kd.data.builders import sparse_chain
from kd.data.sources import Source
from kd.errors import UserError
from kd.evaluators import language
from kd.evaluators.samples import check_weights
from kd.losses import classification
from kd.losses import masked_diffusion as losses
from kd.losses.masked_diffusion import ScheduleName
from kd.methods.discrete import common
from kd.methods.lm.common import examples_only, token_losses
from kd.metrics import mean
from kd.ranges import Count, Seed, Size, SplitName
from kd.sampling import masked
from kd.state import State

# int [N, L] -> log p of each symbol that it judges, [N, n]; -inf for what is impossible.
Judge = Callable[[np.ndarray], np.ndarray]


def likelihood(
    context: Context,
    *,
    weights: str = 'final',
    schedule: ScheduleName = 'log_linear',
    mask: Size | None = None,
    chunk: Count = 256,
) -> Evaluator:
    """A bound from above of the nats a symbol, `nll`, and `perplexity`; its noise is the same at
    every evaluation.

    Args:
      context: the stage.
      weights: 'final' for the parameters, or the name of an average.
      schedule, mask, chunk: as of `kd.methods.discrete.masked_diffusion.masked_diffusion`.
    """
    network, noise = context.network, common.noise(context, schedule, mask)
    check_weights(context, weights)

    def of_token(logits, teacher, labels):
        del teacher
        where = losses.outcomes(logits.shape[-1], noise.mask)
        nll = classification.cross_entropy(logits, labels, where=where)
        return nll, {'hidden_nll': nll}

    def update(state, batch):
        times, coins = jax.random.split(jax.random.fold_in(jax.random.key(0), batch['index'][0]))
        tokens = batch['input']
        t = losses.stratified(times, len(tokens))
        noised = noise(batch, jax.random.uniform(coins, tokens.shape), t)
        variables = state.variables(None if weights == 'final' else weights)
        found = token_losses(network, variables, noised, of_token, chunk=chunk, train=False)
        hidden = examples_only(found.where, batch)
        weight = losses.elbo_weights(hidden, noise.schedule.rate(t))
        counted = examples_only(common.counting(batch), batch)
        bound = mean(jnp.where(hidden, weight * found.losses, 0.0), counted)
        return {'nll': bound, 'hidden_nll': mean(found.losses, hidden)}

    return Evaluator(update, language.finish)


def masked_text(
    context: Context,
    *,
    judge: Block,
    steps: Sequence[Count] = (2, 4, 8, 16),
    samples: Count = 256,
    batch: Count = 64,
    deterministic: bool = False,
    weights: str = 'final',
    schedule: ScheduleName = 'log_linear',
    mask: Size | None = None,
    seed: Seed = 0,
) -> Probe:
    """`sample_metrics` of samples in N calls of the network, as NAME_N; those of as many examples
    as NAME_data.

    Low nats come with low entropy as well as with good samples: they are one question together.

    Args:
      context: the stage; its data have rows of a length without padding.
      judge: block of `f(context, **arguments) -> Judge`.
      steps: numbers of calls.
      samples: of each number.
      batch: samples at a time.
      deterministic: along one path a sample, see `kd.sampling.masked`.
      weights: 'final' for the parameters, or the name of an average.
      schedule, mask: as of `kd.methods.discrete.masked_diffusion.masked_diffusion`.
      seed: of the samples.
    """
    noise = common.noise(context, schedule, mask)
    check_weights(context, weights)
    judging = config_lib.build(judge, context, where=f'{context.stage}.evaluators.judge')
    shape = (batch, *context.spec['input'].shape)
    draw = masked.sampler(context.network, noise.mask, noise.schedule, path=deterministic)
    held: dict[str, float] = {}

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        variables = state.variables(None if weights == 'final' else weights)
        found: dict[str, float | Figure] = {}
        for count in steps:
            keys = jax.random.split(jax.random.key(seed), -(-samples // batch))
            said = np.concatenate([np.asarray(draw(variables, key, shape, count)) for key in keys])
            metrics = sample_metrics(said[:samples], judging)
            found |= {f'{name}_{count}': value for name, value in metrics.items()}
        if not held:
            real: list[np.ndarray] = []
            for part in batches:
                real.append(np.asarray(part['input'])[np.asarray(part['mask'])])
                if sum(map(len, real)) >= samples:
                    break
            metrics = sample_metrics(np.concatenate(real)[:samples], judging)
            held.update({f'{name}_data': value for name, value in metrics.items()})
        return found | held

    return Probe(run)


def sample_metrics(tokens: np.ndarray, judge: Judge) -> dict[str, float]:
    """What samples int [N, L] are like.

    nll, nats of a symbol that is possible, to the judge; impossible, the share of the others;
    entropy and bigram_entropy of the symbols and pairs that there are, nats; distinct, the share of
    runs of four symbols that are different ones.
    """
    log_p = judge(tokens)
    possible = log_p > -np.inf
    grams = np.lib.stride_tricks.sliding_window_view(tokens, 4, axis=1).reshape(-1, 4)
    return {
        'nll': float(-log_p[possible].mean()) if possible.any() else float('inf'),
        'impossible': float(1 - possible.mean()),
        'entropy': _entropy(tokens.reshape(-1, 1)),
        'bigram_entropy': _entropy(np.stack([tokens[:, :-1], tokens[:, 1:]], -1).reshape(-1, 2)),
        'distinct': len(np.unique(grams, axis=0)) / len(grams),
    }


def _entropy(rows: np.ndarray) -> float:
    """Nats of the frequencies of the rows [N, n]."""
    share = np.unique(rows, axis=0, return_counts=True)[1] / len(rows)
    return float(-(share * np.log(share)).sum())


def written(source: Source, tokens: np.ndarray) -> list[str]:
    """Symbols int [N, L] as text: by the tokenizer of the data, or the names of its classes."""
    tokenizer = getattr(source, 'tokenizer', None)
    if tokenizer is not None:
        return [tokenizer.decode(row) for row in tokens]
    names = source.class_names
    if names is None:
        return [' '.join(map(str, row)) for row in tokens.tolist()]
    return [''.join(names[symbol] for symbol in row) for row in tokens.tolist()]


def chain_judge(
    context: Context,
    *,
    tokens: Count = sparse_chain.TOKENS,
    successors: Count = sparse_chain.SUCCESSORS,
) -> Judge:
    """The true law of `kd.data.builders.sparse_chain`; arguments as there."""
    table = sparse_chain.law(context.recipe.seed, tokens, successors)
    return lambda said: sparse_chain.log_probs(table, said)


def ngram_judge(context: Context, *, order: Count = 5, split: SplitName = 'train') -> Judge:
    """A model of runs of up to `order` symbols, counted in a split of the data.

        p_n(x | c) = (count(c x) + distinct(c) p_{n-1}(x | c')) / (count(c) + distinct(c))

    with c the n - 1 symbols before, c' without the first of them, distinct(c) the different symbols
    that follow c, and p_0 uniform (Witten and Bell 1991). Of a row all symbols but the first
    order - 1 are judged.

    Args:
      context: the stage.
      order: n.
      split: of the data.
    """

    @functools.cache
    def tables() -> tuple[int, dict[int, dict[str, np.ndarray]]]:
        source = context.source(split)
        return _tables(source.fetch(np.arange(len(source)))['input'], source.num_classes, order)

    def judge(said: np.ndarray) -> np.ndarray:
        size, of = tables()
        first = order - 1
        p = np.full((len(said), said.shape[1] - first), 1 / size)
        for n in range(1, order + 1):
            runs = _codes(said, n, size)[:, first - n + 1 :]
            before, table = runs // size, of[n]
            seen = _looked_up(table['before'], table['seen'], before)
            kinds = _looked_up(table['before'], table['kinds'], before)
            count = _looked_up(table['runs'], table['count'], runs)
            known = seen > 0
            p = np.where(known, (count + kinds * p) / np.where(known, seen + kinds, 1), p)
        return np.log(p)

    return judge


def _tables(
    text: np.ndarray, size: int | None, order: int
) -> tuple[int, dict[int, dict[str, np.ndarray]]]:
    """Symbols, and by n: runs of n with their counts, and of the n - 1 symbols before the last how
    often they come and how many symbols follow them."""
    size, found = int(size or text.max() + 1), {}
    if size**order >= 2**62:
        raise UserError(f'runs of {order} of {size} symbols are too many to be counted.')
    for n in range(1, order + 1):
        runs, count = np.unique(_codes(text, n, size), return_counts=True)
        before, place, kinds = np.unique(runs // size, return_inverse=True, return_counts=True)
        seen = np.bincount(place, count)
        found[n] = dict(runs=runs, count=count, before=before, kinds=kinds, seen=seen)
    return size, found


def _codes(rows: np.ndarray, length: int, size: int) -> np.ndarray:
    """A number for each run of so many symbols of each row, [N, L - length + 1]."""
    runs = np.lib.stride_tricks.sliding_window_view(np.asarray(rows, np.int64), length, axis=1)
    return runs @ (size ** np.arange(length, dtype=np.int64)[::-1])


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 of what is none of them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
