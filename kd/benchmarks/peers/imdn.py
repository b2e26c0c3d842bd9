"""IMDN's forward pass in torch, as `kd.benchmarks.super_resolution` asks for it.

In the order of the release (Zheng222/IMDN): features are concatenated before the convolutions of
one pixel that fuse them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kd.benchmarks import turns

_HELD: dict[str, Any] = {}


def picture(side: int) -> np.ndarray:
    """[1, side, side, 3] in [-1, 1], the same on both sides."""
    return np.random.default_rng(side).uniform(-1, 1, (1, side, side, 3)).astype('f4')


def name() -> str:
    """What the peer calls itself."""
    import torch

    return f'torch {torch.__version__}'


def prepare(file: str, scale: int, blocks: int) -> None:
    """Takes the weights of a file of safetensors, under the names of the release."""
    import safetensors.numpy
    import torch

    torch.set_num_threads(1)
    weights = {k: torch.tensor(x) for k, x in safetensors.numpy.load_file(file).items()}
    _HELD.update(weights=weights, scale=scale, blocks=blocks)


def _restored(x: Any) -> Any:
    from torch.nn import functional as f

    weights = _HELD['weights']

    def conv(name: str, x: Any) -> Any:
        kernel = weights[f'{name}.weight']
        return f.conv2d(x, kernel, weights[f'{name}.bias'], padding=kernel.shape[-1] // 2)

    def leaky(x: Any) -> Any:
        return f.leaky_relu(x, 0.05)

    def block(name: str, x: Any) -> Any:
        rest, kept, own = x, [], x.shape[1] // 4
        for i in (1, 2, 3):
            every = leaky(conv(f'{name}.c{i}', rest))
            part, rest = every.split((own, x.shape[1] - own), 1)
            kept.append(part)
        kept.append(conv(f'{name}.c4', rest))
        y = _cat(kept)
        mean = y.mean((2, 3), keepdim=True)
        z = mean + (y - mean).square().mean((2, 3), keepdim=True).sqrt()
        z = conv(f'{name}.cca.conv_du.2', f.relu(conv(f'{name}.cca.conv_du.0', z)))
        return conv(f'{name}.c5', y * z.sigmoid()) + x

    first = conv('fea_conv', 0.5 * (x + 1))
    y, gathered = first, []
    for i in range(_HELD['blocks']):
        y = block(f'IMDB{i + 1}', y)
        gathered.append(y)
    y = conv('LR_conv', leaky(conv('c.0', _cat(gathered)))) + first
    return 2 * f.pixel_shuffle(conv('upsampler.0', y), _HELD['scale']) - 1


def _cat(parts: Any) -> Any:
    import torch

    return torch.cat(parts, 1)


def forward(side: int, calls: int) -> dict[str, Any]:
    """{'cpu_s'} of a picture, and a few of the pixels that it becomes."""
    import torch

    x = torch.tensor(picture(side)).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        took, found = turns.cpu_seconds(lambda: _restored(x), calls)
    shown = found.permute(0, 2, 3, 1).reshape(-1)[:: 3 * side]
    return {'cpu_s': took, 'pixels': shown[:64].double().tolist()}


FUNCTIONS = {'name': name, 'prepare': prepare, 'forward': forward}
