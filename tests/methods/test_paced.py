"""PACED: pass rates, weights and their gradients, against enumeration and the theory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.data import sources
from kd.data.builders import verifiable
from kd.errors import UserError
from kd.evaluators.answers import answers
from kd.losses import divergence
from kd.methods.lm.paced import paced, sampled_pass_rate
from kd.models.structured import AnswerMLP
from kd.network import from_linen
from kd.theory import competence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, L, V, LR = 6, 3, 5, 0.5


@pytest.fixture(scope='module')
def network():
    shape = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    return from_linen(AnswerMLP(length=L, num_classes=V, widths=()), shape)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.normal(size=(B, 4)).astype(np.float32),
        'label': rng.integers(0, V, (B, L)).astype(np.int32),
        'teacher_logits': rng.normal(size=(B, L, V)).astype(np.float32),
        'pass_rate': np.array([0.0, 0.25, 0.5, 0.625, 0.875, 1.0], np.float32),
    }


def run(network, batch, **options):
    """The parameters before and after a step, and its metrics."""
    method = paced(seeds.context(network=network, tx=optax.sgd(LR), num_classes=V), **options)
    state = jax.jit(method.init)(jax.random.key(0))
    stepped, metrics = jax.jit(method.step)(state, batch)
    return state.params['network'], stepped.params['network'], metrics


@pytest.mark.parametrize('name', ['forward_kl', 'reverse_kl'])
def test_a_step_is_that_of_the_theorys_weighted_divergence(network, batch, name):
    before, after, metrics = run(network, batch, divergence=f'kd.losses.divergence.{name}')
    of_problem = competence.paced(
        lambda s, t: getattr(divergence, name)(s, t).mean(-1), normalise=True
    )

    def objective(params):
        logits = network.apply({'params': params}, batch['input']).logits
        return of_problem(batch['pass_rate'], logits, batch['teacher_logits']).mean()

    value, grads = jax.jit(jax.value_and_grad(objective))(before)
    np.testing.assert_allclose(metrics['loss'].total / B, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose(a - LR * g, b, atol=1e-6), before, after, grads
    )
    w = batch['pass_rate'] * (1 - batch['pass_rate'])
    effective = w.sum() ** 2 / (w**2).sum()
    np.testing.assert_allclose(metrics['effective_count'].total, effective, rtol=1e-5)


def test_problems_always_or_never_solved_leave_no_trace(network, batch):
    poisoned = batch | {'teacher_logits': batch['teacher_logits'].copy()}
    poisoned['teacher_logits'][[0, 5]] = 1e4
    _, clean, _ = run(network, batch)
    _, other, _ = run(network, poisoned)
    jax.tree.map(np.testing.assert_array_equal, clean, other)
    # With the hard filter, 0.25, 0.5 and 0.625 count alike.
    _, _, metrics = run(network, batch, weighting='hard')
    assert float(metrics['effective_count'].total) == pytest.approx(3)


def test_uniform_weights_are_plain_distillation_whatever_the_pass_rates(network, batch):
    values = [
        float(run(network, batch, **options)[2]['loss'].total)
        for options in ({'weighting': 'uniform'}, {'a': 0.0, 'b': 0.0, 'normalise': False})
    ]
    params = run(network, batch)[0]
    logits = network.apply({'params': params}, batch['input']).logits
    q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    p = scipy.special.log_softmax(batch['teacher_logits'].astype(np.float64), -1)
    expected = (np.exp(p) * (p - q)).sum(-1).mean(-1).sum()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_masked_positions_change_nothing_and_micro_batches_neither(network, batch):
    mask = np.ones((B, L), bool)
    mask[1:4, 2] = False
    masked = batch | {'response_mask': mask}
    padded = masked | {'teacher_logits': np.where(mask[..., None], batch['teacher_logits'], 77.0)}
    _, first, _ = run(network, masked)
    _, second, _ = run(network, padded)
    _, parts, _ = run(network, masked, micro_batches=2)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, parts)


def test_sampled_pass_rates_are_products_of_the_symbols_probabilities(batch):
    rng = np.random.default_rng(1)
    logits = (2 * rng.normal(size=(B, L, V))).astype(np.float32)
    labels = logits.argmax(-1).astype(np.int32)
    rollouts = 20_000
    rates = sampled_pass_rate(jax.random.key(0), logits, labels, rollouts)
    p = scipy.special.softmax(logits, -1).max(-1).prod(-1)
    assert (np.abs(rates - p) < 4 * np.sqrt(p * (1 - p) / rollouts)).all()
    where = np.zeros((B, L), bool)
    where[:, 0] = True
    rates = sampled_pass_rate(jax.random.key(0), logits, labels, rollouts, where=where)
    p = scipy.special.softmax(logits, -1).max(-1)[:, 0]
    assert (np.abs(rates - p) < 4 * np.sqrt(p * (1 - p) / rollouts)).all()


def test_the_student_itself_is_sampled_where_the_batch_brings_no_rates(network, batch):
    without = {k: v for k, v in batch.items() if k != 'pass_rate'}
    method = paced(seeds.context(network=network, tx=optax.sgd(LR), num_classes=V), rollouts=4000)
    state = jax.jit(method.init)(jax.random.key(0))
    logits = network.apply(state.variables(), batch['input']).logits
    p = np.take_along_axis(scipy.special.softmax(logits, -1), batch['label'][..., None], -1)
    _, metrics = jax.jit(method.step)(state, without)
    rates = p[..., 0].prod(-1)
    error = np.sqrt((rates * (1 - rates)).sum() / 4000)
    assert abs(float(metrics['pass_rate'].total) - rates.sum()) < 4 * error


def test_a_stage_starts_from_the_weights_of_its_reference(network):
    context = seeds.context(network=network, tx=optax.adam(LR), num_classes=V)
    method = paced(dataclasses.replace(context, references={'start': network}))
    start = jax.jit(network.init)(jax.random.key(7))
    state = jax.jit(method.init)(jax.random.key(0), {'start': start})
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], start['params'])
    assert int(state.opt_state[0].count) == 0


def test_unknown_weightings_are_said(network):
    with pytest.raises(UserError, match='weighting must be one of'):
        paced(seeds.context(network=network, tx=optax.sgd(LR)), weighting='bell')


# The toy


def test_problems_follow_their_mix_and_their_rule():
    data = verifiable.make('test', verifiable.DISTILLATION_MIX, size=20_000)
    share = np.bincount(data['family'], minlength=6) / 20_000
    assert np.abs(share - verifiable.DISTILLATION_MIX).max() < 4 * np.sqrt(0.25 / 20_000)
    np.testing.assert_array_equal(data['input'][:, 12:].argmax(-1), data['family'])
    logits = verifiable.true_logits(data['input'][:, :12].astype(float), data['family'])
    # float32 inputs decide a near-tie differently now and then.
    assert (logits.argmax(-1) == data['label']).mean() > 0.9999
    solvable = data['family'] < 5
    # The teacher is 4 logits + N(0, 1/4) where it knows, and independent of them where not.
    residual = (data['teacher_logits'] - 4 * logits)[solvable]
    assert abs(residual.std() - 0.5) < 0.01
    correlation = np.corrcoef(data['teacher_logits'][~solvable].ravel(), logits[~solvable].ravel())
    assert abs(correlation[0, 1]) < 0.02
    known = verifiable.make('test', verifiable.DISTILLATION_MIX, size=20_000, coherent=True)
    np.testing.assert_array_equal(known['label'], data['label'])
    assert abs((known['teacher_logits'] - 4 * logits).std() - 0.5) < 0.01


def test_the_easiest_family_is_linear():
    data = verifiable.make('train', (1.0, 0, 0, 0, 0, 0), size=1000)
    x = data['input'][:, :12].astype(float)
    logits = verifiable.true_logits(x, data['family']).reshape(1000, -1)
    residual = logits - x @ np.linalg.lstsq(x, logits)[0]
    assert np.abs(residual).max() < 1e-9


def test_wrong_mixes_and_splits_are_said():
    with pytest.raises(sources.DataError, match='6 probabilities'):
        verifiable.make('train', (0.5, 0.5))
    with pytest.raises(sources.DataError, match="not 'dev'"):
        verifiable.make('dev', verifiable.DISTILLATION_MIX)


def test_exact_match_counts_answers_by_family(network, batch):
    context = seeds.context(network=network, tx=optax.sgd(LR), num_classes=V)
    state = jax.jit(paced(context).init)(jax.random.key(0))
    labels = np.asarray(network.apply(state.variables(), batch['input']).logits.argmax(-1))
    labels = labels.copy()
    labels[1, 2] = (labels[1, 2] + 1) % V
    evaluator = answers(context, groups=2)
    sums = evaluator.update(state, {
        'input': batch['input'], 'label': labels, 'family': np.array([0, 0, 1, 1, 1, 0]),
        'mask': np.array([1, 1, 1, 1, 0, 1], bool),
    })  # fmt: skip
    result = evaluator.finish(sums)
    expected = {'exact': 4 / 5, 'exact_0': 2 / 3, 'exact_1': 1.0}
    assert result == pytest.approx(expected)
