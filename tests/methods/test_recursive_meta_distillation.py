"""Anchored generations, the small language model they need, and its text."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.data import catalogue
from kd.data.builders import characters
from kd.errors import UserError
from kd.evaluators.calibration import calibration
from kd.losses import divergence
from kd.methods.recursive_meta_distillation import recursive_meta_distillation
from kd.models.transformer import Transformer
from kd.network import from_linen
from kd.theory import meta_distillation

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LENGTH, SYMBOLS = 6, 5


class Bigram(nn.Module):
    """The smallest language model: a table of logits."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Embed(SYMBOLS, SYMBOLS, name='table')(x)


@pytest.fixture(scope='module')
def network():
    shape = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return from_linen(Bigram(), shape)


@pytest.fixture(scope='module')
def frozen(network):
    init = jax.jit(network.init)
    return {'teacher': init(jax.random.key(1)), 'student': init(jax.random.key(2))}


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, SYMBOLS, (4, LENGTH + 1)).astype(np.int32)
    return {'input': symbols[:, :-1], 'label': symbols[:, 1:]}


def context(network, references=('student',)):
    made = seeds.context(network=network, teacher=network, tx=optax.sgd(0.5), num_classes=SYMBOLS)
    return dataclasses.replace(made, references=dict.fromkeys(references, network))


@pytest.mark.parametrize(('lam', 'power'), [(0.3, 1.0), (0.3, 0.0), (0.0, 1.0)])
def test_a_step_reports_the_kl_to_the_anchored_mixture(network, frozen, batch, lam, power):
    temperature = 2.0
    method = recursive_meta_distillation(
        context(network), lam=lam, power=power, temperature=temperature
    )
    state = method.init(jax.random.key(0), frozen)
    log_p = [
        scipy.special.log_softmax(
            np.asarray(network.apply(v, batch['input']).logits, np.float64) / temperature, -1
        )
        for v in (state.variables(), frozen['student'], frozen['teacher'])
    ]
    own, previous, base = log_p
    if power:
        target = (1 - lam) * np.exp(previous) + lam * np.exp(base)
    else:
        target = scipy.special.softmax((1 - lam) * previous + lam * base, -1)
    expected = temperature**2 * np.sum(target * (np.log(target) - own))
    _, metrics = jax.jit(method.step)(state, batch)
    assert metrics['loss'].count == batch['input'].size
    np.testing.assert_allclose(metrics['loss'].total, expected, rtol=1e-4)
    to_base = np.sum(np.exp(base) * (base - own))
    np.testing.assert_allclose(metrics['kl_to_base'].total, to_base, rtol=1e-4)


def test_the_linear_anchor_has_the_gradient_of_two_teachers(network, frozen, batch):
    lam = 0.3
    method = recursive_meta_distillation(context(network), lam=lam)
    state = method.init(jax.random.key(0), frozen)
    stepped, _ = jax.jit(method.step)(state, batch)

    def two_teachers(params):
        logits = network.apply({'params': params}, batch['input']).logits
        student, base = (
            network.apply(frozen[name], batch['input']).logits for name in ('student', 'teacher')
        )
        return jnp.mean(
            (1 - lam) * divergence.forward_kl(logits, student)
            + lam * divergence.forward_kl(logits, base)
        )

    grads = jax.jit(jax.grad(two_teachers))(state.params['network'])
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - 0.5 * g, new, atol=1e-6),
        state.params['network'], stepped.params['network'], grads,
    )  # fmt: skip


