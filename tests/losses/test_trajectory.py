"""Trajectory matching against explicit adjoints, closed forms and invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from kd.losses import segments, trajectory

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LABELS = np.asarray([0, 1, 2, 0, 1, 2])
STEPS = 5


def network(params, x):
    return jnp.tanh(x @ params['w1'] + params['b1']) @ params['w2'] + params['b2']


def inner_loss(params, images, rows):
    log_probs = jax.nn.log_softmax(network(params, images[rows]))
    return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(LABELS)[rows][:, None], 1))


def draw_params(rng):
    shapes = {'w1': (3, 4), 'b1': (4,), 'w2': (4, 3), 'b2': (3,)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture
def problem():
    """A small tanh network in float64: start, target, images and the order of the batches."""
    with jax.enable_x64(True):
        return make_problem()


@functools.cache
def make_problem():
    rng = np.random.default_rng(0)
    start, target = draw_params(rng), draw_params(rng)
    images = jnp.asarray(rng.normal(size=(6, 3)))
    order = jnp.asarray([[0, 1, 2], [3, 4, 5], [5, 1, 0], [2, 4, 3], [1, 3, 5]])
    return start, target, images, order


@jax.jit
def explicit_adjoint(problem, step_size, momentum, hessian):
    """Value and gradients by the adjoint recursion, with dense derivatives of each inner step."""
    start, target, images, order = problem
    theta, unravel = ravel_pytree(start)
    end = ravel_pytree(target)[0]

    def gradient(theta, images, rows):
        return ravel_pytree(jax.grad(inner_loss)(unravel(theta), images, rows))[0]

    def forward(carry, rows):
        theta, velocity = carry
        velocity = momentum * velocity + gradient(theta, images, rows)
        return (theta - step_size * velocity, velocity), (theta, velocity)

    (final, _), (thetas, velocities) = jax.lax.scan(forward, (theta, jnp.zeros_like(theta)), order)
    scale = jnp.sum((theta - end) ** 2)
    adjoint, of_velocity = 2 * (final - end) / scale, jnp.zeros_like(theta)

    def backward(carry, step):
        adjoint, of_velocity, to_images, to_step_size = carry
        theta, velocity, rows = step
        curvature, mixed = jax.jacfwd(gradient, (0, 1))(theta, images, rows)
        to_step_size -= adjoint @ velocity
        of_velocity = momentum * of_velocity - step_size * adjoint
        to_images += jnp.einsum('p,pij->ij', of_velocity, mixed)
        return (
            adjoint + hessian * curvature @ of_velocity,
            of_velocity,
            to_images,
            to_step_size,
        ), 0

    carry = adjoint, of_velocity, jnp.zeros_like(images), jnp.zeros((), theta.dtype)
    carry, _ = jax.lax.scan(backward, carry, (thetas, velocities, order), reverse=True)
    return jnp.sum((final - end) ** 2) / scale, carry[2:]


def differentiated(problem, step_size, loss=inner_loss, **options):
    start, target, images, order = problem

    def outer(images, step_size):
        return trajectory.mtt_loss(loss, images, step_size, start, target, order, **options)

    return jax.jit(jax.value_and_grad(outer, (0, 1)))(images, step_size)


def tesla(problem, step_size, loss=inner_loss, **options):
    start, target, images, order = problem
    return jax.jit(
        lambda x, b: trajectory.tesla_grads(loss, x, b, start, target, order, **options)
    )(images, step_size)


def assert_close(actual, expected, rtol):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_exact_gradient_is_the_adjoint_recursion(problem, momentum):
    with jax.enable_x64(True):
        expected = explicit_adjoint(problem, 0.3, momentum, 1.0)
        assert_close(differentiated(problem, 0.3, momentum=momentum), expected, 1e-10)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_tesla_is_the_adjoint_recursion_without_hessian(problem, momentum):
    with jax.enable_x64(True):
        expected = explicit_adjoint(problem, 0.3, momentum, 0.0)
        approximate = tesla(problem, 0.3, momentum=momentum)
        assert_close(approximate, expected, 1e-10)
        exact = explicit_adjoint(problem, 0.3, momentum, 1.0)[1][0]
        assert float(jnp.linalg.norm(approximate[1][0] - exact) / jnp.linalg.norm(exact)) > 0.05


def test_differentiating_without_hessian_is_tesla(problem):
    with jax.enable_x64(True):
        expected = explicit_adjoint(problem, 0.3, 0.9, 0.0)
        assert_close(differentiated(problem, 0.3, momentum=0.9, hessian=False), expected, 1e-10)


def test_tesla_is_exact_for_a_single_step(problem):
    with jax.enable_x64(True):
        one = (*problem[:3], problem[3][:1])
        assert_close(tesla(one, 0.3), explicit_adjoint(one, 0.3, 0.0, 1.0), 1e-12)


def test_tesla_is_exact_for_a_loss_linear_in_the_parameters(problem):
    def linear(params, images, rows):
        return jnp.sum(jnp.tanh(images[rows]) @ params['w1'])

    with jax.enable_x64(True):
        exact = differentiated(problem, 0.3, linear)
        assert float(jnp.abs(exact[1][0]).max()) > 1e-3
        assert_close(tesla(problem, 0.3, linear), exact, 1e-12)


@pytest.mark.parametrize('options', [{'checkpoint': False}, {'unroll': True}])
def test_checkpointing_and_unrolling_change_no_gradient(problem, options):
    with jax.enable_x64(True):
        expected = explicit_adjoint(problem, 0.3, 0.0, 1.0)
        assert_close(differentiated(problem, 0.3, **options), expected, 1e-12)


def test_learned_labels_and_keyed_augmentation_pass_through_the_loop(problem):
    start, target, images, order = problem
    with jax.enable_x64(True):
        synthetic = {'images': images, 'labels': 0.5 * jnp.eye(3)[jnp.asarray(LABELS)]}
        steps = {'rows': order[:2], 'key': jax.random.split(jax.random.key(0), 2)}

        def loss(params, synthetic, step):
            noise = jax.random.uniform(step['key'], (3, 1), jnp.float64, 0.5, 1.5)
            log_probs = jax.nn.log_softmax(
                network(params, noise * synthetic['images'][step['rows']])
            )
            soft = jax.nn.softmax(synthetic['labels'])[step['rows']]
            return -jnp.mean(jnp.sum(soft * log_probs, -1))

        def by_hand(synthetic, step_size):
            params = start
            for i in range(2):
                step = {'rows': order[i], 'key': steps['key'][i]}
                grads = jax.grad(loss)(params, synthetic, step)
                params = jax.tree.map(lambda p, g: p - step_size * g, params, grads)
            return trajectory.param_distance(params, start, target)

        whole = (start, target, synthetic, steps)
        expected = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(synthetic, 0.3)
        assert float(jnp.abs(expected[1][0]['labels']).max()) > 1e-4
        assert_close(differentiated(whole, 0.3, loss), expected, 1e-10)


def test_without_steps_the_loss_is_one_and_does_not_depend_on_the_images(problem):
    start, target, images, order = problem
    with jax.enable_x64(True):
        value, (to_images, to_step_size) = differentiated((start, target, images, order[:0]), 0.3)
        assert value == 1.0
        assert not to_images.any()
        assert to_step_size == 0.0


@pytest.mark.parametrize('momentum', [0.0, 0.5])
def test_replaying_the_experts_own_batches_matches_it_and_all_intermediate_targets(momentum):
    """Two epochs of an expert on six examples, in batches of two, replayed by the student."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        data = jnp.asarray(rng.normal(size=(6, 3)))
        params, order = (
            draw_params(rng),
            np.asarray([[4, 0], [1, 3], [5, 2], [0, 1], [2, 3], [4, 5]]),
        )
        snapshots, velocity = [params], jax.tree.map(np.zeros_like, params)
        gradient = jax.jit(jax.grad(inner_loss))
        for number, rows in enumerate(order):
            grads = jax.device_get(gradient(params, data, rows))
            velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
            params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
            if number % 3 == 2:
                snapshots.append(params)
        student = trajectory.unroll_student(
            inner_loss,
            snapshots[0],
            data,
            0.1,
            jnp.asarray(order),
            momentum=momentum,
            record=segments.target_steps(6, 2),
        )
        students = (*student.recorded, student.final)
        distances = trajectory.segment_distances(students, snapshots[0], snapshots[1:])
        assert distances.shape == (2,)
        assert (distances < 1e-20).all()


