"""DC, DM and MTT in torch as published, for `kd.benchmarks.condensation`, written plainly by us.

DC (Zhao et al. 2020, arXiv:2006.05929) computes the gradients of one class after another, those of
synthetic images with a graph; DM (Zhao and Bilen 2021, arXiv:2110.04181) embeds both sides with one
network; MTT (Cazenavette et al. 2022, arXiv:2203.11932) unrolls descent with a graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from kd.benchmarks import turns

STEP_SIZE = 0.02
_HELD: dict[str, Any] = {}


def prepare(file: str, case: list[Any]) -> None:
    """Reads the arrays that ours has written, in torch's order of axes."""
    import torch

    torch.set_num_threads(1)
    arrays = np.load(file)
    method, depth, _, pixels, _, steps = case[:6]

    def images(name: str) -> Any:
        return torch.tensor(arrays[name].transpose(0, 1, 4, 2, 3).copy())

    def params(name: str) -> dict[str, Any]:
        found = {}
        for path in (each for each in arrays if each.startswith(f'{name}/')):
            x = arrays[path]
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
            found[path.removeprefix(f'{name}/')] = torch.tensor(x.copy()).requires_grad_()
        return found

    _HELD.update(
        method={'DC': _dc, 'DM': _dm, 'MTT': partial(_mtt, steps=steps)}[method],
        synthetic=images('synthetic').requires_grad_(), real=images('real'),
        step_size=torch.tensor(STEP_SIZE, requires_grad=True),
        start=params('start'), target=params('target'), depth=depth,
        padding=3 if pixels == 28 else 1,
        trained=('synthetic', 'step_size') if steps else ('synthetic',),
    )  # fmt: skip


def _features(params: dict[str, Any], x: Any) -> Any:
    import torch.nn.functional as nn

    for i in range(_HELD['depth']):
        of = {name.removeprefix(f'block{i}/'): p for name, p in params.items()}
        x = nn.conv2d(x, of['conv/kernel'], of['conv/bias'], padding=1 if i else _HELD['padding'])
        x = nn.instance_norm(x, weight=of['norm/scale'], bias=of['norm/bias'], eps=1e-5)
        x = nn.avg_pool2d(nn.relu(x), 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for i in range(0 if _HELD['depth'] else 2):
        x = nn.relu(nn.linear(x, params[f'hidden{i}/kernel'], params[f'hidden{i}/bias']))
    return x


def _cross_entropy(params: dict[str, Any], x: Any, y: Any) -> Any:
    import torch.nn.functional as nn

    head = params['head/kernel'], params['head/bias']
    return nn.cross_entropy(nn.linear(_features(params, x), *head), y)


def _dc() -> Any:
    import torch

    total, params = 0.0, _HELD['start']
    for c, (own, real) in enumerate(zip(_HELD['synthetic'], _HELD['real'], strict=True)):
        labels = [torch.full((len(x),), c) for x in (own, real)]
        leaves = list(params.values())
        wanted = torch.autograd.grad(_cross_entropy(params, real, labels[1]), leaves)
        loss = _cross_entropy(params, own, labels[0])
        found = torch.autograd.grad(loss, leaves, create_graph=True)
        for a, b in zip(found, wanted, strict=True):
            if a.ndim > 1:
                a, b = a.flatten(1), b.detach().flatten(1)
                total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def _dm() -> Any:
    import torch

    def embedded(x: Any) -> Any:
        return _features(_HELD['start'], x.flatten(0, 1)).reshape(*x.shape[:2], -1)

    with torch.no_grad():
        theirs = embedded(_HELD['real'])
    return (embedded(_HELD['synthetic']).mean(1) - theirs.mean(1)).square().sum()


def _mtt(steps: int) -> Any:
    import torch

    params, x = _HELD['start'], _HELD['synthetic']
    y = torch.arange(len(x)).repeat_interleave(x.shape[1])
    for _ in range(steps):
        loss = _cross_entropy(params, x.flatten(0, 1), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = zip(params.items(), grads, strict=True)
        params = {name: p - _HELD['step_size'] * g for (name, p), g in moved}

    def distance(a: dict[str, Any], b: dict[str, Any]) -> Any:
        return sum(((a[name] - b[name]) ** 2).sum() for name in b)

    return distance(params, _HELD['target']) / distance(_HELD['start'], _HELD['target'])


def _step() -> tuple[Any, Any]:
    for name in ('synthetic', 'step_size'):
        _HELD[name].grad = None
    value = _HELD['method']()
    trained = [_HELD[name] for name in _HELD['trained']]
    value.backward(inputs=trained)
    return value, _HELD['synthetic'].grad


def step() -> dict[str, float]:
    """{'cpu_s', 'mib'} of a step."""
    mib, (took, _) = turns.held_mib(lambda: turns.cpu_seconds(_step))
    return {'cpu_s': took, 'mib': mib}


def gradient() -> list[float]:
    """Of the images, in our order of axes, that both sides may be compared."""
    value, images = _step()
    images = images.permute(0, 1, 3, 4, 2).double().flatten()
    return [value.item(), *images[:200].tolist()]


def name() -> str:
    """What the peer is, with its version."""
    import torch

    return f'written plainly, torch {torch.__version__}'


FUNCTIONS = {'prepare': prepare, 'step': step, 'gradient': gradient, 'name': name}
