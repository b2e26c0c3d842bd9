"""SRPO: answers are routed, to rewards or to a teacher who has seen a right one (arXiv:2604.02288).

A right answer is reinforced as in GRPO. A wrong one, where another answer to the same prompt is
right, is distilled from the policy itself (a slow average of it) that has read the right one: what
would it have said at every token? That teaches more than a reward as long as much is wrong, and
rewards teach more reliably later on. With every answer distilled it is SDPO (arXiv:2601.20802).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, policy, token
from kd.losses.policy import Advantage
from kd.method import Batch, Method, with_ema
from kd.methods.rl import common, self_teacher, surrogate
from kd.methods.rl.self_teacher import Comparison
from kd.methods.rl.surrogate import Surrogate, Term
from kd.metrics import Mean, Metrics, mean
from kd.ranges import Count, Fraction, Keywords, NonNegative, Positive, Size
from kd.sampling.environment import Draws
from kd.state import State
from kd.text.revision import Around, Words, encoded

# Name of the slow average in `state.ema`.
TEACHER = 'teacher'
Taught = Literal['wrong', 'right', 'all']


@dataclasses.dataclass(frozen=True)
class Quote:
    """How the teacher is shown an answer, in its prompt.

    Attributes:
      opening, closing: what stands around it: tokens, or text that the data's tokenizer encodes.
      after: tokens of the prompt that stand before all this, see
        `kd.methods.rl.self_teacher.with_block`.
    """

    opening: Words = ()
    closing: Words = ()
    after: int | None = None

    def around(self, context: Context) -> Around:
        """The tokens of both; see `kd.text.revision.encoded`."""
        tokenizer = None
        if isinstance(self.opening, str) or isinstance(self.closing, str):
            source = context.source('train')
            if not hasattr(source, 'tokenizer'):
                raise UserError(f'{context.stage}: the data have no tokenizer; quote by tokens.')
            tokenizer = source.tokenizer
        return Around(encoded(self.opening, tokenizer), encoded(self.closing, tokenizer))


class Routing(NamedTuple):
    """Which answers learn from what; numbers or scalar arrays.

    Attributes:
      right, wrong: 1 where right answers, and wrong ones, are routed to the self-teacher if it can
        be shown another right one, else 0.
      others: 1 where the answers that are not routed are reinforced; 0 leaves them out, also of
        what the mean over tokens divides by.
      sharpness: of the teacher's weights, see `kd.losses.token.entropy_weights`.
      mix: share of the policy gradient in what routed answers learn, 0 in SRPO and SDPO.
    """

    right: ArrayLike = 0
    wrong: ArrayLike = 1
    others: ArrayLike = 1
    sharpness: ArrayLike = 1.0
    mix: ArrayLike = 0.0

    def routed(self, right: jax.Array, available: jax.Array) -> jax.Array:
        """The answers, bool [B], that go to the self-teacher: z."""
        return available & (jnp.where(right, self.right, self.wrong) > 0)


def routed_weights(
    mask: jax.Array, routed: jax.Array, entropies: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    """Weights of the two losses of every token: the mean over rows of what they give is

        L = sum m [(1 - z) l_policy + z w l_teacher] / sum m,    w of `token.entropy_weights`

    one mean over the tokens of both kinds. It is of the whole batch, so it belongs in `collect`.

    Args:
      mask: bool [B, R], m.
      routed: bool [B], z.
      entropies: [B, R] nats of the teacher.
      routing: see there.

    Returns:
      (policy [B, R], teacher [B, R]).

    Source: SRPO, arXiv 2604.02288, its objective and dynamic weights.
    """
    counted = routed | (jnp.asarray(routing.others) > 0)
    each = aggregate.weights(mask & counted[:, None], 'token_mean')
    certain = token.entropy_weights(entropies, mask & routed[:, None], routing.sharpness)
    reinforced = jnp.where(routed, routing.mix, jnp.asarray(routing.others, jnp.float32))
    taught = jnp.where(routed, 1.0 - jnp.asarray(routing.mix), 0.0)
    return each * reinforced[:, None], each * certain * taught[:, None]


def srpo(
    context: Context,
    *,
    reward: Mapping[str, Any],
    sampling: Annotated[Mapping[str, Any], Keywords(common.Sampling)],
    quote: Annotated[Mapping[str, Any], Keywords(Quote)],
    taught: Taught = 'wrong',
    reinforced: bool = True,
    sharpness: NonNegative = 1.0,
    mix: Fraction = 0.0,
    routing: Callable[[State], Routing] | None = None,
    rate: Fraction = 0.05,
    alpha: Fraction = 0.5,
    top_k: Size = 100,
    tokens: Literal['all', 'said'] = 'all',
    advantage: Advantage = 'dr_grpo',
    updates: Count = 1,
    parts: Count = 1,
    old: Literal['recomputed', 'sampler'] = 'recomputed',
    low: Positive = 0.2,
    high: Positive = 0.28,
    cap: Positive = 2.0,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Policy gradients and self-distillation, each on the answers that it suits.

        l_policy = -min(rho A, clip(rho, 1 - low, 1 + high) A) min(pi_old / pi_sampler, cap)
        l_teacher = D_alpha(pi, pi_teacher(. | a right answer)) min(pi / pi_old, cap)

    weighed by `routed_weights`. A right answer is one with a reward of .5 or more. The teacher is
    the average `state.ema['teacher']` of the policy, <- (1 - rate) teacher + rate policy after the
    updates of a step, and reads the first other right answer of the group quoted in its prompt.

    | | taught | reinforced | sharpness |
    |---|---|---|---|
    | SRPO | wrong | true | 1 |
    | SDPO | all | false | 0 |
    | SDPO on failures only | wrong | false | 0 |
    | mixed advantages | all | true | 0, and mix=.9 |

    Args:
      context: the stage; a decoder, data in the layout 'prompts', an optimiser. Starts from
        `references.start`, if there is one.
      reward: block of the reward, see `kd.rewards`.
      sampling: keywords of `kd.methods.rl.common.Sampling`.
      quote: keywords of `Quote`; an answer is shown without the token that ends it.
      taught: which answers are routed to the teacher, if there is another right one.
      reinforced: whether the others have a policy gradient, or are left out.
      sharpness: b, of the weights exp(-b H) by the teacher's entropy.
      mix: share of the policy gradient in the loss of routed answers.
      routing: in place of these four, one that depends on the state; from code alone.
      rate: of the teacher's average.
      alpha: of D, the weight of the teacher in `kd.losses.divergence.generalized_jsd`: .5 is the
        Jensen-Shannon divergence, 0 is KL(teacher || policy), 1 is KL(policy || teacher).
      top_k: D is between the probabilities of the policy's so many favourites and of all others
        together; 0 for all tokens.
      tokens: 'said' estimates the divergence on the answer's own tokens, which with alpha = 1 has
        the mean gradient of the reverse KL: sg[log pi - log pi_teacher] grad log pi.
      advantage: see `kd.losses.policy.group_advantage`, over all answers of a group, routed or not;
        'dr_grpo' as in the code, 'grpo' as in the paper's equation.
      updates, parts, old, low, high, cap, chunk, micro_batches: see
        `kd.methods.rl.surrogate.Surrogate`; the cap is that of both importance weights.

    Raises:
      UserError: tokens='said' with another divergence than the reverse KL; an environment.
    """
    if tokens == 'said' and alpha != 1:
        raise UserError(
            f"{context.stage}.method: tokens='said' estimates the reverse KL; set alpha to 1."
        )
    if routing is None:
        fixed = Routing(int(taught != 'wrong'), int(taught != 'right'), int(reinforced))
        fixed = fixed._replace(sharpness=sharpness, mix=mix)
    config = common.Sampling(**sampling)
    if config.environment:
        raise UserError(f'{context.stage}.method: answers that are quoted are those of one turn.')
    how = Surrogate(updates, parts, old, low, high, None, cap, chunk, micro_batches)
    draw = common.drawing(context, config)
    roll = common.rollouts(
        context, draw, common.of_block(context, reward), group=config.group, advantage=advantage,
        aggregation='token_mean', recomputed=how.recomputed, chunk=chunk, parts=micro_batches,
    )  # fmt: skip
    hear = _teacher(context, draw, Quote(**quote), routing or (lambda _: fixed), config.group, how)
    between = Comparison('kd.losses.divergence.generalized_jsd', dict(beta=alpha), top_k)
    compare = self_teacher.comparison(draw, between)

    def collect(state, batch, key):
        return hear(state, roll(state, batch, key))

    def term(said, old, given):
        if tokens == 'said':
            distance = policy.kl_estimate(said.log_p, given['teacher_log_probs'], 'k2')
        else:
            distance = compare(said)
        capped = distance * policy.importance_cap(said.log_p, old, cap)
        weight = given['teacher_weight']
        # Of tokens that are taught, as a mean over all.
        logged = {'self_distillation': jnp.where(weight > 0, distance, 0.0)}
        return Term(policy.log_ratio(said.log_p, old), apart=weight * capped, aux=logged)

    def teacher(state, batch):
        network = context.network
        return self_teacher.with_head(network, state.variables(TEACHER), batch['hidden'])

    method = surrogate.method(
        context, draw, collect, term, group=config.group, how=how, teacher=teacher,
        fields=('teacher_weight', 'teacher_log_probs'), further=_metrics,
    )  # fmt: skip
    return with_ema(method, {TEACHER: 1 - rate})


