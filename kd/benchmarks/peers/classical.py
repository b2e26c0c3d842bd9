"""Value and gradient of the classical losses in torch, as `kd.benchmarks.classical` asks for them.

torchdistill's own modules where it has the loss (its similarity-preserving one is another, whose
rows are scaled by the sum of their sizes), and mdistiller's, which is no package, as
`kd.benchmarks.plain.classical` writes them.
"""

from __future__ import annotations

from typing import Any

from kd.benchmarks import turns
from kd.benchmarks.plain import classical as plain

_HELD: dict[str, Any] = {}


def name() -> str:
    """What the peers call themselves."""
    from importlib.metadata import version

    return f'torchdistill {version("torchdistill")}, torch {version("torch")}'


def _torchdistill() -> dict[str, Any]:
    from torchdistill.losses import mid_level

    path = dict(
        student_module_path='x', student_module_io='output',
        teacher_module_path='x', teacher_module_io='output',
    )  # fmt: skip
    side = dict(path='x', io='output')
    outputs = dict(student_output_path='x', teacher_output_path='x')
    modules = {
        'KD': mid_level.KDLoss(**path, temperature=4.0, alpha=0.0, beta=1.0),
        'AT': mid_level.ATLoss(dict(one=dict(student=side, teacher=side))),
        'RKD': mid_level.RKDLoss(**outputs, dist_factor=25.0, angle_factor=50.0, reduction='mean'),
        'PKT': mid_level.PKTLoss(**path),
        'ReviewKD': mid_level.HierarchicalContextLoss(**path),
    }

    def called(module: Any, pair: bool, factor: float) -> Any:
        # What a wrapped student gives beside its features there.
        def loss(s: Any, t: Any, labels: Any) -> Any:
            given = {'x': {'output': (s, None) if pair else s}}
            return factor * module(given, {'x': {'output': t}})

        return loss

    # Alone, its KD lacks T^2.
    return {
        label: called(module, label == 'ReviewKD', 16.0 if label == 'KD' else 1.0)
        for label, module in modules.items()
    }


def prepare(loss: str, arrays: list[str]) -> None:
    """Takes a loss and the files of its student, teacher and labels; maps are [B, H, W, C]."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    s, t, labels = (torch.tensor(np.load(file)) for file in arrays)
    if s.ndim == 4:
        s, t = (x.permute(0, 3, 1, 2).contiguous() for x in (s, t))
    _HELD.update(
        arrays=(s.requires_grad_(), t, labels),
        forms={'mdistiller': plain.functions()[loss], 'torchdistill': _torchdistill().get(loss)},
    )


def gradient(form: str, calls: int) -> dict[str, Any]:
    """{'cpu_s'} of value and gradient, and both; None where the peer has no such loss."""
    import torch

    of, (s, t, labels) = _HELD['forms'][form], _HELD['arrays']
    if of is None:
        return {}

    def work() -> Any:
        value = of(s, t, labels)
        return value, torch.autograd.grad(value, s)[0]

    took, (value, slope) = turns.cpu_seconds(work, calls)
    slope = slope.permute(0, 2, 3, 1) if slope.ndim == 4 else slope
    return {'cpu_s': took, 'value': float(value), 'gradient': slope.reshape(-1)[:64].tolist()}


FUNCTIONS = {'name': name, 'prepare': prepare, 'gradient': gradient}
