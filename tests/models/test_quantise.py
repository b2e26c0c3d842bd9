"""Weights in four bits: what is lost, and bytes of the file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import quantised, safetensors
from kd.models import quantise
from kd.models.dit import DiT

pytestmark = pytest.mark.usefixtures('compiled_quickly')
W = np.random.default_rng(0).standard_normal((48, 50)).astype(np.float32)


@pytest.mark.parametrize(('levels', 'gap'), [('nf4', 0.1519), ('int4', 1 / 14)])
def test_a_weight_is_the_nearest_level_of_its_block(levels, gap):
    q = quantise.quantise(W, levels=levels)
    found = np.asarray(quantise.dequantise(q)).reshape(-1)
    at, rows = np.array(quantise.LEVELS[levels]), W.reshape(-1)
    for first in range(0, rows.size, 64):
        block = rows[first : first + 64]
        scale = np.float64(np.float16(np.abs(block).max()))
        wanted = scale * at[np.abs(block[:, None] / scale - at).argmin(1)]
        np.testing.assert_allclose(found[first : first + 64], wanted, rtol=1e-6)
        assert np.abs(found[first : first + 64] - block).max() <= np.abs(block).max() * gap * 1.01


def test_levels_come_back_exactly_and_zero_stays():
    for levels, at in quantise.LEVELS.items():
        # Of INT4 the least level is never the nearest of a block's own weights.
        used = np.array(at if levels == 'nf4' else at[1:], np.float32)
        w = np.resize(used, 64).reshape(4, 16) * 0.5
        q = quantise.quantise(w, levels=levels)
        np.testing.assert_allclose(quantise.dequantise(q), w, rtol=1e-6)
        assert 0.0 in at
        zeros = quantise.quantise(np.zeros((3, 5)), levels=levels)
        np.testing.assert_array_equal(quantise.dequantise(zeros), 0.0)
    assert len(quantise.LEVELS['nf4']) == len(quantise.LEVELS['int4']) == 16


def test_a_scale_scales_and_an_odd_number_of_weights_is_kept():
    w = W[:5, :7]
    q, four = quantise.quantise(w), quantise.quantise(4 * w)
    np.testing.assert_array_equal(q.codes, four.codes)
    np.testing.assert_array_equal(4 * quantise.dequantise(q), quantise.dequantise(four))
    assert (q.codes.size, q.scales.size) == (18, 1)
    with pytest.raises(ValueError, match="and a block is even, got 'fp4' and 64"):
        quantise.quantise(w, levels='fp4')


def test_bits_are_those_of_the_arrays_held():
    packed = quantise.quantise_tree({'a': {'kernel': W[:, :48], 'bias': W[0]}})
    assert quantise.bits_per_weight(packed) == 4.25
    assert packed['a']['bias'].dtype == jnp.float16
    with pytest.raises(UserError, match="'up' finds no matrix"):
        quantise.quantise_tree({'a': {'kernel': W}}, 'up')


@pytest.mark.parametrize('at', [65_504.0, 7e4, np.nan])
@pytest.mark.parametrize('name', ['kernel', 'bias'])
def test_numbers_that_no_float16_is_as_large_as_are_refused(at, name, tmp_path):
    tree = {'up': {'kernel': W.copy(), 'bias': W[0].copy()}}
    tree['up'][name][..., 3] = at
    file = tmp_path / 'x.safetensors'
    compiled = jax.jit(quantise.quantise_tree)(tree)
    if at == 65_504.0:
        there = quantise.dequantised(quantise.quantise_tree(tree))['up'][name]
        np.testing.assert_array_equal(there[..., 3], at)
        assert quantised.save(file, compiled)
        return
    with pytest.raises(UserError, match=f'quantise: up/{name}: float16 goes to 65,504, and the'):
        quantise.quantise_tree(tree)
    with pytest.raises(UserError, match=f"x.safetensors: 'up/{name}' has numbers that are not fin"):
        quantised.save(file, compiled)
    assert not file.exists()


def test_a_file_of_four_bits_is_a_quarter_of_sixteen_and_reads_back(tmp_path):
    module = DiT(patch=2, width=256, depth=3, heads=4)
    inputs = jnp.zeros(1), jnp.ones(1), jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape, np.float32), shapes)
    packed = jax.jit(lambda v: quantise.quantise_tree(v, r'block\d+/.*kernel$|kernel$'))(variables)
    bytes_of_four = quantised.save(tmp_path / 'four.safetensors', packed)
    half = tmp_path / 'half.safetensors'
    safetensors.save(half, jax.tree.map(lambda x: x.astype(np.float16), variables))
    assert bytes_of_four / half.stat().st_size <= 0.27
    read = quantised.load(tmp_path / 'four.safetensors')
    jax.tree.map(np.testing.assert_array_equal, read, packed)
    apply = jax.jit(lambda tree: module.apply(quantise.dequantised(tree), *inputs))
    np.testing.assert_array_equal(apply(read), apply(packed))
    with pytest.raises(UserError, match=r'half\.safetensors has no weights of four bits'):
        quantised.load(half)


def test_the_command_writes_a_stage_in_four_bits(tmp_path, monkeypatch, capsys):
    variables = {'params': {'up': {'kernel': W, 'bias': W[0]}}}
    monkeypatch.setattr(safetensors, 'stage_variables', lambda stage, weights: variables)
    file = tmp_path / 'student.safetensors'
    monkeypatch.setattr(sys, 'argv', ['x', 'runs/mine/student', str(file), '--levels=int4'])
    assert quantised.main() == 0
    size = file.stat().st_size
    told = capsys.readouterr().out
    assert told.endswith(f'2,450 parameters, {size:,} bytes, {8 * size / 2450:.2f} bits each\n')
    read = quantised.load(file)['params']['up']
    jax.tree.map(np.testing.assert_array_equal, read['kernel'], quantise.quantise(W, levels='int4'))
    np.testing.assert_array_equal(read['bias'], W[0].astype(np.float16))
