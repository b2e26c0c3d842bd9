"""Run by a Python that has diffusers: encoders of a tiny SDXL, and what its pipeline says."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

folder, texts = Path(sys.argv[1]), sys.argv[2:]
letters = 'abcdefghijklmnopqrstuvwxyz'
words = [*letters, *(f'{letter}</w>' for letter in letters), '<|startoftext|>', '<|endoftext|>']
parts = {}
torch.manual_seed(0)
for i, suffix in enumerate(('', '_2')):
    tokens = folder / f'tokenizer{suffix}'
    tokens.mkdir(parents=True)
    (tokens / 'vocab.json').write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (tokens / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = transformers.CLIPTokenizer(
        str(tokens / 'vocab.json'), str(tokens / 'merges.txt'), model_max_length=9
    )
    tokenizer.save_pretrained(tokens)
    kind = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)[i]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8 * (i + 1), intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=9, projection_dim=6,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    network = kind(config).eval()
    network.save_pretrained(folder / f'text_encoder{suffix}')
    parts |= {f'tokenizer{suffix}': tokenizer, f'text_encoder{suffix}': network}
pipeline = StableDiffusionXLPipeline(
    vae=None, unet=None, scheduler=EulerDiscreteScheduler(), **parts
)
with torch.no_grad():
    text, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
np.savez(folder / 'said.npz', text=text.numpy(), pooled=pooled.numpy())
