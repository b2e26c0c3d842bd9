"""Flow maps of a frozen flow (Boffi, Albergo, Vanden-Eijnden 2024, arXiv 2406.07507)."""

from __future__ import annotations

from kd.context import Context
from kd.errors import UserError
from kd.losses.flow_map import VelocityFunction
from kd.losses.flow_map_algorithms import get_algorithm
from kd.losses.interpolant import get_interpolant
from kd.method import Method
from kd.methods.flow import common
from kd.ranges import Count, Finite, Fraction, Positive
from kd.sampling.velocity import num_classes, velocity_function

# Algorithms whose teacher makes jumps; the others read its diagonal.
_JUMPING = ('pfmm', 'psd_uniform', 'psd_midpoint')


def flow_map_distillation(
    context: Context,
    *,
    algorithm: str = 'lmd',
    diagonal_fraction: Fraction = 0.0,
    stop_gradient: str | None = None,
    teacher_jumps: str = 'map',
    guidance: Finite = 1.0,
    interpolant: str = 'linear',
    noise_scale: Positive | None = None,
    label_dropout: Fraction = 0.1,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """A student map X of a frozen teacher's flow b.

        lmd:  || d_t X_{s,t}(I_s) - b_t(X_{s,t}(I_s)) ||^2
        emd:  || d_s X_{s,t}(I_s) + grad X_{s,t}(I_s) b_s(I_s) ||^2
        pfmm: || X_{s,t}(I_s) - sg[X'_{u,t}(X'_{s,u}(I_s))] ||^2,  u = (s + t) / 2

    Errors are summed over the dimensions of the data. The paper's lmd and emd stop no gradient;
    `lsd` and `esd` here are the same with the teacher's part stopped, `consistency` jumps to data
    only, `psd_uniform` and `psd_midpoint` are progressive distillation as velocities.

    Args:
      context: the stage; needs a velocity network v(s, t, x), a teacher and an optimiser.
      algorithm: one of the above.
      diagonal_fraction: share of the batch that matches the interpolant's velocity instead.
      stop_gradient: where the gradient stops, see `kd.losses.flow_map`; None for the algorithm's.
      teacher_jumps: for pfmm and psd: 'map' for a teacher that is a flow map itself, 'euler' for a
        flow, whose jumps are then Euler steps.
      guidance: scale of the classifier-free guidance of the teacher's field: the student learns
        the map of the guided flow, in one evaluation a jump.
      interpolant, noise_scale, label_dropout, augmentation, micro_batches: as of
        `kd.methods.flow.flow_matching.flow_matching`.
    """
    if teacher_jumps not in ('map', 'euler'):
        raise UserError(f"teacher_jumps must be 'map' or 'euler', got '{teacher_jumps}'.")
    path = get_interpolant(interpolant)
    chosen = get_algorithm(algorithm, teacher=True, stop_gradient=stop_gradient)  # type: ignore[arg-type]
    by_map = algorithm in _JUMPING and teacher_jumps == 'map'
    common.check_teacher(context, path, two_times=by_map)
    classes = num_classes(context.teacher)
    if classes != num_classes(context.network):
        raise UserError(
            f'{context.stage}: the student is conditioned on {num_classes(context.network)} '
            f'classes and its teacher on {classes}; give both networks the same num_classes.'
        )
    common.check_guidance(context, guidance)

    def teacher(frozen, label) -> VelocityFunction:
        field = velocity_function(context.teacher, frozen['teacher'], label, guidance=guidance)
        return field if by_map else lambda s, t, x: field(s, s, x)

    return common.flow_method(
        context,
        algorithm=chosen,
        diagonal_fraction=diagonal_fraction,
        interpolant=path,
        noise=noise_scale,
        label_dropout=label_dropout,
        augmentation=augmentation,
        micro_batches=micro_batches,
        teacher=teacher,
    )
