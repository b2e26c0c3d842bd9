"""Shapes in 3-D: sizes as published, convolutions over voxels, rows that nobody reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from kd.claims import seeds
from kd.errors import UserError
from kd.io import pretrained, shape_names
from kd.losses.flow_map_family import consistency_distillation_residual
from kd.methods.flow.mdt_dist import mdt_dist
from kd.models import shape_dit, sparse
from kd.models.one_time import OneTime
from kd.network import from_linen, parameter_count
from kd.sampling import times
from kd.state import path_name

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SIDE, N, C = 4, 12, 2
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ('of', 'context', 'million'),
    # TRELLIS's table of its text models: 543 M and 588 M; those of images see more features.
    [
        ('trellis_structure_large', 768, 543),
        ('trellis_latents_large', 768, 588),
        ('trellis_structure_large', 1_024, 556),
        ('trellis_latents_large', 1_024, 601),
    ],
)
def test_networks_have_the_published_sizes(of, context, million):
    module = shape_dit.preset(of, context=context)
    shape = (4, 4, 4, 8) if 'structure' in of else (16, 8)
    inputs = jnp.zeros(1), jnp.zeros((1, *shape))
    made = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))
    assert parameter_count(made) / 1e6 == pytest.approx(million, abs=0.6)
    assert made['params']['blocks']['self_attn']['q_rms_norm']['gamma'].shape == (24, 16, 64)


def voxels(count=N, rows=N, seed=1):
    """So many different places on the grid, [1, rows, 3], and which rows these are."""
    rng = np.random.default_rng(seed)
    flat = rng.permutation(SIDE**3)[:count]
    places = np.full((1, rows, 3), 99, np.int32)
    places[0, :count] = np.stack(np.unravel_index(flat, (SIDE,) * 3), axis=-1)
    return places, np.arange(rows)[None] < count


def test_a_convolution_is_that_of_the_whole_grid_where_there_are_voxels():
    places, there = voxels(rows=N + 3)
    grid = jax.jit(lambda p, t: sparse.pyramid(p, t, SIDE, 8))(places, there)
    x = RNG.normal(size=(1, N + 3, C)).astype('f4')
    conv = sparse._Conv(5, jnp.float32)
    variables = conv.init(jax.random.key(0), x, grid.fine.near)
    found = np.asarray(conv.apply(variables, x, grid.fine.near))[0, :N]
    at = tuple(places[0, :N].T)
    full = np.zeros((1, SIDE, SIDE, SIDE, C), 'f4')
    full[0][at] = x[0, :N]
    kernel = np.asarray(variables['params']['kernel']).reshape(3, 3, 3, C, 5)
    dense = jax.lax.conv_general_dilated(
        full, kernel, (1, 1, 1), 'SAME', dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC')
    )
    np.testing.assert_allclose(found, np.asarray(dense)[0][at], atol=1e-5)


def test_cells_have_the_mean_of_their_voxels_and_voxels_what_their_cell_has():
    places, there = voxels(rows=N + 3)
    grid = sparse.pyramid(jnp.asarray(places), jnp.asarray(there), SIDE, 8)
    x = RNG.normal(size=(1, N + 3, C)).astype('f4')
    cells = {}
    for place, value in zip(places[0, :N] // 2, x[0, :N], strict=True):
        cells.setdefault(tuple(place), []).append(value)
    ordered = sorted(cells)
    assert int(grid.coarse.there.sum()) == len(cells)
    np.testing.assert_array_equal(grid.coarse.places[0, : len(cells)], ordered)
    found = np.asarray(sparse.mean_of_cells(jnp.asarray(x), grid))
    wanted = [np.mean(cells[place], axis=0) for place in ordered]
    np.testing.assert_allclose(found[0, : len(cells)], wanted, atol=1e-6)
    np.testing.assert_array_equal(found[0, len(cells) :], 0.0)
    back = np.asarray(sparse._rows(jnp.asarray(found), grid.cell))[0]
    for row, place in enumerate(places[0, :N] // 2):
        np.testing.assert_allclose(back[row], np.mean(cells[tuple(place)], axis=0), atol=1e-6)
    np.testing.assert_array_equal(back[N:], 0.0)
    assert bool(grid.fits[0])
    assert not bool(sparse.pyramid(jnp.asarray(places), jnp.asarray(there), SIDE, 2).fits[0])
    with pytest.raises(ValueError, match='do not divide a grid of side 5'):
        sparse.pyramid(jnp.asarray(places), jnp.asarray(there), 5, 8)


@pytest.fixture(name='drawn', scope='module')
def _drawn():
    """A small network of voxels, every leaf random."""
    module = OneTime(
        shape_dit.VoxelDiT(
            width=16, depth=1, heads=2, context=6, features=4, side=SIDE, tokens=8
        ),
        1000.0, backward=True,
    )  # fmt: skip
    spec = {'input': jax.ShapeDtypeStruct((N, C), jnp.float32)}
    network = from_linen(module, *module.example_inputs(spec))
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    return network, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), abstract
    )


def test_neither_rows_that_are_not_there_nor_the_order_of_those_that_are_changes_a_shape(drawn):
    network, variables = drawn
    assert network.module.conditions == ('coordinates', 'voxel_mask', 'text')
    assert network.module.valid == 'voxel_mask'
    x, text = RNG.normal(size=(1, N, C)).astype('f4'), RNG.normal(size=(1, 3, 6)).astype('f4')
    s = jnp.array([0.3])

    def said(places, there, x):
        told = dict(coordinates=jnp.asarray(places, jnp.float32), voxel_mask=there, text=text)
        return np.asarray(network.apply(variables, s, s, jnp.asarray(x), **told).logits)[0]

    places, there = voxels()
    alone = said(places, there, x)
    assert np.abs(alone).max() > 0.1
    more, among = voxels(rows=N + 5)
    padded = np.concatenate([x, 100 * np.ones((1, 5, C), 'f4')], axis=1)
    found = said(more, among, padded)
    np.testing.assert_allclose(found[:N], alone, atol=1e-5)
    np.testing.assert_array_equal(found[N:], 0.0)
    order = np.random.default_rng(3).permutation(N)
    np.testing.assert_allclose(said(places[:, order], there, x[:, order]), alone[order], atol=1e-5)
    # More cells than rows for them: no number that looks like one.
    crowded = network.module.clone(inner=network.module.inner.clone(tokens=2))
    told = dict(coordinates=jnp.asarray(places, jnp.float32), voxel_mask=there, text=text)
    lost = crowded.apply(variables, s, s, x, **told)
    assert np.isnan(lost).all()


def test_on_a_grid_tokens_know_their_place_and_the_time_runs_the_other_way():
    inner = shape_dit.ShapeDiT(width=16, depth=1, heads=2, context=0, patch=2)
    module = OneTime(inner, 1000.0, backward=True)
    x = jnp.asarray(RNG.normal(size=(1, 4, 4, 4, C)), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(1), jnp.ones(1), x)
    rng = np.random.default_rng(4)
    variables = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.4, a.dtype), abstract
    )
    s = jnp.array([0.25])
    found = module.apply(variables, s, s, x)
    np.testing.assert_allclose(found, -inner.apply(variables, 1000 * (1 - s), x), atol=1e-6)
    assert found.shape == x.shape
    # Rolled by a patch the tokens are the same, and their places are not.
    rolled = module.apply(variables, s, s, jnp.roll(x, 2, axis=1))
    assert np.abs(rolled - jnp.roll(found, 2, axis=1)).max() > 1e-3
    features = np.asarray(shape_dit.place_features(jnp.array([[0, 1, 2]]), 16))[0]
    frequency = 1e4 ** (-np.arange(2) / 2)
    wanted = [f(k * frequency) for k in (0, 1, 2) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(features, [*np.concatenate(wanted), 0, 0, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match='sides must be divisible by the patch'):
        module.apply(variables, s, s, x[:, :3])
    with pytest.raises((ValueError, UserError), match="no ShapeDiT 'trellis'"):
        shape_dit.preset('trellis')


def test_velocities_are_matched_over_the_voxels_that_there_are(drawn):
    """By hand from the same draws: a sum over voxels over their number, row by row."""
    network, variables = drawn
    teacher = jax.tree.map(lambda a: 1.1 * a, variables)
    context = seeds.context(network=network, teacher=network, tx=optax.sgd(1.0))
    method = mdt_dist(context, distribution=0.0, constant=0.1)
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})
    state = state.replace(params={'network': variables['params']})
    few, many = voxels(5, N, seed=5), voxels(N, N, seed=6)
    places, there = (np.concatenate(pair) for pair in zip(few, many, strict=True))
    data = {
        'input': RNG.normal(size=(2, N, C)).astype('f4'),
        'text': RNG.normal(size=(2, 3, 6)).astype('f4'),
        'coordinates': places.astype('f4'),
        'voxel_mask': there,
    }
    _, metrics = jax.jit(method.step)(state, data)
    keys = jax.random.split(state.step_key(), 4)
    law = times.logit_normal(1.0, 1.0, 0.01 + 1e-5, 1.0)
    s = 1.0 - law(keys[0], jnp.zeros(2))
    noise = jax.random.normal(keys[1], (2, N, C))
    told = {name: x for name, x in data.items() if name != 'input'}

    def field(of):
        return lambda s, t, x: network.apply(of, s, s, x, **told).logits

    x_s = (1 - s)[:, None, None] * noise + s[:, None, None] * data['input']
    found = jax.jit(
        lambda x: consistency_distillation_residual(
            field(variables), s, x, teacher=field(teacher), step=0.01, constant=0.1
        )
    )(x_s)
    each = np.square(found).sum((1, 2)) / (C * there.sum(1))
    loss = metrics['loss']
    np.testing.assert_allclose(loss.total / loss.count, each.mean(), rtol=1e-4)


def test_released_weights_are_found_under_their_names(tmp_path):
    """Convolutions are [O, 3, 3, 3, I] there, blocks one by one."""
    size = dict(resolution=SIDE, in_channels=C, out_channels=C, model_channels=16, num_blocks=2,
                cond_channels=6, num_heads=2, mlp_ratio=4, pe_mode='ape', qk_rms_norm=True,
                patch_size=2, use_fp16=True)  # fmt: skip
    described = {'_class_name': 'SLatFlowModel', 'num_io_res_blocks': 2, 'io_block_channels': [4]}
    (tmp_path / 'config.json').write_text(json.dumps(described | size))
    rng = np.random.default_rng(8)
    shapes = {
        'input_layer.weight': (4, C), 'out_layer.bias': (C,), 't_embedder.mlp.0.weight': (16, 256),
        'input_blocks.1.conv1.conv.weight': (16, 3, 3, 3, 4),
        'out_blocks.0.conv2.conv.bias': (4,), 'out_blocks.0.emb_layers.1.weight': (8, 16),
        'input_blocks.1.skip_connection.weight': (16, 4), 'input_blocks.0.norm1.weight': (4,),
        **{f'blocks.{i}.{name}': shape for i in range(2) for name, shape in {
            'self_attn.to_qkv.weight': (48, 16), 'self_attn.q_rms_norm.gamma': (2, 8),
            'cross_attn.to_kv.weight': (32, 6), 'mlp.mlp.2.weight': (16, 64),
            'adaLN_modulation.1.bias': (96,), 'norm2.weight': (16,)}.items()},
    }  # fmt: skip
    module = pretrained.network('hf:' + str(tmp_path))
    assert module == shape_dit.VoxelDiT(16, 2, 2, 6, features=4, side=SIDE)
    inputs = jnp.zeros(1), jnp.zeros((1, N, C))
    abstract = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))
    find, _ = shape_names.find(module, (), '')
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract['params'])[0]:
        found = find(tuple(key.key for key in path), leaf.shape)
        parts = found if isinstance(found, tuple) else (found,)
        for part in parts:
            shape = leaf.shape[len(parts) > 1 or 'blocks/' in path_name(path)[:7] :]
            if part.axes is not None:
                back = np.argsort(part.axes)
                shape = tuple(shape[i] for i in back)
            tensors[part.name] = rng.normal(size=shape).astype('f4')
    for name, shape in shapes.items():
        assert tensors[name].shape == shape, name
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
    loaded = pretrained.load('hf:' + str(tmp_path), abstract)['params']
    kernel = tensors['input_blocks.1.conv1.conv.weight']
    np.testing.assert_array_equal(
        loaded['input_blocks_1']['conv1']['kernel'], kernel.transpose(1, 2, 3, 4, 0)
    )
    np.testing.assert_array_equal(
        loaded['blocks']['self_attn']['to_qkv']['kernel'][1],
        tensors['blocks.1.self_attn.to_qkv.weight'].T,
    )