def test_intermediate_targets_are_weighted_distances_and_off_by_default(problem):
    start, target, images, order = problem
    with jax.enable_x64(True):
        middle = jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, start, target)

        @jax.jit
        @jax.value_and_grad
        def combined(images, weights):
            student = trajectory.unroll_student(inner_loss, start, images, 0.3, order, record=(2,))
            students = (*student.recorded, student.final)
            return weights @ trajectory.segment_distances(students, start, (middle, target))

        off, on = (
            combined(images, jnp.asarray(segments.target_weights(kind, 2)))
            for kind in ('end', 'all')
        )
        value, (plain, _) = explicit_adjoint(problem, 0.3, 0.0, 1.0)
        assert_close(off, (value, plain), 1e-10)
        # The first two steps alone, towards the middle, are the other term.
        halves = explicit_adjoint((start, middle, images, order[:2]), 0.3, 0.0, 1.0)
        assert_close(on, (value + halves[0], plain + halves[1][0]), 1e-10)


def test_linear_regression_follows_its_closed_form():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        inputs, targets, theta = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
        curvature = inputs.T @ inputs / 8
        solution = np.linalg.solve(curvature, inputs.T @ targets / 8)

        def loss(params, inputs, _):
            return jnp.mean((inputs @ params - jnp.asarray(targets)) ** 2) / 2

        student = trajectory.unroll_student(
            loss, jnp.asarray(theta), jnp.asarray(inputs), 0.2, jnp.zeros(30)
        ).final
        powers = np.linalg.matrix_power(np.eye(3) - 0.2 * curvature, 30)
        np.testing.assert_allclose(student, solution + powers @ (theta - solution), rtol=1e-10)