def test_logits_of_classifiers_are_anchored_like_the_operator_says(frozen):
    # The operator on [B, V] is that on [B, 1, V].
    rng = np.random.default_rng(1)
    s, t = (scipy.special.log_softmax(rng.normal(size=(3, 4)), -1) for _ in range(2))
    flat = meta_distillation.anchor(s, t, 0.25, 0.5)
    long = meta_distillation.anchor(s[:, None], t[:, None], 0.25, 0.5)[:, 0]
    expected = (0.75 * np.exp(s / 2) + 0.25 * np.exp(t / 2)) ** 2
    np.testing.assert_allclose(np.exp(flat), expected / expected.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(flat, long)


def test_without_an_earlier_student_only_the_base_teacher_can_be_learnt(network, frozen, batch):
    with pytest.raises(UserError, match=r"set stage.references to \{'student'"):
        recursive_meta_distillation(context(network, ()), lam=0.5)
    with pytest.raises(UserError, match='in \\[0, 1\\]'):
        recursive_meta_distillation(context(network), lam=1.5)
    method = recursive_meta_distillation(context(network, ()), lam=1.0)
    state = method.init(jax.random.key(0), {'teacher': frozen['teacher']})
    _, metrics = jax.jit(method.step)(state, batch)
    assert float(metrics['loss'].total) == float(metrics['kl_to_base'].total)


def test_evaluators_count_every_position_of_the_examples_that_count(network, frozen, batch):
    evaluator = calibration(context(network))
    state = recursive_meta_distillation(context(network)).init(jax.random.key(0), frozen)
    mask = np.array([True, True, False, True])
    means, bins = jax.jit(evaluator.update)(state, batch | {'mask': mask})
    log_p = scipy.special.log_softmax(network.apply(state.variables(), batch['input']).logits, -1)
    nll = -np.take_along_axis(log_p, batch['label'][..., None], -1)[..., 0]
    np.testing.assert_allclose(means['nll'].total, nll[mask].sum(), rtol=1e-5)
    assert means['nll'].count == 3 * LENGTH
    assert bins.examples.sum() == 3 * LENGTH
    right = (log_p.argmax(-1) == batch['label'])[mask].sum()
    assert bins.correct.sum() == right


@pytest.fixture(scope='module')
def transformer():
    module = Transformer(num_classes=SYMBOLS, width=8, depth=2, heads=2, max_length=8)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    return module, jax.tree.map(lambda w: 3 * w, variables)


def test_the_transformer_does_not_look_ahead(transformer, batch):
    module, variables = transformer
    apply = jax.jit(lambda x: module.apply(variables, x))
    whole = apply(batch['input'])
    for place in range(LENGTH):
        changed = batch['input'].copy()
        changed[:, place] = (changed[:, place] + 1) % SYMBOLS
        difference = np.abs(np.asarray(apply(changed) - whole)).max(axis=(0, 2))
        np.testing.assert_array_equal(difference[:place], 0.0)
        # From there on, every position sees the change.
        assert (difference[place:] > 1e-6).all()


def test_a_symbol_that_is_none_makes_the_logits_nan(transformer, batch):
    module, variables = transformer
    for symbol in (-1, SYMBOLS):
        changed = batch['input'].copy()
        changed[0, 0] = symbol
        logits = module.apply(variables, changed)
        assert np.isnan(logits[0]).all()
        assert np.isfinite(logits[1:]).all()


def test_the_transformer_refuses_what_is_no_sequence(transformer):
    module, variables = transformer
    for wrong, match in (
        (jnp.zeros((1, 4)), 'integer symbols'),
        (jnp.zeros((1, 9), jnp.int32), 'exceeds max_length=8'),
        (jnp.zeros((4,), jnp.int32), r'symbols \[B, L\]'),
    ):
        with pytest.raises(ValueError, match=match):
            module.apply(variables, wrong)
    with pytest.raises(ValueError, match='divisible by heads'):
        Transformer(width=10, heads=4)


def test_text_is_encoded_by_letter():
    symbols = characters.encode("Zip-file's  a\n\n  b2c")
    assert characters.decode(symbols) == 'zip file s a b c'
    assert characters.decode(np.arange(27)) == characters.SYMBOLS
    code = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        "Method."\n'
    assert characters.docstrings(code) == 'Module. Class. Method.'


def test_characters_come_with_the_next_one_as_label_and_splits_apart():
    train, test = (catalogue.load('stdlib_characters', split) for split in ('train', 'test'))
    assert train.num_classes == 27
    batch = train.fetch([0, 1, 2])
    assert batch['input'].dtype == batch['label'].dtype == np.int32
    np.testing.assert_array_equal(batch['input'][:, 1:], batch['label'][:, :-1])
    np.testing.assert_array_equal(batch['input'][1:, 0], batch['label'][:-1, -1])
    assert characters.decode(batch['input'][0]).startswith('command line parsing library')
    text = characters.text()
    assert len(train) + len(test) == (len(text) - 1) // 64
    np.testing.assert_array_equal(test.fetch([0])['input'][0], text[64 * len(train) :][:64])
    # English: the space and e are the commonest, by far more than chance.
    frequencies = np.bincount(text, minlength=27) / len(text)
    assert list(np.argsort(-frequencies)[:2]) == [0, 5]
    assert 100_000 < len(text) < 1_000_000
