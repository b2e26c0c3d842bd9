"""`config.json` of language models, read and written: the arguments of `kd.models.decoder.Decoder`.

{'model_type': 'qwen3', 'hidden_size': 4096, ...}  <->  dict(width=4096, qk_norm=True, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kd.errors import UserError
from kd.models import rope
from kd.models.decoder import Decoder

# Names of transformers' classes.
CLASSES = {
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
    'phi3': 'Phi3ForCausalLM',
    'gpt2': 'GPT2LMHeadModel',
}
# What else may stand in a block of rotations: `truncate` rounds as is done here.
_IMPLIED = {'partial_rotary_factor': (None, 1, 1.0), 'truncate': (None, True)}


def arguments(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """What `Decoder` takes, for a `config.json` of transformers 4 or 5.

    Args:
      config: of one of `CLASSES`, by `model_type`.
      where: the file, for messages.

    Raises:
      UserError: a size that is missing, or a setting that `Decoder` does not have.
    """
    kind = config['model_type']
    if config.get('quantization_config'):
        raise UserError(f'{where}: its weights are quantised; take the model as it was released.')
    made = _gpt2(config, where) if kind == 'gpt2' else _llama(config, kind, where)
    try:
        Decoder(**made)
    except ValueError as error:
        raise UserError(f'{where}: {error}') from error
    return made


def _llama(config: Mapping[str, Any], kind: str, where: Any) -> dict[str, Any]:
    need = _needed(config, where)
    _only(config, 'hidden_act', ('silu', 'swish'), where)
    _only(config, 'partial_rotary_factor', _IMPLIED['partial_rotary_factor'], where)
    bias = config.get('attention_bias', False)
    if bias != config.get('mlp_bias', False):
        raise UserError(
            f'{where}: attention_bias={bias} without mlp_bias={bias} is more than kd knows.'
        )
    theta, scaling = _rotations(config, where)
    return dict(
        num_classes=need('vocab_size'),
        width=need('hidden_size'),
        depth=need('num_hidden_layers'),
        heads=need('num_attention_heads'),
        kv_heads=config.get('num_key_value_heads') or need('num_attention_heads'),
        head_dim=config.get('head_dim') or (128 if kind == 'qwen3' else None),
        mlp_hidden=need('intermediate_size'),
        epsilon=config.get('rms_norm_eps', 1e-6),
        bias=bias,
        qkv_bias=bias or kind == 'qwen2',
        qk_norm=kind == 'qwen3',
        rope_theta=theta,
        rope_scaling=scaling,
        window=_window(config, kind, where),
        tied=config.get('tie_word_embeddings', False),
        max_length=need('max_position_embeddings'),
    )


def _gpt2(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    need = _needed(config, where)
    _only(config, 'activation_function', ('gelu_new', 'gelu_pytorch_tanh'), where)
    _only(config, 'scale_attn_weights', (True,), where)
    _only(config, 'scale_attn_by_inverse_layer_idx', (False,), where)
    _only(config, 'add_cross_attention', (False,), where)
    return dict(
        num_classes=need('vocab_size'),
        width=need('n_embd'),
        depth=need('n_layer'),
        heads=need('n_head'),
        mlp_hidden=config.get('n_inner') or 4 * need('n_embd'),
        mlp='gelu',
        norm='layer',
        epsilon=config.get('layer_norm_epsilon', 1e-5),
        bias=True,
        qkv_bias=True,
        rope_theta=None,
        tied=config.get('tie_word_embeddings', True),
        max_length=need('n_positions'),
    )


def _needed(config: Mapping[str, Any], where: Any) -> Callable[[str], int]:
    def need(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where} must give '{name}' as an integer, and gives {value!r}.")
        return value

    return need


def _only(config: Mapping[str, Any], name: str, known: Iterable[Any], where: Any) -> None:
    known = tuple(known)
    if config.get(name, known[0]) not in known:
        raise UserError(f'{where}: {name}={config[name]!r} is more than kd knows ({known[0]!r}).')


def _rotations(config: Mapping[str, Any], where: Any) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`: of their own in transformers 4, `rope_parameters` in 5."""
    given = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UserError(f'{where}: rotations that differ by layer are more than kd knows.')
    theta = float(given.pop('rope_theta', None) or config.get('rope_theta') or 1e4)
    kind = given.pop('rope_type', None) or given.pop('type', None) or 'default'
    given.pop('type', None)
    for name, implied in _IMPLIED.items():
        _only(given, name, implied, where)
        given.pop(name, None)
    if kind == 'default':
        return theta, None
    if kind not in rope.SCALINGS:
        raise UserError(
            f"{where}: rotations of the type '{kind}' are more than kd knows "
            f'({", ".join(rope.SCALINGS)}).'
        )
    if kind == 'yarn' and given.get('original_max_position_embeddings') is None:
        given['original_max_position_embeddings'] = config.get('max_position_embeddings')
    known = ['factor', *rope.SCALINGS[kind]]
    known += ['beta_fast', 'beta_slow', 'attention_factor'] if kind == 'yarn' else []
    for name, value in given.items():
        if name not in known and value is not None:
            raise UserError(f"{where}: {name}={value!r} of rotations '{kind}' is not known to kd.")
    found = {name: given[name] for name in known if given.get(name) is not None}
    return theta, {'rope_type': kind, **found}


