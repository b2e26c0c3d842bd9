"""Language models known by name: the sizes of `kd.models.decoder.Decoder` that were released,
and the one of the small worlds here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd.models.decoder import Decoder

__all__ = ['PRESETS', 'preset']


def _of(like: Mapping[str, Any], width: int, depth: int, heads: int, kv_heads: int, hidden: int):
    def sized(**changes: Any) -> dict[str, Any]:
        sizes = dict(width=width, depth=depth, heads=heads, kv_heads=kv_heads, mlp_hidden=hidden)
        return {**like, **sizes, **changes}

    return sized


_SMOLLM2 = dict(num_classes=49_152, rope_theta=1e5, max_length=8_192)
_LLAMA2 = dict(num_classes=32_000, tied=False, max_length=4_096)
_LLAMA3 = dict(num_classes=128_256, rope_theta=5e5, max_length=131_072)
_QWEN2 = dict(num_classes=151_936, rope_theta=1e6, qkv_bias=True, epsilon=1e-6, max_length=32_768)
_QWEN3 = dict(
    num_classes=151_936,
    rope_theta=1e6,
    qk_norm=True,
    head_dim=128,
    epsilon=1e-6,
    max_length=40_960,
)
_GPT2 = dict(
    num_classes=50_257,
    mlp='gelu',
    norm='layer',
    bias=True,
    qkv_bias=True,
    rope_theta=None,
    max_length=1_024,
)
_TOY = dict(num_classes=72, mlp='gelu', rope_theta=1e3, tied=False, max_length=256, deviation=None)
_UNTIED = dict(tied=False)
# Masked diffusion models: LLaDA's mask is the id 126,336, Dream's 151,666.
_LLADA = dict(num_classes=126_464, tied=False, rope_theta=5e5, max_length=4_096, causal=False)
# The larger models of Qwen2 have a vocabulary padded further.
_WIDE = dict(num_classes=152_064, tied=False)


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return dict(
        rope_type='llama3',
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8_192,
    )


_QWEN2_0_5B = _of(_QWEN2, 896, 24, 14, 2, 4_864)
_QWEN2_1_5B = _of(_QWEN2, 1_536, 28, 12, 2, 8_960)
_QWEN2_7B = _of(_QWEN2 | _WIDE, 3_584, 28, 28, 4, 18_944)
_QWEN2_14B = _of(_QWEN2 | _WIDE, 5_120, 48, 40, 8, 13_824)
_QWEN2_32B = _of(_QWEN2 | _WIDE, 5_120, 64, 40, 8, 27_648)
_LLAMA3_8B = _of(_LLAMA3 | _UNTIED, 4_096, 32, 32, 8, 14_336)
# Qwen2.5-Math, from which the smaller distilled ones of DeepSeek-R1 were made.
_MATH = dict(rope_theta=1e4, max_length=4_096)
_LONG = dict(max_length=131_072)

# By name, the arguments of `Decoder`.
PRESETS: dict[str, dict[str, Any]] = {
    'smollm2_135m': _of(_SMOLLM2, 576, 30, 9, 3, 1_536)(),
    'smollm2_360m': _of(_SMOLLM2, 960, 32, 15, 5, 2_560)(),
    'smollm2_1_7b': _of(_SMOLLM2, 2_048, 24, 32, 32, 8_192)(rope_theta=1.3e5),
    'tinyllama_1_1b': _of(_LLAMA2, 2_048, 22, 32, 4, 5_632)(max_length=2_048),
    'llama2_7b': _of(_LLAMA2, 4_096, 32, 32, 32, 11_008)(),
    'llama2_13b': _of(_LLAMA2, 5_120, 40, 40, 40, 13_824)(),
    'llama3_1_8b': _LLAMA3_8B(rope_scaling=_llama3_scaling(8.0)),
    'llama3_2_1b': _of(_LLAMA3, 2_048, 16, 32, 8, 8_192)(rope_scaling=_llama3_scaling(32.0)),
    'llama3_2_3b': _of(_LLAMA3, 3_072, 28, 24, 8, 8_192)(rope_scaling=_llama3_scaling(32.0)),
    'qwen1_5_0_5b': _of(_QWEN2, 1_024, 24, 16, 16, 2_816)(),
    'qwen1_5_1_8b': _of(_QWEN2 | _UNTIED, 2_048, 24, 16, 16, 5_504)(),
    'qwen1_5_7b': _of(_QWEN2 | _UNTIED, 4_096, 32, 32, 32, 11_008)(),
    'qwen2_0_5b': _QWEN2_0_5B(max_length=131_072),
    'qwen2_1_5b': _QWEN2_1_5B(max_length=131_072),
    'qwen2_7b': _QWEN2_7B(max_length=131_072),
    'qwen2_5_0_5b': _QWEN2_0_5B(),
    'qwen2_5_1_5b': _QWEN2_1_5B(max_length=131_072),
    'qwen2_5_3b': _of(_QWEN2, 2_048, 36, 16, 2, 11_008)(),
    'qwen2_5_7b': _QWEN2_7B(max_length=131_072),
    'qwen2_5_14b': _QWEN2_14B(max_length=131_072),
    'qwen2_5_32b': _QWEN2_32B(max_length=131_072),
    'qwen2_5_math_1_5b': _QWEN2_1_5B(**_MATH),
    'qwen2_5_math_7b': _QWEN2_7B(**_MATH),
    'r1_distill_qwen_1_5b': _QWEN2_1_5B(**_MATH | _LONG | _UNTIED),
    'r1_distill_qwen_7b': _QWEN2_7B(**_MATH | _LONG),
    'r1_distill_qwen_14b': _QWEN2_14B(epsilon=1e-5, **_LONG),
    'r1_distill_qwen_32b': _QWEN2_32B(epsilon=1e-5, **_LONG),
    'r1_distill_llama_8b': _LLAMA3_8B(rope_scaling=_llama3_scaling(8.0)),
    'qwen3_0_6b': _of(_QWEN3, 1_024, 28, 16, 8, 3_072)(),
    'qwen3_1_7b': _of(_QWEN3, 2_048, 28, 16, 8, 6_144)(),
    'qwen3_4b': _of(_QWEN3, 2_560, 36, 32, 8, 9_728)(),
    'qwen3_8b': _of(_QWEN3 | _UNTIED, 4_096, 36, 32, 8, 12_288)(),
    'qwen3_14b': _of(_QWEN3 | _UNTIED, 5_120, 40, 40, 8, 17_408)(),
    'qwen3_32b': _of(_QWEN3 | _UNTIED, 5_120, 64, 64, 8, 25_600)(),
    'phi3_mini_4k': _of(_LLAMA2, 3_072, 32, 32, 32, 8_192)(num_classes=32_064, window=2_047),
    'llada_8b': _of(_LLADA, 4_096, 32, 32, 32, 12_288)(),
    'dream_7b': _QWEN2_7B(max_length=131_072, causal=False),
    'distilgpt2': _of(_GPT2, 768, 6, 12, 12, 3_072)(),
    'gpt2': _of(_GPT2, 768, 12, 12, 12, 3_072)(),
    'gpt2_medium': _of(_GPT2, 1_024, 24, 16, 16, 4_096)(),
    'gpt2_large': _of(_GPT2, 1_280, 36, 20, 20, 5_120)(),
    'gpt2_xl': _of(_GPT2, 1_600, 48, 25, 25, 6_400)(),
    # Of the small worlds, see `kd.data.builders.symbols`.
    'toy': _of(_TOY, 64, 2, 4, 4, 256)(),
}


def preset(of: str, **changes: Any) -> Decoder:
    """The decoder that is known as `of`, with changes.

        network=dict(name='kd.models.decoders.preset', of='qwen3_8b', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `Decoder`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    if of not in PRESETS:
        raise ValueError(f"there is no decoder '{of}'; known are: {', '.join(PRESETS)}.")
    names = [field.name for field in dataclasses.fields(Decoder) if field.init]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"Decoder has no '{unknown[0]}'; it has: {', '.join(names)}.")
    return Decoder(**{**PRESETS[of], **changes})
