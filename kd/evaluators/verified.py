"""How often are sampled answers right?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from kd.context import Context, Evaluator, Probe
from kd.data import pipeline
from kd.losses import policy
from kd.methods.rl import common
from kd.metrics import Mean, divide, mean
from kd.ranges import Count, Keywords, Seed, SplitName
from kd.rewards.reward import judged

_Sampling = Annotated[Mapping[str, Any], Keywords(common.Sampling)]


def verified(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: _Sampling,
    k: tuple[Count, ...] = (),
    weights: str = 'final',
    seed: Seed = 0,
) -> Evaluator:
    """Answers to each prompt, the same at every evaluation but for what the network has learnt.

    reward, their mean (avg@G of verdicts 0 and 1); pass_at_k for each `k`, an answer being right
    from a reward of .5 on; length; truncated and unjudged, shares of answers.

    Args:
      context: the stage; data in the layout 'prompts'.
      reward, sampling: as of `kd.methods.rl.grpo.grpo`; `group` answers to each prompt, and
        `top_k=1` for the most probable ones.
      k: at most `group` each.
      weights: 'final' for the parameters, or the name of an average.
      seed: of the draws.
    """
    config = common.Sampling(**sampling)
    draw = common.drawing(context, config)
    judge = common.of_block(context, reward)
    group = config.group

    def update(state, batch) -> dict[str, Mean]:
        variables = state.variables(None if weights == 'final' else weights)
        asked = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), batch)
        rows = asked['index'] * group + jnp.arange(len(asked['index'])) % group
        said = draw.of(context.rollout(variables), asked, jax.random.key(seed), rows=rows)
        asked['truncated'] = said.truncated
        rewards, unjudged = judged(judge(said.tokens, said.mask, asked))
        where = asked['mask']
        found = {
            'reward': mean(rewards, where),
            'length': mean(said.mask.sum(1), where),
            'truncated': mean(said.truncated, where),
            'unjudged': mean(unjudged, where),
        }
        right = (rewards >= 0.5).reshape(-1, group).sum(1)
        for tries in k:
            found[f'pass_at_{tries}'] = mean(policy.pass_at_k(right, group, tries), batch['mask'])
        return found

    return Evaluator(update, divide)


def verified_of_recipe(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: _Sampling,
    data: SplitName = 'validation',
    **arguments: Any,
) -> Probe:
    """`verified` on the recipe's own data, for a stage that learns from rows of its own.

    Args:
      context: the stage.
      data: the split of the recipe's data.
      reward, sampling, **arguments: as of `verified`.
    """
    source = context.recipe_source(data)
    own = dataclasses.replace(context, spec=source.spec, source=context.recipe_source)
    evaluator = verified(own, reward=reward, sampling=sampling, **arguments)
    update = jax.jit(evaluator.update)

    def run(state, batches):
        del batches
        sums = None
        for batch in pipeline.eval_batches(source, context.batch_size):
            found = update(state, batch)
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        return evaluator.finish(sums)

    return Probe(run)
