"""ProARD and TRADES: steps by hand, which architecture is drawn, what phases open and sort."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import divergence, robust
from kd.methods.vision.proard import architecture_key, proard
from kd.methods.vision.trades import trades
from kd.models import elastic
from kd.models.elastic_mlp import ElasticMLP
from kd.models.elastic_resnet import ElasticResNet
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.networks import sliced

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, CLASSES, LR = 12, 3, 0.1
NET = from_linen(
    ElasticMLP((4, 6), (1, 2), (2, 5), num_classes=CLASSES), jax.ShapeDtypeStruct((1, 5), 'float32')
)
SPACE = NET.module.space()
THREAT = dict(epsilon=0.3, step=0.1, attack_steps=3)


def context(network=NET, **more):
    given = dict(network=network, teacher=network, tx=optax.sgd(LR), num_classes=CLASSES) | more
    return seeds.context(**given)


def batch_of(shape=(5,)):
    rng = np.random.default_rng(0)
    return {
        'input': jnp.asarray(rng.uniform(-0.6, 0.6, (B, *shape)), jnp.float32),
        'label': jnp.asarray(rng.integers(0, CLASSES, B), jnp.int32),
    }


def begun(method, network=NET, **frozen):
    teacher = jax.jit(network.init)(jax.random.key(9))
    return jax.jit(method.init)(jax.random.key(0), {'teacher': teacher, **frozen})


def value(metric):
    return float(metric.total / metric.count)


def attacked(key, loss, x, steps=3):
    return robust.pgd(key, loss, x, epsilon=0.3, step=0.1, steps=steps, jitter=0.002)


def test_a_step_of_trades_by_hand():
    method, batch = trades(context(), beta=2.0, **THREAT), batch_of()
    state = begun(method)
    after, metrics = jax.jit(method.step)(state, batch)
    _, key = jax.random.split(state.step_key())
    params, x = state.params['network'], batch['input']

    def logits(params, x):
        return NET.apply({'params': params}, x).logits

    @jax.jit
    def by_hand(params):
        law = logits(params, x)
        far = attacked(
            jax.random.split(key, 3)[0],
            lambda x: divergence.forward_kl(logits(params, x), law), x,
        )  # fmt: skip

        def loss(params):
            p, q = (jax.nn.log_softmax(logits(params, z)) for z in (x, far))
            hard = -jnp.take_along_axis(p, batch['label'][:, None], -1)[:, 0]
            return jnp.mean(hard + 2.0 * jnp.sum(jnp.exp(p) * (p - q), -1))

        return jax.value_and_grad(loss)(params)

    loss, slope = by_hand(params)
    assert value(metrics['loss']) == pytest.approx(float(loss), rel=1e-5)
    moved = jax.tree.map(lambda a, b: (a - b) / LR, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), moved, slope)


@pytest.mark.parametrize('criterion', ['rslad', 'ard', 'adaad'])
def test_a_step_is_that_of_the_smaller_network_by_itself(criterion):
    """The loss and the gradient of the part that was drawn; all else stays, bit for bit."""
    method, batch = proard(context(), criterion=criterion, clean_weight=0.25, **THREAT), batch_of()
    state = begun(method)
    params, x, y = state.params['network'], batch['input'], batch['label']
    arch = jax.device_get(SPACE.sample(architecture_key(state)))
    small = sliced(NET, arch)
    own = elastic.slice_variables(NET, {'params': params}, arch)['params']
    after, metrics = jax.jit(method.step)(state, batch)
    key = jax.random.split(state.step_key(), 5)[1]

    @jax.jit
    def by_hand(own):
        say = lambda own, x: small.apply({'params': own}, x).logits  # noqa: E731
        ask = lambda x: NET.apply(state.frozen['teacher'], x).logits  # noqa: E731
        kl = lambda s, t: divergence.forward_kl(s, t)  # noqa: E731
        hard = lambda z: -jax.nn.log_softmax(z)[jnp.arange(B), y]  # noqa: E731
        raised = {
            'rslad': lambda z: kl(say(own, z), ask(x)),
            'ard': lambda z: hard(say(own, z)),
            'adaad': lambda z: kl(say(own, z), ask(z)),
        }[criterion]
        far = attacked(key, raised, x)

        def loss(own):
            near, there = say(own, x), say(own, far)
            if criterion == 'ard':
                return kl(there, ask(x)).mean()
            target = ask(x if criterion == 'rslad' else far)
            return (0.75 * kl(there, target) + 0.25 * kl(near, ask(x))).mean()

        return jax.value_and_grad(loss)(own)

    loss, slope = by_hand(own)
    assert value(metrics['loss']) == pytest.approx(float(loss), rel=1e-5)
    moved = jax.tree.map(lambda a, b: (a - b) / LR, params, after.params['network'])
    inside = elastic.slice_variables(NET, {'params': moved}, arch)['params']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), inside, slope)
    count = lambda tree: sum(int((np.asarray(x) != 0).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(moved) == count(inside) > 0
    # It was not the largest that was drawn.
    assert any((arch[name] != SPACE.largest()[name]).any() for name in arch)


def test_without_radius_the_loss_is_the_divergence_and_classes_may_share_it():
    batch = batch_of()
    method = proard(context(), epsilon=0.0, step=0.1, attack_steps=1, class_mean=True)
    state = begun(method)
    _, metrics = jax.jit(method.step)(state, batch)
    arch = SPACE.sample(architecture_key(state))
    student = NET.apply(state.variables(), batch['input'], arch=arch).logits
    teacher = NET.apply(state.frozen['teacher'], batch['input']).logits
    expected = float(divergence.forward_kl(student, teacher).mean())
    assert value(metrics['student_loss']) == pytest.approx(expected, rel=1e-5)
    assert value(metrics['loss']) == pytest.approx(expected / CLASSES, rel=1e-5)


def test_a_joint_teacher_is_the_largest_network_which_learns_by_trades():
    batch = batch_of()
    method = proard(context(teacher=None), joint=0.5, epsilon=0.0, step=0.1, attack_steps=1)
    state = begun(method)
    after, metrics = jax.jit(method.step)(state, batch)
    total = 0.5 * value(metrics['largest_loss']) + value(metrics['student_loss'])
    assert value(metrics['loss']) == pytest.approx(total, rel=1e-5)
    arch = SPACE.sample(architecture_key(state))

    @jax.jit
    @jax.grad
    def slope(params):
        whole = NET.apply({'params': params}, batch['input']).logits
        part = NET.apply({'params': params}, batch['input'], arch=arch).logits
        law = jax.lax.stop_gradient(whole)
        hard = -jax.nn.log_softmax(whole)[jnp.arange(B), batch['label']]
        return jnp.mean(0.5 * hard + divergence.forward_kl(part, law))

    params = state.params['network']
    moved = jax.tree.map(lambda a, b: (a - b) / LR, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope(params))


def test_an_architecture_is_held_for_as_many_steps_as_told():
    state = begun(proard(context(), **THREAT))
    draw = jax.jit(
        jax.vmap(lambda step: SPACE.sample(architecture_key(state.replace(step=step), 4)))
    )
    drawn = jax.device_get(draw(jnp.arange(80)))
    together = np.concatenate(list(drawn.values()), -1).reshape(20, 4, -1)
    np.testing.assert_array_equal(together, together[:, :1].repeat(4, 1))
    assert len(np.unique(together[:, 0], axis=0)) > 6


def test_a_phase_starts_from_the_one_before_with_its_channels_in_order():
    start = jax.jit(NET.init)(jax.random.key(5))
    references = dict(references={'start': NET})
    kept = begun(proard(context(**references), **THREAT), start=start)
    jax.tree.map(np.testing.assert_array_equal, kept.params['network'], start['params'])
    method = proard(context(**references), sort=(), **THREAT)
    found = begun(method, start=start)
    expected = elastic.sort_channels(NET, start)
    jax.tree.map(np.testing.assert_array_equal, found.params['network'], expected['params'])
    changed = jax.tree.map(lambda a, b: np.any(a != b), found.params['network'], start['params'])
    assert any(jax.tree.leaves(changed))
    x = batch_of()['input']
    same = NET.apply(found.variables(), x).logits
    np.testing.assert_allclose(same, NET.apply(start, x).logits, atol=1e-5)


def test_running_statistics_take_in_the_clean_inputs_and_then_the_attacked():
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    network = from_linen(
        ElasticResNet((1.0,), (0,), (0.5,), stem=8, stages=(8,), blocks=(1,), num_classes=CLASSES),
        image,
    )
    method = proard(context(network), epsilon=0.0, step=0.1, attack_steps=1, unroll=True)
    state, batch = begun(method, network), batch_of((4, 4, 1))
    after, _ = jax.jit(method.step)(state, batch)
    kernel = state.params['network']['stem0']['conv']['kernel']
    y = jax.lax.conv_general_dilated(
        batch['input'], kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    found = after.mutables['network']['batch_stats']['stem0']['norm']
    np.testing.assert_allclose(found['mean'], 0.19 * y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found['var'], 0.81 + 0.19 * y.var((0, 1, 2)), atol=1e-5)


def test_what_is_no_space_or_no_elastic_network_is_refused():
    with pytest.raises(UserError, match=r'stage\.method\.space\.width must name some of \(4, 6\)'):
        proard(context(), space={'width': (5,)}, **THREAT)
    plain = from_linen(MLP((4,), num_classes=CLASSES), jax.ShapeDtypeStruct((1, 5), 'float32'))
    with pytest.raises(UserError, match=r'stage\.network must be an elastic network'):
        proard(context(plain), **THREAT)
