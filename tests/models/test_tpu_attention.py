"""The kernel for TPUs, interpreted, against attention in blocks, alone and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.models.causal_attention import attend_causally
from kd.models.tpu_attention import attend_on_tpu
from kd.parallel import layout
from kd.parallel import mesh as mesh_lib

# Padded to two blocks of lanes; four heads of queries on two of keys.
B, T, H, K, D = 2, 200, 4, 2, 16


def draw():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, n, D)), jnp.float32) for n in (H, K, K)]


SEGMENTS = jnp.asarray([[0] * 70 + [1] * 130, [2] * 20 + [3] * 180], jnp.int32)


@pytest.mark.parametrize(
    ('segments', 'window', 'sizes'),
    [
        (None, None, None),
        (SEGMENTS, 50, None),
        (SEGMENTS, None, dict(fsdp=2, tensor=2)),
        (None, None, dict(data=4)),
    ],
)
def test_it_is_attention_in_blocks_and_so_is_its_gradient(segments, window, sizes):
    weights = jnp.cos(jnp.arange(B * T * H * D)).reshape(B, T, H, D)
    mesh = mesh_lib.make_mesh(dict(dict(data=1), **(sizes or {})), jax.devices()[:4])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = jax.device_put(draw(), everywhere)

    def on_tpu(*arrays):
        with layout.inside(mesh):
            return attend_on_tpu(*arrays, segments, window=window, interpret=True)

    def in_blocks(*arrays):
        return attend_causally(*arrays, segments=segments, window=window, block=64)

    def both(attend):
        def summed(*arrays):
            out = attend(*arrays)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(summed, (0, 1, 2), has_aux=True))(*arrays)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), both(on_tpu), both(in_blocks)
    )


def test_elsewhere_than_on_a_tpu_it_is_not_part_of_the_program():
    arrays = [jnp.zeros((1, 512, n, D), jnp.bfloat16) for n in (H, K, K)]
    attended = jax.jit(attend_causally)
    assert 'platform_index' in str(attended.trace(*arrays).jaxpr)
    lowered = attended.trace(*arrays).lower(lowering_platforms=('cpu',)).as_text()
    assert 'custom_call' not in lowered
    assert 'tpu_custom_call' in attended.trace(*arrays).lower(lowering_platforms=('tpu',)).as_text()
