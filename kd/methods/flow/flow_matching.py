"""Flow matching (Albergo & Vanden-Eijnden, arXiv 2209.15571; Lipman et al., arXiv 2210.02747)."""

from __future__ import annotations

from kd.context import Context
from kd.losses.flow_map_algorithms import get_algorithm
from kd.losses.interpolant import get_interpolant
from kd.method import Method
from kd.methods.flow import common
from kd.ranges import Count, Fraction, Positive


def flow_matching(
    context: Context,
    *,
    interpolant: str = 'linear',
    noise_scale: Positive | None = None,
    label_dropout: Fraction = 0.1,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Regression of the interpolant's velocity: the field of a flow, and nothing else.

        loss = E || v(t, t, I_t) - dI_t ||^2,   I_t = a(t) x0 + c(t) x1,   t ~ U[0, 1)

    The error is summed over the dimensions of the data. The network is the two-time network of a
    flow map, of which only the diagonal is trained: sample it with an ODE solver, or distil it. If
    it has a `time_weight`, the loss is exp(-w(t, t)) error + w(t, t).

    Args:
      context: the stage; needs a velocity network v(s, t, x) and an optimiser.
      interpolant: 'linear', 'trigonometric' or 'variance_preserving'.
      noise_scale: standard deviation of the noise x0; None for the network's `data_scale`.
      label_dropout: share of labels replaced by the null class, which guidance needs; for networks
        with `num_classes` only.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.
    """
    return common.flow_method(
        context,
        # No example is left for the algorithm.
        algorithm=get_algorithm('lsd'),
        diagonal_fraction=1.0,
        interpolant=get_interpolant(interpolant),
        noise=noise_scale,
        label_dropout=label_dropout,
        augmentation=augmentation,
        micro_batches=micro_batches,
    )
