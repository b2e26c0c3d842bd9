"""Videos frame by frame: their exact denoiser, rollouts with caches, and pairs of n and n + 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from kd import sample
from kd.claims import seeds
from kd.data.builders import ring_video
from kd.errors import UserError
from kd.evaluators import generation
from kd.evaluators.causal_samples import causal_samples
from kd.losses.schedule import edm, flow
from kd.methods.diffusion.asd_video import (
    Adversary,
    asd_video,
    fooled,
    forced,
    noised,
    told_apart,
)
from kd.methods.diffusion.distribution_matching import Views
from kd.models.causal_video import CausalVideo
from kd.models.denoiser import Denoised
from kd.models.discriminator import FeatureHead
from kd.models.mlp import MLP
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import causal, denoiser, diffusion, times
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

F, B, PATH, LEVELS = 3, 4, edm(0.02, 5.0), (3.0, 1.0, 0.3)
SPEC = {'input': jax.ShapeDtypeStruct((F, 2), jnp.float32)}
KEY = jax.random.key(0)
LAW = times.uniform(times.natural(PATH))


@pytest.fixture(scope='module')
def network():
    module = CausalVideo(PATH, F, width=6, depth=1)
    return from_linen(module, *module.example_inputs(SPEC))


@pytest.fixture(scope='module')
def variables(network):
    return jax.jit(network.init)(jax.random.key(1))


@pytest.fixture(scope='module')
def said(network):
    """The network on all frames at once, compiled."""
    return jax.jit(lambda variables, *inputs: network.apply(variables, *inputs).logits)


@pytest.fixture(scope='module')
def student(network):
    return causal.generator(network, LEVELS, where='x')


# Data


def test_the_exact_denoiser_of_videos_against_each_gaussian_by_hand():
    """Covariances are those of the recursion, written as a matrix of its noises."""
    video, path = ring_video.RingVideo(F, modes=2, deviation=0.3), flow(1.0)
    alpha, sigma = 0.6, 0.4
    x = np.random.default_rng(0).standard_normal((5, 2 * F))
    logs, means = [], []
    for signs in np.ndindex(*(2,) * (F - 1)):
        turns = [
            np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
            for a in (2 * np.array(signs) - 1) * video.angle
        ]
        noises = np.zeros((F, 2, F, 2))
        for f in range(F):
            if f:
                noises[f] = np.einsum('ij,jfk->ifk', turns[f - 1], noises[f - 1])
            noises[f, :, f] += np.eye(2)
        noises = noises.reshape(2 * F, 2 * F)
        covariance = video.deviation**2 * noises @ noises.T
        total = alpha**2 * covariance + sigma**2 * np.eye(2 * F)
        for mode in ([1.0, 0.0], [-1.0, 0.0]):
            centre = noises[:, :2] @ mode
            away = x - alpha * centre
            logs.append(stats.multivariate_normal(alpha * centre, total).logpdf(x))
            means.append(centre + alpha * away @ np.linalg.solve(total, covariance))
    share = np.exp(logs - np.max(logs, axis=0))
    share /= share.sum(0)
    wanted = np.einsum('kb,kbd->bd', share, means)
    exact = ring_video.exact_denoiser(video, path)
    given = jnp.asarray(x, jnp.float32).reshape(5, F, 2), jnp.full(5, sigma)
    found = jax.jit(lambda x, t: exact.apply({}, x, t, {}).x0)(*given)
    np.testing.assert_allclose(found.reshape(5, -1), wanted, rtol=1e-4, atol=1e-5)


def test_videos_turn_either_way_and_are_the_mixture_of_the_components():
    video, n = ring_video.RingVideo(4), 100_000
    drawn = video.draw(np.random.default_rng(0), n)
    turn = np.angle((drawn[:, 1:] @ [1, 1j]) / (drawn[:, :-1] @ [1, 1j]))
    np.testing.assert_allclose((turn > 0).mean(0), 0.5, atol=4 * 0.5 / np.sqrt(n))
    np.testing.assert_allclose(np.abs(turn).mean(0), np.pi / 6, atol=2e-3)
    means, bases, spectrum = video.components()
    second = np.mean(
        [np.outer(m, m) + (v * spectrum) @ v.T for m, v in zip(means, bases, strict=True)], 0
    )
    flat = drawn.reshape(n, -1)
    np.testing.assert_allclose(flat.T @ flat / n, second, atol=4.5 * 0.8 / np.sqrt(n))
    inside = ring_video.on_ring(flat)
    assert inside.mean() > 0.9
    flat[0, 4:6] *= 1.3
    assert inside[0]
    assert not ring_video.on_ring(flat[:1])[0]


# Network and rollouts


@pytest.fixture(scope='module')
def rolled(student):
    """One program of every exit, and how often it was traced."""
    traced = []

    @jax.jit
    def made(variables, z, exit):
        traced.append(1)
        return causal.causal_rollout(student.causal, variables, LEVELS, z, KEY, exit)

    return made, traced


@pytest.fixture(scope='module')
def z():
    return jax.random.normal(jax.random.key(2), (B, F, 2))


def test_a_rollout_with_a_cache_is_the_whole_network_with_its_mask(said, variables, rolled, z):
    made, traced = rolled
    for exit, level in enumerate(LEVELS):
        found = made(variables, z, exit)
        np.testing.assert_array_equal(found.time, np.full(B, level, np.float32))
        whole = said(variables, jnp.full((B, F), level), found.input, found.x)
        np.testing.assert_allclose(found.x, whole, atol=1e-5)
        if exit == 0:
            np.testing.assert_allclose(found.input, 3 * z, rtol=1e-6)
    assert len(traced) == 1


def test_inputs_are_the_generators_own_and_no_gradient_goes_through_them(
    network, variables, rolled, z
):
    """Trap: noised data in place of a rollout. The gradient is that of the last calls alone."""
    made, _ = rolled
    base = made(variables, z, 2)
    moved = jax.tree.map(lambda x: x + 0.1, variables)
    assert np.abs(made(moved, z, 2).input - base.input).max() > 1e-3
    np.testing.assert_array_equal(made(moved, z, 0).input, made(variables, z, 0).input)
    weight = jax.random.normal(jax.random.key(3), base.x.shape)

    # What is remembered of a frame is a constant: nothing is learned from frames after it.
    def last(variables, memory):
        said = [
            network.module.apply(
                variables, jnp.full(B, LEVELS[2]), base.input[:, f : f + 1], memory, jnp.int32(f),
                method='say',
            )
            for f in range(F)
        ]  # fmt: skip
        return jnp.sum(weight * jnp.concatenate(said, 1))

    @jax.jit
    def wanted(variables):
        memory = network.module.empty(base.x)
        for f in range(F):
            clean = base.x[:, f : f + 1]
            memory = network.module.apply(
                variables, clean, memory, jnp.int32(f), method='remember'
            )  # fmt: skip
        return jax.grad(last)(variables, memory)

    found = jax.jit(jax.grad(lambda v: jnp.sum(weight * made(v, z, 2).x)))(variables)
    wanted = wanted(variables)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-5), found, wanted)


def test_no_frame_sees_itself_or_one_after_it(said, variables, rolled, z):
    made, _ = rolled
    other = z.at[:, 1:].add(1.0)
    one, two = (made(variables, noise, 1).x for noise in (z, other))
    np.testing.assert_array_equal(one[:, :1], two[:, :1])
    assert (np.abs(one - two)[:, 1:].max((0, 2)) > 1e-3).all()
    # Trap of teacher forcing: the clean frame that is to be found is not told.
    one, two = (
        said(variables, jnp.full((B, F), 1.0), z, clean) for clean in (z, z.at[:, 1].add(1.0))
    )
    apart = np.abs(one - two).max((0, 2))
    assert (apart[:2] == 0).all()
    assert apart[2] > 1e-3


def test_calls_and_first_frame_enhancement(student, variables, z):
    """N + (F - 1) n calls; with as many for all it is uniform sampling, and n of it is exit n."""
    calls = []

    def denoise(*given):
        jax.debug.callback(lambda: calls.append(1))
        return student.causal.denoise(*given)

    counted, euler = student.causal._replace(denoise=denoise), diffusion.ddim()

    def drawn(n, whole=()):
        grid = causal.times_of_blocks(LEVELS, n, F, whole=whole)
        calls.clear()
        found = jax.jit(lambda v: causal.causal_sample(counted, v, grid, z, KEY, step=euler))(
            variables
        )
        jax.effects_barrier()
        return np.asarray(found), len(calls)

    (one, of_one), (first, of_first) = drawn(1), drawn(1, whole=(0,))
    full, of_full = drawn(3)
    assert (of_one, of_first, of_full) == (F, 3 + F - 1, 3 * F)
    grids = [causal.times_of_blocks(LEVELS, 3, F, whole=whole) for whole in ((), (0,))]
    assert grids[0] == grids[1]
    # The first frame is that of all calls, and those after it follow from it.
    np.testing.assert_allclose(first[:, 0], full[:, 0], atol=1e-6)
    assert (np.abs(first - one)[:, 1:].max((0, 2)) > 1e-4).all()
    calls.clear()
    rolled = jax.jit(
        lambda v, exit: causal.causal_rollout(counted, v, LEVELS, z, KEY, exit, step=euler).x
    )
    np.testing.assert_allclose(rolled(variables, 2), full, atol=1e-5)
    jax.effects_barrier()
    assert len(calls) == 3 * F
    np.testing.assert_allclose(rolled(variables, 0), one, atol=1e-5)


# Pairs


@pytest.fixture(scope='module')
def adversary():
    """Linear logits, whose gradients are known."""
    judge = from_linen(MLP((), len(LEVELS)), jax.ShapeDtypeStruct((1, F, 2), jnp.float32))
    return Adversary(judge, optax.sgd(0.1), LAW, 2.0)


@pytest.fixture(scope='module')
def judge(adversary):
    return jax.jit(adversary.network.init)(jax.random.key(4))['params']


@pytest.fixture(scope='module')
def pull(adversary, student, judge, variables):
    """(level, x) -> losses [B], gradients in x, in the judge, in the generator of the state."""

    def summed(x, judge, own, level):
        parts = {'generator': {'params': own}, 'discriminator': {'params': judge}}
        views = Views(
            x, jnp.full(B, level), {}, PATH, None, None, None, state=State.create(KEY, parts)
        )
        losses = fooled(adversary, student, PATH).loss(views, {}, KEY)
        return losses.sum(), losses

    made = jax.jit(jax.grad(summed, (0, 1, 2), has_aux=True))

    def asked(level, x):
        slopes, losses = made(x, judge, variables['params'], level)
        return losses, *slopes

    return asked


def test_a_generator_goes_where_one_logit_grows_and_the_call_more_stays(pull, judge, z):
    """L = softplus(u), du/dx = -w_n: every row moves along w_n by 1 - exp(-L)."""
    (name,) = judge
    weight = np.asarray(judge[name]['kernel'])
    for n, level in enumerate(LEVELS[:2]):
        losses, of_x, of_judge, of_own = pull(level, z)
        assert (np.asarray(losses) > 0).all()
        wanted = -(1 - np.exp(-losses))[:, None] * weight[:, n]
        np.testing.assert_allclose(of_x.reshape(B, -1), wanted, rtol=2e-4)
        columns = np.abs(of_judge[name]['kernel']).max(0)
        assert columns[n] > 0
        assert (np.delete(columns, n) == 0).all()
        # Trap: the preferred sample carries no gradient.
        assert all((x == 0).all() for x in jax.tree.leaves(of_own))
    # After the last there is no call more.
    losses, of_x, *_ = pull(LEVELS[2], z)
    assert (np.asarray(losses) == 0).all()
    assert (np.asarray(of_x) == 0).all()


def test_the_discriminator_knows_differences_alone_and_is_held_flat(
    adversary, student, variables, judge
):
    """log 2 where it says nothing, the same with a constant more; penalties are s^2 w^2."""
    rows, (name,) = 2_000, judge
    two = student._replace(times=LEVELS[:2])
    batch = {'input': jnp.zeros((rows, F, 2))}

    @jax.jit
    def losses(judge, penalty):
        own = adversary._replace(penalty=penalty)
        parts = {'generator': variables, 'discriminator': {'params': judge}}
        made = told_apart(own, two, PATH).loss(judge, State.create(KEY, parts), batch, KEY)
        return made.loss.total / made.loss.count, made.metrics['told_apart'].total

    blind = jax.tree.map(jnp.zeros_like, judge)
    found, told = losses(blind, 600.0)
    assert float(found) == pytest.approx(np.log(2), rel=1e-6)
    assert told == 0
    bare = float(losses(judge, 0.0)[0])
    more = {name: {**judge[name], 'bias': judge[name]['bias'] + 5.0}}
    assert float(losses(more, 0.0)[0]) == pytest.approx(bare, rel=1e-4)
    square = float(jnp.sum(judge[name]['kernel'][:, 0] ** 2))
    wanted = 2 * 600.0 * 0.05**2 * square
    assert float(losses(judge, 600.0)[0]) - bare == pytest.approx(wanted, rel=0.1)


def test_both_of_a_pair_have_noise_of_their_own_and_one_time_if_together(adversary):
    pair = (jnp.zeros((1, 20_000)),) * 2
    for together in (True, False):
        one, two = noised(adversary._replace(together=together), PATH, pair, KEY)
        assert abs(np.corrcoef(one[0], two[0])[0, 1]) < 0.03
        # Of nothing but noise the deviation is the time.
        assert (float(one.std() / two.std()) == pytest.approx(1, rel=0.03)) == together


def test_a_head_on_videos_has_a_logit_for_each_pair_and_sees_the_order_of_frames():
    head, x = FeatureHead(width=8, logits=3), jax.random.normal(KEY, (2, 3, 8, 12, 4))
    variables = jax.jit(head.init)(KEY, x)
    say = jax.jit(head.apply)
    assert say(variables, x).shape == (2, 3)
    assert np.abs(say(variables, x) - say(variables, x[:, ::-1])).max() > 1e-4
    assert variables['params']['down0']['kernel'].shape == (3, 4, 4, 4, 8)


# The method


@pytest.fixture(scope='module')
def critic():
    module = Denoised(VelocityMLP(width=6, depth=1), PATH, 'flow', 'edm')
    return from_linen(module, *module.example_inputs(SPEC))


def method(network, critic, references=None, **options):
    context = seeds.context(
        network=network, teacher=critic, tx=optax.sgd(0.1), spec=SPEC, steps=10,
        references={'start': network} if references is None else references,
    )  # fmt: skip
    given = dict(
        times=LEVELS, optimizer=dict(name='sgd', lr=0.1), updates=1, denoising='edm',
        discriminator=dict(name='kd.models.mlp.MLP', widths=(4,), num_classes=3),
        clock=dict(name='kd.sampling.times.karras', low=0.02, high=5.0),
    )  # fmt: skip
    return asd_video(context, **given | options)


def test_without_weight_it_is_self_forcing_and_with_it_the_parts_begin_where_they_should(
    network, critic, variables
):
    teacher = jax.tree.map(lambda x: x + 0.1, jax.jit(critic.init)(jax.random.key(5)))
    frozen = {'start': variables, 'teacher': teacher}
    batch, ended = {'input': jnp.zeros((8, F, 2))}, {}
    for weight in (0.0, 1e-12):
        made = method(network, critic, weight=weight)
        state = jax.jit(made.init)(KEY, frozen)
        jax.tree.map(np.testing.assert_array_equal, state.params['generator'], variables['params'])
        jax.tree.map(np.testing.assert_array_equal, state.params['fake'], teacher['params'])
        assert ('discriminator' in state.params) == (weight > 0)
        step, began = jax.jit(made.step), state.params
        for _ in range(3):
            state, metrics = step(state, batch)
        ended[weight] = state.params
        for name, value in frozen.items():
            jax.tree.map(np.testing.assert_array_equal, state.frozen[name], value)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), began, state.params)
    assert all(max(jax.tree.leaves(part)) > 0 for part in moved.values())
    assert 0 <= float(metrics['discriminator/told_apart'].total) <= 8
    for part in ('generator', 'fake'):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *(
                ended[weight][part] for weight in (0.0, 1e-12)
            )
        )  # fmt: skip


def test_a_causal_network_is_trained_after_clean_frames(network, said, variables):
    """The loss of a step is the mean over frames of the squared error, each with its own time."""
    context = seeds.context(
        network=network, tx=optax.sgd(0.0), spec=SPEC, references={'start': network}
    )
    made = forced(context, law=dict(name='kd.sampling.times.among', levels=(1.0,)), weight='x0')
    state = jax.jit(made.init)(KEY, {'start': variables})
    data = jax.random.normal(jax.random.key(6), (2_000, F, 2))
    _, metrics = jax.jit(made.step)(state, {'input': data})
    x_t = data + jax.random.normal(jax.random.key(7), data.shape)
    found = said(variables, jnp.ones(data.shape[:2]), x_t, data)
    wanted = float(jnp.square(found - data).mean())
    loss = metrics['loss'].total / metrics['loss'].count
    assert float(loss) == pytest.approx(wanted, rel=0.05)


def test_samples_of_a_generator_and_their_page(network, variables, rolled):
    draw = jax.jit(sample.sampler(network, dict(times=LEVELS), {}, steps=1), static_argnums=3)
    videos = np.asarray(draw(variables, None, KEY, (B, F, 2)))
    # One call for each frame, of the same noise.
    z = jax.random.normal(jax.random.split(KEY)[0], (B, F, 2))
    np.testing.assert_allclose(videos, rolled[0](variables, z, 0).x, atol=1e-5)
    page = generation.frames_page({'one': videos, 'two': videos})
    assert len(page.axes) == 2 * (F + 1)
    titles = [axis.get_title() for axis in page.axes]
    assert titles == ['frame 1', 'frame 2', 'frame 3', 'paths'] + [''] * (F + 1)
    shown = page.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(shown, videos[:, 1], atol=1e-6)


def test_what_does_not_fit_is_told_in_a_line(network, critic):
    def told(match, call, *given, **more):
        with pytest.raises(UserError, match=match):
            call(*given, **more)

    told('stage: a causal generator does not begin as its teacher', method, network, critic, {})
    told('Denoised makes no video frame by frame', method, critic, critic)
    told(r'stage.method.times must decrease', method, network, critic, times=(1.0, 2.0))
    told('discriminator is missing; give one, or weight=0', method, network, critic,
         discriminator=None)  # fmt: skip
    told(r'has outputs of the shape \(3,\), and there are 2 times', method, network, critic,
         times=LEVELS[:2])  # fmt: skip
    told('CausalVideo makes videos frame by frame, and denoises none', denoiser.of_network, network)
    four = {'input': jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    told(r'has frames=3 of size=2, and an example of the data has the shape \(4, 2\)',
         network.module.example_inputs, four)  # fmt: skip
    told('3 times; --steps is that or fewer', sample.sampler, network, dict(times=LEVELS), {},
         steps=4)  # fmt: skip
    context = seeds.context(network=network, spec=SPEC)
    told('causal_samples needs a method with times', causal_samples, context)
    context.config.method['times'] = LEVELS
    told('steps=.1, 4. of 3 times', causal_samples, context, steps=(1, 4))
