"""The share of sampled answers that are right, against the sampler itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoders
from toy_decoders import EOS, P, R, V

from kd.claims import seeds
from kd.evaluators.verified import verified
from kd.losses import policy
from kd.sampling.autoregressive import sampler
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

G = 4


@pytest.fixture(scope='module')
def network():
    return toy_decoders.decoder()


@pytest.fixture(scope='module')
def state(network):
    return State.create(jax.random.key(0), toy_decoders.drawn(network, 1))


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.integers(3, V, (6, P)).astype(np.int32),
        'prompt_mask': np.ones((6, P), bool),
        'index': np.array([4, 9, 2, 7, 0, 0], np.int32),
        'mask': np.arange(6) < 5,
    }


def evaluator(network, **options):
    spec = {
        'input': jax.ShapeDtypeStruct((P,), jnp.int32),
        'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
    }
    sampling = dict(
        group=G, max_new=R, stop=(EOS,), forbidden=(0, 1), **options.pop('sampling', {})
    )
    reward = dict(name='toy_decoders.odd_first')
    return verified(
        seeds.context(network=network, spec=spec), reward=reward, sampling=sampling, **options
    )


def test_answers_are_drawn_by_the_number_of_the_prompt_and_padding_does_not_count(
    network, state, batch
):
    made = evaluator(network, k=(1, 2, 4), seed=3)
    found = made.finish(jax.jit(made.update)(state, batch))
    draw = jax.jit(sampler(network.module, max_new=R, stop=(EOS,), forbidden=(0, 1)))
    rows = np.repeat(batch['index'], G) * G + np.tile(np.arange(G), 6)
    prompts = [np.repeat(batch[name], G, axis=0) for name in ('input', 'prompt_mask')]
    said = draw(state.variables(), *prompts, jax.random.key(3), rows=rows)
    first = np.asarray(said.tokens)[:, 0].reshape(6, G)[:5]
    right = first % 2 == 1
    assert 0 < right.mean() < 1
    assert found['reward'] == pytest.approx(right.mean())
    assert found['pass_at_1'] == pytest.approx(right.mean())
    assert found['pass_at_2'] == pytest.approx(float(policy.pass_at_k(right.sum(1), G, 2).mean()))
    assert found['pass_at_4'] == pytest.approx(right.any(1).mean())
    assert found['unjudged'] == pytest.approx((first == 4).mean())
    lengths = np.asarray(said.mask).sum(1).reshape(6, G)[:5]
    assert found['length'] == pytest.approx(lengths.mean())


def test_the_most_probable_answers_are_one_for_all(network, state, batch):
    made = evaluator(network, sampling=dict(top_k=1), k=(4,))
    found = made.finish(jax.jit(made.update)(state, batch))
    logits = np.array(network.apply(state.variables(), batch['input']).logits[:5, -1])
    logits[:, :2] = -np.inf
    assert found['reward'] == pytest.approx((logits.argmax(-1) % 2 == 1).mean())
    assert found['pass_at_4'] == found['reward']
