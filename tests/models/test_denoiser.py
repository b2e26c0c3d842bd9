"""Low-rank adapters beside the kernels of any network in a denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.losses import schedule
from kd.method import with_base, with_result
from kd.methods.diffusion.dmd import dmd
from kd.models import adapters
from kd.models.adapters import Adapted, Adapter
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RANK, ALPHA = 2, 6.0


def drawn(network, seed=0):
    """Every leaf random, also those that begin at 0."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), abstract)


def test_a_denoiser_has_adapters_beside_the_kernels_of_any_network():
    path, spec = schedule.edm(0.02, 5.0), {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}

    def denoiser_of(adapter):
        inner = VelocityMLP(width=6, depth=2)
        inner = inner if adapter is None else Adapted(inner, adapter)
        module = Denoised(inner, path, 'flow', 'edm')
        return from_linen(module, *module.example_inputs(spec))

    plain, network = denoiser_of(None), denoiser_of(Adapter(RANK, ALPHA, r'hidden'))
    variables = drawn(network)
    own, base = adapters.own(variables['params']), adapters.without(variables['params'])
    jax.tree.map(lambda x, y: None, base, jax.eval_shape(plain.init, jax.random.key(0))['params'])
    # By hand: W + alpha / rank A B.
    merged = jax.tree.map(np.array, base)
    for name, each in own.items():
        merged[name]['kernel'] += ALPHA / RANK * np.asarray(each['lora_a']) @ each['lora_b']
    x, t = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32), jnp.full(3, 0.7)
    wanted = jax.jit(plain.apply)({'params': merged}, t, x).logits
    np.testing.assert_allclose(
        jax.jit(network.apply)(variables, t, x).logits, wanted, rtol=1e-4, atol=1e-5
    )
    # They begin as nothing, and a generator trains them alone.
    first = {'params': drawn(plain, 3)['params']}
    context = seeds.context(
        network=network, teacher=plain, tx=optax.sgd(0.1), spec=spec, steps=10,
        references={'start': plain},
    )  # fmt: skip
    made = dmd(context, times=(5.0,), optimizer=dict(name='sgd', lr=0.1), updates=1)
    made = with_base(with_result(made, 'generator', where='stage'), 'start')
    state = jax.jit(made.init)(jax.random.key(4), {'start': first, 'teacher': first})
    jax.tree.map(lambda x, y: None, state.params['generator'], own)
    begun = network.apply(state.variables(part='generator'), t, x).logits
    np.testing.assert_allclose(begun, plain.apply(first, t, x).logits, rtol=1e-5, atol=1e-6)
    before = state.params['generator']
    step = jax.jit(made.step)
    for _ in range(2):
        state, _ = step(state, {'input': x})
    assert all(
        np.abs(one['lora_b']).max() > 0 for one in state.params['generator'].values()
    )  # fmt: skip
    assert set(state.params['generator']) == set(before) == {'hidden0', 'hidden1'}
    jax.tree.map(np.testing.assert_array_equal, state.frozen['start'], first)
