"""Clipped surrogates on sampled answers: what GRPO and its relatives share.

    def term(said, old, given):
        return Term(policy.log_ratio(said.log_p, old))

    method = surrogate.method(context, draw, collect, term, group=8, how=Surrogate(updates=2))

is GRPO, with `collect` of `kd.methods.rl.common`. A relative has another ratio, adds a term, or
collects something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import policy
from kd.losses.signal import HiddenHead
from kd.method import Batch, Method, Objective, minimize, repeat, with_collect, with_memory
from kd.methods import start
from kd.methods.rl import common, scoring, watched
from kd.metrics import Mean, Metrics, mean
from kd.network import Network
from kd.ranges import Count, NonNegative, Positive
from kd.sampling.environment import Draws
from kd.state import PyTree, State

# A number, or what gives it: of the runs of a claim each may have its own, in `state.frozen`.
Number = NonNegative | Callable[[State], jax.Array]
# Name of the reference, in a stage's `references`, that the policy is kept near.
REFERENCE = 'reference'


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """How ratios are clipped, and how often a batch is gone through.

    Attributes:
      updates, parts: see `kd.method.repeat`. With one update the old policy is the present one.
      old: with several updates, whether the old policy's log-probabilities are 'recomputed' by a
        forward pass or the 'sampler's own, which are the same up to rounding in one type.
      low, high, dual: of the clip, see `kd.losses.policy.clipped_surrogate`.
      cap: weighs tokens by pi_old / pi_sampler cut to this, where both differ in type; None for no
        weights.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated, and scores computed.
    """

    updates: Count = 1
    parts: Count = 1
    old: Literal['recomputed', 'sampler'] = 'recomputed'
    low: Positive = 0.2
    high: Positive = 0.2
    dual: Positive | None = None
    cap: Positive | None = None
    chunk: Count = 256
    micro_batches: Count = 1

    @property
    def recomputed(self) -> bool:
        """Whether `collect` has to bring `old_log_probs`."""
        return self.updates > 1 and self.old == 'recomputed'

    def __call__(self, ratio, advantage, old, sampled) -> jax.Array:
        """The losses of tokens."""
        losses = policy.clipped_surrogate(
            ratio, advantage, low=self.low, high=self.high, dual=self.dual
        )
        if self.cap is not None:
            losses *= policy.importance_cap(old, sampled, self.cap)
        return losses


class Term(NamedTuple):
    """What a method says of n tokens.

    Attributes:
      ratio: [n] log rho, which the surrogate clips.
      added: [n], joins the surrogate before it is weighed by the batch's `weight`.
      apart: [n], joins it after: what has weights of its own.
      aux: {metric: [n]}, whose means over tokens are logged.
    """

    ratio: jax.Array
    added: jax.Array | float = 0.0
    apart: jax.Array | float = 0.0
    aux: Mapping[str, jax.Array] = {}


class Pull(NamedTuple):
    """A KL to a frozen network that scores answers: its name, weight, and kind of estimate."""

    name: str
    weight: float
    kind: policy.KL


def method(
    context: Context,
    draw: Draws,
    collect: Callable[[State, Batch, jax.Array], Any],
    term: Callable[[scoring.Said, jax.Array, dict[str, jax.Array]], Term],
    *,
    group: Count,
    how: Surrogate,
    fields: Sequence[str] = (),
    teacher: Callable[[State, Batch], HiddenHead] | None = None,
    further: Callable[[Batch], Metrics] | None = None,
    memory: tuple[str, PyTree] | None = None,
) -> Method:
    """Rollout, verdicts, scores and all updates as one compiled step.

    Args:
      context: the stage. Starts from `references.start`, if there is one.
      draw: the sampler of the answers.
      collect: brings what `kd.methods.rl.common` lists, and `fields`.
      term: `term(said, old, given)`, with `old` [n] under the old policy and `given` the fields.
      group: G; groups stay whole in parts.
      how: see there.
      fields: of the batch, [B] or [B, R], that `term` is given.
      teacher: hidden states [B, R, D] and head, for `said.teacher`.
      further: metrics of what `collect` has brought.
      memory: name and first value of what `collect` keeps, which it then returns beside the batch,
        see `kd.method.with_memory`.
    """
    network = context.network

    def of_token(said, advantage, weight, sampled, old=None, **given):
        before = jax.lax.stop_gradient(said.log_p) if old is None else old
        made = term(said, before, given)
        losses = how(made.ratio, advantage, before, sampled) + made.added
        logged = {'entropy': said.entropy, 'ratio': made.ratio, 'old_log_p': before}
        return weight * losses + made.apart, (logged, dict(made.aux))

    def loss(params, state, batch, key) -> Objective:
        given = {'advantage': batch['advantage'], 'weight': batch['weight']}
        given['sampled'] = batch['sampler_log_probs']
        if how.updates > 1:
            given['old'] = batch['old_log_probs' if how.recomputed else 'sampler_log_probs']
        given |= {name: batch[name] for name in fields}
        found = scoring.answer_losses(
            network, state.variables(params=params), batch, draw, of_token, per_token=given,
            teacher=teacher(state, batch) if teacher else None, key=key, chunk=how.chunk,
        )  # fmt: skip
        logged, aux = found.aux
        said = metrics(batch, **logged, low=how.low, high=how.high, cap=how.cap or 2.0)
        said |= {name: mean(value, batch['mask']) for name, value in aux.items()}
        said |= further(batch) if further else {}
        # What nobody could judge is not drawn anywhere either.
        rows = jnp.where(batch['unjudged'], 0.0, found.losses.sum(1))
        return Objective(mean(rows), said, found.mutables)

    init = start.from_reference(network.init, context)
    one = minimize(loss, context.tx_of(how.updates), init, micro_batches=how.micro_batches)
    several = repeat(one, how.updates, parts=how.parts, group=group)
    if memory is None:
        return with_collect(several, collect)
    return with_memory(several, *memory, collect)


def networks(context: Context, *pulls: Pull) -> dict[str, Network]:
    """The frozen networks of pulls with a weight, by name: 'reference' or 'teacher'.

    Raises:
      UserError: a weight without a network.
    """
    found = {}
    for pull in pulls:
        if not pull.weight:
            continue
        if pull.name == REFERENCE:
            if REFERENCE not in context.references:
                raise UserError(
                    f'{context.stage}.method.kl_weight={pull.weight} needs a reference of '
                    f"'{REFERENCE}', the stage to stay near."
                )
            found[REFERENCE] = context.references[REFERENCE]
        else:
            if context.optional_teacher is None:
                raise UserError(
                    f'{context.stage}.method.teacher_weight={pull.weight} needs a teacher.'
                )
            found['teacher'] = context.teacher
    return found


def number(value: Any, state: State) -> Any:
    """A `Number` of a state."""
    return value(state) if callable(value) else value


def field_of(name: str) -> str:
    """The field of a batch with what a network says of answers."""
    return f'{name}_log_probs'


def scored(
    collect: common.Collect, others: Mapping[str, Network], draw: Draws, how: Surrogate
) -> common.Collect:
    """`collect`, and what each of these networks says of the answers, in `field_of(name)`."""

    def with_scores(state: State, batch: Batch, key: jax.Array) -> Batch:
        batch = collect(state, batch, key)
        for name, other in others.items():
            said = scoring.score(
                other, state.frozen[name], batch, draw, chunk=how.chunk, parts=how.micro_batches
            )
            batch[field_of(name)] = said.log_probs
        return batch

    return with_scores


def pulled(
    said: scoring.Said, given: Mapping[str, jax.Array], *pulls: Pull
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the weighted estimates, and {'kl_to_NAME': k1}, of those that are `given`."""
    added, aux = jnp.zeros_like(said.log_p), {}
    for name, weight, kind in pulls:
        if field_of(name) in given:
            log_p = given[field_of(name)]
            if weight:
                added += weight * policy.kl_estimate(said.log_p, log_p, kind)
            aux[f'kl_to_{name}'] = policy.kl_estimate(said.log_p, log_p, 'k1')
    return added, aux


