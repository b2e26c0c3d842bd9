"""Drawn guidance of both denoisers, adapters that follow, attention away from a text."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.data.builders import mixtures
from kd.errors import UserError
from kd.losses.schedule import discrete, edm
from kd.methods.diffusion.critic import GENERATOR
from kd.methods.diffusion.distribution_matching import Views
from kd.methods.diffusion.snoopi import drawn, snoopi
from kd.models import adapters
from kd.models.adapters import Adapter
from kd.models.attention import attend, attend_away
from kd.models.denoiser import Denoised
from kd.models.latent_dit import LatentDiT
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser, times
from kd.sampling import negative as negative_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, CLOCK, B = edm(0.02, 5.0), times.karras(0.02, 5.0), 512
TEACHER = mixtures.exact_denoiser(mixtures.pairs(), PATH)
FAKE = mixtures.exact_denoiser(mixtures.pairs(deviation=0.6), PATH)
LAW, KEY = times.uniform(CLOCK, 0.02, 0.98), jax.random.key(0)


def seen(fake=FAKE):
    x = jax.random.normal(jax.random.key(1), (B, 2))
    condition = {'label': jnp.arange(B) % 4}

    def both(of):
        def asked(x_t, t):
            return denoiser.branches(of, {}, x_t, t, (condition, denoiser.without(of, condition)))

        return asked

    return Views(
        x, jnp.full(B, 5.0), condition, PATH, None, None, both(TEACHER), fake_both=both(fake)
    )


def direction(guidance, sides='both', fake=FAKE, key=KEY):
    return np.asarray(drawn(LAW, guidance, sides)(seen(fake), key)[0])


def test_the_direction_is_affine_in_the_guidance_and_by_hand():
    at = {k: direction((k, k)) for k in (0.0, 1.0, 3.0)}
    np.testing.assert_allclose(at[3.0], at[0.0] + 3 * (at[1.0] - at[0.0]), atol=1e-4)
    views = seen()
    x_t, t = views.noised(jax.random.split(KEY)[0], LAW)
    (real, _), (fake, _) = views.both(x_t, t), views.fake_both(x_t, t)
    s = t[:, None]
    by_hand = s**2 / (1 + s**2) * ((x_t - real) / s - (x_t - fake) / s)
    np.testing.assert_allclose(at[1.0], by_hand, rtol=1e-3, atol=1e-4)
    # Towards the data: the step -g lowers the distance of what the fake says to what is real.
    assert np.sum(at[1.0] * np.asarray(fake - real)) > 0


def test_drawn_guidance_has_the_mean_of_the_fixed_one_and_its_own_noise():
    many = np.stack([direction((0.5, 4.0), key=k) for k in jax.random.split(KEY, 24)])
    middle = np.stack([direction((2.25, 2.25), key=k) for k in jax.random.split(KEY, 24)])
    # The same times and noises: the rest is guidance, one for each example.
    apart = many - middle
    error = apart.std((0, 1)) / np.sqrt(24 * B)
    assert (np.abs(apart.mean((0, 1))) < 3.5 * error).all()
    assert (apart.std((0, 1)) > 0.01).all()
    assert (apart[0].std(0) > 0.01).all()


def test_where_fake_and_real_agree_guidance_of_both_is_none_and_of_one_is_not():
    """Trap: at every guidance, and exactly; of one side alone what guidance adds is left."""
    for guidance in ((0.5, 0.5), (4.0, 4.0), (0.5, 4.0)):
        assert (direction(guidance, fake=TEACHER) == 0).all()
    assert np.abs(direction((4.0, 4.0), 'real', TEACHER)).mean() > 0.02
    np.testing.assert_allclose(
        direction((4.0, 4.0), 'real', TEACHER), -direction((4.0, 4.0), 'fake', TEACHER), atol=1e-5
    )


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=8, depth=1, num_classes=4), PATH, 'flow', 'edm')
    spec = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
    return from_linen(module, *module.example_inputs(spec))


OPTIONS = dict(
    times=(5.0,), optimizer=dict(name='sgd', lr=0.5), targets='hidden', rank=2, alpha=4.0,
    clock=dict(name='kd.sampling.times.karras', low=0.02, high=5.0), dropout=0.25,
)  # fmt: skip


def context_of(network):
    return seeds.context(
        network=network, teacher=network, tx=optax.sgd(0.1), steps=8,
        spec={'input': jax.ShapeDtypeStruct((2,), jnp.float32)},
    )  # fmt: skip


def test_the_critic_is_the_teacher_with_adapters_that_alone_move(network):
    method = snoopi(context_of(network), **OPTIONS)
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(
        lambda x: x + 0.5 * rng.standard_normal(x.shape).astype('f'),
        jax.jit(network.init)(jax.random.key(0)),
    )
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})
    fake = state.params['fake']
    assert set(fake) == {'hidden0'}
    assert {n: x.shape for n, x in fake['hidden0'].items()} == {'lora_a': (4, 2), 'lora_b': (2, 8)}
    batch = {'input': jnp.zeros((64, 2)), 'label': jnp.arange(64) % 4}
    step = jax.jit(method.step)
    state, metrics = step(state, batch)
    # B is zero: the fake is the teacher but for rounding, and the generator stays.
    jax.tree.map(np.testing.assert_array_equal, state.params[GENERATOR], teacher['params'])
    for gap in ('gap', 'gap_null'):
        assert float(metrics[f'generator/{gap}'].total) == pytest.approx(0, abs=1e-5)
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.frozen['teacher'], teacher)
    # It follows with its condition and without.
    assert float(metrics['generator/gap'].total) > 1
    assert float(metrics['generator/gap_null'].total) > 1
    assert np.abs(state.params['fake']['hidden0']['lora_b']).max() > 0


def test_adapters_of_any_tree():
    key, adapter = jax.random.key(0), Adapter(3, 6.0, r'block\d/q')
    params = {
        'block0': {'q': {'kernel': jnp.ones((4, 5)), 'bias': jnp.ones(5)}},
        'block1': {'q': {'kernel': jnp.ones((5, 4))}, 'out': {'kernel': jnp.ones((5, 4))}},
    }
    own = adapters.drawn(key, params, adapter)
    assert jax.tree.map(jnp.shape, own) == {
        'block0': {'q': {'lora_a': (4, 3), 'lora_b': (3, 5)}},
        'block1': {'q': {'lora_a': (5, 3), 'lora_b': (3, 4)}},
    }
    jax.tree.map(np.testing.assert_array_equal, adapters.merged(params, own, 2.0), params)
    own['block0']['q']['lora_b'] += 1.0
    made = adapters.merged(params, own, adapter.scale)['block0']['q']
    wanted = 1 + 2.0 * np.asarray(own['block0']['q']['lora_a']) @ np.ones((3, 5))
    np.testing.assert_allclose(made['kernel'], wanted, rtol=1e-5)
    np.testing.assert_array_equal(made['bias'], np.ones(5))
    with pytest.raises(UserError, match="targets='nothing' matches no kernel"):
        adapters.drawn(key, params, Adapter(3, 6.0, 'nothing'))


# Attention away from a text (NASA)


@pytest.fixture(name='texts')
def _texts():
    keys = jax.random.split(jax.random.key(3), 5)
    query = jax.random.normal(keys[0], (2, 6, 2, 4))
    positive = tuple(jax.random.normal(k, (2, 5, 2, 4)) for k in keys[1:3])
    negative = tuple(jax.random.normal(k, (2, 3, 2, 4)) for k in keys[3:])
    return query, positive, negative


def test_without_strength_it_is_attention_bit_for_bit(texts):
    query, positive, negative = texts
    plain = attend(query, *positive)
    np.testing.assert_array_equal(attend_away(query, positive, negative, 0.0), plain)
    each = attend_away(query, positive, negative, jnp.array([0.0, 0.7]))
    np.testing.assert_array_equal(each[0], plain[0])
    assert not np.allclose(each[1], plain[1])


def test_it_is_affine_in_the_strength_and_between_the_values(texts):
    query, positive, negative = texts
    low, middle, high = (attend_away(query, positive, negative, a) for a in (0.2, 0.6, 1.0))
    np.testing.assert_allclose(low + high, 2 * middle, atol=1e-6)
    away = np.asarray(attend_away(query, positive, negative, 0.0) - high)
    values = np.asarray(negative[1])
    assert (away <= values.max(1, keepdims=True) + 1e-5).all()
    assert (away >= values.min(1, keepdims=True) - 1e-5).all()


def test_away_from_itself_nothing_but_the_bias_is_left(texts):
    """Trap: before the output projection, so that at strength 1 its bias stays whole."""
    query, positive, _ = texts
    half = attend_away(query, positive, positive, 0.5)
    np.testing.assert_allclose(half, 0.5 * attend(query, *positive), atol=1e-6)
    none = attend_away(query, positive, positive, 1.0).reshape(2, 6, 8)
    kernel, bias = jax.random.normal(KEY, (8, 8)), jnp.arange(8.0)
    np.testing.assert_array_equal(none @ kernel + bias, jnp.broadcast_to(bias, (2, 6, 8)))


def test_padding_of_either_text_says_nothing(texts):
    query, positive, negative = texts

    def padded(pair):
        return tuple(jnp.concatenate([x, 9.0 * jnp.ones((2, 5, 2, 4))], axis=1) for x in pair)

    masks = tuple(
        (jnp.arange(x[0].shape[1] + 5) < x[0].shape[1])[None, None, None]
        for x in (positive, negative)
    )
    found = attend_away(query, padded(positive), padded(negative), 0.7, masks=masks)
    np.testing.assert_allclose(found, attend_away(query, positive, negative, 0.7), atol=1e-6)


# Attention away from a text, in networks


def test_networks_attend_away_from_a_negative_text():
    """Of one text against itself nothing but the bias of the projection is left at strength 1."""
    module = LatentDiT(
        width=24, depth=2, heads=2, num_classes=None, context=6, masked=True, variance=False,
        grid=4, epsilon=1e-6,
    )  # fmt: skip
    wrapped = Denoised(module, discrete('linear', 1e-4, 0.02), 'eps')
    network = from_linen(
        wrapped, *wrapped.example_inputs({'input': jax.ShapeDtypeStruct((8, 8, 4), jnp.float32)})
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32),
        jax.eval_shape(network.init, KEY),
    )
    x, t = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), jnp.asarray([999.0, 300.0])
    text = rng.normal(size=(2, 5, 6)).astype(np.float32)
    mask = np.arange(5) < np.array([[3], [5]])
    told, own = {'text': text, 'mask': mask}, denoiser.of_network(network)

    @jax.jit
    def said(variables, strength, negative):
        made = negative_lib.away(own, negative, strength)
        return made.apply(variables, x, t, told).x0

    plain = own.apply(variables, x, t, told).x0
    np.testing.assert_allclose(said(variables, jnp.zeros(2), told), plain, rtol=1e-4, atol=1e-4)
    blind = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if 'attn2' in str(path) and 'to_out_0' in str(path)
        and 'kernel' in str(path) else x,
        variables,
    )  # fmt: skip
    wanted = own.apply(blind, x, t, told).x0
    np.testing.assert_allclose(said(variables, jnp.ones(2), told), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - plain).max() > 0.01
    # Another length, one for all, each row its own strength; what a mask hides is not seen.
    other = {'text': rng.normal(size=(1, 7, 6)), 'mask': np.arange(7)[None] < 4}
    hidden = {**other, 'text': other['text'] + 9 * ~other['mask'][..., None]}
    found = said(variables, jnp.asarray([0.0, 0.5]), other)
    np.testing.assert_allclose(found, said(variables, jnp.asarray([0.0, 0.5]), hidden), atol=1e-4)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-4, atol=1e-4)
    assert np.abs(found[1] - plain[1]).max() > 0.01


def test_a_network_without_attention_to_a_text_is_told():
    def apply(variables, x, t, condition, **how):
        return x

    own = denoiser.Denoiser(PATH, apply)
    with pytest.raises(ValueError, match='no attention to its text alone'):
        negative_lib.away(own, {'text': np.ones((1, 2, 3))}, 0.5).apply(
            {}, jnp.ones((1, 4)), jnp.ones(1), {'text': np.ones((1, 2, 3))}
        )
