"""YONOS-SR: targets by an easier scale, the tower property, a decoder tuned, and a run."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.claims import seeds
from kd.errors import UserError
from kd.losses.schedule import convert, cosine
from kd.losses.score_distillation import denoising
from kd.methods.sr.yonos_sr import decoder_tuning, one_step, part_of, scale_distillation, widened
from kd.models.autoencoder_kl import AutoencoderKL
from kd.models.denoiser import Denoised
from kd.models.discriminator import FourierHead
from kd.models.edm import SongUNet
from kd.models.layers import Features
from kd.models.refiner import LatentDecoder, Refiner
from kd.models.unet_conditional import UNetConditional
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

IMAGE, B = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), 16
SPEC = {'input': IMAGE, 'low': IMAGE, 'easier': IMAGE}
TIME, ONE = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1,), (1, 4, 4, 1)))
MODULE = Denoised(VelocityMLP(width=8, depth=1, beside=('low',)), cosine(), kind='v')
NET = from_linen(MODULE, TIME, ONE)
PATH = cosine()


def context_of(**more):
    return seeds.context(**dict(network=NET, tx=optax.sgd(1.0), spec=SPEC) | more)


def noisy(seed, net=NET):
    params = jax.jit(net.init)(jax.random.key(0))['params']
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), params
    )


def batch_of():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.uniform(-1, 1, (B, 4, 4, 1)), jnp.float32) for name in SPEC}


def test_the_path_has_no_signal_at_the_end_and_its_weight_is_one_there():
    t = jnp.array([0.001, 0.3, 0.5, 0.8, 1.0])
    alpha, sigma = PATH.alpha(t), PATH.sigma(t)
    np.testing.assert_allclose(alpha, np.cos(np.pi * np.asarray(t) / 2), atol=2e-7)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    assert float(alpha[-1]) == 0.0
    x, z = (jax.random.normal(jax.random.key(i), (5, 4, 4, 1)) for i in (0, 1))
    error = denoising(z + 1.0, z, PATH, t, 'truncated')
    snr = np.asarray((alpha / sigma) ** 2, np.float64)
    np.testing.assert_allclose(error, np.maximum(snr, 1.0), rtol=1e-4)
    # v says x0 where eps cannot: at the end it is -v.
    v = alpha[:, None, None, None] * x - sigma[:, None, None, None] * z
    z_t = PATH.mix(z, x, t)
    np.testing.assert_allclose(convert(PATH, v, z_t, t, 'v', 'x0'), z, atol=1e-5)
    np.testing.assert_allclose(convert(PATH, v, z_t, t, 'v', 'x0')[-1], -v[-1], atol=1e-6)


def test_least_squares_on_what_an_easier_fit_says_is_the_same_fit_with_less_left():
    """The tower property, exact in finite samples: low is a function of easier."""
    rng = np.random.default_rng(0)
    place = np.arange(16)
    root = np.linalg.cholesky(np.exp(-np.abs(place[:, None] - place) / 4))
    data = rng.standard_normal((1_000, 16)) @ root.T
    for deviation in (0.3, 3.0):
        z_t = data + deviation * rng.standard_normal(data.shape)
        easier = data.reshape(-1, 8, 2).mean(-1)
        low = easier.reshape(-1, 4, 2).mean(-1)

        def fitted(told, target, z_t=z_t):
            seen = np.concatenate([z_t, told], 1)
            weights = np.linalg.lstsq(seen, target, rcond=None)[0]
            return weights, seen @ weights

        better = fitted(easier, data)[1]
        (direct, of_data), (distilled, of_better) = fitted(low, data), fitted(low, better)
        np.testing.assert_allclose(distilled, direct, atol=1e-11)
        left = [np.square(a - b).mean() for a, b in ((data, of_data), (better, of_better))]
        # What is less is what the easier fit leaves, to the last digit: projections are nested.
        np.testing.assert_allclose(left[0] - left[1], np.square(data - better).mean(), rtol=1e-9)
        assert left[1] < 0.8 * left[0]


@pytest.mark.parametrize('taught', [False, True])
def test_a_step_by_hand_with_one_noised_example_for_both(taught):
    params, teacher, batch = noisy(1), noisy(2), batch_of()
    context = context_of(teacher=NET if taught else None, references={'start': NET})
    method = scale_distillation(context, weight='truncated')
    frozen = {name: {'params': teacher} for name in ('teacher', 'start')}
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], teacher)
    state = state.replace(params={'network': params})
    after, metrics = jax.jit(method.step)(state, batch)
    time_key, noise_key, _ = jax.random.split(state.step_key(), 3)
    t = 1e-3 + (1 - 1e-3) * jax.random.uniform(time_key, (B,))
    wide = t.reshape(B, 1, 1, 1)
    alpha, sigma = jnp.cos(jnp.pi * wide / 2), jnp.sin(jnp.pi * wide / 2)
    z_t = alpha * batch['input'] + sigma * jax.random.normal(noise_key, (B, 4, 4, 1))

    def said(params, low):
        v = MODULE.inner.apply({'params': params}, t, t, z_t, low=low)
        return alpha * z_t - sigma * v

    def loss(params):
        target = said(teacher, batch['easier']) if taught else batch['input']
        error = jnp.square(said(params, batch['low']) - target).mean((1, 2, 3))
        weight = jnp.maximum((alpha / sigma)[:, 0, 0, 0] ** 2, 1.0)
        return jnp.mean(weight * error), jnp.mean(error)

    (value, error), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for name, expected in (('loss', value), ('squared_error', error)):
        found = metrics[name].total / metrics[name].count
        np.testing.assert_allclose(found, expected, rtol=2e-4)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), moved, slope)


def test_a_teacher_that_is_told_no_more_has_nothing_to_teach_its_copy():
    batch = batch_of()
    batch['easier'] = batch['low']
    method = scale_distillation(context_of(teacher=NET, references={'start': NET}))
    frozen = {name: {'params': noisy(2)} for name in ('teacher', 'start')}
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    after, metrics = jax.jit(method.step)(state, batch)
    assert float(metrics['loss'].total) < 1e-9
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.params, state.params
    )


def test_one_step_is_what_is_said_of_noise_whatever_the_other_steps_are():
    denoiser, variables = denoisers.of_network(NET), {'params': noisy(1)}
    noise = jax.random.normal(jax.random.key(3), (B, 4, 4, 1))
    told = {'low': batch_of()['low']}

    @jax.jit
    def both():
        once = one_step(denoiser, variables, noise, told)
        grid = times.grid(times.even(PATH), 3, last=1 / 3)
        steps = diffusion.sample(
            PATH, denoiser.bind(variables, told), noise, grid, jax.random.key(0), trajectory=True
        )
        v = MODULE.inner.apply(variables, jnp.ones(B), jnp.ones(B), noise, **told)
        return once, v, steps[1], steps[-1]

    once, v, second, last = both()
    np.testing.assert_allclose(once, -v, atol=1e-6)
    # The first of three steps goes on from there: x0 and the rest of the noise.
    alpha, sigma = np.cos(np.pi / 3), np.sin(np.pi / 3)
    np.testing.assert_allclose(second, alpha * once + sigma * noise, atol=2e-3)
    assert float(jnp.abs(last - once).max()) > 0.05


def test_a_decoder_is_tuned_and_the_denoiser_stays():
    refiner = Refiner(width=8, depth=1)
    net = from_linen(refiner, ONE)
    method = decoder_tuning(context_of(network=net, teacher=NET), squared=0.5)
    params, teacher, batch = noisy(1, net), noisy(2), batch_of()
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': {'params': teacher}})
    untouched = net.apply({'params': state.params['network']}, batch['input']).logits
    np.testing.assert_array_equal(untouched, batch['input'])
    state = state.replace(params={'network': params})
    after, metrics = jax.jit(method.step)(state, batch)
    assert set(after.params) == {'network'}
    noise = jax.random.normal(jax.random.split(state.step_key())[0], (B, 4, 4, 1))
    ones = jnp.ones(B)
    z = -MODULE.inner.apply({'params': teacher}, ones, ones, noise, low=batch['low'])

    def loss(params):
        away = refiner.apply({'params': params}, z) - batch['input']
        return jnp.abs(away).mean() + 0.5 * jnp.square(away).mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, value, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope)


class _Seen(nn.Module):
    """Features of images, for distances."""

    @nn.compact
    def __call__(self, x, *, train=False):
        y = Features(name='one')(nn.relu(nn.Dense(5, name='a')(x)))
        return Features(name='two')(nn.Dense(3, name='b')(y)).mean((1, 2))


def test_a_decoder_is_tuned_by_features_and_against_a_discriminator():
    refiner, head = Refiner(width=8, depth=1), FourierHead(width=8, frequencies=4)
    net, seen = (from_linen(module, ONE) for module in (refiner, _Seen()))
    context = context_of(network=net, teacher=NET, references={'perceptual': seen})
    block = dict(name='kd.models.discriminator.FourierHead', width=8, frequencies=4)
    options = dict(perceptual=0.7, features=('one', 'two'), adversarial=0.5, discriminator=block)
    method = decoder_tuning(context, last='out/kernel', **options)
    teacher, known = {'params': noisy(2)}, {'params': noisy(4, seen)}
    frozen = {'teacher': teacher, 'perceptual': known}
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    params = noisy(1, net)
    state = state.replace(params={**state.params, 'network': params})
    batch = batch_of()
    after, metrics = jax.jit(method.step)(state, batch)

    def decoded(params, player):
        key = jax.random.split(jax.random.fold_in(state.step_key(), player))[0]
        noise, ones = jax.random.normal(key, (B, 4, 4, 1)), jnp.ones(B)
        z = -MODULE.inner.apply(teacher, ones, ones, noise, low=batch['low'])
        return refiner.apply({'params': params}, z)

    def of_head(d):
        fake = decoded(params, 0)
        real, made = (head.apply({'params': d}, x) for x in (batch['input'], fake))
        return (jnp.maximum(1 - real, 0) + jnp.maximum(1 + made, 0)).mean()

    def near(params):
        y = decoded(params, 1)
        total = jnp.abs(y - batch['input']).mean()
        one, two = (_layers(known['params'], x) for x in (y, batch['input']))
        for a, b in zip(one, two, strict=True):
            a, b = (x / (jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-24) + 1e-10) for x in (a, b))
            total = total + 0.7 * jnp.square(a - b).sum(-1).mean()
        return total

    @jax.jit
    def by_hand(params):
        d = state.params['discriminator']
        down = jax.grad(of_head)(d)
        moved = jax.tree.map(lambda x, g: x - g, d, down)

        def far(params):
            return -head.apply({'params': moved}, decoded(params, 1)).mean()

        slopes = [jax.grad(of)(params) for of in (near, far)]
        sizes = [jnp.linalg.norm(slope['out']['kernel']) for slope in slopes]
        factor = sizes[0] / (sizes[1] + 1e-4)
        both = jax.tree.map(lambda a, b: a + 0.5 * factor * b, *slopes)
        return moved, jax.tree.map(lambda x, g: x - g, params, both), factor

    moved, stepped, factor = by_hand(params)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)  # noqa: E731
    jax.tree.map(close, after.params['discriminator'], moved)
    jax.tree.map(close, after.params['network'], stepped)
    found = metrics['network/balance']
    np.testing.assert_allclose(found.total / found.count, factor, rtol=1e-3)
    for options, words in (
        (
            dict(perceptual=1.0, features=('none',)),
            r"features=\('none',\) must be some of the features of",
        ),
        (dict(perceptual=1.0, features=()), r'features=\(\) must be some'),
    ):
        with pytest.raises(UserError, match=words):
            decoder_tuning(context, **options)
    with pytest.raises(UserError, match=r'wants a network, stage\.references\.perceptual'):
        decoder_tuning(context_of(network=net, teacher=NET), perceptual=1.0, features=('one',))
    method = decoder_tuning(context, adversarial=1.0, last='none', discriminator=block)
    with pytest.raises(UserError, match=r"last='none' is none of the decoder's: .*out/kernel"):
        jax.eval_shape(method.step, jax.eval_shape(method.init, jax.random.key(0), frozen), batch)


def _layers(params, x):
    one = jnp.maximum(x @ params['a']['kernel'] + params['a']['bias'], 0)
    return one, one @ params['b']['kernel'] + params['b']['bias']


def test_channels_that_a_reference_lacks_begin_with_nothing():
    options = dict(channels=8, multipliers=(1,), blocks=1, attention=())
    image = {'input': IMAGE}
    plain, wide = SongUNet(**options), SongUNet(**options, beside=('low',))
    nets = [from_linen(module, *module.example_inputs(image)) for module in (plain, wide)]
    reference, own = (jax.jit(net.init)(jax.random.key(i)) for i, net in enumerate(nets))
    reference = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), reference
    )
    made = widened(reference, own)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, own)
    x, low = (jax.random.normal(jax.random.key(i), (2, 4, 4, 1)) for i in (2, 3))
    t = jnp.array([3.0, 500.0])
    found = jax.jit(lambda v: wide.apply(v, t, x, low=low))(made)
    expected = jax.jit(lambda v: plain.apply(v, t, x))(reference)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Stable Diffusion's network sees as many channels again.
    stable = UNetConditional(
        channels=(8,), blocks=1, depths=(0,), middle=0, heads=(1,), groups=4, beside=('low',)
    )
    abstract = jax.eval_shape(stable.init, jax.random.key(0), *stable.example_inputs(image))
    assert abstract['params']['conv_in']['kernel'].shape == (3, 3, 2, 8)
    assert stable.conditions == ('text', 'low')


def test_a_decoder_of_an_autoencoder_is_part_of_it():
    whole = AutoencoderKL(channels=(4,), blocks=1, latent=2, groups=2)
    decoder = LatentDecoder(whole)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 2, 2))
    variables = jax.jit(whole.init)(jax.random.key(1), jnp.zeros((1, 2, 2, 3)))
    own = jax.eval_shape(decoder.init, jax.random.key(2), latents)
    made = part_of(variables, own)
    assert jax.tree.structure(made) == jax.tree.structure(own)
    assert set(made['params']) == {'decoder', 'post_quant_conv'}
    found = jax.jit(decoder.apply)(made, latents)
    decode = jax.jit(lambda v: whole.apply(v, whole.unscaled(latents), method='decode'))
    np.testing.assert_allclose(found, decode(variables), atol=1e-5)


def test_what_does_not_fit_is_told():
    blind = from_linen(Denoised(VelocityMLP(width=8, depth=1), PATH, kind='v'), TIME, ONE)
    with pytest.raises(UserError, match=r"Denoised is not told 'low', and restores nothing"):
        scale_distillation(context_of(network=blind))
    small = {'input': IMAGE, 'low': IMAGE}
    with pytest.raises(UserError, match=r"wants 'easier' beside images; .* scales=\(2, 4\)"):
        scale_distillation(context_of(spec=small, teacher=NET))
    with pytest.raises(UserError, match=r"wants 'low' beside images"):
        decoder_tuning(context_of(spec={'input': IMAGE}, teacher=NET))
    other = from_linen(dataclasses.replace(MODULE, schedule=cosine(0.01)), TIME, ONE)
    with pytest.raises(UserError, match='give both the same, whose noise they share'):
        scale_distillation(context_of(teacher=other))
    wrong = from_linen(LatentDecoder(AutoencoderKL(channels=(4, 4), blocks=1, latent=1, groups=2)),
                       ONE)  # fmt: skip
    method = decoder_tuning(context_of(network=wrong, teacher=NET))
    frozen = {'teacher': {'params': noisy(1)}}
    state = jax.eval_shape(method.init, jax.random.key(0), frozen)
    with pytest.raises(UserError, match=r"makes images of \(8, 8, 3\), and the data have 'input'"):
        jax.eval_shape(method.step, state, batch_of())


def test_a_run_of_the_small_recipe_reports_by_steps(tmp_path):
    config = kd_config.load('configs/sr/yonos_sr.py:cpu')
    config.data.source.of.count = config.first.data.source.of.count = 40
    config.stages, config.decoder.teacher = ('first', 'decoder'), 'first'
    del config.direct, config.distilled
    config.report.rows = [row for row in config.report.rows if row[1] in config.stages]
    for name in config.stages:
        stage = config[name]
        stage.steps = stage.log_every = stage.checkpoint_every = 1
        stage.batch_size = 8
        inner = stage.network if name == 'decoder' else stage.network.network
        inner.width, inner.depth = 8, 1
        probe = stage.evaluators.restored
        probe.samples, probe.batch, probe.components, probe.steps = 20, 20, 4, (1,)
    report = loop.run(config, tmp_path / 'run').read_text()
    assert report.startswith('# china_flower: x2, x4, mended')
    assert '| x4, mended |' in report
