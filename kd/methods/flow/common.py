"""What flow methods share: velocity functions, the batch loss, checks when a method is built."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses.flow_map import VelocityFunction, uncertainty_weight
from kd.losses.flow_map_algorithms import Algorithm, flow_map_errors
from kd.losses.interpolant import Interpolant, check_same_interpolant, get_interpolant
from kd.losses.schedule import Schedule, convert
from kd.method import Batch, Init, Loss, Method, Objective, minimize, with_projection
from kd.metrics import mean
from kd.models.conditioning import log_variance
from kd.models.magnitude_preserving import effective_weights, normalize_weights
from kd.network import Network
from kd.ranges import Count, Fraction, Positive
from kd.sampling import denoiser
from kd.sampling.velocity import NULL, fields_of, noise_scale, num_classes, velocity_function
from kd.state import PyTree, State

# Splits the randomness of a step: augmentation, noise, dropped labels, dropout, times.
_KEYS = 5
# frozen, label [B] or None -> velocity function of the teacher
Teacher = Callable[[PyTree, jax.Array | None], VelocityFunction]


def flow_method(
    context: Context,
    *,
    algorithm: Algorithm,
    diagonal_fraction: Fraction,
    interpolant: Interpolant,
    noise: Positive | None,
    label_dropout: Fraction,
    augmentation: tuple,
    micro_batches: Count,
    teacher: Teacher | None = None,
) -> Method:
    """Minimises the batch loss of `kd.losses.flow_map_algorithms.flow_map_errors`.

        loss = mean_i [exp(-w(s_i, t_i)) e_i + w(s_i, t_i)]    or mean_i e_i without learned weight

    The first int(eta M) of M examples give flow-matching errors e_i at s = t, with dropout; the
    others those of the algorithm at s <= t, without. The weight w is part of the network's
    parameters where the network has a `time_weight`. Magnitude-preserving weights are projected
    back to their length after each step.

    A batch may bring its own `noise` [B, ...], which then belongs to its `input` as a pair.
    Arguments are those of the builders in this directory.
    """
    network = context.network
    if not 0.0 <= diagonal_fraction <= 1.0:
        raise UserError(f'diagonal_fraction must lie in [0, 1], got {diagonal_fraction}.')
    if not 0.0 <= label_dropout <= 1.0:
        raise UserError(f'label_dropout must lie in [0, 1], got {label_dropout}.')
    check_network(network, two_times=diagonal_fraction < 1.0, where=f'{context.stage}.network')
    scale, classes = noise_scale(network, noise), num_classes(network)
    weighted = bool(getattr(network.module, 'time_weight', 0))

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        keys = jax.random.split(key, _KEYS)
        batch = augment.augment(keys[0], batch, augmentation, context.num_classes)
        data = batch['input']
        start = batch.get('noise')
        if start is None:
            start = scale * jax.random.normal(keys[1], data.shape, data.dtype)
        label = None if classes is None else _drop(keys[2], batch['label'], label_dropout, classes)
        diagonal = int(diagonal_fraction * len(data))
        variables = variables_of(network, state, params)
        bind = functools.partial(velocity_function, network, variables)
        on, off = (None, None) if label is None else (label[:diagonal], label[diagonal:])
        told = fields_of(network, batch)
        told_on, told_off = (
            {name: x[part] for name, x in told.items()}
            for part in (slice(diagonal), slice(diagonal, None))
        )
        error, s, t = flow_map_errors(
            keys[4],
            bind(on, told=told_on, train=True, key=keys[3]),
            start,
            data,
            interpolant=interpolant,
            algorithm=algorithm,
            diagonal=diagonal,
            off_diagonal_vfn=bind(off, told=told_off),
            teacher=teacher(state.frozen, off) if teacher and diagonal < len(data) else None,
        )
        values = uncertainty_weight(error, log_variance(params, s, t)) if weighted else error
        metrics = {}
        if diagonal:
            metrics['diagonal_error'] = mean(error[:diagonal])
        if diagonal < len(data):
            metrics['map_error'] = mean(error[diagonal:])
        return Objective(mean(values), metrics)

    return minimized(context, loss, network.init, micro_batches)


def minimized(context: Context, loss: Loss, init: Init, micro_batches: int = 1) -> Method:
    """`minimize`; magnitude-preserving weights are projected back to their length."""
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_projection(method, normalize_weights)


def variables_of(network: Network, state: State, params: PyTree) -> PyTree:
    """The variables of a loss, with weights that are normalised once for all calls."""
    effective = effective_weights(params, getattr(network.module, 'dtype', jnp.float32))
    return {**state.variables(params=params), 'effective': effective}


def teacher_field(
    context: Context, variables: PyTree, batch: Batch, guidance: float
) -> VelocityFunction:
    """v(t, t, x) of the teacher, guided: of a flow, or of a denoiser of the straight path."""
    network = context.teacher
    if not isinstance(getattr(network.module, 'schedule', None), Schedule):
        told = fields_of(network, batch)
        return velocity_function(
            network, variables, batch.get('label'), told=told, guidance=guidance
        )
    own = denoiser.guided(denoiser.of_network(network), guidance)
    condition = denoiser.conditions(network, batch)

    def field(s: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
        del t
        x0 = own.apply(variables, x, 1 - s, condition).x0
        return -convert(own.schedule, x0, x, 1 - s, 'x0', 'flow').astype(x.dtype)

    return field


def mean_square(residual: jax.Array) -> jax.Array:
    """Of each example over all its elements, [B, ...] -> [B]."""
    return jnp.mean(jnp.square(residual), axis=tuple(range(1, residual.ndim)))


def one_time(field: VelocityFunction) -> VelocityFunction:
    """A network that is told no end: v(s, s, x) for every t."""
    return lambda s, t, x: field(s, s, x)


def _drop(key: jax.Array, label: jax.Array, probability: float, null: int) -> jax.Array:
    """Labels [B], each replaced by the null class with the given probability."""
    dropped = jax.random.bernoulli(key, probability, label.shape)
    return jnp.where(dropped, null, label)


# Checks when a method is built.


def check_network(network: Network, *, two_times: bool, where: str) -> None:
    """Refuses a network that is not v(s, t, x), from its traced program: nothing is computed.

    Raises:
      UserError: other inputs, a velocity of another shape or type than x, or a time that the
        output does not depend on (with `two_times` False one of the two is enough).
    """
    if len(network.inputs) != 3:
        raise UserError(
            f'{where}: {type(network.module).__name__} is no velocity network v(s, t, x); one says '
            'so by a method example_inputs(spec) that returns the shapes of s, t and x.'
        )
    x = network.inputs[2]
    # Initialising computes the output too: one trace where two would do the same.
    program = jax.make_jaxpr(
        lambda s, t, x: network.module.init_with_output(jax.random.key(0), s, t, x)[0]
    )(*network.inputs)
    out = program.out_avals[0]
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise UserError(
            f'{where}: the velocity is {out.dtype}{list(out.shape)} for an input '
            f'{x.dtype}{list(x.shape)}; it must have the shape and type of its input.'
        )
    seen = [
        _depends(program.jaxpr, [i == k for i in range(len(program.in_avals))])[0] for k in (0, 1)
    ]
    if two_times and not all(seen):
        blind = 's, the start' if not seen[0] else 't, the end'
        raise UserError(
            f'{where}: the network ignores its time {blind} of the jump; a flow map needs both '
            '(a one-time flow can be a teacher, or be trained by flow matching).'
        )
    if not any(seen):
        raise UserError(f'{where}: the network ignores time; a flow needs v(t, t, x).')


def _depends(jaxpr: core.Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which outputs depend on the marked inputs; inside loops every output on every input."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for equation in jaxpr.eqns:
        marks = [not isinstance(v, core.Literal) and v in marked for v in equation.invars]
        inner = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
        inner = getattr(inner, 'jaxpr', inner)
        calls = equation.primitive.name in ('jit', 'pjit', 'remat', 'checkpoint', 'custom_jvp_call')
        if any(marks) and calls and inner is not None and len(inner.invars) == len(marks):
            outputs = _depends(inner, marks)
        else:
            outputs = [any(marks)] * len(equation.outvars)
        marked |= {v for v, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [not isinstance(v, core.Literal) and v in marked for v in jaxpr.outvars]


def check_teacher(context: Context, interpolant: Interpolant, *, two_times: bool) -> None:
    """Refuses a teacher that is no flow, or one of another interpolant or noise.

    A denoiser of the straight path is one, of noise of deviation 1 and one time.
    """
    schedule = getattr(context.teacher.module, 'schedule', None)
    if isinstance(schedule, Schedule):
        _check_denoiser(context, interpolant, schedule, two_times)
        return
    check_network(context.teacher, two_times=two_times, where=f'{context.stage}.teacher')
    block = context.trained_by.get('teacher')
    if block is None:  # A context made by hand.
        return
    try:
        name = block.get('interpolant', 'linear')
        check_same_interpolant(interpolant, get_interpolant(name))
    except ValueError as error:
        raise UserError(f'{context.stage}: {error}') from error
    check_noise(context, noise_scale(context.network, context.config.method.get('noise_scale')))


def _check_denoiser(
    context: Context, interpolant: Interpolant, schedule: Schedule, two_times: bool
) -> None:
    if two_times or schedule.name != 'flow' or interpolant.name != 'linear':
        raise UserError(
            f'{context.stage}.teacher is a denoiser of the schedule {schedule.name!r}; a flow on '
            'the linear path is one of kd.losses.schedule.flow.'
        )
    own = noise_scale(context.network, context.config.method.get('noise_scale'))
    if own != 1.0:
        raise UserError(
            f'{context.stage}: the noise has standard deviation {own:g}, that of the teacher 1; '
            'give noise_scale=1.'
        )


def check_noise(context: Context, own: float) -> None:
    """Refuses a teacher that starts from noise of another standard deviation than `own`."""
    block = context.trained_by.get('teacher', {'noise_scale': own})
    other = noise_scale(context.teacher, block.get('noise_scale'))
    if own != other:
        raise UserError(
            f'{context.stage}: the noise has standard deviation {own:g}, that of the teacher '
            f'{other:g}; give both the same data_scale or noise_scale.'
        )


def check_guidance(context: Context, guidance: float) -> None:
    """Refuses to guide a teacher with nothing to compare with, or one that has never seen it."""
    if guidance == 1.0 or any(name.startswith(NULL) for name in context.spec):
        return
    if num_classes(context.teacher) is None:
        raise UserError(
            f'{context.stage}: guidance needs a teacher with num_classes, or data with the '
            'embedding of an empty text beside.'
        )
    if context.trained_by.get('teacher', {}).get('label_dropout') == 0:
        raise UserError(
            f'{context.stage}: guidance={guidance:g} takes the velocity without a class, which the '
            'teacher was not trained on; train it with label_dropout above 0.'
        )