def test_momentum_on_a_constant_gradient_follows_its_closed_form():
    gradient = np.asarray([1.0, -2.0, 0.5])
    student = trajectory.unroll_student(
        lambda params, g, _: params @ g,
        jnp.ones(3),
        jnp.asarray(gradient),
        0.05,
        jnp.zeros(12),
        momentum=0.9,
    ).final
    reach = sum((1 - 0.9**i) / 0.1 for i in range(1, 13))
    np.testing.assert_allclose(student, 1 - 0.05 * gradient * reach, rtol=1e-6)


def test_distance_has_no_units(problem):
    start, target, _, _ = problem
    with jax.enable_x64(True):
        student = jax.tree.map(lambda a, b: 0.3 * a + 0.5 * b, start, target)
        value = trajectory.param_distance(student, start, target)
        scaled = [jax.tree.map(lambda x: 1e3 * x, tree) for tree in (student, start, target)]
        np.testing.assert_allclose(trajectory.param_distance(*scaled), value, rtol=1e-12)
        half = jax.tree.map(lambda a, b: (a + b) / 2, start, target)
        np.testing.assert_allclose(trajectory.param_distance(half, start, target), 0.25)


def test_distance_is_float32_for_bfloat16_parameters():
    start, target = jnp.zeros(1000, jnp.bfloat16), jnp.ones(1000, jnp.bfloat16)
    value = trajectory.param_distance(start + 0.5, start, target)
    assert value.dtype == jnp.float32
    assert value == 0.25


def test_accumulated_error_splits_into_initialisation_and_matching(problem):
    start, _, images, order = problem
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        start, unravel = ravel_pytree(start)
        experts = start + 0.1 * np.cumsum(rng.normal(size=(4, start.size)), 0)

        @jax.jit
        def segment(params, rows):
            loss = lambda theta, images, rows: inner_loss(unravel(theta), images, rows)  # noqa: E731
            return trajectory.unroll_student(loss, params, images, 0.3, rows).final

        rows = jnp.stack([order[:2], order[1:3], order[2:4]])
        errors = trajectory.accumulated_error(segment, experts, rows)
        np.testing.assert_allclose(
            errors.total, errors.initialisation + errors.matching, atol=1e-12
        )
        # The student starts on the expert; afterwards it runs on from where it is.
        assert not errors.initialisation[0].any()
        running = experts[0]
        for k in range(3):
            running = segment(running, rows[k])
            np.testing.assert_allclose(errors.total[k], running - experts[k + 1], atol=1e-12)


