"""LLaVA-MoD: a small model that sees, with experts, learns from a large one (arXiv:2408.15881).

    adaptor   what carries image features into the language model, from captions
    D2D       the dense student mimics the teacher's law over answers
    D2S       its MLPs become experts, which alone go on, with labels and a loss of balance
    PD        right answers are preferred to wrong ones, relative to the TEACHER

`mimic` is the first three, `prefer` the last; the vision tower is trained by neither. The released
mimic loss multiplies logits with labels that are not shifted; here position i predicts token i + 1.
It also counts the loss of balance twice in the second mimic stage; here once.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, signal
from kd.method import Batch, Init, Method, Objective, minimize, with_collect
from kd.method.base import call_init
from kd.methods import start
from kd.methods.lm import common
from kd.methods.lm.preference import preference
from kd.methods.lm.sequence_kd import answers
from kd.metrics import mean
from kd.models.vision_language import VISION
from kd.ranges import Count, NonNegative, Positive, Seed
from kd.references import START

# The network that wrong answers are drawn from, where the data are no pairs.
INITIAL = 'initial'
# References of which a model is put together that sees: a decoder, and a tower or what has one.
LANGUAGE = 'language'
# All leaves but the tower's, and those of experts alone.
UNFROZEN = rf'^(?!{VISION}/)'
SPARSE = r'/(experts|router)/'


def mimic(
    context: Context,
    *,
    soft_weight: NonNegative = 1.0,
    hard_weight: NonNegative = 0.0,
    balance: NonNegative = 0.0,
    trainable: str = UNFROZEN,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Learns a teacher's law over the answers of the data.

        loss = w_s L_KD + w_h CE(y, q) + w_b sum over layers of balance
        L_KD = -sum_v p(v) log q(v)              p of the teacher, a constant

    the first two averaged over the answers' tokens, the last, see `kd.losses.routing`, over rows.
    D2D is (1, 0, 0), D2S (1, 1, .01); fine-tuning is (0, 1, 0), and the adaptor's stage that with
    `trainable` '^adaptor/'. L_KD is the forward KL up to the teacher's entropy.

    Args:
      context: the stage; needs a network, an optimiser, text (see `kd.methods.lm.common`), and a
        teacher unless soft_weight is 0. Starts from `references.start`, whose MLPs the experts
        copy, or from the parts that `assembled` finds.
      soft_weight, hard_weight, balance: w_s, w_h, w_b.
      trainable: regular expression to be found in the path of a leaf that is trained; '' for all.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.network

    def collect(state, batch, key):
        del key
        return common.aggregated(batch, 'token_mean')

    def loss(params, state, batch, key) -> Objective:
        teacher = common.teacher_signal(context, state, batch) if soft_weight else None

        def of_token(logits, teacher, labels, weight):
            aux = {'hard_loss': classification.cross_entropy(logits, labels)}
            total = hard_weight * aux['hard_loss'] if hard_weight else 0.0
            if soft_weight:
                law = jax.nn.softmax(signal.all_logits('llava_mod', teacher))
                aux['soft_loss'] = classification.cross_entropy(logits, law)
                total = total + soft_weight * aux['soft_loss']
            return jnp.where(weight > 0, weight * total, 0.0), aux

        found = common.token_losses(
            network, state.variables(params=params), batch, of_token, teacher=teacher,
            per_token=(batch[common.TOKEN_WEIGHT],), key=key, chunk=chunk,
        )  # fmt: skip
        losses, metrics = found.sums, found.metrics
        if found.routers:
            unequal, loads = common.balanced(network, batch, found.routers)
            losses, metrics = losses + balance * unequal, {**metrics, **loads}
        return Objective(mean(losses), metrics, found.mutables)

    method = minimize(
        loss,
        context.tx,
        assembled(context),
        micro_batches=micro_batches,
        trainable=trainable or None,
    )
    return with_collect(method, collect)


def assembled(context: Context) -> Init:
    """What a model that sees starts from.

    `references.start`, if the stage has one. Else its own initial values, but for a language model
    from `references.language`, and the tower of `references.vision`, each if it is there; the
    latter may be a tower, or a model that sees.
    """
    network = context.network
    begun = start.from_reference(network.init, context)
    named = [name for name in (LANGUAGE, VISION) if name in context.references]
    if START in context.references or not named:
        return begun

    def init(key, frozen):
        own = call_init(begun, key, frozen)
        params = dict(own['params'])
        if LANGUAGE in named:
            params |= frozen[LANGUAGE]['params']
        if VISION in named:
            theirs = frozen[VISION]['params']
            params[VISION] = theirs.get(VISION, theirs)
        return start.as_own(own, {**own, 'params': params}, f'{context.stage}.references')

    return init


def prefer(
    context: Context,
    *,
    loss: Literal['dpo', 'kto_pair'] = 'dpo',
    beta: Positive = 0.1,
    balance: NonNegative = 0.01,
    trainable: str = SPARSE,
    seed: Seed = 0,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Prefers right answers y+ to wrong ones y-, relative to the teacher.

        a(y) = S(y) - S_T(y)
        dpo:       -log sigma(beta a(y+) - beta a(y-))
        kto_pair:  mean of sigma(beta (K- - a(y+))) and sigma(beta (a(y-) - K+))

    plus w_b times the losses of balance of both, with S the sum of log-probabilities over an answer
    under the student, S_T under `references.reference`, the teacher; K+ and K- as of
    `kd.losses.preference_family.kto_baseline`, over the whole batch and constants to the gradient.
    (In the released code, whose default is kto_pair, they are of a device's batch of one, and a
    gradient flows through them.)

    Text comes in pairs (`kd.data.text.preferences`). An answer of one token may come alone, which
    is then y+; y- is drawn from `references.initial` among the other tokens of text, by the
    example's `index`: the same at every pass, and in every run of one `seed`.

    Args:
      context: the stage; as of `kd.methods.lm.preference.preference`.
      loss: which of the two.
      beta: how closely the teacher is held to.
      balance: w_b.
      trainable: as of `mimic`; experts and their routers.
      seed: of the draws of y-, apart from the run's.
      chunk, micro_batches: as of `mimic`.
    """
    method = preference(
        context, loss=f'kd.losses.preference_family.{loss}', beta=beta, balance=balance,
        trainable=trainable, chunk=chunk, micro_batches=micro_batches,
    )  # fmt: skip
    if INITIAL not in context.references:
        return method

    def collect(state, batch, key):
        del key  # Another one at every step.
        return with_wrong_answers(context, state, batch, jax.random.key(seed))

    return with_collect(method, collect, name='wrong answers')


