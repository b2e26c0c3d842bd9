"""What methods for language models share: which tokens count, and losses of them without logits.

A batch is one of two kinds. A classifier of tokens has `label` int [B] or [B, T], the answer at
each position. Text (`kd.data.text`) has `input` int [B, T] and `response_mask` bool [B, T], and
position i is asked for token i + 1, see `kd.text.packing.shifted`. Where answers are sampled,
`answering.on_policy` makes such text of prompts, `input` int [B, P] and `prompt_mask` bool [B, P].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import aggregate, routing, sequence, signal
from kd.losses.signal import Dense, HiddenHead, TeacherSignal, TopK
from kd.method import Batch
from kd.methods import start
from kd.methods.teacher import is_cached, teacher_logits
from kd.metrics import Mean, Metrics, mean
from kd.models import moe
from kd.models.decoder import Decoder, head_of
from kd.network import Network
from kd.parallel import layout
from kd.state import PyTree, State
from kd.text.packing import targets

# What a decoder has beside its blocks.
_PARTS = ('embed', 'positions', 'final_norm', 'head')
# Field of a batch that says how much each token counts, see `aggregated`.
TOKEN_WEIGHT = 'token_weight'
# See `token_losses`.
TokenLoss = Callable[..., tuple[jax.Array, Any]]


class TokenLosses(NamedTuple):
    """Losses of the tokens of a batch.

    Attributes:
      losses: float32, [B] or [B, T].
      where: bool like `losses`, the tokens that count.
      aux: a tree of arrays with leading axes as of `losses`; of a decoder 0 outside `where`.
      mutables: of the network.
      routers: float32 [B, T, E] of each layer with experts, or of stacked ones [layers, B, T, E],
        their probabilities; () of a network without.
    """

    losses: jax.Array
    where: jax.Array
    aux: Any
    mutables: PyTree
    routers: tuple[jax.Array, ...] = ()

    @property
    def sums(self) -> jax.Array:
        """[B]: losses added up over the tokens of a row, for such with weights of `aggregated`."""
        counted = jnp.where(self.where, self.losses, 0.0)
        return counted.reshape(counted.shape[0], -1).sum(1)

    @property
    def metrics(self) -> Metrics:
        """Means of aux over the tokens that count."""
        return {name: mean(value, self.where) for name, value in self.aux.items()}


def rows(network: Network, batch: Batch) -> Batch:
    """A batch with an answer a row: of pairs, [B, 2, ...], both below each other, [2 B, ...].

    Pairs (`kd.data.text.preferences`) have an axis more than the network takes; any other batch
    stays as it is. Fields without an axis of 2, such as `index` [B], are repeated.
    """
    if batch[network.fields[0]].ndim == len(network.inputs[0].shape):
        return batch

    def row(x):
        if x.ndim > 1 and x.shape[1] == 2:
            return x.reshape(-1, *x.shape[2:])
        return jnp.repeat(x, 2, axis=0)

    return jax.tree.map(row, batch)


def decoder_of(network: Network) -> Decoder | None:
    """The module of a network with hidden states and a head, whose logits need not be formed."""
    return network.module if isinstance(network.module, Decoder) else None


def teacher_signal(context: Context, state: State, batch: Batch) -> TeacherSignal:
    """What the stage's teacher says of every position; hidden states where it is a decoder.

    What a cache brings, if the batch is from one.
    """
    teacher = context.optional_teacher
    if teacher is None or decoder_of(teacher) is None or is_cached(batch):
        return signal.as_signal(teacher_logits(context, state, batch))
    return said_by(teacher, state.frozen['teacher'], batch)


def said_by(network: Network, variables: PyTree, batch: Batch) -> TeacherSignal:
    """What a network says of every position: hidden states [B, T, D] and a head, or logits."""
    decoder = decoder_of(network)
    if decoder is None:
        return Dense(network.apply(variables, *network.of(batch)).logits)
    hidden = network.apply(variables, *network.of(batch), method='hidden').logits
    return HiddenHead(hidden, head_of(decoder, variables), decoder.tied)


def token_losses(
    network: Network,
    variables: PyTree,
    batch: Batch,
    loss: TokenLoss,
    *,
    teacher: TeacherSignal | None = None,
    per_token: tuple[jax.Array, ...] = (),
    key: jax.Array | None = None,
    chunk: int = 256,
    train: bool = True,
) -> TokenLosses:
    """A loss of every token that counts; a decoder's logits are formed `chunk` tokens at a time.

    Or whatever else is wanted of its logits: that is `aux`.

    Vocabularies of one tokenizer may be padded to different sizes (Qwen2.5: 151,936 and 152,064):
    logits are cut to the tokens that student and teacher both have (`signal.cut`).

    Args:
      network: of the student.
      variables: of the network.
      batch: see above.
      loss: `loss(logits [n, V], teacher, labels int [n], *per_token) -> ([n], {name: [n, ...]})`
        of n tokens. The teacher is None or a signal with a leading axis [n], `Dense` if it is
        whole.
      teacher: with leading axes as of the labels.
      per_token: further arrays with leading axes as of the labels.
      key: for dropout.
      chunk: tokens at a time, of each device that shares the batch; 0 for all at once, whose logits
        are then formed whole.
      train: whether the network is in training mode.
    """
    labels, where = targets(batch)
    leading = labels.shape

    def flat(x):
        return x.reshape(-1, *x.shape[len(leading) :])

    def of_tokens(logits, teacher, per_token):
        if isinstance(teacher, Dense | HiddenHead):
            logits, teacher = signal.cut(logits, teacher)
        return loss(logits, teacher, *per_token)

    given = tuple(flat(x) for x in (labels, *per_token))
    decoder = decoder_of(network)
    how = dict(train=train, key=key, capture=moe.routers(decoder))
    if decoder is not None and chunk:
        output = network.apply(variables, *network.of(batch), method='hidden', **how)
        shards = layout.shards(labels.size)
        found, aux = sequence.fused_token_loss(
            flat(output.logits), head_of(decoder, variables), of_tokens,
            teacher=_flat(teacher, flat), per_token=given, valid=flat(where),
            chunk=chunk * shards, shards=shards, tied=decoder.tied,
        )  # fmt: skip
    else:
        output = network.apply(variables, *network.of(batch), **how)
        found, aux = of_tokens(flat(output.logits), _flat(teacher, flat), given)
    found, aux = jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), (found, aux))
    routers = tuple(output.features.values())
    return TokenLosses(found, where, aux, output.mutables, routers)


def balanced(
    network: Network, batch: Batch, routers: Sequence[jax.Array]
) -> tuple[jax.Array, Metrics]:
    """How unequally the experts of a network are used, and by whom.

    Args:
      network, batch: as of `token_losses`.
      routers: of `TokenLosses`.

    Returns:
      float32 [B], the balance loss of `kd.losses.routing` of each row, summed over layers; and the
      metrics `balance`, its mean over layers, `dropped`, the share of choices that found no slot,
      and `load_e`, the share of expert e in what is computed, 1 / E each where they are balanced.
    """
    experts = network.module.experts
    rows = batch['input'].shape[:2]
    counted = batch['segments'] > 0 if 'segments' in batch else jnp.ones(rows, bool)
    layers = [layer for x in routers for layer in (x if x.ndim == 4 else x[None])]
    each = jnp.stack([routing.balance(layer, where=counted) for layer in layers])
    loads = jnp.stack([moe.routed(layer, experts, counted).load for layer in layers])
    total = loads.sum()
    asked = len(layers) * experts.top_k * counted.sum()
    metrics = {
        'balance': mean(each),
        'dropped': Mean(asked - total, asked),
        **{f'load_{e}': Mean(loads[..., e].sum(), total) for e in range(experts.count)},
    }
    return each.sum(0), jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.float32(x)), metrics)


def aggregated(batch: Batch, mode: aggregate.Mode, constant: float | None = None) -> Batch:
    """The batch with `token_weight` float32 of each label, see `kd.losses.aggregate`.

    For `with_collect`, which has the whole batch: weights hold denominators over all of its rows,
    so that the mean over rows of the sums of weighted losses is the same for any micro-batches.
    """
    where = jnp.asarray(targets(batch)[1])
    rows = where.reshape(where.shape[0], -1)
    weights = aggregate.weights(rows, mode, constant=constant)
    return {**batch, TOKEN_WEIGHT: weights.reshape(where.shape)}


def top_k(network: Network, variables: PyTree, batch: Batch, k: int, *, chunk: int = 256) -> TopK:
    """The k tokens that a network holds most probable at every position: log_probs [B, T, k].

    A decoder's logits are formed `chunk` tokens at a time; positions that do not count hold zeros.
    """

    def of_token(logits, teacher, labels):
        del teacher
        return jnp.zeros(labels.shape), signal.top_k(logits, k)

    return token_losses(network, variables, batch, of_token, chunk=chunk, train=False).aux


def examples_only(where: jax.Array, batch: Batch) -> jax.Array:
    """`where` [B, ...] without the examples that fill a batch up, outside its bool [B] `mask`."""
    if 'mask' not in batch:
        return where
    return where & batch['mask'].reshape(-1, *[1] * (where.ndim - 1))


def cut(blocks: Sequence[int], context: Context) -> start.Transform:
    """The transform that begins a decoder with chosen blocks of a deeper one, and all else of it.

    Raises:
      UserError: another number of blocks than the student has.
    """
    depth = getattr(context.network.module, 'depth', 0)
    if len(blocks) != depth or getattr(context.network.module, 'stacked', False):
        raise UserError(
            f'{context.stage}.method.blocks names {len(blocks)} blocks, and the network has {depth}'
            ', which must not be stacked.'
        )
    paths = {f'block{own}': f'block{of}' for own, of in enumerate(blocks)}
    others = [name for name in _PARTS if name in _own_parts(context)]
    return start.copy_blocks({**paths, **dict(zip(others, others, strict=True))}, drop='block')


def _own_parts(context: Context) -> Mapping[str, Any]:
    return jax.eval_shape(context.network.init, jax.random.key(0))['params']


def _flat(teacher: TeacherSignal | None, flat: Callable) -> TeacherSignal | None:
    """A teacher's signal with one leading axis."""
    if isinstance(teacher, HiddenHead):
        return HiddenHead(flat(teacher.hidden), teacher.head, teacher.tied)
    return jax.tree.map(flat, teacher)
