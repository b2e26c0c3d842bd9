"""Sampled answers as text, to be read: no number shows that a policy has learnt to please."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import callables
from kd.context import Context, Probe
from kd.methods.rl import common
from kd.ranges import Count, Keywords, Seed

# Ids of a text -> the text, control tokens spelled out.
_Decode = Callable[[Sequence[int]], str]


def transcripts(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    prompts: Count = 4,
    symbols: str = '',
    weights: str = 'final',
    seed: Seed = 0,
) -> Probe:
    """The first prompts of the split with `group` answers each and their rewards.

    The text `answers`, and the mean `reward` of the answers that have a verdict (0 if none has).
    The draws are the same at every evaluation but for what the network has learnt, so that files
    of two steps can be compared line by line.

    Args:
      context: the stage; data in the layout 'prompts'.
      reward, sampling: as of `kd.methods.rl.grpo.grpo`.
      prompts: how many.
      symbols: a table of symbols by their ids, such as 'kd.data.builders.symbols.SYMBOLS', for data
        without a tokenizer; '' for the data's tokenizer, or ids as they are if it has none.
      weights: 'final' for the parameters, or the name of an average.
      seed: of the draws.
    """
    config = common.Sampling(**sampling)
    draw, judge = common.drawing(context, config), common.of_block(context, reward)
    group = config.group

    @jax.jit
    def answered(state, batch):
        variables = state.variables(None if weights == 'final' else weights)
        asked = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), batch)
        said = draw.of(context.rollout(variables), asked, jax.random.key(seed))
        asked = common.rewarded(asked, said, judge)
        return {**asked, 'read': said.there}

    def run(state, batches):
        decode, first = _decoder(context, symbols), _first(batches, prompts)
        batch = jax.device_get(answered(state, first))
        rewards, unjudged = batch['rewards'], batch['unjudged']
        text = ''.join(_told(batch, row, group, decode) for row in range(0, len(rewards), group))
        return {'answers': text, 'reward': rewards.sum() / max(np.sum(~unjudged), 1)}

    return Probe(run)


def _first(batches, count: int) -> dict[str, np.ndarray]:
    """So many examples of the split, or all that there are."""
    parts, held = [], 0
    for batch in batches:
        batch = {name: np.asarray(value) for name, value in batch.items()}
        parts.append({name: value[batch['mask']] for name, value in batch.items()})
        held += len(parts[-1]['mask'])
        if held >= count:
            break
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _decoder(context: Context, symbols: str) -> _Decode:
    if symbols:
        known = callables.resolve(symbols)
        return lambda ids: ' '.join(known[i] for i in ids)
    tokenizer = getattr(context.source('train'), 'tokenizer', None)
    if tokenizer is None:
        return lambda ids: ' '.join(map(str, ids))
    return lambda ids: tokenizer.decode(ids, special=True)


def _told(batch: Mapping[str, np.ndarray], first: int, group: int, decode: _Decode) -> str:
    """A prompt and the answers to it, rows `first` to `first + group`, as Markdown."""
    number = first // group + 1
    prompt = batch['input'][first][batch['prompt_mask'][first]]
    lines = [f'# Prompt {number}', '', _quoted(decode(prompt.tolist())), '']
    for row in range(first, first + group):
        verdict = 'no verdict' if batch['unjudged'][row] else f'reward {batch["rewards"][row]:g}'
        cut = ', cut off' if batch['truncated'][row] else ''
        said = batch['tokens'][row][batch['read'][row]].tolist()
        title = f'Answer {row - first + 1}: {verdict}, {batch["mask"][row].sum()} tokens{cut}'
        lines += [title, '', _quoted(decode(said)), '']
    return '\n'.join(lines) + '\n'


def _quoted(text: str) -> str:
    """As it is, whatever Markdown is in it."""
    return textwrap.indent(text, '    ', lambda line: True)