def with_wrong_answers(context: Context, state, batch: Batch, key: jax.Array) -> Batch:
    """Pairs of the last token of every row, the answer, and another one of `references.initial`."""
    network = context.references[INITIAL]
    mask = batch['response_mask']
    if mask.ndim != 2:
        raise UserError(
            f'{context.stage}.references.{INITIAL} gives wrong answers to text [B, T], and the '
            f'data have {list(mask.shape)}: leave it out where answers come in pairs.'
        )
    logits = network.apply(state.frozen[INITIAL], *network.of(batch)).logits[:, -2]
    asked = jnp.asarray(batch['input'])
    right = asked[:, -1]
    # A place of an image is no answer, and would ask for a patch that there is not.
    place = getattr(network.module, 'image_token', -1)
    tokens = jnp.arange(logits.shape[-1])
    others = jnp.where((tokens == right[:, None]) | (tokens == place), -jnp.inf, logits)
    wrong = answers(key, batch['index'], others).astype(right.dtype)
    text = jnp.stack([asked, asked.at[:, -1].set(wrong)], axis=1)
    twice: Batch = {
        name: jnp.stack([batch[name]] * 2, axis=1)
        for name in ('response_mask', 'positions', 'segments')
        if name in batch
    }
    return {**batch, **twice, 'input': text}
