"""Metadata of language models in GGUF files: the arguments of `kd.models.decoder.Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kd.errors import UserError
from kd.io.gguf import Tensor
from kd.models import rope
from kd.models.decoder import Decoder

# By `general.architecture`; 'llama' is Mistral's too.
ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'phi3', 'gpt2')

# What Llama 3 and all after it have of its scaling.
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8_192)
# Of these none may be there; each makes another network.
_UNKNOWN = ('expert_count', 'rope.scaling.attn_factor', 'attention.clamp_kqv', 'logit_scale')


def arguments(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Any) -> dict:
    """What `Decoder` takes, for a file.

    Args:
      fields: the metadata; `general.architecture` is one of `ARCHITECTURES`.
      tensors: of the file; the head and biases are there or not.
      where: the file, for messages.

    Raises:
      UserError: a size that is missing, or a setting that `Decoder` does not have.
    """
    kind = fields['general.architecture']
    need = _needed(fields, kind, where)
    for name in _UNKNOWN:
        if fields.get(f'{kind}.{name}'):
            raise UserError(f'{where}: {kind}.{name} is more than kd knows.')
    if 'token_embd.weight' not in tensors:
        raise UserError(f"{where} has no tensor 'token_embd.weight'.")
    heads, width = need('attention.head_count'), need('embedding_length')
    size = fields.get(f'{kind}.attention.key_length') or width // heads
    if fields.get(f'{kind}.attention.value_length', size) != size:
        raise UserError(f'{where}: values of another size than keys are more than kd knows.')
    gpt2 = kind == 'gpt2'
    bias = 'blk.0.attn_output.bias' in tensors
    norm = 'layer_norm_epsilon' if gpt2 else 'layer_norm_rms_epsilon'
    made = dict(
        num_classes=tensors['token_embd.weight'].shape[0],
        width=width,
        depth=need('block_count'),
        heads=heads,
        kv_heads=fields.get(f'{kind}.attention.head_count_kv', heads),
        head_dim=None if size * heads == width else size,
        mlp_hidden=need('feed_forward_length'),
        epsilon=_short(need(f'attention.{norm}')),
        bias=bias,
        qkv_bias=bias or 'blk.0.attn_q.bias' in tensors,
        qk_norm='blk.0.attn_q_norm.weight' in tensors,
        window=fields.get(f'{kind}.attention.sliding_window'),
        tied='output.weight' not in tensors,
        max_length=need('context_length'),
    )
    if gpt2:
        made |= dict(mlp='gelu', norm='layer', rope_theta=None)
    else:
        made |= _rotations(fields, kind, need, size, tensors, where)
    try:
        Decoder(**made)
    except ValueError as error:
        raise UserError(f'{where}: {error}') from error
    return made


def _needed(fields: Mapping[str, Any], kind: str, where: Any) -> Callable[[str], Any]:
    def need(name: str) -> Any:
        value = fields.get(f'{kind}.{name}')
        if not isinstance(value, int | float) or not value:
            raise UserError(f"{where} must give '{kind}.{name}' as a number, and gives {value!r}.")
        return value

    return need


def _rotations(
    fields: Mapping[str, Any],
    kind: str,
    need: Callable[[str], Any],
    size: int,
    tensors: Mapping[str, Tensor],
    where: Any,
) -> dict[str, Any]:
    theta = _short(fields.get(f'{kind}.rope.freq_base', 1e4))
    if fields.get(f'{kind}.rope.dimension_count', size) != size:
        raise UserError(f'{where}: rotations of a part of each head are more than kd knows.')
    if long := [name for name in tensors if name.startswith('rope_factors')]:
        raise UserError(f'{where}: rotations by {long[0]} are more than kd knows.')
    named = fields.get(f'{kind}.rope.scaling.type', 'none')
    factors = tensors.get('rope_freqs.weight')
    if named not in (('none', 'linear', 'yarn') if factors is None else ('none',)):
        raise UserError(f"{where}: rotations of the type '{named}' are more than kd knows.")
    scaling: dict[str, Any] | None = None
    if factors is not None:
        scaling = _llama3(factors.read(), size, theta, where)
    elif named != 'none':
        scaling = dict(rope_type=named, factor=_short(need('rope.scaling.factor')))
        if named == 'yarn':
            length = need('rope.scaling.original_context_length')
            scaling['original_max_position_embeddings'] = length
    return dict(rope_theta=theta, rope_scaling=scaling)


def _llama3(factors: np.ndarray, size: int, theta: float, where: Any) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, of which files keep the factors alone."""
    scaling = dict(rope_type='llama3', factor=_short(factors.max()), **_LLAMA3)
    wanted = rope.frequencies(size, theta)[0] / rope.frequencies(size, theta, scaling)[0]
    if factors.shape != wanted.shape or not np.allclose(wanted, factors, rtol=1e-3):
        raise UserError(f'{where}: the rotations of rope_freqs.weight are not those of Llama 3.')
    return scaling


def _short(value: float) -> float:
    """The number that was meant by a float32: 1e-5 of 9.99999974737875e-06."""
    return float(str(np.float32(value)))
