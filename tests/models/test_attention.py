"""Attention head by head and query by query in NumPy; masks, groups, edits, the fused path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from kd.models import attention
from kd.models.attention import attend

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, N, M, H, D = 2, 5, 7, 6, 4


def draw(groups=H, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, N, H, D), (B, M, groups, D), (B, M, groups, D)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def draw_mask(*shape):
    """A key in three is hidden; the first query of the first example sees none."""
    mask = np.random.default_rng(1).uniform(size=shape) < 2 / 3
    if shape[2] > 1:
        mask[0, :, 0] = False
    return jnp.asarray(mask)


def by_hand(query, key, value, mask=None, edit=lambda maps: maps):
    """(maps [B, H, N, M] in float64, what they sum to)."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    mask = np.broadcast_to(True if mask is None else mask, (B, H, N, M))
    maps = np.zeros((B, H, N, M))
    out = np.zeros((B, N, H, D))
    for b, h, n in np.ndindex(B, H, N):
        group = h * key.shape[2] // H
        seen = mask[b, h, n]
        if seen.any():
            maps[b, h, n, seen] = softmax(key[b, seen, group] @ query[b, n, h] / np.sqrt(D))
    maps = edit(maps)
    for b, h in np.ndindex(B, H):
        out[b, :, h] = maps[b, h] @ value[b, :, h * key.shape[2] // H]
    return out


MASKS = {'none': None, 'keys': (B, 1, 1, M), 'pairs': (1, 1, N, M), 'heads': (B, H, N, M)}


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('groups', [6, 2, 1])
def test_attention_is_softmax_over_the_keys_that_are_seen(groups, mask, monkeypatch):
    arrays = draw(groups)
    mask = MASKS[mask] and draw_mask(*MASKS[mask])
    # Called as a fused kernel is, which CPUs lack.
    monkeypatch.setattr(attention, '_kernel', lambda query: 'xla')
    both = jax.jit(lambda *a: [attend(*a, mask=mask, fused=fused) for fused in (False, True)])
    for found in both(*arrays):
        np.testing.assert_allclose(found, by_hand(*arrays, mask), atol=2e-6)


def test_a_map_is_edited_after_the_mask():
    arrays, mask = draw(2), draw_mask(B, H, N, M)

    def halved(maps):
        return 0.5 * maps + maps[:, ::-1]

    found = attend(*arrays, mask=mask, edit=halved)
    np.testing.assert_allclose(found, by_hand(*arrays, mask, halved), atol=2e-6)
    kept = []
    attend(*arrays, mask=mask, edit=lambda maps: kept.append(maps) or maps)
    assert kept[0].shape == (B, H, N, M)
    np.testing.assert_array_equal(np.asarray(kept[0])[~np.asarray(mask)], 0.0)
    np.testing.assert_allclose(kept[0].sum(-1), mask.any(-1), atol=1e-6)


def test_queries_that_see_nothing_have_finite_derivatives_in_both_modes():
    arrays, mask = draw(3), draw_mask(B, H, N, M)
    large = [1e3 * x for x in arrays[:2]] + arrays[2:]
    moved = [np.cos(x) for x in arrays]

    @jax.jit
    def derivatives(*point):
        gradients = jax.grad(lambda *a: (attend(*a, mask=mask) ** 2).sum(), (0, 1, 2))(*point)
        return gradients, jax.jvp(lambda *a: attend(*a, mask=mask), point, tuple(moved))[1]

    for point in (large, arrays):
        gradients, slope = derivatives(*point)
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)
        np.testing.assert_array_equal(gradients[0][0, 0], 0.0)
    h = 1e-2
    pairs = [(np.float64(x), np.float64(d)) for x, d in zip(arrays, moved, strict=True)]
    ends = [by_hand(*(x + step * h * d for x, d in pairs), mask) for step in (-2, -1, 1, 2)]
    # The central difference of fourth order.
    difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
    np.testing.assert_allclose(slope, difference, atol=2e-5)


def test_types_stay_and_the_softmax_is_wide():
    narrow = draw(2, jnp.bfloat16)
    out = attend(*narrow)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), by_hand(*narrow), atol=2e-2)
    seen = []
    attend(*narrow, edit=lambda maps: seen.append(maps.dtype) or maps)
    assert seen == [jnp.float32]
    with jax.enable_x64(True):
        wide = draw(2, np.float64)
        for fused in (False, True):
            np.testing.assert_allclose(attend(*wide, fused=fused), by_hand(*wide), atol=1e-14)


def test_what_does_not_fit_is_refused():
    query, key, value = draw()
    with pytest.raises(ValueError, match='6 heads of queries over 4 of keys and 4 of values'):
        attend(query, key[:, :, :4], value[:, :, :4])
    with pytest.raises(ValueError, match='over 3 of keys and 6 of values'):
        attend(query, key[:, :, :3], value)
    with pytest.raises(ValueError, match=r'the mask is float32\[2, 1, 1, 7\], expected bool'):
        attend(query, key, value, mask=jnp.ones((B, 1, 1, M)))
    with pytest.raises(ValueError, match=r'the mask is bool\[5, 7\], expected bool that broad'):
        attend(query, key, value, mask=jnp.ones((N, M), bool))
    with pytest.raises(ValueError, match='holds no maps'):
        attend(query, key, value, fused=True, edit=lambda maps: maps)


@pytest.mark.parametrize('kind', ['none', 'keys', 'each'])
def test_many_queries_go_in_blocks_that_say_the_same(kind, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 4)), jnp.float32)
               for n, h in ((7, 4), (6, 2), (6, 2)))  # fmt: skip
    shape = {'none': None, 'keys': (2, 1, 1, 6), 'each': (1, 1, 7, 6)}[kind]
    mask = None if shape is None else jnp.asarray(rng.random(shape) > 0.4)
    weight = jnp.asarray(rng.normal(size=(2, 7, 4, 4)), jnp.float32)

    def said(fused):
        def loss(q, k, v):
            out = attention.attend(q, k, v, mask=mask, fused=fused)
            return jnp.sum(weight * out), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    whole = said(False)
    monkeypatch.setattr(attention, 'BLOCK', 3)
    text = str(jax.make_jaxpr(lambda q: attention.attend(q, k, v, mask=mask, fused=True))(q))
    assert 'scan' in text
    assert '[2,4,7,6]' not in text
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), said(True), whole
    )