def _teacher(
    context: Context,
    draw: Draws,
    quote: Quote,
    routing: Callable[[State], Routing],
    group: int,
    how: Surrogate,
) -> Callable[[State, Batch], Batch]:
    """Adds to a batch of answers what the self-teacher says of them, and how much each counts."""
    opening, closing = quote.around(context)

    def hear(state: State, batch: Batch) -> Batch:
        route, rows = routing(state), len(batch['rewards'])
        sibling, available = policy.sibling_index(batch['rewards'], group)
        routed = route.routed(batch['rewards'] >= 0.5, available & ~batch['unjudged'])
        answers, ended = self_teacher.without_end(batch)
        block = (
            self_teacher.tokens_of(opening, rows),
            (answers[sibling], ended[sibling]),
            self_teacher.tokens_of(closing, rows),
        )
        # Who has no sibling reads the prompt alone, and is not asked.
        shown = [(tokens, there & available[:, None]) for tokens, there in block]
        hidden, scores = self_teacher.heard(
            context.network, state.variables(TEACHER),
            self_teacher.with_block(batch, *shown, after=quote.after), draw, where=routed,
            chunk=how.chunk, parts=how.micro_batches,
        )  # fmt: skip
        counted = batch['mask'] & ~batch['unjudged'][:, None]
        weight, teacher_weight = routed_weights(counted, routed, scores.entropy, route)
        made = {
            'weight': weight,
            'teacher_weight': teacher_weight,
            'routed': routed,
            'available': available,
            'hidden': hidden,
            'teacher_log_probs': scores.log_probs,
            'teacher_entropy': scores.entropy,
        }
        return {**batch, **made}

    return hear


def _metrics(batch: Batch) -> Metrics:
    """Shares of answers and tokens that are routed, and of answers that have a sibling; how
    uncertain the teacher is of the routed tokens, in nats."""
    where = batch['mask'] & batch['routed'][:, None]
    return {
        'routed': mean(batch['routed']),
        'routed_tokens': Mean(where.sum(dtype=jnp.float32), batch['mask'].sum(dtype=jnp.float32)),
        'available': mean(batch['available']),
        'teacher_entropy': mean(batch['teacher_entropy'], where),
    }
