"""Answers that are sampled while a language model learns, and the rows that are made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoders as toys

from kd.claims import seeds
from kd.data.sources import Source
from kd.errors import UserError
from kd.losses import classification
from kd.method import with_collect
from kd.methods.lm import answering
from kd.methods.lm.distillation import distillation
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.sampling.autoregressive import sampler
from kd.text.packing import shifted

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, P, R, EOS = 12, 5, 4, 7
SPEC = {
    'input': jax.ShapeDtypeStruct((P,), jnp.int32),
    'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
    'response': jax.ShapeDtypeStruct((R - 1,), jnp.int32),
    'response_mask': jax.ShapeDtypeStruct((R - 1,), bool),
}


def decoder(**changes):
    return toys.decoder(length=P, **changes)


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([P, 3, 1, P, 4, 2])
    mask = np.arange(P) >= P - lengths[:, None]
    return {
        'input': np.where(mask, rng.integers(3, V, mask.shape), EOS).astype(np.int32),
        'prompt_mask': mask,
        'response': rng.integers(3, V, (6, R - 1)).astype(np.int32),
        'response_mask': np.arange(R - 1) < np.array([1, 2, 3, 3, 2, 1])[:, None],
        'printed': np.arange(6),
    }


def context(network, teacher=None, spec=SPEC, **more):
    made = seeds.context(
        network=network, teacher=teacher, tx=optax.sgd(0.1), num_classes=V, spec=spec, **more
    )
    return dataclasses.replace(made, source=lambda split: Source)


@pytest.fixture(scope='module')
def state(network):
    made = distillation(context(network), soft_weight=0.0)
    state = jax.jit(made.init)(jax.random.key(0))
    return state.with_params(toys.drawn(network, 0)['params']).replace(
        frozen={'teacher': toys.drawn(network, 7)}
    )


@pytest.fixture(scope='module')
def own(network):
    """What the student answers."""
    return collected(context(network))


def collected(context, **options):
    return jax.jit(answering.on_policy(context, max_new=R, stop=(EOS,), **options))


def answers(found):
    """The tokens of the answers of each row, in order."""
    rows = zip(np.asarray(found['input']), np.asarray(found['response_mask']), strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


def test_rows_hold_what_the_student_says_as_probable_as_it_said_it(network, batch, state, own):
    """Sampled with a cache and left padding; scored as rows that begin in the first slot."""
    key = jax.random.key(3)
    found = own(state, batch, key)
    draw = sampler(network.module, max_new=R, stop=(EOS,))
    said = jax.jit(draw)(
        state.variables(), batch['input'], batch['prompt_mask'], jax.random.split(key)[1]
    )
    lengths = batch['prompt_mask'].sum(1)
    for row, length in enumerate(lengths):
        prompt = batch['input'][row, P - length :].tolist()
        answer = np.asarray(said.tokens[row])[np.asarray(said.mask[row])].tolist()
        used = length + len(answer)
        assert found['input'][row, :used].tolist() == prompt + answer
        assert found['response_mask'][row].tolist() == [
            length <= i < used for i in range(P + R)
        ]  # fmt: skip
        assert found['segments'][row].tolist() == [int(i < used) for i in range(P + R)]
        assert found['positions'][row, :used].tolist() == list(range(used))
    # Neither positions nor segments are needed: padding is behind the end.
    logits = jax.jit(network.apply)(state.variables(), found['input']).logits
    labels, where = shifted(found)
    scored = -np.asarray(classification.cross_entropy(logits, labels))[np.asarray(where)]
    np.testing.assert_allclose(scored, said.log_probs[said.mask], atol=1e-4)
    np.testing.assert_array_equal(found['printed'], batch['printed'])
    assert {'response', 'prompt_mask'}.isdisjoint(found)
    # An end is part of the answer, and is learnt.
    assert EOS in [answer[-1] for answer in answers(found)]


def test_answers_are_of_the_present_student(network, batch, state, own):
    first = answers(own(state, batch, jax.random.key(3)))
    assert first == answers(own(state, batch, jax.random.key(3)))
    assert first != answers(own(state, batch, jax.random.key(4)))
    other = state.with_params(toys.drawn(network, 1)['params'])
    assert first != answers(own(other, batch, jax.random.key(3)))
    # Padding a prompt further on the left changes no answer.
    wide = {**batch, **{n: np.pad(batch[n], ((0, 0), (2, 0))) for n in ('input', 'prompt_mask')}}
    assert first == answers(own(state, wide, jax.random.key(3)))


def chosen(state, batch, own, mixed, other):
    """How many of 24 batches are the student's; the others are `other(key)`."""
    count = 0
    for key in map(jax.random.key, range(24)):
        found, mine = answers(mixed(state, batch, key)), answers(own(state, batch, key))
        assert found in (mine, other(key))
        assert mine != other(key)
        count += found == mine
    return count


def test_a_coin_decides_for_the_whole_batch_whether_it_has_the_text_of_the_data(
    network, batch, state, own
):
    rows = zip(batch['response'], batch['response_mask'], strict=True)
    given = [tokens[mask].tolist() for tokens, mask in rows]
    mixed = collected(context(network), share=0.5)
    assert 5 < chosen(state, batch, own, mixed, lambda key: given) < 19


def test_a_teacher_answers_instead_and_never_says_what_the_student_has_not(
    network, batch, state, own
):
    wide = decoder(num_classes=V + 20)
    state = state.replace(frozen={'teacher': toys.drawn(wide, 5)})
    mixed = collected(context(network, wide), share=0.5, other='teacher')
    draw = jax.jit(sampler(wide.module, max_new=R, stop=(EOS,), forbidden=range(V, V + 20)))
    prompts = batch['input'], batch['prompt_mask']

    def said(key):
        found = draw(state.frozen['teacher'], *prompts, jax.random.split(key)[1])
        rows = zip(np.asarray(found.tokens), np.asarray(found.mask), strict=True)
        return [tokens[mask].tolist() for tokens, mask in rows]

    assert 5 < chosen(state, batch, own, mixed, said) < 19


def test_a_method_learns_from_what_was_sampled(network, batch, state):
    """Cross-entropy with own answers of temperature 0 makes them more probable."""
    made = context(network)
    method = with_collect(
        distillation(made, soft_weight=0.0),
        answering.on_policy(made, max_new=R, stop=(EOS,), temperature=0.0),
    )
    step = jax.jit(method.step)
    now, before = step(state, batch)
    for _ in range(4):
        now, after = step(now, batch)
    # As many tokens as were said, not as there are slots.
    assert 6 <= before['loss'].count <= 6 * R
    assert (
        after['loss'].total / after['loss'].count
        < 0.8 * before['loss'].total / before['loss'].count
    )


def test_what_cannot_be_sampled_is_told(network):
    table = from_linen(BottleneckLM(num_classes=V), jax.ShapeDtypeStruct((1, P), jnp.int32))
    with pytest.raises(UserError, match=r'stage: .*the network is BottleneckLM\.$'):
        answering.on_policy(context(table), max_new=R)
    with pytest.raises(UserError, match=r"the data has no 'prompt_mask'; .*layout='prompts'"):
        answering.on_policy(context(network, spec={'input': SPEC['input']}), max_new=R)
    prompts = {name: SPEC[name] for name in ('input', 'prompt_mask')}
    with pytest.raises(UserError, match=r"the data has no 'response'"):
        answering.on_policy(context(network, spec=prompts), max_new=R, share=0.5)
    with pytest.raises(UserError, match=r'the teacher is BottleneckLM'):
        answering.on_policy(context(network, table), max_new=R, share=0.5, other='teacher')
