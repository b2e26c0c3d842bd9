"""What methods for language models share: which tokens count, and losses of them without logits.

A batch is one of two kinds. A classifier of tokens has `label` int [B] or [B, T], the answer at
each position. Text (`kd.data.text`) has `input` int [B, T] and `response_mask` bool [B, T], and
position i is asked for token i + 1, see `kd.text.packing.shifted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import sequence, signal
from kd.losses.signal import Dense, HiddenHead, TeacherSignal
from kd.method import Batch
from kd.methods import start
from kd.methods.teacher import teacher_logits
from kd.models.decoder import Decoder, head_of
from kd.network import Network
from kd.state import PyTree, State
from kd.text.packing import shifted

# What a decoder has beside its blocks.
_PARTS = ('embed', 'positions', 'final_norm', 'head')
# See `token_losses`.
TokenLoss = Callable[..., tuple[jax.Array, Any]]


class TokenLosses(NamedTuple):
    """Losses of the tokens of a batch.

    Attributes:
      losses: float32, [B] or [B, T].
      where: bool like `losses`, the tokens that count.
      aux: a tree of arrays like `losses`.
      mutables: of the network.
    """

    losses: jax.Array
    where: jax.Array
    aux: Any
    mutables: PyTree


def targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The token that each position is asked for, int [B] or [B, T], and which positions count."""
    if 'response_mask' in batch and 'label' not in batch:
        return shifted(batch)
    where = jnp.broadcast_to(batch.get('response_mask', True), batch['label'].shape)
    return batch['label'], where


def decoder_of(network: Network) -> Decoder | None:
    """The module of a network with hidden states and a head, whose logits need not be formed."""
    return network.module if isinstance(network.module, Decoder) else None


def teacher_signal(context: Context, state: State, batch: Batch) -> TeacherSignal:
    """What the stage's teacher says of every position; hidden states where it is a decoder."""
    teacher = context.optional_teacher
    if teacher is None or decoder_of(teacher) is None:
        return signal.as_signal(teacher_logits(context, state, batch))
    return said_by(teacher, state.frozen['teacher'], batch)


def said_by(network: Network, variables: PyTree, batch: Batch) -> TeacherSignal:
    """What a network says of every position: hidden states [B, T, D] and a head, or logits."""
    decoder = decoder_of(network)
    if decoder is None:
        return Dense(network.apply(variables, *network.of(batch)).logits)
    hidden = network.apply(variables, *network.of(batch), method='hidden').logits
    return HiddenHead(hidden, head_of(decoder, variables))


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

    Vocabularies of one tokenizer may be padded to different sizes (Qwen2.5: 151,936 and 152,064):
    logits are cut to the tokens that student and teacher both have (`signal.cut`).

    Args:
      network: of the student.
      variables: of the network.
      batch: see above.
      loss: `loss(logits [n, V], teacher, labels int [n], *per_token) -> ([n], {name: [n]})` of n
        tokens. The teacher is None or a signal with a leading axis [n], `Dense` if it is whole.
      teacher: with leading axes as of the labels.
      per_token: further arrays with leading axes as of the labels.
      key: for dropout.
      chunk: tokens at a time.
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
    how = dict(train=train, key=key)
    decoder = decoder_of(network)
    if decoder is not None:
        output = network.apply(variables, *network.of(batch), method='hidden', **how)
        found, aux = sequence.fused_token_loss(
            flat(output.logits), head_of(decoder, variables), of_tokens,
            teacher=_flat(teacher, flat), per_token=given, valid=flat(where), chunk=chunk,
        )  # fmt: skip
    else:
        output = network.apply(variables, *network.of(batch), **how)
        found, aux = of_tokens(flat(output.logits), _flat(teacher, flat), given)
    found, aux = jax.tree.map(lambda x: x.reshape(leading), (found, aux))
    return TokenLosses(found, where, aux, output.mutables)


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
        return HiddenHead(flat(teacher.hidden), teacher.head)
    return jax.tree.map(flat, teacher)
