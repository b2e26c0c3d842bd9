"""The losses of mdistiller (Zhao et al. 2022, arXiv:2203.08679) in torch, plainly as published.

Features are [B, C, H, W] or [B, D], logits [B, V]; each returns the mean of a batch. What is 1 / B
or 1 / positions of ours is so there, and `kd.benchmarks.classical` knows.
"""

from __future__ import annotations

from typing import Any


def functions() -> dict[str, Any]:
    """By name: `loss(student, teacher, labels)`."""
    return {
        'KD': _kd,
        'DKD': _dkd,
        'AT': _at,
        'RKD': _rkd,
        'NST': _nst,
        'PKT': _pkt,
        'ReviewKD': _review,
        'SP': _sp,
    }


def _kd(s: Any, t: Any, labels: Any, temperature: float = 4.0) -> Any:
    from torch.nn import functional as f

    log_q, p = f.log_softmax(s / temperature, 1), f.softmax(t / temperature, 1)
    return f.kl_div(log_q, p, reduction='none').sum(1).mean() * temperature**2


def _dkd(s: Any, t: Any, labels: Any, beta: float = 8.0, temperature: float = 4.0) -> Any:
    import torch
    from torch.nn import functional as f

    own = torch.zeros_like(s).scatter_(1, labels[:, None], 1).bool()

    def parts(z: Any) -> Any:
        p = f.softmax(z / temperature, 1)
        return torch.cat([(p * own).sum(1, keepdim=True), (p * ~own).sum(1, keepdim=True)], 1)

    scale = temperature**2 / len(labels)
    target = f.kl_div(parts(s).log(), parts(t), reduction='sum') * scale
    rest = [z / temperature - 1000.0 * own for z in (s, t)]
    others = f.kl_div(f.log_softmax(rest[0], 1), f.softmax(rest[1], 1), reduction='sum') * scale
    return target + beta * others


def _at(s: Any, t: Any, labels: Any) -> Any:
    from torch.nn import functional as f

    a, b = (f.normalize(x.pow(2).mean(1).reshape(len(x), -1)) for x in (s, t))
    return (a - b).pow(2).mean()


def _distances(x: Any) -> Any:
    squares = x.pow(2).sum(1)
    found = (squares[:, None] + squares - 2 * x @ x.t()).clamp(min=1e-12).sqrt().clone()
    found[range(len(x)), range(len(x))] = 0
    return found / found[found > 0].mean()


def _rkd(s: Any, t: Any, labels: Any) -> Any:
    """Distances at weight 25 and angles at 50."""
    import torch
    from torch.nn import functional as f

    def angles(x: Any) -> Any:
        apart = f.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(apart, apart.transpose(1, 2)).view(-1)

    with torch.no_grad():
        far, wide = _distances(t), angles(t)
    return 25 * f.smooth_l1_loss(_distances(s), far) + 50 * f.smooth_l1_loss(angles(s), wide)


def _nst(s: Any, t: Any, labels: Any) -> Any:
    from torch.nn import functional as f

    def kernel(a: Any, b: Any) -> Any:
        return (a[:, None] * b[:, :, None]).sum(-1).pow(2).mean()

    s, t = (f.normalize(x.view(*x.shape[:2], -1), dim=2) for x in (s, t))
    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)


def _pkt(s: Any, t: Any, labels: Any, eps: float = 1e-7) -> Any:
    import torch

    def affinities(x: Any) -> Any:
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + eps)
        x[x != x] = 0
        kernel = (torch.mm(x, x.t()) + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    q, p = affinities(s), affinities(t)
    return (p * torch.log((p + eps) / (q + eps))).mean()


def _review(s: Any, t: Any, labels: Any) -> Any:
    from torch.nn import functional as f

    loss, weight, total = f.mse_loss(s, t), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= s.shape[2]:
            continue
        weight /= 2
        a, b = (f.adaptive_avg_pool2d(x, (level, level)) for x in (s, t))
        loss, total = loss + weight * f.mse_loss(a, b), total + weight
    return loss / total


def _sp(s: Any, t: Any, labels: Any) -> Any:
    from torch.nn import functional as f

    def similarity(x: Any) -> Any:
        x = x.view(len(x), -1)
        return f.normalize(x @ x.t())

    return (similarity(t) - similarity(s)).pow(2).sum() / len(s) ** 2
