"""Decoding by `generate` of transformers, as `kd.benchmarks.decode` asks for it."""

from __future__ import annotations

import functools
from typing import Any

from kd.benchmarks import turns


@functools.cache
def _model(directory: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)
    made = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return made.eval()


def decode(
    directory: str, prompts: list[list[int]], new: int, temperature: float, calls: int
) -> Any:
    """{'cpu_s' of a call, 'tokens'} of `generate`: `new` tokens a row whatever they are."""
    import torch
    import transformers

    model, read = _model(directory), torch.tensor(prompts)
    sampled = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    how = transformers.GenerationConfig(
        max_new_tokens=new, eos_token_id=None, pad_token_id=0, use_cache=True,
        **(sampled if temperature else dict(do_sample=False)),
    )  # fmt: skip
    model.generation_config = how

    def work() -> Any:
        with torch.inference_mode():
            return model.generate(read, attention_mask=torch.ones_like(read))

    took, said = turns.cpu_seconds(work, calls)
    return {'cpu_s': took, 'tokens': said[:, read.shape[1] :].tolist()}


def name() -> str:
    """What the peer is, with its version."""
    import transformers

    return f'transformers {transformers.__version__}'


FUNCTIONS = {'decode': decode, 'name': name}
