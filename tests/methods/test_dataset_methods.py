"""Methods of dataset distillation: steps against gradients composed by hand, experts, sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from kd.claims import dataset_seeds
from kd.data.distilled import synthetic
from kd.errors import UserError
from kd.evaluators import compensated_set
from kd.losses import segments as segments_lib
from kd.losses import sharpness
from kd.methods.dataset import common, infer_ufc
from kd.methods.dataset.coreset import coreset
from kd.methods.dataset.distribution_matching import distribution_matching
from kd.methods.dataset.expert_trajectories import expert_trajectories, flatten
from kd.methods.dataset.gradient_matching import gradient_matching
from kd.methods.dataset.mtt import mtt
from kd.methods.dataset.smooth_experts import smooth_experts
from kd.models import convnet
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.parallel.sharding import tree_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, SHAPE = 10, (4, 4, 1)
NET = from_linen(
    MLP(widths=(8,), activation='tanh'), jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
)


@pytest.fixture(scope='module')
def context():
    """Forty random images, four per class, and a small perceptron."""
    rng = np.random.default_rng(0)
    part = {
        'input': rng.normal(size=(40, *SHAPE)).astype(np.float32),
        'label': np.arange(40, dtype=np.int32) % CLASSES,
    }
    task = dataset_seeds.Task(part, part, part, NET, batch_size=10)
    return dataset_seeds.context(task, tx=optax.sgd(0.1), batch_size=1)


@pytest.fixture(scope='module')
def vectors():
    """Parameter vectors [3, P] of unrelated networks."""
    keys = jax.random.split(jax.random.key(5), 3)
    return flatten(jax.vmap(lambda k: NET.init(k)['params'])(keys))


def batch_of(vectors, epochs=2):
    return {
        'start': vectors[:1],
        'targets': vectors[None, 1 : 1 + epochs],
        'epoch': jnp.array([1]),
    }


def descent(images, labels, step_size, start, steps):
    """Plain descent on the synthetic set, written out."""
    unravel = common.unraveller(NET)

    @jax.jit
    def loss(vector):
        log_p = jax.nn.log_softmax(NET.apply({'params': unravel(vector)}, images).logits)
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    for _ in range(steps):
        start = start - step_size * jax.grad(loss)(start)
    return start


def test_an_outer_step_is_the_gradient_of_the_unrolled_run_composed_by_hand(context, vectors):
    method = mtt(context, images_per_class=1, student_steps=3, step_size=0.3, log_step_size=True)
    state = method.init(jax.random.key(0), None)
    new, metrics = jax.jit(method.step)(state, batch_of(vectors))

    def distance(images, log_rate):
        end = descent(images, state.mutables['network']['label'], jnp.exp(log_rate), vectors[0], 3)
        return ((end - vectors[2]) ** 2).sum() / ((vectors[0] - vectors[2]) ** 2).sum()

    given = state.params['network']['images'], state.params['network']['log_step_size']
    value, (images, rate) = jax.jit(jax.value_and_grad(distance, (0, 1)))(*given)
    assert metrics['loss'].total / metrics['loss'].count == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(
        new.params['network']['images'], given[0] - 0.1 * images, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        new.params['network']['log_step_size'], given[1] - 0.1 * rate, rtol=1e-5
    )


def test_smooth_experts_with_all_its_parts_off_is_trajectory_matching(context, vectors):
    options = dict(images_per_class=2, student_steps=4, step_size=0.3, start='random')
    off = dict(momentum=0.0, perturbation=0.0, intermediate='end', start_experts='')
    plain, same = mtt(context, **options), smooth_experts(context, **off, **options)
    one, two = (
        jax.jit(m.step)(m.init(jax.random.key(0), None), batch_of(vectors))[0]
        for m in (plain, same)
    )
    jax.tree.map(np.testing.assert_array_equal, one.params['network'], two.params['network'])


def test_intermediate_targets_momentum_and_balance_change_the_step_as_written_out(context, vectors):
    method = smooth_experts(
        context, images_per_class=1, student_steps=4, step_size=0.1, start='random',
        start_experts='', momentum=0.9, balance_epochs=2, perturbation=0.0, intermediate='all',
    )  # fmt: skip
    state = method.init(jax.random.key(0), None)
    metrics = jax.jit(method.step)(state, batch_of(vectors))[1]
    # Epoch 1 of 2: h = 1, so the balance is log_5(8).
    balance, images, labels = (
        np.log(8) / np.log(5),
        state.params['network']['images'],
        np.arange(CLASSES),
    )
    at, velocity, ends = vectors[0], 0.0, []
    for _ in range(4):
        gradient = (at - descent(images, labels, 1.0, at, 1)) * balance
        velocity = 0.9 * velocity + gradient
        at = at - 0.1 * velocity
        ends.append(at)
    wanted = sum(
        ((end - target) ** 2).sum() / ((vectors[0] - target) ** 2).sum()
        for end, target in ((ends[1], vectors[1]), (ends[3], vectors[2]))
    )
    assert metrics['loss'].total == pytest.approx(float(wanted), rel=1e-5)


def test_tesla_is_exact_for_a_single_step_also_through_the_logarithm(context, vectors):
    options = dict(images_per_class=1, student_steps=1, step_size=0.3, log_step_size=True)
    one, two = (
        jax.jit(m.step)(m.init(jax.random.key(0), None), batch_of(vectors))[0]
        for m in (mtt(context, gradient=g, **options) for g in ('exact', 'tesla'))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        one.params['network'],
        two.params['network'],
    )


def test_learned_labels_and_labels_of_the_expert(context, vectors):
    options = dict(images_per_class=1, student_steps=2, step_size=0.3)
    learned = mtt(context, labels='learned', **options)
    state = learned.init(jax.random.key(0), None)
    start = synthetic.of_state(state).label
    np.testing.assert_allclose(start.max(-1), 0.9, rtol=1e-6)
    new = jax.jit(learned.step)(state, batch_of(vectors))[0]
    assert (
        np.abs(
            new.params['network']['label_logits'] - state.params['network']['label_logits']
        ).max()
        > 1e-5
    )

    expert = mtt(context, labels='expert', gradient='tesla', **options)
    state = expert.init(jax.random.key(0), None)
    new = jax.jit(expert.step)(state, batch_of(vectors))[0]
    target = common.unraveller(NET)(vectors[2])
    wanted = jax.nn.softmax(NET.apply({'params': target}, state.params['network']['images']).logits)
    np.testing.assert_allclose(synthetic.of_state(new).label, wanted, rtol=1e-5)


def test_a_segment_without_a_finite_distance_is_skipped_and_counted(context, vectors):
    method = mtt(context, images_per_class=1, student_steps=3, step_size=0.3)
    state = method.init(jax.random.key(0), None)
    step = jax.jit(method.step)
    still = batch_of(jnp.stack([vectors[0]] * 3))
    new, metrics = step(state, still)
    jax.tree.map(np.testing.assert_array_equal, new.params['network'], state.params['network'])
    assert metrics['skipped'].total == 1
    assert metrics['loss'].count == 0
    # Beside a good segment the gradient is that of the good one.
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), still, batch_of(vectors))
    mixed, metrics = step(state, both)
    alone = step(state, batch_of(vectors))[0]
    assert (metrics['skipped'].total, metrics['skipped'].count) == (1, 2)
    np.testing.assert_allclose(
        mixed.params['network']['images'], alone.params['network']['images'], rtol=1e-5
    )


def test_inner_batches_use_every_image_once_per_pass(context, vectors):
    """Images outside the batches of the inner loop get no gradient."""
    step = lambda n: jax.jit(  # noqa: E731
        mtt(context, images_per_class=1, student_steps=n, step_size=0.3, inner_batch=4).step
    )
    state = mtt(context, images_per_class=1, student_steps=1, step_size=0.3).init(
        jax.random.key(0), None
    )
    for steps, touched in ((2, 8), (3, 10)):
        new = step(steps)(state, batch_of(vectors))[0]
        moved = (
            np.abs(new.params['network']['images'] - state.params['network']['images']).max(
                (1, 2, 3)
            )
            > 0
        )
        assert moved.sum() == touched


def test_more_images_per_class_than_there_are_is_said(context):
    rng = np.random.default_rng(1)
    # Three examples of class 0, more of the others.
    part = {
        'input': rng.normal(size=(60, *SHAPE)).astype(np.float32),
        'label': np.array([0, 0, 0, *(1 + np.arange(57) % 9)], np.int32),
    }
    task = dataset_seeds.Task(part, part, part, NET, batch_size=10)
    uneven = dataset_seeds.context(task, tx=optax.sgd(0.1), batch_size=1)
    for build in (coreset, mtt):
        extra = dict(student_steps=1, step_size=0.1) if build is mtt else {}
        with pytest.raises(UserError, match='5 images of each of 10 classes are more than the 40'):
            build(context, images_per_class=5, **extra)
        with pytest.raises(UserError, match='class 0 has only 3 examples; lower images_per_class'):
            build(uneven, images_per_class=4, **extra)


@pytest.mark.parametrize(
    'options',
    [{}, dict(rho=0.05, alpha=0.3), dict(weight_decay=0.1, drop_epoch=1, drop_factor=0.5)],
)
def test_vmapped_experts_are_single_runs(context, options):
    tx = optax.sgd(0.2, momentum=0.5)
    context = dataclasses.replace(context, optional_tx=tx, steps=4 * 4, batch_size=10)
    method = expert_trajectories(context, experts=4, together=2, epochs=2, **options)
    state, step = method.init(jax.random.key(3), {}), jax.jit(method.step)
    batches = [context.source('train').fetch(np.arange(i, i + 10) % 40) for i in range(16)]
    for number, batch in enumerate(batches):
        state = step(state, batch)[0]
        if number == 8:
            begun = state.extra['start']

    decay, drop = options.get('weight_decay', 0.0), 'drop_epoch' in options

    @jax.jit
    def update(params, opt_state, batch, factor):
        def loss(p):
            logits = NET.apply({'params': p}, batch['input']).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

        if options.get('rho'):
            grads = sharpness.gsam_gradient(loss, params, rho=0.05, alpha=0.3, adaptive=True)[1]
        else:
            grads = jax.grad(loss)(params)
        grads = jax.tree.map(lambda g, p: g + decay * p, grads, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + factor * u, params, updates), opt_state

    def single(expert):
        """Expert 2 or 3, in the second round."""
        first = params = NET.init(jax.random.fold_in(jax.random.key(3), expert))['params']
        opt_state = tx.init(params)
        for number, batch in enumerate(batches[8:]):
            if drop and number == 4:
                opt_state = tx.init(params)
            factor = 0.5 if drop and number >= 4 else 1.0
            params, opt_state = update(params, opt_state, batch, factor)
        return ravel_pytree(first)[0], ravel_pytree(params)[0]

    for place, expert in enumerate((2, 3)):
        first, last = single(expert)
        np.testing.assert_allclose(flatten(begun)[place], first, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(
            flatten(state.params['network'])[place], last, rtol=2e-5, atol=1e-6
        )


def test_faded_in_losses_scale_plain_descent(context):
    """With the factor 0.5 in epoch 0, a step of plain descent is half as long."""
    context = dataclasses.replace(context, steps=4, batch_size=10)
    batch = context.source('train').fetch(np.arange(10))

    def moved(**options):
        method = expert_trajectories(context, experts=1, together=1, epochs=1, **options)
        state = method.init(jax.random.key(3), {})
        new = jax.jit(method.step)(state, batch)[0]
        return flatten(new.params['network']) - flatten(new.extra['start'])

    np.testing.assert_allclose(moved(ramp_epochs=10), 0.5 * moved(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(('momentum', 'equal'), [(0.0, True), (0.9, False)])
def test_fading_in_is_a_schedule_of_the_rate_without_momentum_only(context, momentum, equal):
    batch = context.source('train').fetch(np.arange(10))

    def moved(rate, **options):
        tx = optax.sgd(rate, momentum=momentum)
        made = dataclasses.replace(context, steps=8, batch_size=10, optional_tx=tx)
        method = expert_trajectories(made, experts=1, together=1, epochs=2, **options)
        state, step = method.init(jax.random.key(3), {}), jax.jit(method.step)
        for _ in range(8):
            state = step(state, batch)[0]
        return flatten(state.params['network']) - flatten(state.extra['start'])

    factors = segments_lib.loss_ramp(jnp.array([0, 1]), epochs=10)
    assert 0 < factors[0] < factors[1] < 1
    scheduled = moved(lambda count: 0.1 * factors[count // 4])
    difference = jnp.abs(moved(0.1, ramp_epochs=10) - scheduled).max()
    assert (difference < 1e-6) == equal
    assert equal or difference > 1e-2 * jnp.abs(scheduled).max()


@pytest.mark.parametrize(
    ('changes', 'options', 'message'),
    [
        ({'steps': 3}, {}, 'of 2 epochs with 4 steps take 16'),
        ({}, {'together': 3}, 'a multiple of those together'),
        (
            {'optional_network': from_linen(ConvNet(1, 4, norm='batch'), NET.inputs[0])},
            {},
            "norm='instance'",
        ),
    ],
)
def test_experts_that_cannot_be_are_said(context, changes, options, message):
    context = dataclasses.replace(context, **{'steps': 16, 'batch_size': 10, **changes})
    with pytest.raises(UserError, match=message):
        expert_trajectories(context, **{'experts': 4, 'together': 2, 'epochs': 2, **options})


def test_eight_devices_give_the_numbers_of_one(context, vectors):
    """Images and inner loop over `tensor`, segments over `data`; experts over both."""
    wide = dataclasses.replace(context, steps=8, batch_size=10)
    matching = mtt(context, images_per_class=4, student_steps=3, step_size=0.3)
    experts = expert_trajectories(wide, experts=8, together=8, epochs=2)
    segments = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), batch_of(vectors), batch_of(vectors[::-1])
    )
    images = wide.source('train').fetch(np.arange(10))
    mesh = make_mesh({'data': 2, 'fsdp': 1, 'tensor': 4})
    rules = ((r'images$', ('tensor',)), (r'^(params|extra/start)/', (('data', 'tensor'),)))
    for method, batch, spec in ((matching, segments, ('data',)), (experts, images, ())):
        state = jax.jit(method.init)(jax.random.key(0), {})
        places = tree_shardings(jax.eval_shape(lambda s: s, state), rules, mesh)
        given = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*spec)))
        spread = jax.device_put(state, places)
        step = jax.jit(method.step)
        for _ in range(2):
            state, alone = step(state, batch)
            spread, together = step(spread, given)
        leaf = jax.tree.leaves(spread.params['network'])[0]
        assert len({s.device for s in leaf.addressable_shards}) == 8
        assert leaf.addressable_shards[0].data.size < leaf.size
        for one, eight in ((state.params['network'], spread.params['network']), (alone, together)):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight
            )


def grouped(context):
    """A batch of four groups of one image per class, [4, C, ...]."""
    rows = np.arange(40).reshape(4, CLASSES)
    return {'input': jnp.asarray(context.source('train').fetch(rows.ravel())['input']).reshape(
        4, CLASSES, *SHAPE
    )}  # fmt: skip


def test_distribution_matching_moves_along_the_gradient_of_the_summed_distances(context):
    method = distribution_matching(context, images_per_class=2)
    state, batch = method.init(jax.random.key(0), None), grouped(context)
    new, metrics = jax.jit(method.step)(state, batch)
    # The network of the step, from its parameters' key.
    net_key = jax.random.split(state.step_key(), 3)[0]
    params = NET.init(net_key)['params']

    def embed(x):
        flat = x.reshape(len(x), -1)
        return jnp.tanh(flat @ params['hidden0']['kernel'] + params['hidden0']['bias'])

    def loss(images):
        total = 0.0
        for k in range(CLASSES):
            ours = embed(images[2 * k : 2 * k + 2]).mean(0)
            total += ((ours - embed(batch['input'][:, k]).mean(0)) ** 2).sum()
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params['network']['images'])
    assert metrics['loss'].total == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(
        new.params['network']['images'],
        state.params['network']['images'] - 0.1 * grads,
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_convnet_inside_of_a_loop_is_what_its_platform_runs_best(context):
    net = from_linen(ConvNet(depth=1, width=2), jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
    assert convnet.in_loops(net.module, 'tpu').conv == 'direct'
    assert convnet.in_loops(net.module.clone(conv='direct'), 'cpu').conv == 'direct'
    assert common.in_loops(NET, context) is NET
    here = common.in_loops(net, context)
    assert (net.module.conv, here.module.conv) == ('auto', 'matmul')
    variables, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, *SHAPE))
    ours, plain = (each.apply(variables, x, train=True).logits for each in (here, net))
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_gradient_matching_compares_classes_and_trains_its_network(context):
    method = gradient_matching(
        context, images_per_class=2, kind='squared', network_steps=3, network_lr=0.5,
        restart_every=2,
    )  # fmt: skip
    state, batch = method.init(jax.random.key(0), None), grouped(context)
    step = jax.jit(method.step)
    new, metrics = step(state, batch)
    theta = ravel_pytree(state.extra['network'])[0]
    images = state.params['network']['images']
    # The gradient of one class at theta is what one step of descent at rate 1 takes away.
    distances = []
    for k in range(CLASSES):
        ours, real = (
            theta - descent(x, jnp.full(len(x), k), 1.0, theta, 1)
            for x in (images[2 * k : 2 * k + 2], batch['input'][:, k])
        )
        distances.append(((ours - real) ** 2).sum())
    value = metrics['loss'].total / metrics['loss'].count
    assert value == pytest.approx(float(np.sum(distances)), rel=1e-4)
    trained = descent(new.params['network']['images'], np.repeat(np.arange(10), 2), 0.5, theta, 3)
    np.testing.assert_allclose(ravel_pytree(new.extra['network'])[0], trained, rtol=1e-4, atol=1e-6)
    # A new network comes after two steps.
    later = step(step(new, batch)[0], batch)[0]
    fresh = NET.init(jax.random.fold_in(step(new, batch)[0].step_key(), 1))['params']
    wanted = descent(later.params['network']['images'], np.repeat(np.arange(10), 2), 0.5,
                     ravel_pytree(fresh)[0], 3)  # fmt: skip
    np.testing.assert_allclose(
        ravel_pytree(later.extra['network'])[0], wanted, rtol=1e-4, atol=1e-6
    )


def test_a_network_that_is_used_once_is_not_trained(context):
    method = gradient_matching(
        context, images_per_class=2, kind='squared', network_steps=3, network_lr=0.5,
        restart_every=1,
    )  # fmt: skip
    state = method.init(jax.random.key(0), None)
    new = jax.jit(method.step)(state, grouped(context))[0]
    jax.tree.map(np.testing.assert_array_equal, new.extra['network'], state.extra['network'])
    assert np.abs(new.params['network']['images'] - state.params['network']['images']).max() > 0


def test_a_pass_in_small_batches_is_full_batch_descent_to_first_order(context):
    """Four batches of five of the twenty images, against four steps on all of them."""
    ends = []
    for size in (0, 5):
        method = gradient_matching(
            context, images_per_class=2, kind='squared', network_steps=4, network_lr=1e-3,
            network_batch=size,
        )  # fmt: skip
        state = method.init(jax.random.key(0), None)
        new = jax.jit(method.step)(state, grouped(context))[0]
        begin, end = (ravel_pytree(s.extra['network'])[0] for s in (state, new))
        ends.append(np.asarray(end - begin) / 1e-3)
    full, batches = ends
    assert np.linalg.norm(full) > 1
    np.testing.assert_allclose(batches, full, atol=0.02 * np.linalg.norm(full))
    assert np.abs(batches - full).max() > 1e-4 * np.linalg.norm(full)


@pytest.fixture(scope='module')
def compensated(context):
    net = from_linen(ConvNet(1, 4, norm='batch'), NET.inputs[0])
    nets = {'a': net, 'b': net}
    frozen = {name: net.init(jax.random.key(i)) for i, name in enumerate(nets)}
    frozen['a']['batch_stats']['block0']['norm']['mean'] += 0.3
    context = dataclasses.replace(context, references=nets)
    method = infer_ufc.infer_ufc(
        context, images_per_class=2, statistics_weight=0.5, shift=0, first_weight=10.0
    )
    return method, method.init(jax.random.key(0), frozen), nets


def test_what_enters_a_normalisation_layer_is_the_output_of_its_convolution(context, compensated):
    _, state, nets = compensated
    images = jnp.asarray(context.source('train').fetch(np.arange(6))['input'])
    logits, layers = infer_ufc.normalisation_inputs(nets['a'], state.frozen['a'], images)
    output = nets['a'].apply(state.frozen['a'], images, capture=('block0/conv',))
    entered = np.asarray(output.features['block0/conv']).reshape(-1, 4)
    np.testing.assert_allclose(logits, output.logits)
    np.testing.assert_allclose(layers[0].mean, entered.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layers[0].variance, entered.var(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layers[0].running_mean, 0.3, atol=1e-6)
    with pytest.raises(ValueError, match="norm='batch'"):
        infer_ufc.normalisation_inputs(NET, NET.init(jax.random.key(0)), images)


def test_a_compensator_moves_along_the_sum_of_the_gradients_of_its_images(compensated):
    method, state, nets = compensated
    new = jax.jit(method.step)(state, {})[0]
    groups, variables = state.mutables['network']['groups'], state.frozen['a']
    assert groups.shape == (1, CLASSES, *SHAPE)

    def loss(images):
        output = nets['a'].apply(variables, images, capture=('block0/conv',))
        log_p = jax.nn.log_softmax(output.logits)
        entered = output.features['block0/conv'].reshape(-1, 4)
        running = variables['batch_stats']['block0']['norm']
        norms = jnp.linalg.norm(entered.var(0) - running['var']) + jnp.linalg.norm(
            entered.mean(0) - running['mean']
        )
        return -jnp.diagonal(log_p).mean() + 0.5 * 10.0 * norms

    by_image = jax.jit(jax.grad(loss))(groups[0])
    np.testing.assert_allclose(
        new.params['network']['a'][0, 0], -0.1 * by_image.sum(0), rtol=1e-4, atol=1e-6
    )


def test_without_training_every_variant_is_the_real_image_with_the_same_label(compensated):
    _, state, nets = compensated
    images = compensated_set.unfolded(state)
    real = np.asarray(state.mutables['network']['groups'][0])
    np.testing.assert_array_equal(images, np.concatenate([real] * 3))
    labelled = compensated_set.soft_examples(nets, state.frozen, images)
    wanted = np.mean([nets[n].apply(state.frozen[n], real).logits for n in nets], 0)
    np.testing.assert_allclose(labelled['label'], np.tile(wanted, (3, 1)), rtol=1e-5, atol=1e-6)
