"""The loop of DMD2 written plainly in torch, as `kd.benchmarks.score_distillation` asks for it.

As published (arXiv:2405.14867, without its discriminator): the generator of one step
moves along the difference of two denoisers of its noised sample, over the mean distance to the
teacher's; then the fake denoiser learns noise of samples of the generator, those of this step and
fresh ones. Networks are the conditional UNet of diffusers, optimisers torch's fused AdamW.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kd.benchmarks import turns

LR = 1e-5
_HELD: dict[str, Any] = {}


def question(seed: int, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise [B, H, W, C], times [B] and texts [B, M, C] of a seed, shaped as those of a batch."""
    rng = np.random.default_rng(seed)
    x, text = (rng.normal(size=batch[name].shape).astype('f4') for name in ('input', 'text'))
    return x, np.full(len(x), 500.0, 'f4'), text


def prepare(directory: str, shape: list[int], batch: int, text: list[int], updates: int) -> None:
    """Writes a small UNet of random weights there, and makes three of it."""
    import diffusers
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=shape[0], in_channels=shape[2], out_channels=shape[2],
        block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=16,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=text[1], attention_head_dim=4,
    )  # fmt: skip
    made.save_pretrained(directory)
    load = diffusers.UNet2DConditionModel.from_pretrained
    players = {name: load(directory) for name in ('generator', 'fake')}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    rng = np.random.default_rng(0)
    fields = dict(input=(batch, *shape), text=(batch, *text))
    _HELD.update(
        players,
        teacher=load(directory).eval().requires_grad_(False),
        optimizers={
            name: torch.optim.AdamW(player.parameters(), lr=LR, fused=True)
            for name, player in players.items()
        },
        bar=torch.cumprod(1 - betas, 0).float(),
        batch={name: rng.normal(size=size).astype('f4') for name, size in fields.items()},
        text=torch.tensor(rng.normal(size=fields['text']).astype('f4')),
        updates=updates,
    )


def _said(network: Any, x: Any, t: Any) -> tuple[Any, Any]:
    """(x0, eps) of x_t."""
    eps = network(x, t, encoder_hidden_states=_HELD['text']).sample
    bar = _HELD['bar'][t].view(-1, 1, 1, 1)
    return (x - (1 - bar).sqrt() * eps) / bar.sqrt(), eps


def _noised(x: Any, t: Any) -> tuple[Any, Any]:
    import torch

    bar, eps = _HELD['bar'][t].view(-1, 1, 1, 1), torch.randn_like(x)
    return bar.sqrt() * x + (1 - bar).sqrt() * eps, eps


def _drawn() -> Any:
    """A sample of the generator."""
    import torch

    rows, *sides, channels = _HELD['batch']['input'].shape
    noise = torch.randn(rows, channels, *sides)
    return _said(_HELD['generator'], noise, torch.full((rows,), 999))[0]


def _moved(player: str, loss: Any) -> None:
    loss.backward()
    _HELD['optimizers'][player].step()
    _HELD['optimizers'][player].zero_grad()


def _step() -> None:
    import torch
    import torch.nn.functional as nn

    x = _drawn()
    t = torch.randint(20, 980, (len(x),))
    with torch.no_grad():
        x_t, _ = _noised(x, t)
        real, fake = _said(_HELD['teacher'], x_t, t)[0], _said(_HELD['fake'], x_t, t)[0]
        g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    _moved('generator', 0.5 * nn.mse_loss(x, (x - g).detach()))
    for move in range(_HELD['updates']):
        with torch.no_grad():
            seen = x.detach() if move == 0 else _drawn()
        t = torch.randint(0, 1000, (len(x),))
        x_t, eps = _noised(seen, t)
        _moved('fake', nn.mse_loss(_said(_HELD['fake'], x_t, t)[1], eps))


def step() -> dict[str, float]:
    """{'cpu_s'} of a cycle."""
    return {'cpu_s': turns.cpu_seconds(_step)[0]}


def asked(seed: int) -> list[float]:
    """What the teacher says of a noise, channels last."""
    import torch

    x, t, text = (torch.tensor(each) for each in question(seed, _HELD['batch']))
    with torch.no_grad():
        said = _HELD['teacher'](x.permute(0, 3, 1, 2), t, encoder_hidden_states=text).sample
    return said.permute(0, 2, 3, 1).reshape(-1)[:8].tolist()


def name() -> str:
    """What the peer is, with its version."""
    import diffusers
    import torch

    return f'torch {torch.__version__} over diffusers {diffusers.__version__}'


FUNCTIONS = {
    'prepare': prepare, 'step': step, 'asked': asked, 'name': name, 'peak_mib': turns.peak_mib
}  # fmt: skip
