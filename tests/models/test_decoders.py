"""Language models known by name have the sizes that were published."""

import jax
import jax.numpy as jnp
import pytest

from kd.models import decoder, decoders

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# As the pages of the models state them (safetensors' total).
PUBLISHED = {
    'smollm2_135m': 134_515_008,
    'smollm2_360m': 361_821_120,
    'smollm2_1_7b': 1_711_376_384,
    'tinyllama_1_1b': 1_100_048_384,
    'llama2_7b': 6_738_415_616,
    'llama2_13b': 13_015_864_320,
    'llama3_1_8b': 8_030_261_248,
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'qwen1_5_0_5b': 463_987_712,
    'qwen1_5_1_8b': 1_836_828_672,
    'qwen1_5_7b': 7_721_324_544,
    'qwen2_0_5b': 494_032_768,
    'qwen2_1_5b': 1_543_714_304,
    'qwen2_7b': 7_615_616_512,
    'qwen2_5_0_5b': 494_032_768,
    'qwen2_5_1_5b': 1_543_714_304,
    'qwen2_5_3b': 3_085_938_688,
    'qwen2_5_7b': 7_615_616_512,
    'qwen2_5_14b': 14_770_033_664,
    'qwen2_5_32b': 32_763_876_352,
    'qwen2_5_math_1_5b': 1_543_714_304,
    'qwen2_5_math_7b': 7_615_616_512,
    'r1_distill_qwen_1_5b': 1_777_088_000,
    'r1_distill_qwen_7b': 7_615_616_512,
    'r1_distill_qwen_14b': 14_770_033_664,
    'r1_distill_qwen_32b': 32_763_876_352,
    'r1_distill_llama_8b': 8_030_261_248,
    'qwen3_0_6b': 596_049_920,
    'qwen3_1_7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'qwen3_14b': 14_768_307_200,
    'qwen3_32b': 32_762_123_264,
    'phi3_mini_4k': 3_821_079_552,
    # 8.02B and 7.62B, as the model cards say; the latter has the sizes of Qwen2.5-7B.
    'llada_8b': 8_015_581_184,
    'dream_7b': 7_615_616_512,
    'distilgpt2': 81_912_576,
    'gpt2': 124_439_808,
    'gpt2_medium': 354_823_168,
    'gpt2_large': 774_030_080,
    'gpt2_xl': 1_557_611_200,
    # Embedding and head, and of each block four projections, an MLP and two norms.
    'toy': 2 * 72 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 256 + 2 * 64) + 64,
}


def test_every_model_has_the_number_of_parameters_that_was_published():
    assert set(PUBLISHED) == set(decoders.PRESETS)

    def count(of):
        # Stacked, all blocks are traced as one.
        module = decoders.preset(of, stacked=True)
        tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        return sum(x.size for x in jax.tree.leaves(tree))

    assert {of: count(of) for of in PUBLISHED} == PUBLISHED


def test_a_preset_takes_changes_and_refuses_names_that_are_not_there():
    small = decoders.preset('qwen3_8b', depth=2, dtype='bfloat16')
    assert isinstance(small, decoder.Decoder)
    assert (small.depth, small.width, small.dtype) == (2, 4_096, 'bfloat16')
    with pytest.raises(ValueError, match="no decoder 'qwen3_9b'; known are: smollm2_135m"):
        decoders.preset('qwen3_9b')
    with pytest.raises(ValueError, match="Decoder has no 'widht'; it has: num_classes, width"):
        decoders.preset('gpt2', widht=3)