def test_initialisation_error_of_linear_regression_is_contracted_by_its_curvature():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        inputs, experts = rng.normal(size=(8, 3)), rng.normal(size=(3, 3))
        contraction = np.linalg.matrix_power(np.eye(3) - 0.1 * inputs.T @ inputs / 8, 4)

        def segment(params, _):
            return trajectory.unroll_student(
                lambda p, x, _: jnp.mean((x @ p - 1.0) ** 2) / 2,
                params,
                jnp.asarray(inputs),
                0.1,
                jnp.zeros(4),
            ).final

        errors = trajectory.accumulated_error(segment, jnp.asarray(experts), jnp.zeros(2))
        expected = contraction @ np.asarray(errors.total[0])
        np.testing.assert_allclose(errors.initialisation[1], expected, rtol=1e-10)


@pytest.mark.parametrize(('step_size', 'shrinks'), [(0.1, True), (1.9, True), (2.1, False)])
def test_initialisation_error_shrinks_as_long_as_the_step_is_below_two_over_curvature(
    step_size, shrinks
):
    with jax.enable_x64(True):
        # Curvatures 1 and 0.5: the larger of them decides.
        inputs = jnp.asarray(np.diag([2**0.5, 1.0]))

        def end(params):
            return trajectory.unroll_student(
                lambda p, x, _: jnp.mean((x @ p) ** 2) / 2, params, inputs, step_size, jnp.zeros(50)
            ).final

        error = jnp.array([1e-3, 1e-3])
        start = jnp.array([0.3, -0.2])
        carried = end(start + error) - end(start)
        expected = (1 - step_size * np.array([1.0, 0.5])) ** 50 * 1e-3
        np.testing.assert_allclose(carried, expected, rtol=1e-6, atol=1e-12)
        assert (jnp.linalg.norm(carried) < jnp.linalg.norm(error)) == shrinks


def test_sharded_inner_batches_give_the_gradient_of_one_device():
    rng = np.random.default_rng(5)
    start, target = draw_params(rng), draw_params(rng)
    labels = jnp.asarray(rng.integers(0, 3, 16))
    images = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    order = segments.inner_batches(jax.random.key(0), 16, 8, 3)[0]
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec('data'))

    def loss(params, images, rows, constrain):
        batch = constrain(images[rows])
        log_probs = jax.nn.log_softmax(network(params, batch))
        return -jnp.mean(jnp.take_along_axis(log_probs, labels[rows][:, None], 1))

    def outer(images, step_size, constrain):
        return trajectory.mtt_loss(
            lambda p, s, r: loss(p, s, r, constrain), images, step_size, start, target, order
        )

    def run(images, constrain):
        function = jax.value_and_grad(lambda x, b: outer(x, b, constrain), (0, 1))
        return jax.jit(function)(images, jnp.float32(0.2))

    alone = run(images, lambda x: x)
    together = run(
        jax.device_put(images, spread), lambda x: jax.lax.with_sharding_constraint(x, spread)
    )
    assert_close(together, alone, 1e-5)


def test_bad_input_is_named(problem):
    start, _, images, order = problem
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match=r'ascend within 1\.\.5 steps, got \(3, 2\)'):
            trajectory.unroll_student(inner_loss, start, images, 0.1, order, record=(3, 2))
        with pytest.raises(ValueError, match=r'got \(6,\)'):
            trajectory.unroll_student(inner_loss, start, images, 0.1, order, record=(6,))
        with pytest.raises(ValueError, match=r'share one length, got \[4, 5\]'):
            trajectory.unroll_student(inner_loss, start, images, 0.1, (order, order[:4]))