def metrics(
    batch: Batch,
    entropy: jax.Array,
    ratio: jax.Array,
    old_log_p: jax.Array,
    *,
    low: float,
    high: float,
    cap: float = 2.0,
) -> Metrics:
    """What people look for in the log of a policy gradient.

    | metric | |
    |---|---|
    | those of `kd.methods.rl.watched.metrics` | |
    | `dead_groups` | mean over answers |
    | `clip_fraction` | mean over tokens |
    | `ratio`, `ratio_max` | rho, mean over tokens; mean over answers of the largest |
    | `sampler_ratio`, `sampler_ratio_max`, `sampler_ratio_cut` | pi_old / pi_sampler before it is
      cut; the last is the share of tokens above `cap` |

    Args:
      batch: of answers.
      entropy: [B, R] of the policy.
      ratio: [B, R] log rho that the loss has clipped.
      old_log_p: [B, R] under the old policy.
      low, high: the radii of the clip.
      cap: of the sampler's ratio.
    """
    where = batch['mask']
    rho, sampled = jnp.exp(ratio), jnp.exp(policy.log_ratio(old_log_p, batch['sampler_log_probs']))
    clipped = policy.is_clipped(ratio, batch['advantage'][:, None], low=low, high=high)

    def largest(x: jax.Array) -> Mean:
        return mean(jnp.where(where, x, 0.0).max(1))

    found = {
        **watched.metrics(batch, entropy),
        'dead_groups': mean(batch['dead']),
        'clip_fraction': mean(clipped, where),
        'ratio': mean(rho, where),
        'ratio_max': largest(rho),
        'sampler_ratio': mean(sampled, where),
        'sampler_ratio_max': largest(sampled),
        'sampler_ratio_cut': mean(sampled > cap, where),
    }
    return jax.lax.stop_gradient(found)