def _window(config: Mapping[str, Any], kind: str, where: Any) -> int | None:
    """How far back all layers see."""
    window = config.get('sliding_window')
    if kind == 'llama' or window is None:
        return None
    if kind == 'phi3':
        return window
    layers = config.get('num_hidden_layers', 0)
    if not config.get('use_sliding_window', False):
        return None
    first = config.get('max_window_layers', 28)
    kinds = config.get('layer_types') or [
        'sliding_attention' if layer >= first else 'full_attention' for layer in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise UserError(f'{where}: windows in some layers alone are more than kd knows.')
    return window if set(kinds) == {'sliding_attention'} else None


def config(decoder: Decoder) -> dict[str, Any]:
    """The `config.json` of a decoder, with rotations as transformers 4 has them, which 5 reads too.

    Raises:
      UserError: a decoder that is none of the shapes that transformers has by these names.
    """
    of, learned = decoder, decoder.rope_theta is None
    kind = _kind(of)
    if kind is None:
        raise UserError(
            'transformers has no such decoder (norm, mlp, biases, rotations, window): it is none '
            f'of {", ".join(CLASSES)} as kd.models.decoder describes them.'
        )
    shared = dict(
        architectures=[CLASSES[kind]],
        model_type=kind,
        vocab_size=of.num_classes,
        tie_word_embeddings=of.tied,
    )
    if learned:
        return shared | dict(
            n_embd=of.width,
            n_layer=of.depth,
            n_head=of.heads,
            n_inner=of.hidden_units,
            n_positions=of.max_length,
            activation_function='gelu_new',
            layer_norm_epsilon=of.epsilon,
        )
    made = shared | dict(
        hidden_size=of.width,
        num_hidden_layers=of.depth,
        num_attention_heads=of.heads,
        num_key_value_heads=of.groups,
        head_dim=of.size_of_head,
        intermediate_size=of.hidden_units,
        hidden_act='silu',
        rms_norm_eps=of.epsilon,
        rope_theta=of.rope_theta,
        rope_scaling=None if of.rope_scaling is None else dict(of.rope_scaling),
        max_position_embeddings=of.max_length,
    )
    if kind == 'llama':
        return made | dict(attention_bias=of.bias, mlp_bias=of.bias)
    if kind == 'phi3':
        return made | dict(sliding_window=of.window)
    windows = dict(use_sliding_window=of.window is not None, sliding_window=of.window)
    return made | windows | dict(max_window_layers=0)


def _kind(of: Decoder) -> str | None:
    """The first of `CLASSES` that computes what a decoder does."""
    if of.experts is not None:
        return None
    if of.rope_theta is None:
        same = of.mlp == 'gelu' and of.norm == 'layer' and of.bias and of.qkv_bias
        square = of.groups == of.heads and of.size_of_head * of.heads == of.width
        return 'gpt2' if same and square and not of.qk_norm and of.window is None else None
    if of.mlp != 'swiglu' or of.norm != 'rms':
        return None
    if of.qk_norm:
        return 'qwen3' if not of.bias and not of.qkv_bias else None
    if of.bias != of.qkv_bias:
        return 'qwen2' if of.qkv_bias else None
    if of.window is None:
        return 'llama'
    return 'phi3' if not of.bias and of.rope_scaling is None else None
