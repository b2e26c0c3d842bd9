"""The fused divergence against the dense one: values, gradients, masks, devices and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd.losses import divergence, signal
from kd.losses.sequence import fused_divergence

N, D, V = 24, 4, 9
GENERATOR = np.random.default_rng(6)


def normal(*shape):
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


STUDENT = (normal(N, D), normal(D, V))
TEACHER = signal.HiddenHead(normal(N, D + 1), normal(D + 1, V))
ALIKE = jnp.full(N, 0.3)
VARIED = normal(N)
MESH_AXIS = 'tokens'


@pytest.fixture(autouse=True)
def quick(request, quick_compilation):
    """Compilation is most of the time, but what is said of programs is said of optimised ones."""
    if 'never_exist' in request.node.name:
        yield
    else:
        with quick_compilation():
            yield


@pytest.fixture(scope='module')
def mesh():
    return jax.make_mesh((8,), (MESH_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def fused_gradients(teacher, cotangents, **options):
    """[(values, to_hidden, to_head)], one for each cotangent, from one compilation."""

    @jax.jit
    def run(hidden, head, teacher, cotangent):
        value, pull = jax.vjp(lambda h, w: fused_divergence(h, w, teacher, **options), hidden, head)
        return value, *pull(cotangent)

    return [run(*STUDENT, teacher, cotangent) for cotangent in cotangents]


def dense_gradients(teacher, cotangents, f=divergence.forward_kl, **options):
    """The same in float64, from whole logits."""
    with jax.enable_x64(True):
        student = [jnp.asarray(x, jnp.float64) for x in STUDENT]
        teacher = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, teacher
        )

        @jax.jit
        def run(hidden, head, teacher, cotangent):
            value, pull = jax.vjp(lambda h, w: f(h @ w, teacher, **options), hidden, head)
            return value, *pull(cotangent)

        return [run(*student, teacher, jnp.asarray(c, jnp.float64)) for c in cotangents]


def assert_same(got, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = np.abs(np.asarray(y, np.float64)).max()
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=tolerance * scale, rtol=0)


DIVERGENCES = {
    'reverse_kl': divergence.reverse_kl,
    'generalized_jsd': partial(divergence.generalized_jsd, beta=0.1),
    'skew_kl': divergence.skew_kl,
    'total_variation': divergence.total_variation,
    'renyi at temperature': partial(divergence.renyi, alpha=2.0, temperature=2.0),
}


@pytest.mark.parametrize('name', DIVERGENCES)
def test_each_divergence_is_the_dense_one_for_equal_and_varied_weights(name):
    f = DIVERGENCES[name]
    got = fused_gradients(TEACHER, (ALIKE, VARIED), divergence=f, chunk=5)
    assert_same(got, dense_gradients(TEACHER, (ALIKE, VARIED), f))


@pytest.mark.parametrize('chunk', [1, 5, 1000])
def test_chunk_sizes_divide_the_work_and_change_nothing(chunk):
    got = fused_gradients(TEACHER, (ALIKE, VARIED), chunk=chunk)
    assert_same(got, dense_gradients(TEACHER, (ALIKE, VARIED)))


@pytest.mark.parametrize('form', ['Dense', 'TopK', 'Sampled'])
def test_each_signal_is_the_dense_one(form):
    logits = TEACHER.logits()
    teacher = {
        'Dense': signal.Dense(logits),
        'TopK': signal.top_k(logits, 3),
        'Sampled': signal.sample(jax.random.key(0), logits, 5),
    }[form]
    got = fused_gradients(teacher, (ALIKE, VARIED), chunk=5)
    assert_same(got, dense_gradients(teacher, (ALIKE, VARIED)))


TOKENS = np.arange(N) % 3 > 0
WORDS = np.arange(V) != 2


@pytest.mark.parametrize(
    'where', [TOKENS[:, None], WORDS, TOKENS[:, None] & WORDS], ids=['tokens', 'words', 'both']
)
def test_where_is_that_of_the_dense_form(where):
    got = fused_gradients(TEACHER, (ALIKE, VARIED), chunk=5, where=where)
    assert_same(got, dense_gradients(TEACHER, (ALIKE, VARIED), where=where))


def count_slabs(weights, where=None):
    """How many slabs the gradient of sum(weights * divergence) evaluates, at 24 / 6 = 4 a sweep."""
    seen = []

    def counted(student, teacher, **options):
        jax.debug.callback(lambda: seen.append(1))
        return divergence.forward_kl(student, teacher, **options)

    @jax.jit
    def gradient(hidden, head, weights):
        def loss(hidden, head):
            value = fused_divergence(
                hidden, head, TEACHER, divergence=counted, chunk=6, where=where
            )
            return jnp.sum(weights * value)

        return jax.grad(loss, (0, 1))(hidden, head)

    jax.block_until_ready(gradient(*STUDENT, weights))
    jax.effects_barrier()
    return len(seen)


def test_only_weights_that_differ_between_kept_tokens_cost_a_second_sweep():
    assert count_slabs(ALIKE) == 4
    assert count_slabs(ALIKE * TOKENS, where=TOKENS[:, None]) == 4
    assert count_slabs(VARIED) == 8


def test_logits_of_all_tokens_never_exist():
    def loss(hidden, head, teacher):
        return jnp.mean(fused_divergence(hidden, head, teacher, chunk=6))

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*STUDENT, TEACHER)
    text = lowered.as_text() + lowered.compile().as_text()
    assert '6x9xf32' in text  # a slab
    assert '24x9xf32' not in text
    assert '[24,9]' not in text


@pytest.mark.parametrize('sharded', ['teacher too', 'student alone'])
def test_shard_map_sums_the_gradient_of_a_replicated_head(mesh, sharded):
    tokens, whole = PartitionSpec(MESH_AXIS), PartitionSpec()
    given = TEACHER if sharded == 'teacher too' else signal.Dense(jnp.ones((1, V)))
    teacher_spec = signal.HiddenHead(tokens, whole) if sharded == 'teacher too' else whole

    def loss(hidden, head, teacher):
        if sharded == 'student alone':
            teacher = jnp.broadcast_to(teacher.logits, (hidden.shape[0], V))
        return jnp.sum(fused_divergence(hidden, head, teacher, chunk=2))

    def device(hidden, head, teacher):
        value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head, teacher)
        return jax.lax.psum(value, MESH_AXIS), gradients

    got = jax.jit(
        jax.shard_map(
            device,
            mesh=mesh,
            in_specs=(tokens, whole, teacher_spec),
            out_specs=(whole, (tokens, whole)),
        )
    )(*STUDENT, given)
    everything = TEACHER if sharded == 'teacher too' else jnp.ones((N, V))
    expected = jax.value_and_grad(
        lambda h, w: jnp.sum(divergence.forward_kl(h @ w, everything)), (0, 1)
    )
    assert_same(got, expected(*STUDENT))


def test_jit_over_sharded_tokens_gives_the_same_numbers(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(MESH_AXIS))
    hidden = jax.device_put(STUDENT[0], sharding)
    teacher = signal.HiddenHead(jax.device_put(TEACHER.hidden, sharding), TEACHER.head)
    loss = lambda h, w: jnp.mean(fused_divergence(h, w, teacher, chunk=8))  # noqa: E731
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, STUDENT[1])
    ((value, *gradients),) = dense_gradients(TEACHER, (jnp.full(N, 1 / N),))
    assert_same(got, (np.mean(np.asarray(value)), gradients))


def test_bfloat16_factors_accumulate_in_float32():
    rounded = [x.astype(jnp.bfloat16) for x in STUDENT]
    exact = [x.astype(jnp.float32) for x in rounded]

    def run(f, *factors):
        value, pull = jax.vjp(f, *factors)
        return value, pull(VARIED)

    value, gradients = run(partial(fused_divergence, teacher=TEACHER, chunk=8), *rounded)
    expected, dense = run(lambda h, w: divergence.forward_kl(h @ w, TEACHER), *exact)
    assert value.dtype == jnp.float32
    assert_same(value, expected)
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    assert_same(gradients, dense, tolerance=2**-7)


def test_the_teacher_gets_no_gradient_and_a_schedule_may_set_the_temperature():
    def loss(teacher, temperature):
        f = partial(divergence.forward_kl, temperature=temperature)
        return jnp.sum(fused_divergence(*STUDENT, teacher, divergence=f, chunk=8))

    value, gradient = jax.jit(jax.value_and_grad(loss))(TEACHER, 2.0)
    dense = divergence.forward_kl(STUDENT[0] @ STUDENT[1], TEACHER, temperature=2.0)
    np.testing.assert_allclose(value, np.sum(dense), rtol=1e-5)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'where': TOKENS}, r'where=mask\[:, None\]'),
        ({'chunk': 0}, 'chunk >= 1'),
        ({'teacher': jnp.ones((N - 1, V))}, r'leading axis of the 24 tokens .* \(23, 9\)'),
        ({'student_hidden': normal(2, 3, D)}, 'flatten leading axes first'),
    ],
)
def test_refusals_say_what_was_expected(options, message):
    arguments = {'student_hidden': STUDENT[0], 'student_head': STUDENT[1], 'teacher': TEACHER}
    with pytest.raises(ValueError, match=message):
        fused_divergence(**(arguments | options))


def test_a_signal_that_does_not_define_the_divergence_is_refused_by_name():
    with pytest.raises(TypeError, match=r'^reverse_kl is not defined by .* Sampled'):
        fused_divergence(
            *STUDENT,
            signal.sample(jax.random.key(0), TEACHER.logits(), 2),
            divergence=divergence.reverse_kl,
        )
