"""PACED for language models: weights by sampled pass rates, against sums by hand."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoders as toys
from toy_decoders import EOS, B, R, V

from kd.claims import seeds
from kd.data.sources import Source
from kd.errors import UserError
from kd.losses import divergence
from kd.methods.lm import answering
from kd.methods.lm.distillation import distillation
from kd.methods.lm.paced import paced_text
from kd.sampling.autoregressive import sampler

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR, K = 0.3, 5
SPEC = {**toys.PROMPTS, 'pass_rate': jax.ShapeDtypeStruct((), jnp.float32)}
RATES = np.array([0.0, 0.25, 0.625, 1.0], np.float32)
SAMPLING = dict(group=K, max_new=R, stop=(EOS,))


def odd(context):
    """Answers whose first token is odd are right."""
    del context
    return lambda tokens, mask, batch: (tokens[:, 0] % 2).astype(jnp.float32)


@pytest.fixture(scope='module')
def network():
    return toys.decoder()


def context(network, *without):
    spec = {name: x for name, x in SPEC.items() if name not in without}
    made = seeds.context(
        network=network, teacher=network, tx=optax.sgd(LR), num_classes=V, spec=spec
    )
    return dataclasses.replace(made, source=lambda split: Source)


@pytest.fixture(scope='module')
def batch():
    return {**toys.prompts(), 'pass_rate': RATES}


@pytest.fixture(scope='module')
def state(network):
    made = paced_text(context(network))
    state = jax.jit(made.init)(jax.random.key(0), {'teacher': toys.drawn(network, 1)})
    return state.with_params(toys.drawn(network, 0)['params'])


def close(first, second, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


def test_a_step_is_that_of_the_weighted_means_over_answers_for_any_micro_batches(
    network, batch, state
):
    text = answering.as_text(batch)

    def objective(params):
        logits = network.apply({'params': params}, text['input']).logits
        said = network.apply(state.frozen['teacher'], text['input']).logits
        losses = divergence.reverse_kl(logits, said)[:, :-1]
        counted = text['response_mask'][:, 1:]
        problems = jnp.where(counted, losses, 0.0).sum(1) / counted.sum(1)
        weights = RATES * (1 - RATES)
        return (weights / weights.mean() * problems).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(state.params['network'])
    # What is said of problems that are never or always solved is nothing.
    other = {**batch, 'response': batch['response'].copy()}
    other['response'][[0, 3]] = 5
    for given, parts in ((batch, 1), (other, 2)):
        method = paced_text(
            context(network), divergence='kd.losses.divergence.reverse_kl', chunk=3,
            micro_batches=parts,
        )  # fmt: skip
        stepped, metrics = jax.jit(method.step)(state, given)
        assert float(metrics['loss'].total / B) == pytest.approx(float(value), rel=1e-5)
        moved = jax.tree.map(
            lambda x, y: (x - y) / LR, state.params['network'], stepped.params['network']
        )
        close(moved, gradient, atol=3e-5)
        # Tokens of the two problems that count.
        assert float(metrics['divergence'].count) == 5


def test_uniform_weights_are_a_mean_over_sequences(network, batch, state):
    ours = jax.jit(paced_text(context(network), weighting='uniform').step)(state, batch)[0]
    rows = {**answering.as_text(batch)}
    method = distillation(context(network), mean_over='sequence_mean')
    close(ours.params, jax.jit(method.step)(state, rows)[0].params)


def test_rates_and_texts_are_those_of_the_present_students_answers(
    network, batch, state, monkeypatch
):
    monkeypatch.setattr('kd.claims.seeds.odd', odd, raising=False)
    asked = {name: x for name, x in batch.items() if name != 'pass_rate'}
    method = paced_text(
        context(network, 'pass_rate'), answers='student', sampling=SAMPLING,
        reward=dict(name='kd.claims.seeds.odd'),
    )  # fmt: skip
    stepped, metrics = jax.jit(method.step)(state, asked)

    # The key that `with_collect` gives, by its own words.
    key = jax.random.fold_in(state.step_key(), zlib.crc32(b'collect'))
    tiled = [np.repeat(batch[name], K, axis=0) for name in ('input', 'prompt_mask')]
    draw = jax.jit(sampler(network.module, max_new=R, stop=(EOS,)))
    said = jax.tree.map(np.asarray, draw(state.variables(), *tiled, key))
    rates = (said.tokens[:, 0] % 2).reshape(B, K).mean(1).astype(np.float32)
    assert len(set(rates)) > 2
    assert float(metrics['pass_rate'].total / B) == pytest.approx(rates.mean())
    own = {
        **asked,
        'response': said.tokens[::K],
        'response_mask': said.mask[::K],
        'pass_rate': rates,
    }
    wanted = jax.jit(paced_text(context(network)).step)(state, own)[0]
    close(stepped.params, wanted.params)
    assert not np.allclose(
        jax.tree.leaves(stepped.params)[0], jax.tree.leaves(state.params)[0], atol=1e-6
    )


def test_what_is_missing_is_told(network):
    with pytest.raises(UserError, match=r"stage: the data bring no 'pass_rate' .* no `reward` to"):
        paced_text(context(network, 'pass_rate'), sampling=SAMPLING)
    with pytest.raises(UserError, match='weighting must be one of'):
        paced_text(context(network), weighting='bell')
    with pytest.raises(UserError, match="the data has no 'prompt_mask'"):
        paced_text(context(network, 'prompt_mask'), answers='student', sampling=SAMPLING)
