"""DMGD in latents, by networks of the kinds of the full scale: what is encoded and decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd.claims import seeds
from kd.data import sources
from kd.data.context import SourceContext
from kd.data.distilled import clusters, coreset
from kd.losses import schedule
from kd.methods.dataset import dmgd
from kd.methods.dataset.class_clusters import class_clusters
from kd.models.autoencoder_kl import AutoencoderKL
from kd.models.denoiser import Denoised
from kd.models.latent_dit import LatentDiT
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

IMAGE = {'input': jax.ShapeDtypeStruct((4, 4, 3), jnp.float32)}
LATENT = {'input': jax.ShapeDtypeStruct((2, 2, 4), jnp.float32)}
TOLD = np.array([5, 2], np.int32)


def filled(network, scale):
    """Variables of which none is 0, on a mesh."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    made = jax.tree.map(lambda x: np.float32(scale * rng.standard_normal(x.shape)), shapes)
    return jax.device_put(made, NamedSharding(make_mesh({'data': 1}), PartitionSpec()))


def network_of(module, spec):
    return from_linen(module, *module.example_inputs(spec))


MODULE = AutoencoderKL(channels=(4, 4), blocks=1, groups=2, scale=0.5)
ENCODER = network_of(MODULE, IMAGE)
WEIGHTS = filled(ENCODER, 0.3)


def test_of_data_that_are_latents_an_autoencoder_takes_the_images():
    assert MODULE.example_inputs(LATENT)[0].shape == (1, 4, 4, 3)
    assert network_of(MODULE, LATENT).inputs == ENCODER.inputs


def test_clusters_are_of_scaled_latents_class_by_class(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {
        'input': rng.uniform(-1, 1, (11, 4, 4, 3)).astype(np.float32),
        'label': np.array([0, 1] * 5 + [1], np.int32),
    }
    data = sources.DataSet(
        'images', {'train': 11}, lambda _: sources.in_memory(arrays),
        sources.example_spec((4, 4, 3)), 2,
    )  # fmt: skip
    source = sources.Source(data, 'train')
    context = seeds.context(
        references={'autoencoder': ENCODER}, num_classes=2, steps=1, batch_size=4,
        source=lambda split: source,
    )  # fmt: skip
    state = State.create(jax.random.key(0), {'params': {}}, frozen={'autoencoder': WEIGHTS})
    class_clusters(context, clusters=2)(state, 1, tmp_path)
    found = clusters.read(tmp_path, sources.fingerprint(source))
    assert found['centroids'].shape == (2, 2, 2, 2, 4)

    @jax.jit
    def encode(x):
        return MODULE.apply(WEIGHTS, x, method='encode')[0]

    latents = 0.5 * np.asarray(encode(arrays['input']))
    for label in (0, 1):
        wanted = coreset.clusters(latents[arrays['label'] == label], 2)
        np.testing.assert_allclose(found['centroids'][label], wanted[0], atol=1e-4)
        np.testing.assert_allclose(found['mass'][label], wanted[1], atol=1e-6)


def test_images_are_the_decoded_latents_that_a_network_of_learned_variance_samples():
    """The teacher is told its own numbers of the classes, not those of the data."""
    rng = np.random.default_rng(2)
    arrays = {
        'input': rng.normal(size=(2, 2, 2, 4)).astype(np.float32),
        'centroids': rng.normal(size=(2, 3, 2, 2, 4)).astype(np.float32),
        'mass': np.full((2, 3), 1 / 3, np.float32),
        'label': np.arange(2, dtype=np.int32),
        'told': TOLD,
    }
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    data = sources.DataSet('classes', {'train': 2}, lambda _: sources.in_memory(arrays), spec, None)
    source = clusters.Classes(data, SourceContext('train'), TOLD, '')
    path = schedule.discrete('linear', 1e-4, 0.02)
    dit = LatentDiT(width=8, depth=1, heads=2, num_classes=6, grid=1)
    teacher = network_of(Denoised(dit, path, 'eps'), LATENT)
    context = seeds.context(
        teacher=teacher, references={'autoencoder': ENCODER}, spec=spec, steps=2, batch_size=2,
        source=lambda split: source,
    )  # fmt: skip
    how = dict(steps=5, window=(1, 3), guided_channels=3, embedding='emb/class_embedder')
    method = dmgd.dmgd(context, images_per_class=2, **how)
    frozen = {'teacher': filled(teacher, 0.1), 'autoencoder': WEIGHTS}
    init, step = jax.jit(method.init), jax.jit(method.step)
    state = init(jax.random.key(0), frozen)
    for _ in range(2):
        state, _ = step(state, arrays)
    found = state.variables()
    assert found['params']['images'].shape == (4, 4, 4, 3)
    decode = jax.jit(lambda z: MODULE.apply(WEIGHTS, z / 0.5, method='decode'))
    wanted = np.clip(decode(found['made'].reshape(4, 2, 2, 4)), -1, 1)
    np.testing.assert_allclose(found['params']['images'], wanted, atol=1e-3)
    assert len(np.unique(found['made'].reshape(4, -1), axis=0)) == 4
    assert np.isfinite(found['made']).all()
    # Other numbers, other images.
    others = step(init(jax.random.key(0), frozen), {**arrays, 'told': TOLD + 1})[0].variables()
    assert np.abs(others['made'][:, 0] - found['made'][:, 0]).max() > 1e-3
