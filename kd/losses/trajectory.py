"""Matching of training trajectories: an unrolled training run on synthetic data, and the distance
of where it ends from where an expert's training on real data went.

Parameters are any pytree (a flat vector included); distances are over all leaves as if they were
one vector. An inner loss has the form

    loss(params, synthetic, step) -> scalar

where `synthetic` is the pytree of trained arrays (images, perhaps labels) and `step` holds what
differs between the steps of the inner loop: indices into the synthetic set, keys of augmentation.

Sources: Cazenavette et al. 2022, arXiv 2203.11932 (matching of trajectories); Cui et al. 2022,
arXiv 2211.10586 (TESLA); Du et al. 2022, arXiv 2211.11004 (accumulated error); Shen et al. 2023,
arXiv 2310.10541 (momentum and intermediate targets).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.losses import numerics

PyTree = Any
InnerLoss = Callable[[PyTree, PyTree, PyTree], jax.Array]


class Unrolled(NamedTuple):
    """Where an inner loop went.

    Attributes:
      final: parameters after the last step.
      recorded: parameters after each of the steps asked for.
    """

    final: PyTree
    recorded: tuple[PyTree, ...]


def unroll_student(
    loss: InnerLoss,
    params: PyTree,
    synthetic: PyTree,
    step_size: jax.Array,
    steps: PyTree,
    *,
    momentum: float = 0.0,
    record: Sequence[int] = (),
    hessian: bool = True,
    checkpoint: bool = True,
    unroll: int | bool = 1,
) -> Unrolled:
    """Trains a student on the synthetic set by gradient descent, differentiably.

        v_i = momentum v_{i-1} + grad_theta loss(theta_i, synthetic, steps[i]),   v_{-1} = 0
        theta_{i+1} = theta_i - step_size v_i

    The derivative of the result with respect to `synthetic`, `step_size` and `params` is exact by
    default. With `checkpoint` a step's activations are recomputed in the backward pass, so memory
    grows with the number of steps by one copy of the parameters (two with momentum) per step, and
    not by the activations.

    Args:
      loss: the inner loss.
      params: parameters to start from.
      synthetic: the trained arrays, float.
      step_size: scalar, the synthetic learning rate.
      steps: pytree of arrays with leading axis N, one slice per step; N = 0 returns `params`.
      momentum: in [0, 1).
      record: numbers of steps in 1..N, ascending, after which parameters are recorded too.
      hessian: False stops the gradient of the parameters at which the inner gradient is taken,
        which drops the Hessian of the inner loss from the derivative (see `tesla_grads`).
      checkpoint: recompute activations instead of keeping them.
      unroll: steps per iteration of the loop, or True for no loop at all. XLA for CPU runs
        convolutions inside a loop many times slower than outside. True avoids that, at the price of
        compile time and, on CPU, of what `checkpoint` saves; a network whose convolutions are
        matrix products (`ConvNet(conv='matmul')`) keeps both and is faster still.

    Raises:
      ValueError: if the leaves of `steps` differ in length, or `record` is not ascending in 1..N.

    Source: arXiv 2203.11932, algorithm 1; momentum as in arXiv 2310.10541.
    """
    length = _length(steps)
    bounds = [0, *record, length]
    if any(a >= b for a, b in itertools.pairwise(bounds[:-1])) or bounds[-2] > length:
        raise ValueError(f'record must ascend within 1..{length} steps, got {tuple(record)}.')

    def body(carry, step):
        params, velocity = carry
        at = params if hessian else jax.lax.stop_gradient(params)
        moved, velocity = _velocity(momentum, velocity, jax.grad(loss)(at, synthetic, step))
        return (_descend(params, step_size, moved), velocity), None

    if checkpoint:
        # Inside a loop XLA cannot merge the recomputation with the forward pass by itself.
        body = jax.checkpoint(body, prevent_cse=unroll != 1)
    carry = params, _at_rest(momentum, params)
    recorded = []
    for start, end in itertools.pairwise(bounds):
        part = jax.tree.map(lambda x, a=start, b=end: x[a:b], steps)
        carry, _ = jax.lax.scan(body, carry, part, unroll=unroll)
        recorded.append(carry[0])
    return Unrolled(recorded[-1], tuple(recorded[:-1]))


def param_distance(student: PyTree, start: PyTree, target: PyTree) -> jax.Array:
    """Normalised distance of a student from the expert's parameters it should reach.

        || student - target ||^2 / || start - target ||^2

    Args:
      student, start, target: pytrees of one structure; all leaves count as one vector.

    Returns:
      Scalar, float32 (float64 for float64 input); 1 for a student that has not moved. Not finite
      where `start` equals `target`: an expert that did not move gives no direction.

    Source: arXiv 2203.11932, Eq. 2.
    """
    return _squared_distance(student, target) / _squared_distance(start, target)


def mtt_loss(
    loss: InnerLoss,
    synthetic: PyTree,
    step_size: jax.Array,
    start: PyTree,
    target: PyTree,
    steps: PyTree,
    **options: Any,
) -> jax.Array:
    """`param_distance` of a student that trained on the synthetic set from the expert's `start`.

    Args:
      loss, synthetic, step_size, steps, **options: see `unroll_student`.
      start: the expert's parameters after t epochs; not stop-gradiented.
      target: its parameters M epochs later, M >= 1.

    Source: arXiv 2203.11932, Eq. 2.
    """
    student = unroll_student(loss, start, synthetic, step_size, steps, **options).final
    return param_distance(student, start, target)


def segment_distances(
    students: Sequence[PyTree], start: PyTree, targets: Sequence[PyTree]
) -> jax.Array:
    """`param_distance` of each student from its target, all from one start: [M], unreduced.

    Weighted by `segments.target_weights` and summed, this is matching with intermediate targets:

        sum_j w_j || theta_{s_j} - theta*_{t+j} ||^2 / || theta*_t - theta*_{t+j} ||^2,  j = 1..M

    Args:
      students: the student's parameters after the steps s_1..s_M, `(*recorded, final)`.
      start: the parameters from which the student started; where they were perturbed, the perturbed
        ones.
      targets: the expert's parameters 1..M epochs after the start.

    Source: arXiv 2310.10541, intermediate matching loss.
    """
    pairs = zip(students, targets, strict=True)
    return jnp.stack([param_distance(student, start, target) for student, target in pairs])


def tesla_grads(
    loss: InnerLoss,
    synthetic: PyTree,
    step_size: jax.Array,
    start: PyTree,
    target: PyTree,
    steps: PyTree,
    *,
    momentum: float = 0.0,
    unroll: int | bool = 1,
) -> tuple[jax.Array, tuple[PyTree, jax.Array]]:
    """The loss of `mtt_loss` and TESLA's approximate gradient, in memory independent of the steps.

    With lambda = d param_distance / d theta_N, the first pass finds theta_N, the second adds up

        d/d synthetic = sum_i d/d synthetic [ -step_size c_i lambda . g_i(sg theta_i, synthetic) ]
        d/d step_size = -lambda . sum_i v_i,          c_i = sum_{k < N - i} momentum^k

    along the same path. This is the exact adjoint recursion with the Hessian of the inner loss set
    to zero: exact for one step or a loss linear in the parameters, and off by more the larger
    step_size N is. It equals the derivative of `mtt_loss(..., hessian=False)`.

    Args:
      loss, synthetic, step_size, start, target, steps, momentum, unroll: as in `mtt_loss`.

    Returns:
      Value, and gradients with respect to `synthetic` and `step_size`.

    Source: arXiv 2211.10586, written with the adjoint lambda; momentum is an extension.
    """
    final = unroll_student(
        loss, start, synthetic, step_size, steps, momentum=momentum, unroll=unroll
    ).final
    value, direction = jax.value_and_grad(param_distance)(final, start, target)
    length = _length(steps)
    # c_i of the steps in order.
    reach = jnp.cumsum(jnp.power(momentum, jnp.arange(length)))[::-1].astype(value.dtype)

    def body(carry, inputs):
        params, velocity, from_synthetic, from_step_size = carry
        step, weight = inputs
        gradient, pull = jax.vjp(lambda s: jax.grad(loss)(params, s, step), synthetic)
        (images,) = pull(
            jax.tree.map(lambda d: (-step_size * weight * d).astype(d.dtype), direction)
        )
        moved, velocity = _velocity(momentum, velocity, gradient)
        from_synthetic = jax.tree.map(jnp.add, from_synthetic, images)
        from_step_size -= numerics.tree_dot(direction, moved)
        return (_descend(params, step_size, moved), velocity, from_synthetic, from_step_size), None

    zeros = jax.tree.map(jnp.zeros_like, synthetic), jnp.zeros((), value.dtype)
    carry = start, _at_rest(momentum, start), *zeros
    (_, _, images, rate), _ = jax.lax.scan(body, carry, (steps, reach), unroll=unroll)
    return value, (images, rate.astype(jnp.result_type(step_size)))


class AccumulatedError(NamedTuple):
    """Error of a student that runs on from segment to segment; pytrees with leading axis K.

    Attributes:
      total: eps_{k+1}, where it is minus where the expert is after the segment.
      initialisation: what the same segment makes of eps_k: A(theta*_k + eps_k) - A(theta*_k).
      matching: A(theta*_k) - theta*_{k+1}, all that matching of single segments sees.
    """

    total: PyTree
    initialisation: PyTree
    matching: PyTree


def accumulated_error(
    segment: Callable[[PyTree, PyTree], PyTree], experts: PyTree, inputs: PyTree
) -> AccumulatedError:
    """Splits the error of a student trained over K segments from the expert's first parameters.

        eps_{k+1} = [A(theta*_k + eps_k) - A(theta*_k)] + [A(theta*_k) - theta*_{k+1}],   eps_0 = 0

    Args:
      segment: `segment(params, inputs[k]) -> params`, the student's training A during segment k.
      experts: the expert's parameters at the K + 1 ends of the segments, leading axis K + 1.
      inputs: pytree with leading axis K.

    Source: arXiv 2211.11004, section 3.
    """
    first, later = (jax.tree.map(lambda x, s=s: x[s], experts) for s in (slice(-1), slice(1, None)))

    def body(error, inputs):
        start, end, given = inputs
        moved = segment(jax.tree.map(jnp.add, start, error), given)
        alone = segment(start, given)
        total = jax.tree.map(jnp.subtract, moved, end)
        parts = AccumulatedError(
            total,
            jax.tree.map(jnp.subtract, moved, alone),
            jax.tree.map(jnp.subtract, alone, end),
        )
        return total, parts

    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), experts)
    return jax.lax.scan(body, zero, (first, later, inputs))[1]


def _at_rest(momentum: float, params: PyTree) -> PyTree:
    # Plain descent carries no velocity: the backward pass would keep one per step.
    return jax.tree.map(jnp.zeros_like, params) if momentum else None


def _velocity(momentum: float, velocity: PyTree, gradient: PyTree) -> tuple[PyTree, PyTree]:
    """The direction of a step, and the velocity to carry."""
    if not momentum:
        return gradient, None
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
    return velocity, velocity


def _descend(params: PyTree, step_size: jax.Array, direction: PyTree) -> PyTree:
    return jax.tree.map(lambda p, d: (p - step_size * d).astype(p.dtype), params, direction)


def _squared_distance(a: PyTree, b: PyTree) -> jax.Array:
    difference = jax.tree.map(lambda x, y: numerics.wide(x) - numerics.wide(y), a, b)
    return numerics.tree_dot(difference, difference)


def _length(steps: PyTree) -> int:
    lengths = {x.shape[0] for x in jax.tree.leaves(steps)}
    if len(lengths) != 1:
        raise ValueError(f'The arrays of `steps` must share one length, got {sorted(lengths)}.')
    return lengths.pop()
