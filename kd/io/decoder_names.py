"""Where the leaves of `kd.models.decoder.Decoder` lie in files of Hugging Face and llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kd.errors import UserError
from kd.io.torch_weights import LEAVES, Find, Part, kernel_axes
from kd.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a family, and what its layouts have of their own.

    Attributes:
      modules: {path in the decoder: name in the file}, of what lies in a block without the block's
        own. Those of one name share a tensor: queries, keys and values; gates and what they gate.
      block: what the names in a block begin with; {} is its number.
      prefix: of all names; files of the model without its head lack it.
      kept: whether kernels lie in the file as they do here, [in, out], as GPT-2's.
      interleaved: whether queries and keys rotate by pairs (2 i, 2 i + 1) in the file, and by pairs
        (i, i + d / 2) here.
      left: expression that finds tensors which are no parameters.
    """

    modules: Mapping[str, str]
    block: str
    prefix: str = ''
    kept: bool = False
    interleaved: bool = False
    left: str = ''

    def of_file(self, tensors: Iterable[str]) -> Names:
        """The same for the names that a file has: without the prefix, where none has it."""
        if not self.prefix or any(name.startswith(self.prefix) for name in tensors):
            return self
        return dataclasses.replace(self, prefix='')


_QUERY, _KEY, _VALUE = 'attention/query', 'attention/key', 'attention/value'
_ATTENTION = (_QUERY, _KEY, _VALUE)

_LLAMA = {
    'embed': 'embed_tokens',
    'final_norm': 'norm',
    'norm1': 'input_layernorm',
    'norm2': 'post_attention_layernorm',
    _QUERY: 'self_attn.q_proj',
    _KEY: 'self_attn.k_proj',
    _VALUE: 'self_attn.v_proj',
    'attention/output': 'self_attn.o_proj',
    'attention/query_norm': 'self_attn.q_norm',
    'attention/key_norm': 'self_attn.k_norm',
    'mlp/gate': 'mlp.gate_proj',
    'mlp/up': 'mlp.up_proj',
    'mlp/down': 'mlp.down_proj',
    'head': 'lm_head',
}
_PHI3 = {
    **_LLAMA,
    **dict.fromkeys(_ATTENTION, 'self_attn.qkv_proj'),
    **dict.fromkeys(('mlp/gate', 'mlp/up'), 'mlp.gate_up_proj'),
}
_GPT2 = {
    'embed': 'wte',
    'positions': 'wpe',
    'final_norm': 'ln_f',
    'norm1': 'ln_1',
    'norm2': 'ln_2',
    **dict.fromkeys(_ATTENTION, 'attn.c_attn'),
    'attention/output': 'attn.c_proj',
    'mlp/up': 'mlp.c_fc',
    'mlp/down': 'mlp.c_proj',
    'head': 'lm_head',
}
_GGUF = {
    'embed': 'token_embd',
    'positions': 'position_embd',
    'final_norm': 'output_norm',
    'norm1': 'attn_norm',
    'norm2': 'ffn_norm',
    _QUERY: 'attn_q',
    _KEY: 'attn_k',
    _VALUE: 'attn_v',
    'attention/output': 'attn_output',
    'attention/query_norm': 'attn_q_norm',
    'attention/key_norm': 'attn_k_norm',
    'mlp/gate': 'ffn_gate',
    'mlp/up': 'ffn_up',
    'mlp/down': 'ffn_down',
    'head': 'output',
}
_GGUF_FUSED = {**_GGUF, **dict.fromkeys(_ATTENTION, 'attn_qkv')}

# A head is not read where the embedding is one; older files have it, and what rotations need.
_BUFFERS = r'^lm_head\.weight$|rotary_emb\.inv_freq$|attn\.(masked_)?bias$'
_HF_LLAMA = Names(_LLAMA, 'layers.{}.', prefix='model.', left=_BUFFERS)

# By `model_type` of config.json.
HF = {
    'llama': _HF_LLAMA,
    'qwen2': _HF_LLAMA,
    'qwen3': _HF_LLAMA,
    'phi3': dataclasses.replace(_HF_LLAMA, modules=_PHI3),
    'gpt2': Names(_GPT2, 'h.{}.', prefix='transformer.', kept=True, left=_BUFFERS),
}
# By `general.architecture` of GGUF files.
GGUF = {
    'llama': Names(_GGUF, 'blk.{}.', interleaved=True, left=r'^rope_freqs\.weight$'),
    'qwen2': Names(_GGUF, 'blk.{}.'),
    'qwen3': Names(_GGUF, 'blk.{}.'),
    'phi3': Names({**_GGUF_FUSED, 'mlp/gate': 'ffn_up'}, 'blk.{}.'),
    'gpt2': Names(_GGUF_FUSED, 'blk.{}.'),
}


def find(of: Architecture, names: Names, where: Any) -> Find:
    """Where each leaf of a decoder lies; of stacked blocks, a part for each layer.

    Args:
      of: what the file holds.
      names: of the file's family.
      where: the file, for messages.

    The function raises `UserError` for a leaf that the family does not have.
    """

    def found(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part | tuple[Part, ...]:
        block, *inside = keys
        if block == 'blocks':
            return tuple(part(inside, len(shape) - 1, layer) for layer in range(of.depth))
        if block.startswith('block'):
            return part(inside, len(shape), int(block.removeprefix('block')))
        return part(keys, len(shape), None)

    def part(keys: Iterable[str], rank: int, layer: int | None) -> Part:
        *path, leaf = keys
        if not path:  # The head and the positions are leaves.
            path, leaf = [leaf], 'kernel' if leaf == 'head' else 'embedding'
        module = '/'.join(path)
        if module not in names.modules:
            raise UserError(f"{where}: models of its architecture have no '{module}/{leaf}'.")
        name = f'{names.modules[module]}.{LEAVES[leaf]}'
        if layer is not None:
            name = names.block.format(layer) + name
        if module != 'head':
            name = names.prefix + name
        turned = leaf == 'kernel' and (module == 'head' or not names.kept)
        rows, size = _rows(of, names, module)
        return Part(name, kernel_axes(rank) if turned else None, rows, size)

    return found


def _rows(
    of: Architecture, names: Names, module: str
) -> tuple[range | np.ndarray | None, int | None]:
    """The places of a module's outputs in its tensor, and how many the tensor has."""
    sizes = {
        _QUERY: of.heads * of.size_of_head,
        _KEY: of.groups * of.size_of_head,
        _VALUE: of.groups * of.size_of_head,
        'mlp/gate': of.hidden_units,
        'mlp/up': of.hidden_units,
    }
    sharing = [one for one in sizes if names.modules.get(one) == names.modules[module]]
    if len(sharing) > 1:
        first = sum(sizes[one] for one in sharing[: sharing.index(module)])
        return range(first, first + sizes[module]), sum(sizes[one] for one in sharing)
    if names.interleaved and module in (_QUERY, _KEY):
        heads = np.arange(sizes[module]).reshape(-1, of.size_of_head // 2, 2)
        return heads.swapaxes(1, 2).reshape(-1), sizes[module]
    return None, None
