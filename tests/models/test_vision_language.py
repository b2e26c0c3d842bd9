"""Images in the place of tokens: as if their features were words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.claims import seeds
from kd.errors import UserError
from kd.methods.lm import answering
from kd.models.decoder import Decoder
from kd.models.vision_language import splice, vision_decoder
from kd.networks import build_network

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, N, IMAGE = 9, 7, 4, 8
LANGUAGE = dict(
    name='kd.models.decoder.Decoder', width=8, depth=1, heads=2, mlp_hidden=12, max_length=16,
    tied=False, deviation=None,
)  # fmt: skip
TOKENS = np.array([[1, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3], [4, 5, 1, 2, 3, 0, 1]], np.int32)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)


class Data:
    spec = {  # noqa: RUF012
        'input': jax.ShapeDtypeStruct((T,), jnp.int32),
        'image': jax.ShapeDtypeStruct((8, 8, 1), jnp.float32),
        'segments': jax.ShapeDtypeStruct((T,), jnp.int32),
        'positions': jax.ShapeDtypeStruct((T,), jnp.int32),
    }
    num_classes = V


@pytest.fixture(scope='module')
def network():
    block = dict(
        name='kd.models.vision_language.vision_decoder', language=LANGUAGE,
        vision=dict(name='kd.models.clip.preset', of='toy'), image_token=IMAGE,
    )  # fmt: skip
    return build_network(block, Data(), where='network')


@pytest.fixture(scope='module')
def variables(network):
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), abstract)


def test_features_stand_in_their_places_in_order():
    rng = np.random.default_rng(0)
    words, image = rng.normal(size=(3, 6, 2)), rng.normal(size=(3, 3, 2))
    where = np.array([[0, 1, 1, 0, 1, 0], [0] * 6, [1, 0, 1, 1, 1, 0]], bool)
    found = np.asarray(splice(jnp.asarray(words), jnp.asarray(image), jnp.asarray(where)))
    for row in range(3):
        used = 0
        for t in range(6):
            if not where[row, t]:
                np.testing.assert_allclose(found[row, t], words[row, t], rtol=1e-6)
            elif used == 3:  # One more than there are patches.
                assert np.isnan(found[row, t]).all()
            else:
                np.testing.assert_allclose(found[row, t], image[row, used], rtol=1e-6)
                used += 1


def test_an_image_is_read_as_if_its_features_were_words(network, variables):
    assert network.fields == ('input', 'image', 'positions', 'segments')
    params = variables['params']
    tower = jax.jit(network.module.vision.apply)({'params': params['vision']}, IMAGES)
    up, down = (params['adaptor'][name] for name in ('up', 'down'))
    inner = np.asarray(tower, np.float64) @ up['kernel'] + up['bias']
    inner = inner * (1 + special.erf(inner / np.sqrt(2))) / 2
    words = (inner @ down['kernel'] + down['bias'])[0]
    # A decoder that has a word for each patch of the first image.
    plain = Decoder(**{k: v for k, v in LANGUAGE.items() if k != 'name'}, num_classes=V + N)
    own = {name: x for name, x in params.items() if name not in ('vision', 'adaptor')}
    table = jnp.concatenate([own['embed']['embedding'], jnp.float32(words)])
    own |= {'embed': {'embedding': table}, 'head': jnp.pad(own['head'], ((0, 0), (0, N)))}
    tokens = TOKENS.copy()
    tokens[0, 1:5] = V + np.arange(N)
    wanted = jax.jit(plain.apply)({'params': own}, tokens)[..., :V]
    batch = {
        'input': TOKENS, 'image': IMAGES, 'segments': np.ones_like(TOKENS),
        'positions': np.broadcast_to(np.arange(T), TOKENS.shape),
    }  # fmt: skip
    apply = jax.jit(lambda v, b: network.apply(v, *network.of(b)).logits)
    found = np.asarray(apply(variables, batch))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    # Text alone does not see the image of its row; text behind one does.
    other = np.asarray(apply(variables, {**batch, 'image': -IMAGES}))
    np.testing.assert_array_equal(other[1], found[1])
    assert np.abs(other[0, 5:] - found[0, 5:]).max() > 0.01


def test_what_cannot_be_is_told(network):
    with pytest.raises(ValueError, match=r'image_token=30 among its 9 tokens'):
        vision_decoder(
            V, language=LANGUAGE, vision=dict(name='kd.models.clip.preset', of='toy'),
            image_token=30,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r'not by a Decoder and a Decoder'):
        vision_decoder(V, language=LANGUAGE, vision=LANGUAGE, image_token=3)
    with pytest.raises(UserError, match=r"takes the fields \['input', 'image'\]; take answers"):
        answering.needed_decoder(seeds.context(network=network), network, 'network')
