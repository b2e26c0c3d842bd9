"""What experts cost, by XLA's count of operations of the compiled layer."""

import jax
import jax.numpy as jnp
import pytest

from kd.models import moe
from kd.models.decoder import Decoder
from kd.models.decoder_parts import Mlp

SIZES = dict(num_classes=13, depth=1, heads=2, width=32, mlp_hidden=128, mlp='gelu')


def flops(experts=None):
    """Of the layer for a row of 64 tokens."""
    of = Decoder(**SIZES, experts=experts).architecture
    layer = Mlp(of) if experts is None else moe.Moe(of)
    x = jnp.zeros((1, 64, SIZES['width']))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.jit(layer.apply).lower(variables, x).compile().cost_analysis()['flops']


def test_the_cost_grows_with_the_choices_and_not_with_the_experts():
    """A dense MLP of as many hidden units is the measure."""
    dense = flops()
    found = {
        (count, k): flops(dict(count=count, top_k=k, capacity=1.0))
        for count, k in ((4, 1), (4, 2), (4, 4), (16, 2))
    }
    for k in (1, 2, 4):
        assert found[4, k] == pytest.approx(k * dense, rel=0.15)
    # Four times the experts, as much to compute but for the router.
    assert found[16, 2] == pytest.approx(found[4, 2], rel=0.1)
