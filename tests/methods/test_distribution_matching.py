"""The loop of score distillation against a step by hand, and what it must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.losses import schedule
from kd.method import Objective, Player
from kd.methods.diffusion import common
from kd.methods.diffusion.denoising import denoising
from kd.methods.diffusion.distribution_matching import Further, Term, distribution_matching
from kd.methods.diffusion.dmd import dmd
from kd.metrics import mean, scalar
from kd.models.adapters import Adapter
from kd.models.denoiser import denoiser as denoiser_module
from kd.models.discriminator import FeatureHead
from kd.network import from_linen
from kd.sampling import denoiser, times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

EDM = dict(name='kd.losses.schedule.edm', low=0.02, high=5.0)
B, LR, FAKE_LR = 6, 0.3, 0.1
SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
MIXTURE = mixtures.pairs(3)


@pytest.fixture(scope='module')
def network():
    made = denoiser_module(
        network=dict(name='kd.models.velocity_mlp.VelocityMLP', width=8, depth=2),
        schedule=EDM,
        precondition='edm',
        num_classes=3,
    )
    return from_linen(made, *made.example_inputs(SPEC))


@pytest.fixture(scope='module')
def teacher(network):
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        network.init(jax.random.key(7)),
    )


@pytest.fixture(scope='module')
def batch():
    points, label = MIXTURE.draw(np.random.default_rng(0), B)
    return {'input': jnp.asarray(points, jnp.float32), 'label': jnp.asarray(label, jnp.int32)}


def context(network, **more):
    return seeds.context(
        network=network, teacher=network, tx=optax.sgd(LR), spec=SPEC, steps=10, **more
    )


def method(network, **options):
    options = dict(times=(5.0,), optimizer=dict(name='sgd', lr=FAKE_LR)) | options
    return dmd(context(network), **options)


def begun(method, teacher):
    return jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})


def test_networks_begin_as_the_teacher_and_the_first_direction_is_none(network, teacher, batch):
    made = method(network, updates=1)
    state = begun(made, teacher)
    for part in ('generator', 'fake'):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], teacher['params'])
    moved, metrics = jax.jit(made.step)(state, batch)
    # The critic is the teacher, so that nothing pulls; the critic itself moves.
    jax.tree.map(np.testing.assert_array_equal, moved.params['generator'], teacher['params'])
    assert float(metrics['generator/gap'].total) == 0
    assert float(metrics['fake/grad_norm'].total) > 0
    other = jax.tree.map(lambda x: x[..., :1], teacher)
    with pytest.raises(UserError, match=r'the generator begins as .* another network'):
        begun(made, other)


def test_a_step_against_one_by_hand(network, teacher, batch):
    """One move of the generator and two of the critic, every draw taken by its key."""
    made = method(network, updates=2, guidance=3.0)
    state = begun(made, teacher)
    state = state.replace(params={
        'generator': jax.tree.map(lambda x: 1.1 * x, state.params['generator']),
        'fake': jax.tree.map(lambda x: 0.9 * x, state.params['fake']),
    })  # fmt: skip
    found, _ = jax.jit(made.step)(state, batch)

    path, clock = schedule.edm(0.02, 5.0), times.karras(0.02, 5.0)
    label = batch['label']

    def mu(params, x, t, label=label):
        return network.apply({'params': params}, t, x, label=label).logits

    def rolled(params, key):
        noise_key = jax.random.split(key, 4)[0]
        z = 5.0 * jax.random.normal(noise_key, (B, 2))
        return mu(params, z, jnp.full(B, 5.0))

    def noised(x, key, low, high):
        time_key, noise_key = jax.random.split(key)
        t = clock.at(jax.random.uniform(time_key, (B,), minval=low, maxval=high))
        return x + t[:, None] * jax.random.normal(noise_key, x.shape), t

    start = jax.random.fold_in(state.step_key(), 0)
    keys = jax.random.split(start, 3)

    def loss(params):
        x = rolled(params, keys[0])
        x_t, t = noised(x, keys[1], 0.02, 0.98)
        untold = mu(teacher['params'], x_t, t, jnp.full(B, 3))
        told = mu(teacher['params'], x_t, t)
        real, fake = untold + 3.0 * (told - untold), mu(state.params['fake'], x_t, t)
        g = (fake - real) / jnp.abs(x - real).mean(1, keepdims=True)
        # A product with a constant: its gradient is g times that of x.
        return jnp.mean(jnp.sum(jax.lax.stop_gradient(g) * x, 1)) / 2

    step = jax.jit(jax.grad(loss))(state.params['generator'])
    generator = jax.tree.map(lambda p, g: p - LR * g, state.params['generator'], step)
    close(found.params['generator'], generator)

    fake, player = state.params['fake'], jax.random.fold_in(state.step_key(), 1)
    for move in range(2):
        keys_of = jax.random.split(jax.random.fold_in(player, move), 4)
        if move == 0:  # The sample that the generator made before it moved.
            x = rolled(state.params['generator'], keys[0])
        else:
            x = rolled(generator, keys_of[0])
        x_t, t = noised(x, keys_of[1], 0.0, 1.0)

        def denoise(params, x=x, x_t=x_t, t=t):
            return jnp.mean(jnp.square(mu(params, x_t, t) - x).mean(1) / t**2)

        fake = jax.tree.map(lambda p, g: p - FAKE_LR * g, fake, jax.jit(jax.grad(denoise))(fake))
    close(found.params['fake'], fake)
    assert path.sigma(2.0) == 2.0


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4), one, other)


def test_counts_of_moves_and_what_stays_as_it_is(network, teacher, batch):
    made = dmd(
        seeds.context(
            network=network, teacher=network, tx=optax.adam(1e-3), spec=SPEC, steps=10
        ),
        times=(5.0, 0.8), optimizer=dict(name='adam', lr=1e-3), updates=3,
    )  # fmt: skip
    state, step = begun(made, teacher), jax.jit(made.step)
    for _ in range(2):
        state, metrics = step(state, batch)
    for name, moves in (('generator', 2), ('fake', 6)):
        counts = [int(n) for _, n in optax.tree.get_all_with_path(state.opt_state[name], 'count')]
        assert set(counts) == {moves}
    # The teacher is an argument, no constant of the program.
    consts = jax.make_jaxpr(made.step)(state, batch).consts
    assert sum(np.size(c) for c in consts) < 2_000
    # Frozen trees are as they were.
    jax.tree.map(np.testing.assert_array_equal, state.frozen['teacher'], teacher)
    assert np.isfinite(metrics['generator/loss'].total)


def test_inputs_of_later_times_are_made_by_the_generator(network, teacher, batch):
    """No noised data: other parameters, other inputs."""
    student = common.student(context(network), (5.0, 0.8))
    rolled = jax.jit(
        lambda v, key: student.rollout(v, {'label': batch['label']}, key, (B, 2), True, {})
    )
    other = jax.tree.map(lambda x: 1.5 * x, teacher)
    seen = set()
    for seed in range(6):
        one, two = (rolled(v, jax.random.key(seed)) for v in (teacher, other))
        level = float(one.time[0])
        seen.add(round(level, 3))
        assert (level == 5.0) == bool((one.input == two.input).all())
    assert seen == {5.0, 0.8}


def test_a_discriminator_moves_the_critic_and_its_gradient_reaches_the_samples(
    network, teacher, batch
):
    options = dict(updates=1, feature='hidden1', gan_critic=0.5)
    made = method(network, gan=2.0, **options)
    state = begun(made, teacher)
    assert set(state.params['fake']) == {'network', 'head'}
    moved, metrics = jax.jit(made.step)(state, batch)
    # Nothing but the discriminator pulls here, the critic being the teacher.
    change = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), moved.params, state.params)
    assert max(jax.tree.leaves(change['generator'])) > 0
    assert min(jax.tree.leaves(change['fake']['head'])) > 0
    assert np.isclose(float(metrics['generator/gap'].total), 0)

    # The generator's adversarial loss by hand.
    head, key = FeatureHead(), jax.random.split(jax.random.fold_in(state.step_key(), 0), 3)
    clock = times.karras(0.02, 5.0)

    def loss(params):
        z = 5.0 * jax.random.normal(jax.random.split(key[0], 4)[0], (B, 2))
        x = network.apply({'params': params}, jnp.full(B, 5.0), z, label=batch['label']).logits
        time_key, noise_key = jax.random.split(key[2])
        t = clock.at(jax.random.uniform(time_key, (B,)))
        x_t = x + t[:, None] * jax.random.normal(noise_key, x.shape)
        features = network.apply(
            {'params': state.params['fake']['network']}, t, x_t, label=batch['label'],
            capture=('hidden1',),
        ).features['hidden1']  # fmt: skip
        logits = head.apply({'params': state.params['fake']['head']}, features)
        return 2.0 * jnp.mean(jnp.log1p(jnp.exp(-logits)))

    step = jax.jit(jax.grad(loss))(state.params['generator'])
    generator = jax.tree.map(lambda p, g: p - LR * g, state.params['generator'], step)
    close(moved.params['generator'], generator)

    with pytest.raises(UserError, match="feature='hidden9' is no feature of the network, whose"):
        method(network, gan=1.0, feature='hidden9')


def assembled(network, further=None, tx=None, terms=(), **critic):
    """A method whose generator moves by its terms alone, at one time."""
    given = context(network, references={'other': network})
    law, still = times.uniform(times.karras(0.02, 5.0)), dict(name='sgd', lr=0.0)
    return distribution_matching(
        given, student=common.student(given, (5.0,)), teacher=common.teacher(given), terms=terms,
        critic=common.critic(given, still, law, updates=1, weight='eps', **critic),
        direction=lambda views, key: (jnp.zeros_like(views.x), {}), further=further, tx=tx,
    )  # fmt: skip


def test_further_players_are_seen_by_terms_and_may_move_the_generator(network, teacher, batch):
    """And a critic that begins as a reference goes towards the generator before that."""
    tx = optax.sgd(LR)

    def weighed(views, batch, key):
        return views.state.params['scale'] * views.x.sum(1) + 0 * batch['input'][:, 0]

    def scale_loss(params, state, batch, key):
        return Objective(mean(params * batch['out/generator']['x'].sum(1)))

    def shrink(params, state, batch, key):
        return Objective(scalar(0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))))

    further = Further(
        {
            'scale': Player(scale_loss, optax.sgd(1.0)),
            'shrink': Player(shrink, tx, of='generator', slot='generator', repeats=2, rows='same'),
        },
        lambda key, frozen: {'scale': {'params': frozen['offset'] + 2.0}},
    )
    made = assembled(network, further, tx, [Term('weighed', 0.5, weighed)], start='other',
                     coupling=0.75)  # fmt: skip
    other = jax.tree.map(lambda x: 0.5 * x + 0.1, teacher)
    frozen = {'teacher': teacher, 'other': other, 'offset': jnp.float32(1.0)}
    state = jax.jit(made.init)(jax.random.key(0), frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params['fake'], other['params'])
    jax.tree.map(np.testing.assert_array_equal, state.params['generator'], teacher['params'])
    moved, metrics = jax.jit(made.step)(state, batch)

    key = jax.random.split(jax.random.fold_in(state.step_key(), 0), 4)[0]
    z = 5.0 * jax.random.normal(jax.random.split(key, 4)[0], (B, 2))

    def said(params):
        own = {'params': params}
        return network.apply(own, jnp.full(B, 5.0), z, label=batch['label']).logits.sum(1)

    loss = jax.jit(jax.value_and_grad(lambda params: said(params).mean()))
    sum_of_x, step = loss(teacher['params'])
    step = jax.tree.map(lambda g: 0.5 * 3.0 * g, step)
    generator = jax.tree.map(lambda p, g: p - LR * g, teacher['params'], step)
    close(
        moved.params['fake'],
        jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, other['params'], generator),
    )
    close(moved.params['generator'], jax.tree.map(lambda x: (1 - LR) ** 2 * x, generator))
    np.testing.assert_allclose(moved.params['scale'], 3.0 - sum_of_x, rtol=1e-5)
    assert set(state.opt_state) == {'generator', 'coupling', 'fake', 'scale'}
    assert float(metrics['shrink/loss'].count) == 2

    with pytest.raises(
        UserError, match=r"the critic begins as 'none', and references are \['other"
    ):
        assembled(network, start='none')
    with pytest.raises(
        UserError, match=r'method\.coupling: of adapters critic and generator are not of one form'
    ):
        assembled(network, coupling=0.9, adapter=Adapter(2, 4.0, 'hidden'))


def test_times_that_a_schedule_does_not_have(network):
    with pytest.raises(UserError, match=r'method\.times must decrease, got \(0.8, 5.0\)'):
        method(network, times=(0.8, 5.0))
    with pytest.raises(UserError, match=r"leaves the times of the schedule 'edm', 0.02 to 5\."):
        method(network, times=(80.0,))


def test_heads_read_vectors_tokens_and_maps():
    for shape in ((3, 5), (3, 7, 5), (3, 16, 16, 5)):
        head = FeatureHead(width=8)
        x = jax.random.normal(jax.random.key(0), shape)
        assert jax.jit(head.init_with_output)(jax.random.key(1), x)[0].shape == (3,)


def test_denoising_learns_the_exact_denoiser(network):
    """And with labels left out for half of the examples, the unconditional one."""
    points, label = MIXTURE.draw(np.random.default_rng(1), 4_096)
    data = {'input': points.astype(np.float32), 'label': label.astype(np.int32)}
    made = denoiser_module(
        network=dict(name='kd.models.velocity_mlp.VelocityMLP', width=64, depth=3),
        schedule=EDM, precondition='edm', num_classes=3,
    )  # fmt: skip
    wide = from_linen(made, *made.example_inputs(SPEC))
    teach = denoising(
        seeds.context(network=wide, tx=optax.adam(3e-3), spec=SPEC),
        law=dict(name='kd.sampling.times.lognormal'), weight='edm', label_dropout=0.5,
    )  # fmt: skip
    state = seeds.train(teach, data, np.arange(1), steps=500, batch_size=256)
    variables = {'params': jax.tree.map(lambda x: x[0], state.params['network'])}
    exact = mixtures.exact_denoiser(MIXTURE, schedule.edm(0.02, 5.0))
    t = jnp.full(512, 0.5)
    x = jnp.asarray(points[:512], jnp.float32) + 0.5 * jax.random.normal(
        jax.random.key(0), (512, 2)
    )
    learnt = denoiser.of_network(wide)
    for given in (label[:512], np.full(512, 3)):
        condition = {'label': jnp.asarray(given, jnp.int32)}
        one, other = (d.apply(variables, x, t, condition).x0 for d in (exact, learnt))
        trivial = float(jnp.mean(jnp.square(one - one.mean(0))))
        assert float(jnp.mean(jnp.square(one - other))) < 0.05 * trivial
