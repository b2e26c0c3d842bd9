"""Distillation by token: without logits as with them, packed rows as rows alone, cut decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators import language
from kd.losses import classification, divergence, signal
from kd.losses.signal import Dense
from kd.method import with_nonfinite_guard
from kd.methods.lm import common
from kd.methods.lm.distillation import distillation
from kd.models.decoder import Decoder
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, LR = 20, 7, 0.3
FIELDS = ('input', 'positions', 'segments')


def decoder(**changes):
    made = dict(num_classes=V, width=16, depth=2, heads=2, mlp_hidden=28, max_length=32)
    shape = jax.ShapeDtypeStruct((1, T), jnp.int32)
    module = Decoder(**{**made, 'fields': FIELDS, **changes})
    return from_linen(module, *[shape] * len(module.fields))


def drawn(network, seed):
    """Variables far from where they start, so that laws are far from uniform."""
    variables = jax.jit(network.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, variables)


@pytest.fixture(scope='module')
def student():
    return decoder(depth=1)


@pytest.fixture(scope='module')
def teacher():
    # Of one tokenizer, and padded to another size.
    return decoder(num_classes=V + 4)


@pytest.fixture(scope='module')
def batch():
    """Two documents in the first row, the second padded; prompts do not count."""
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
    response = np.array([[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]], bool)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]], np.int32)
    tokens = rng.integers(0, V, (2, T)).astype(np.int32)
    return {
        'input': tokens,
        'positions': positions,
        'segments': segments,
        'response_mask': response,
    }


def context(student, teacher=None, **more):
    return seeds.context(network=student, teacher=teacher, tx=optax.sgd(LR), num_classes=V, **more)


def stepped(method, batch, variables, teacher_variables):
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher_variables})
    state = state.with_params(variables['params'])
    return jax.jit(method.step)(state, batch)


@pytest.mark.parametrize('soft_weight', [0.0, 0.7])
def test_a_step_is_that_of_the_mean_over_the_tokens_that_count(
    student, teacher, batch, soft_weight
):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    method = distillation(
        context(student, teacher), soft_weight=soft_weight, chunk=3,
        divergence='kd.losses.divergence.generalized_jsd', beta=0.9,
    )  # fmt: skip
    state, metrics = stepped(method, batch, own, theirs)

    # Positions that predict a token of a response, by hand: row and place.
    counted = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2), (1, 3)]
    rows, places = map(np.array, zip(*counted, strict=True))
    labels = batch['input'][rows, places + 1]
    said = teacher.apply(theirs, *teacher.of(batch)).logits[rows, places, :V]

    def objective(params):
        logits = student.apply({'params': params}, *student.of(batch)).logits[rows, places]
        hard = classification.cross_entropy(logits, labels)
        soft = divergence.generalized_jsd(logits, said, beta=0.9)
        return ((1 - soft_weight) * hard + soft_weight * soft).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(own['params'])
    total, count = metrics['loss']
    assert float(count) == len(counted)
    assert float(total / count) == pytest.approx(float(value), rel=1e-5)
    moved = jax.tree.map(lambda x, y: (x - y) / LR, own['params'], state.params['network'])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), moved, gradient)


def test_packed_rows_padding_and_micro_batches_change_nothing(student, teacher, batch):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    method = distillation(context(student, teacher), chunk=4)
    packed, _ = stepped(method, batch, own, theirs)
    # Each document in a row of its own, padded to the same length, and a row that counts nothing.
    alone = {name: np.zeros((4, T), x.dtype) for name, x in batch.items()}
    for to, (row, span) in enumerate([(0, slice(0, 4)), (0, slice(4, 7)), (1, slice(0, 5))]):
        for name in batch:
            size = span.stop - span.start
            alone[name][to, :size] = batch[name][row, span]
    alone['segments'] = np.where(alone['segments'] > 0, 1, 0).astype(np.int32)
    alone['input'][3] = 5
    for parts in (1, 2):
        method = distillation(context(student, teacher), chunk=4, micro_batches=parts)
        found, _ = stepped(method, alone, own, theirs)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, packed.params
        )


def test_a_batch_in_which_nothing_counts_is_no_step_and_no_nan(student, teacher, batch):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    method = with_nonfinite_guard(distillation(context(student, teacher)), 'skip')
    empty = {**batch, 'response_mask': np.zeros_like(batch['response_mask'])}
    state, metrics = stepped(method, empty, own, theirs)
    assert float(metrics['nonfinite'].total) == 0
    assert [float(x) for x in metrics['loss']] == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], own['params'])


def test_no_array_of_all_logits_is_formed(student, teacher, batch):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    rows = {name: np.tile(x, (8, 1)) for name, x in batch.items()}
    method = distillation(context(student, teacher), chunk=16)
    state = method.init(jax.random.key(0), {'teacher': theirs}).with_params(own['params'])
    text = str(jax.make_jaxpr(method.step)(state, rows))
    for size in (V, V + 4):
        assert f'f32[{16 * T},{size}]' not in text
        assert f'f32[16,{T},{size}]' not in text
    assert f'f32[16,{V}]' in text


def test_a_student_begins_with_chosen_blocks_of_a_deeper_one(teacher):
    student = decoder(num_classes=V + 4, depth=1, tied=True)
    theirs = drawn(teacher, 1)
    made = context(student, references={'start': teacher})
    method = distillation(made, soft_weight=0.0, blocks=(1,))
    begun = method.init(jax.random.key(0), {'start': theirs}).params['network']
    jax.tree.map(np.testing.assert_array_equal, begun['block0'], theirs['params']['block1'])
    jax.tree.map(np.testing.assert_array_equal, begun['embed'], theirs['params']['embed'])
    with pytest.raises(UserError, match='names 2 blocks, and the network has 1'):
        distillation(made, soft_weight=0.0, blocks=(0, 1))


def test_metrics_of_tokens_against_sums_by_hand(student, teacher, batch):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    masked = {**batch, 'mask': np.array([True, False])}
    said = common.said_by(teacher, theirs, masked)
    sums = jax.jit(lambda v, b, t: language.token_metrics(student, v, b, teacher=t, chunk=3))(
        own, masked, said
    )
    found = language.finish(jax.device_get(sums))
    places = [1, 2, 4, 5]
    logits = np.asarray(student.apply(own, *student.of(batch)).logits[0, places], np.float64)
    other = np.asarray(teacher.apply(theirs, *teacher.of(batch)).logits[0, places, :V], np.float64)
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, other))
    labels = batch['input'][0, [p + 1 for p in places]]
    nll = -log_q[range(4), labels].mean()
    wanted = {
        'nll': nll,
        'perplexity': np.exp(nll),
        'accuracy': (log_q.argmax(-1) == labels).mean(),
        'entropy': -(np.exp(log_q) * log_q).sum(-1).mean(),
        'probability': np.exp(log_q[range(4), labels]).mean(),
        'top_1': (log_q.argmax(-1) == log_p.argmax(-1)).mean(),
        'kl': (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_teachers_whose_logits_are_whole_serve_as_well(student, teacher, batch):
    own, theirs = drawn(student, 0), drawn(teacher, 1)
    logits = teacher.apply(theirs, *teacher.of(batch)).logits
    labels, where = common.targets(batch)
    assert where.sum() == 8
    assert (labels[:, :-1] == batch['input'][:, 1:]).all()

    def of_token(logits, teacher, labels):
        return divergence.forward_kl(logits, signal.all_logits('test', teacher)), {}

    for said in (Dense(logits), common.said_by(teacher, theirs, batch)):
        found = common.token_losses(student, own, batch, of_token, teacher=said, chunk=4)
        wanted = divergence.forward_kl(
            student.apply(own, *student.of(batch)).logits, logits[..., :V]
        )
        np.testing.assert_allclose(found.losses, np.where(where, wanted, 0), atol=1e-4)
