"""Preferences: what is said of pairs, and steps of REDI and DPO, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators import preference as evaluator
from kd.losses import preference_family as family
from kd.methods.lm import common
from kd.methods.lm.preference import REFERENCE, preference, score
from kd.models.decoder import Decoder
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.state import State
from kd.text import packing

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, V, T, LR = 4, 20, 9, 0.5
FIELDS = ('input', 'positions', 'segments')
DPO = 'kd.losses.preference_family.dpo'


@pytest.fixture(scope='module')
def network():
    module = Decoder(
        num_classes=V, width=16, depth=1, heads=2, mlp_hidden=28, max_length=32, fields=FIELDS
    )
    return from_linen(module, *[jax.ShapeDtypeStruct((1, T), jnp.int32)] * 3)


@pytest.fixture(scope='module')
def variables(network):
    made = jax.jit(network.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, made)


def examples(seed=0):
    """Pairs of answers of two to five tokens to prompts of one to three."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(B):
        prompt = rng.integers(1, V, rng.integers(1, 4))
        answers = (rng.integers(1, V, rng.integers(2, 6)) for _ in range(2))
        found.append([
            packing.Example(
                np.concatenate([prompt, answer]).astype(np.int32),
                np.arange(len(prompt) + len(answer)) >= len(prompt),
            )
            for answer in answers
        ])  # fmt: skip
    return found


def batch_of(found, length=T):
    return packing.pairs(*zip(*found, strict=True), length, pad=0).arrays


@pytest.fixture(scope='module')
def batch():
    return batch_of(examples())


@functools.partial(jax.jit, static_argnums=0)
def whole(network, variables, *inputs):
    return network.apply(variables, *inputs).logits


def by_hand(network, variables, found):
    """Sums and counts of every answer alone, in float64."""
    sums, counts = np.zeros((2, B, 2))
    for i, pair in enumerate(found):
        for j, (ids, response) in enumerate(pair):
            alone = batch_of([[packing.Example(ids, response)] * 2])
            inputs = [alone[name][:, 0] for name in FIELDS]
            logits = np.asarray(whole(network, variables, *inputs)[0], np.float64)
            log_q = special.log_softmax(logits, -1)
            at = np.flatnonzero(response)
            sums[i, j] = sum(log_q[t - 1, ids[t]] for t in at)
            counts[i, j] = len(at)
    return sums, counts


def context(network, references=()):
    return seeds.context(
        network=network, tx=optax.sgd(LR), references=dict.fromkeys(references, network)
    )


def close(found, wanted, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, wanted)


def test_both_answers_are_scored_as_each_alone(network, variables, batch):
    found = jax.jit(lambda v, b: score(network, v, b, chunk=8))(variables, batch)
    sums, counts = by_hand(network, variables, examples())
    np.testing.assert_allclose(found.log_p, sums, rtol=2e-5)
    np.testing.assert_array_equal(found.counts, counts)
    # Padding is nothing.
    longer = batch_of(examples(), T + 4)
    again = jax.jit(lambda v, b: score(network, v, b))(variables, longer)
    np.testing.assert_allclose(again.log_p, sums, rtol=2e-5)
    np.testing.assert_array_equal(again.counts, counts)


def means(network, batch):
    """Differentiable means by token of both answers, with whole logits."""
    rows = common.rows(network, batch)
    targets, where = packing.shifted(rows)

    def of(params):
        logits = network.apply({'params': params}, *network.of(rows)).logits
        log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return (jnp.where(where, log_q, 0).sum(-1) / where.sum(-1)).reshape(-1, 2)

    return of


def test_redi_is_of_the_means_of_each_answer(network, variables, batch):
    """alpha = 0 is fine-tuning, averaged by answer and not by token."""
    params = variables['params']

    @jax.jit
    @jax.value_and_grad
    def found(params, batch, alpha):
        scored = score(network, {'params': params}, batch, chunk=8)
        return family.redi(scored.log_p, scored.counts, alpha).mean()

    @jax.jit
    def of_means(params):
        value, back = jax.vjp(means(network, batch), params)
        return value.mean(0), [back(jnp.zeros((B, 2)).at[:, i].set(1 / B))[0] for i in (0, 1)]

    (right, wrong), slopes = of_means(params)
    for alpha in (0.0, 0.8, 1.0):
        loss, slope = found(params, batch, alpha)
        assert float(loss) == pytest.approx(float(alpha * wrong - right), abs=1e-5)
        close(slope, jax.tree.map(lambda r, w, a=alpha: a * w - r, *slopes))
    # Equal answers teach nothing at 1.
    alike = {name: value[:, [0, 0]] for name, value in batch.items()}
    loss, slope = found(params, alike, 1.0)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    close(slope, jax.tree.map(jnp.zeros_like, slope), atol=1e-6)


