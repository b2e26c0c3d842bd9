"""Transformers of text and tokens with something less: stacked blocks in HPP, streams in PPCL."""

import dataclasses

import jax
import jax.numpy as jnp
import latent_cases
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from kd.claims import seeds
from kd.io import found
from kd.losses import schedule
from kd.losses.feature_maps import direction
from kd.methods import pruning
from kd.methods.diffusion import hierarchical_prune as hpp
from kd.methods.diffusion import ppcl
from kd.models.denoiser import Denoised
from kd.models.stack import restricted, stack
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_stacked_blocks_of_text_and_tokens_have_factors_and_features_of_their_own(tmp_path):
    module, told = latent_cases.module_of('flux'), latent_cases.INPUTS['flux'][1]
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32) for name, x in told.items()}
    spec['input'] = jax.ShapeDtypeStruct(latent_cases.X.shape[1:], jnp.float32)
    teacher, student = (
        from_linen(made, *made.example_inputs(spec))
        for made in (
            Denoised(module.clone(dropped=dropped), schedule.flow(), kind='flow')
            for dropped in ((), ('transformer_blocks_0/mlp',))
        )
    )
    costs = dict.fromkeys(pruning.parts_of(module.blocks), 0.8)
    costs |= {'single_transformer_blocks_0/block': 0.4, 'single_transformer_blocks_1/block': 0.2}
    found.write(tmp_path, {'costs': costs})
    steps = {}
    variables, batch = latent_cases.variables_of('flux'), {'input': latent_cases.X, **told}
    for recovery, of in (('pwp', ''), ('sgdistill', 'map')):
        context = seeds.context(
            network=student, teacher=teacher, spec=spec, steps=1,
            optimizer=dict(name='sgd', lr=1e-2),
        )  # fmt: skip
        context = dataclasses.replace(context, locate=lambda stage: tmp_path)
        method = hpp.hierarchical_prune(context, recovery=recovery, costs=of)
        begun = jax.jit(method.init)(jax.random.key(0), {'teacher': variables})
        after, metrics = jax.jit(method.step)(begun, batch)
        steps[recovery] = jax.tree.map(
            lambda a, b: a - b, after.params['network'], begun.params['network']
        )
    moved, scaled = steps.values()
    single = 'single_transformer_blocks'
    wanted = {
        (single, 'proj_mlp', 'kernel'): (0.5, 1.0),
        ('transformer_blocks', 'ff_context', 'net_2', 'kernel'): (0.25,),
    }
    for path, a in wanted.items():
        x, y = scaled, moved
        for name in path:
            x, y = x[name], y[name]
        np.testing.assert_allclose(x, np.reshape(a, (-1, 1, 1)) * y, rtol=1e-3, atol=1e-7)
        assert np.abs(y).max() > 0
    assert np.abs(moved['context_embedder']['kernel']).max() == 0
    # Two streams after the first block, one after each of the others.
    assert float(metrics['feature'].total) > 0
    features = {'transformer_blocks': ((jnp.ones((1, 2, 3, 4)), jnp.zeros((1, 2, 5, 4))), None),
                single: (jnp.stack([jnp.ones((2, 8, 4)), jnp.zeros((2, 8, 4))]), None)}  # fmt: skip
    tokens = hpp.tokens_of(module, features)
    assert list(tokens) == list(module.blocks)
    assert [len(streams) for streams in tokens.values()] == [2, 1, 1]
    assert float(tokens[f'{single}_1'][0].max()) == 0.0


def test_runs_and_maps_of_two_streams(monkeypatch):
    """Tokens of a text that are padding do not count; maps fit each stream by itself."""
    module, told = latent_cases.module_of('qwen'), latent_cases.INPUTS['qwen'][1]
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in told.items()}
    spec['input'] = jax.ShapeDtypeStruct(latent_cases.X.shape[1:], jnp.float32)
    maps = ('transformer_blocks_1/mlp', 'transformer_blocks_1/context_mlp')
    teacher, one, wide = (
        from_linen(made, *made.example_inputs(spec))
        for made in (
            Denoised(module.clone(**changes), schedule.flow(), kind='flow')
            for changes in ({}, dict(dropped=('transformer_blocks_1',)), dict(linear=maps))
        )
    )
    variables, x = latent_cases.variables_of('qwen'), jnp.asarray(latent_cases.X)
    asked = jnp.array([0.2, 0.7]), x
    begun = jax.eval_shape(wide.init, jax.random.key(0))
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), begun)
    context = seeds.context(network=wide, teacher=teacher, spec=spec)
    monkeypatch.setattr(ppcl, 'noised', lambda *_: asked)
    nets = {name: stack(net.module) for name, net in (('t', teacher), ('o', one), ('w', wide))}

    @jax.jit
    def all_of(variables):
        states = [nets['t'].embed(variables, *asked, **told)]
        at = states[0][1]
        states = [states[0][0]]
        for name in nets['t'].names:
            states.append(nets['t'].fold(variables, (name,), states[-1], at))
        small = restricted(teacher.module, one.module)(variables, variables)
        point = ('transformer_blocks_0', 'transformer_blocks_1')
        apart = ppcl.contiguous_losses(
            (nets['t'], nets['o']), (variables, small), [point], asked, told
        )[point]
        made = restricted(teacher.module, wide.module)(variables, zeros)
        name = 'transformer_blocks_1'
        fitted = ppcl.least_squares(
            context, [(name, name)], made, variables, {'input': x, **told}, None, 1e-6
        )
        said = [
            nets['w'].block(nets['w'].params(v, name), name, states[1], at) for v in (made, fitted)
        ]
        return states, apart, said

    states, apart, (before, after) = all_of(variables)
    distances = [np.asarray(direction(a, b)) for a, b in zip(states[1], states[2], strict=True)]
    text = [row[seen].mean() for row, seen in zip(distances[1], told['mask'], strict=True)]
    np.testing.assert_allclose(apart, distances[0].mean(-1) + text, rtol=1e-4)
    # More tokens than features: least squares by scikit-learn, of the image's stream.
    x, said, y = (np.asarray(z[0]).reshape(-1, z[0].shape[-1]) for z in (before, after, states[2]))
    wanted = x + LinearRegression().fit(x, y - x).predict(x)
    np.testing.assert_allclose(said, wanted, atol=2e-2 * np.abs(wanted).max())
    assert np.abs(after[1] - before[1]).max() > 1e-3
