"""Flow maps by self-distillation (Boffi, Albergo, Vanden-Eijnden 2025, arXiv 2505.18825)."""

from __future__ import annotations

from kd.context import Context
from kd.errors import UserError
from kd.losses.flow_map_algorithms import ALGORITHMS, get_algorithm
from kd.losses.interpolant import get_interpolant
from kd.method import Method
from kd.methods.flow import common
from kd.ranges import Count, Fraction, Positive


def flow_map(
    context: Context,
    *,
    algorithm: str = 'lsd',
    diagonal_fraction: Fraction = 0.75,
    stop_gradient: str | None = None,
    interpolant: str = 'linear',
    noise_scale: Positive | None = None,
    label_dropout: Fraction = 0.1,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """One network that is a velocity field on its diagonal and jumps off it, without a teacher.

        loss = (Md mean_b + Mo mean_D) / M,   Md = int(eta M) examples of M
        mean_b: || v(t, t, I_t) - dI_t ||^2,  t ~ U[0, 1)
        mean_D: || residual of the algorithm at (s, t, I_s) ||^2,  s <= t (any s, t for fmm)

    Errors are summed over the dimensions of the data. With a `time_weight` in the network, each
    error e enters as exp(-w(s, t)) e + w(s, t) with the learned w (the paper's images; its 2-D
    network has none). Dropout acts on the diagonal alone. Averages are the stage's `ema`.

    Args:
      context: the stage; needs a velocity network v(s, t, x) and an optimiser.
      algorithm: 'lsd' (Lagrangian), 'esd' (Eulerian), 'psd_uniform' or 'psd_midpoint'
        (progressive); 'meanflow' (arXiv 2505.13447), 'shortcut' (arXiv 2410.12557), 'consistency'
        (continuous-time consistency training, jumps to data only); 'fmm' (flow map matching, arXiv
        2406.07507: the map runs both ways and needs no diagonal).
      diagonal_fraction: eta; the paper of fmm has 0. Both parts of a batch should divide over the
        devices: XLA cuts up the network where they do not (see docs/scaling.md).
      stop_gradient: where the gradient stops, see `kd.losses.flow_map`; None for the paper's.
      interpolant, noise_scale, label_dropout, augmentation, micro_batches: as of
        `kd.methods.flow.flow_matching.flow_matching`.
    """
    alone = [name for name, known in ALGORITHMS.items() if not known.needs_teacher]
    if algorithm in ALGORITHMS and algorithm not in alone:
        raise UserError(
            f"algorithm '{algorithm}' distils a frozen flow: use the method "
            f'kd.methods.flow.flow_map_distillation.flow_map_distillation, or one of {alone}.'
        )
    return common.flow_method(
        context,
        algorithm=get_algorithm(algorithm, stop_gradient=stop_gradient),  # type: ignore[arg-type]
        diagonal_fraction=diagonal_fraction,
        interpolant=get_interpolant(interpolant),
        noise=noise_scale,
        label_dropout=label_dropout,
        augmentation=augmentation,
        micro_batches=micro_batches,
    )
