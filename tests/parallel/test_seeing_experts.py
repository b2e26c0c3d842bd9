"""Experts, adapters and a tower over four devices: what one says, no rows moved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.aot import hlo
from kd.methods.lm import common
from kd.models import adapters
from kd.models.decoder import SHARDING
from kd.networks import build_network
from kd.parallel import layout
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import tree_shardings
from kd.state import path_name

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, B, WIDTH, EXPERTS, PATCHES, IMAGE = 96, 24, 8, 32, 4, 4, 95
# Bytes of the hidden states of all rows.
STATES = B * T * WIDTH * 4


class Data:
    spec = {  # noqa: RUF012
        'input': jax.ShapeDtypeStruct((T,), jnp.int32),
        'image': jax.ShapeDtypeStruct((8, 8, 1), jnp.float32),
        'segments': jax.ShapeDtypeStruct((T,), jnp.int32),
    }
    num_classes = V


def network():
    """One block with experts and one without, all of whose projections have adapters."""
    language = dict(
        name='kd.models.adapters.lora', rank=6, targets='.',
        base=dict(
            name='kd.models.decoder.Decoder', width=WIDTH, depth=2, mlp_hidden=48, heads=4,
            kv_heads=2, max_length=T, remat='block', tied=False,
            experts=dict(count=EXPERTS, top_k=2, capacity=1.25, every=2),
        ),
    )  # fmt: skip
    block = dict(
        name='kd.models.vision_language.vision_decoder', language=language,
        vision=dict(name='kd.models.clip.preset', of='toy'), image_token=IMAGE,
    )  # fmt: skip
    return build_network(block, Data(), where='network')


def example():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, IMAGE, (B, T)).astype(np.int32)
    tokens[::2, 3 : 3 + PATCHES] = IMAGE
    segments = np.ones((B, T), np.int32)
    segments[:, 20:] = 0
    image = rng.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32)
    answers = (segments > 0) & (tokens != IMAGE)
    return dict(input=tokens, segments=segments, image=image, response_mask=answers)


def test_experts_adapters_and_a_tower_are_over_devices_what_they_are_on_one():
    of, batch = network(), example()
    rng = np.random.default_rng(1)
    # Every leaf random, also those that begin at 0.
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), x.dtype),
        jax.eval_shape(of.init, jax.random.key(0)),
    )
    mesh = mesh_lib.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])

    def step(variables, batch):
        def loss(variables):
            said = common.token_losses(
                of, variables, batch, lambda logits, _, labels: (
                    optax.softmax_cross_entropy_with_integer_labels(logits, labels), {}
                ), chunk=6,
            )  # fmt: skip
            each, _ = common.balanced(of, batch, said.routers)
            return jnp.where(said.where, said.losses, 0).sum() + each.sum()

        return jax.value_and_grad(loss)(variables)

    def over_devices(variables, batch):
        with layout.inside(mesh):
            return step(variables, batch)

    lying = tree_shardings(variables, SHARDING, mesh)
    arguments = jax.device_put((variables, batch), (lying, mesh_lib.batch_sharding(mesh)))
    program = jax.jit(over_devices, out_shardings=(None, lying)).lower(*arguments).compile()
    told, gradient = program(*arguments)
    alone, slopes = jax.jit(step)(variables, batch)
    np.testing.assert_allclose(told, alone, rtol=1e-5)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(slopes), strict=True)
    for path, one, many in zip(paths, leaves, jax.tree.leaves(gradient), strict=True):
        name, size = path_name(path), float(jnp.abs(one).max())
        assert size > 0, name
        np.testing.assert_allclose(many, one, atol=1e-4 * size + 1e-6, err_msg=name)
    for name in (adapters.DOWN, adapters.UP, 'router', 'experts', 'vision', 'adaptor'):
        assert any(name in path_name(path) for path in paths)

    # What lies along fsdp is gathered for the forward and the backward pass; the head once,
    # the table never. Of rows come together numbers of tokens and what routers say of them:
    # less than the hidden states of all rows would be, were they gathered once.
    sizes = {
        path_name(path): x.nbytes // (2 if 'tensor' in str(where.spec) else 1)
        for (path, x), where in zip(
            jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(lying), strict=True
        )
        if 'fsdp' in str(where.spec)
    }
    head = sizes['params/head']
    whole = 2 * (sum(sizes.values()) - head - sizes['params/embed/embedding']) + head
    found = hlo.collectives(program.as_text())
    gathered = sum(each.times * each.bytes for each in found if each.kind == 'all-gather')
    assert whole <= gathered <= whole + 4 * B * T + 2 * B * T * EXPERTS * 4 + 2048 < whole + STATES
