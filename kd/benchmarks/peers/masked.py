"""dParallel's decoding in plain torch, as `kd.benchmarks.masked_decoding` asks for it.

A prompt at a time, as released (arXiv:2509.26488): a call of the network on the whole row, the
entropies of the hidden positions of the block come back to the host, those of at most the threshold
and the least of all are committed; a block is over when nothing in it is hidden.
"""

from __future__ import annotations

from typing import Any

from kd.benchmarks import turns

_HELD: dict[str, Any] = {}


def name() -> str:
    """What the peer calls itself."""
    import torch

    return f'torch {torch.__version__}'


def prepare(file: str, depth: int, heads: int) -> None:
    """Takes the weights of a file of safetensors, under their paths in `kd`."""
    import safetensors.numpy
    import torch

    torch.set_num_threads(1)
    weights = {k: torch.tensor(x) for k, x in safetensors.numpy.load_file(file).items()}
    _HELD.update(weights=weights, depth=depth, heads=heads)


def _logits(tokens: Any) -> Any:
    """[B, L, V] of symbols [B, L], of `kd.models.transformer.Transformer` that is not causal."""
    from torch.nn import functional as f

    weights, heads = _HELD['weights'], _HELD['heads']

    def normed(name: str, x: Any) -> Any:
        return f.layer_norm(
            x, x.shape[-1:], weights[f'{name}/scale'], weights[f'{name}/bias'], 1e-6
        )

    def dense(name: str, x: Any) -> Any:
        return x @ weights[f'{name}/kernel'] + weights[f'{name}/bias']

    x = weights['embed/embedding'][tokens] + weights['positions'][: tokens.shape[1]]
    rows, length, size = x.shape
    for i in range(_HELD['depth']):
        y = normed(f'block{i}/norm1', x)
        each = [
            (y @ weights[f'block{i}/attention/{of}/kernel'].reshape(size, size)
             + weights[f'block{i}/attention/{of}/bias'].reshape(size))
            .reshape(rows, length, heads, -1).transpose(1, 2)
            for of in ('query', 'key', 'value')
        ]  # fmt: skip
        found = f.scaled_dot_product_attention(*each).transpose(1, 2).reshape(x.shape)
        out = weights[f'block{i}/attention/out/kernel'].reshape(size, size)
        x = x + found @ out + weights[f'block{i}/attention/out/bias']
        y = f.gelu(dense(f'block{i}/mlp/up', normed(f'block{i}/norm2', x)))
        x = x + dense(f'block{i}/mlp/down', y)
    return dense('head', normed('final_norm', x))


def _decoded(prompt: list[int], answer: int, block: int, threshold: float, mask: int) -> Any:
    """(tokens of the row, calls) of one prompt."""
    import torch

    row = torch.tensor([prompt + [mask] * answer])
    calls = 0
    for begin in range(len(prompt), len(prompt) + answer, block):
        inside = slice(begin, min(begin + block, len(prompt) + answer))
        while (row[0, inside] == mask).any():
            logits = _logits(row)[0, inside]
            calls += 1
            log_p = logits.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            hidden = row[0, inside] == mask
            entropy = torch.where(hidden, entropy, torch.inf)
            commit = hidden & (entropy <= threshold)
            commit[entropy.argmin()] = True
            row[0, inside] = torch.where(commit, logits.argmax(-1), row[0, inside])
    return row[0].tolist(), calls


def decode(
    prompts: list[list[int]], answer: int, block: int, threshold: float, mask: int, calls: int
) -> dict[str, Any]:
    """{'cpu_s' of all prompts, one after another, their 'tokens' and 'calls'}."""
    import torch

    def work() -> Any:
        with torch.inference_mode():
            return [_decoded(each, answer, block, threshold, mask) for each in prompts]

    took, found = turns.cpu_seconds(work, calls)
    return {'cpu_s': took, 'tokens': [row for row, _ in found], 'calls': [n for _, n in found]}


FUNCTIONS = {'name': name, 'prepare': prepare, 'decode': decode, 'peak_mib': turns.peak_mib}