def test_a_step_follows_the_loss_whatever_the_micro_batches(network, variables, batch):
    method = preference(context(network, ['start']), alpha=0.8, micro_batches=2)
    before = jax.jit(method.init)(jax.random.key(0), {'start': variables})
    close(before.params['network'], variables['params'], atol=0)
    after, metrics = jax.jit(method.step)(before, batch)
    of = means(network, batch)

    @jax.jit
    @jax.grad
    def wanted(params):
        return (of(params) @ jnp.array([-1, 0.8])).mean()

    followed = jax.tree.map(
        lambda x, y: (x - y) / LR, before.params['network'], after.params['network']
    )
    close(followed, wanted(variables['params']))
    sums, counts = by_hand(network, variables, examples())
    own = sums / counts
    for name, value in (
        ('loss', (own @ [-1, 0.8]).mean()),
        ('chosen', own[:, 0].mean()),
        ('rejected', own[:, 1].mean()),
        ('rejected_tokens', counts[:, 1].mean()),
        ('preferred', (own[:, 0] > own[:, 1]).mean()),
    ):
        assert float(metrics[name].total / metrics[name].count) == pytest.approx(value, rel=1e-4)


def test_the_first_token_of_an_answer_counts(network, variables, batch):
    """A prompt that is longer by one makes every answer shorter by one."""
    found = [
        [packing.Example(ids, np.arange(len(ids)) > response.argmax()) for ids, response in pair]
        for pair in examples()
    ]
    one, other = (jax.jit(lambda v, b: score(network, v, b))(variables, b)
                  for b in (batch, batch_of(found)))  # fmt: skip
    np.testing.assert_array_equal(one.counts - 1, other.counts)
    assert (one.log_p < other.log_p).all()


def test_answers_of_one_token_are_scored_too():
    network = from_linen(BottleneckLM(num_classes=V), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    variables = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    contexts, label = rng.integers(0, V, (2, B, 2)).astype(np.int32)
    batch = {'input': np.stack([contexts, contexts], 1), 'label': label}
    found = jax.jit(lambda v, b: score(network, v, b))(variables, batch)
    log_q = special.log_softmax(whole(network, variables, contexts), -1)
    np.testing.assert_allclose(found.log_p, np.take_along_axis(log_q, label, 1), rtol=1e-5)
    np.testing.assert_array_equal(found.counts, 1)
    with pytest.raises(UserError, match=r'input \[B, 2, ...\], .* not of shape \[4, 2\]'):
        score(network, variables, {'input': contexts, 'label': label[:, 0]})


def test_the_evaluator_counts_pairs_that_are_there(network, variables, batch):
    made = evaluator.preference(context(network, [REFERENCE]))
    other = jax.tree.map(lambda x: 0.5 * x, variables)
    state = State.create(jax.random.key(0), variables, frozen={REFERENCE: other})
    mask = np.arange(B) < 3
    found = made.finish(jax.jit(made.update)(state, {**batch, 'mask': mask}))
    sums, counts = by_hand(network, variables, examples())
    theirs, _ = by_hand(network, other, examples())
    gain = (sums - theirs)[mask] @ [1, -1]
    own = (sums / counts)[mask]
    wanted = {
        'chosen': own[:, 0].mean(),
        'rejected': own[:, 1].mean(),
        'preferred': (own[:, 0] > own[:, 1]).mean(),
        'chosen_tokens': counts[mask, 0].mean(),
        'rejected_tokens': counts[mask, 1].mean(),
        'margin': gain.mean(),
        'accuracy': (gain > 0).mean(),
    }
    assert found == pytest.approx(wanted, rel=1e-4)


def test_what_cannot_be_is_told(network):
    with pytest.raises(UserError, match=r'stage: .*dpo compares with a reference; name one, such'):
        preference(context(network), loss=DPO)
    with pytest.raises(UserError, match=r"unknown key 'alpah'. Did you mean 'alpha'"):
        preference(context(network), alpah=0.5)
    with pytest.raises(UserError, match=r"unknown key 'log_p'"):
        preference(context(network), log_p=1)
