"""LLaVA-MoD: the mimic loss by NumPy, what each stage trains, preferences against the teacher."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd.claims import seeds
from kd.data.builders import digit_questions as questions
from kd.errors import UserError
from kd.losses import routing
from kd.methods.lm import llava_mod, preference
from kd.models.decoder import Decoder
from kd.models.vision_language import vision_decoder
from kd.network import from_linen
from kd.state import State, paths

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, LR, V, T = 8, 0.5, questions.TOKENS, questions.LENGTH
SIZES = dict(mlp='gelu', heads=2, tied=False, deviation=None, max_length=T, width=8, depth=1)
LANGUAGE = dict(name='kd.models.decoder.Decoder', mlp_hidden=8, **SIZES)
EXPERTS = dict(count=3, top_k=2, capacity=1.0)
TOWER = dict(
    name='kd.models.clip.ClipVision', image=8, patch=4, width=8, depth=2, heads=2, mlp_hidden=8
)
SHAPES = (
    jax.ShapeDtypeStruct((1, T), jnp.int32),
    jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),
)


def sees(tokens=V, **changes):
    module = vision_decoder(
        tokens, language=LANGUAGE | changes, vision=TOWER, image_token=questions.IMAGE
    ).clone(fields=('input', 'image'))
    return from_linen(module, *SHAPES)


def drawn(network, seed, scale=0.5):
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype), abstract)


DENSE, SPARSE = sees(), sees(experts=EXPERTS)
# Of the same tokens, padded further.
LARGE = sees(V + 3, mlp_hidden=12)


@pytest.fixture(scope='module')
def batch():
    """Questions, in one of which the answer is two tokens long."""
    made = {name: x[:B] for name, x in questions.make('test').items()}
    mask = np.array(made['response_mask'])
    mask[0, 4] = True
    return {**made, 'response_mask': mask, 'index': np.arange(B, dtype=np.int32)}


@pytest.fixture(scope='module')
def frozen():
    return {
        'start': drawn(SPARSE, 0),
        'teacher': drawn(LARGE, 1),
        preference.REFERENCE: drawn(LARGE, 1),
        llava_mod.INITIAL: drawn(DENSE, 2),
    }


def context(network, references=(), teacher=None, **more):
    return seeds.context(
        network=network, tx=optax.sgd(LR), references=dict(references), teacher=teacher,
        num_classes=V, **more,
    )  # fmt: skip


def stepped(method, frozen, batch):
    """(state before, state after, metrics)."""
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    return state, *jax.jit(method.step)(state, batch)


def moved(before, after):
    """Paths of the leaves that a step changed."""
    changed = jax.tree.map(
        lambda x, y: bool((x != y).any()), before.params['network'], after.params['network']
    )
    return {name for name, x in zip(paths(changed), jax.tree.leaves(changed), strict=True) if x}


def logits(network, variables, batch):
    return np.asarray(_applied(network)(variables, *network.of(batch)), np.float64)


@functools.cache
def _applied(network):
    return jax.jit(lambda variables, *inputs: network.apply(variables, *inputs).logits)


def routers(variables, batch):
    """Probabilities of experts."""
    found = SPARSE.apply(variables, *SPARSE.of(batch), capture=('block0/mlp/router',))
    return found.features['block0/mlp/router']


def slope(before, after):
    return jax.tree.map(
        lambda x, y: (x - y) / LR, before.params['network'], after.params['network']
    )


@pytest.fixture(scope='module')
def mimicked(frozen, batch):
    """A step of the second stage: (state before, state after, metrics)."""
    made = context(SPARSE, {'start': SPARSE}, LARGE)
    method = llava_mod.mimic(made, hard_weight=0.7, balance=0.1, trainable=llava_mod.SPARSE)
    return stepped(method, frozen, batch)


def test_the_mimic_loss_is_that_of_the_tokens_that_answer(frozen, batch, mimicked):
    """Position i is asked for token i + 1; logits beyond the student's do not matter."""
    before, after, metrics = mimicked
    own = special.log_softmax(logits(SPARSE, frozen['start'], batch), -1)
    theirs = special.softmax(logits(LARGE, frozen['teacher'], batch)[..., :V], -1)
    wanted, count = 0.0, 0
    for row in range(B):
        for at in range(T - 1):
            if batch['response_mask'][row, at + 1]:
                count += 1
                wanted -= 0.7 * own[row, at, batch['input'][row, at + 1]]
                wanted -= (theirs[row, at] * own[row, at]).sum()
    assert count == B + 1
    balance = routing.balance(routers(frozen['start'], batch)).mean()
    wanted = wanted / count + 0.1 * float(balance)
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(wanted, rel=1e-5)
    assert {'balance', 'dropped', 'load_0', 'load_2'} <= set(metrics)
    # D2S trains experts and routers alone.
    inside = {name for name in paths(before.params['network']) if '/mlp/' in name}
    assert moved(before, after) == inside
    assert {name.split('/')[2] for name in inside} == {'experts', 'router'}


def test_micro_batches_do_not_matter(frozen, batch, mimicked):
    made = context(SPARSE, {'start': SPARSE}, LARGE)
    method = llava_mod.mimic(
        made, hard_weight=0.7, balance=0.1, trainable=llava_mod.SPARSE, micro_batches=4
    )
    before, after, _ = stepped(method, frozen, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        slope(before, after),
        slope(*mimicked[:2]),
    )


def test_no_stage_trains_the_tower(frozen):
    names = paths(frozen['start']['params'])
    trained = {name.split('/')[0] for name in names if re.search(llava_mod.UNFROZEN, name)}
    assert trained == {name.split('/')[0] for name in names} - {'vision'}
    sparse = {name for name in names if re.search(llava_mod.SPARSE, name)}
    assert {name.split('/')[0] for name in sparse} == {'block0'}


def test_a_student_is_put_together_of_a_decoder_and_a_tower(frozen):
    plain = from_linen(
        Decoder(num_classes=V, mlp_hidden=8, **SIZES), jax.ShapeDtypeStruct((1, T), jnp.int32)
    )
    tower = from_linen(DENSE.module.vision.clone(parent=None), SHAPES[1])
    given = {'language': drawn(plain, 5), 'vision': drawn(tower, 6)}
    made = llava_mod.assembled(context(DENSE, {'language': plain, 'vision': tower}))
    params = jax.jit(made)(jax.random.key(3), given)['params']
    for name, tree in given['language']['params'].items():
        jax.tree.map(np.testing.assert_array_equal, params[name], tree)
    jax.tree.map(np.testing.assert_array_equal, params['vision'], given['vision']['params'])
    assert np.std(params['adaptor']['up']['kernel']) > 0.1
    # What has a tower is as good as one, and sizes are looked at.
    both = llava_mod.assembled(context(DENSE, {'vision': LARGE}))
    jax.eval_shape(both, jax.random.key(0), {'vision': frozen['teacher']})
    lost = llava_mod.assembled(context(DENSE, {'language': LARGE}))
    with pytest.raises(UserError, match=r"mlp/down/kernel' is \(12, 8\) in what the stage would"):
        jax.eval_shape(lost, jax.random.key(0), {'language': frozen['teacher']})


def test_wrong_answers_are_drawn_among_the_others_by_the_students_law(frozen, batch):
    made = context(DENSE, {llava_mod.INITIAL: DENSE})
    one = {name: np.stack([x[1]] * 2000) for name, x in batch.items()}
    one['index'] = np.arange(2000, dtype=np.int32)
    state = State.create(jax.random.key(0), frozen[llava_mod.INITIAL], frozen=frozen)
    paired = jax.jit(
        lambda b, seed: llava_mod.with_wrong_answers(made, state, b, jax.random.key(seed))
    )
    found = paired(one, 0)
    assert found['input'].shape == (2000, 2, T)
    np.testing.assert_array_equal(found['input'][:, 0], one['input'])
    np.testing.assert_array_equal(found['input'][:, 1, :-1], one['input'][:, :-1])
    assert found['image'].shape == (2000, 8, 8, 1)
    wrong, right = np.asarray(found['input'][:, 1, -1]), int(one['input'][0, -1])
    law = special.softmax(logits(DENSE, frozen[llava_mod.INITIAL], batch)[1, -2])
    law[[right, questions.IMAGE]] = 0
    drawn_often = np.bincount(wrong, minlength=V) / 2000
    assert drawn_often[right] == drawn_often[questions.IMAGE] == 0
    np.testing.assert_allclose(drawn_often, law / law.sum(), atol=0.04)
    np.testing.assert_array_equal(paired(one, 0)['input'], found['input'])
    assert (paired(one, 1)['input'] != found['input']).any()


@pytest.mark.parametrize('loss', ['dpo', 'kto_pair'])
def test_preferences_are_relative_to_the_reference(frozen, batch, loss):
    """By NumPy, with the teacher's law over the tokens that both have; pairs stay together."""
    beta, balance = 0.3, 0.01
    other = LARGE if loss == 'dpo' else SPARSE
    frozen = {**frozen, preference.REFERENCE: drawn(other, 1)}
    roles = {'start': SPARSE, preference.REFERENCE: other, llava_mod.INITIAL: DENSE}
    given = context(SPARSE, roles)
    # One token is the answer, as wrong ones are drawn.
    batch = {**batch, 'response_mask': np.broadcast_to(np.arange(T) == T - 1, (B, T))}
    method = llava_mod.prefer(given, loss=loss, beta=beta, balance=balance)
    before, after, metrics = stepped(method, frozen, batch)
    state = State.create(jax.random.key(9), frozen['start'], frozen=frozen)
    pair = llava_mod.with_wrong_answers(given, state, batch, jax.random.key(0))
    sums, unequal = [], []
    for side in (0, 1):
        text = {'input': np.asarray(pair['input'][:, side]), 'image': batch['image']}
        of = [
            special.log_softmax(logits(net, tree, text)[:, -2, :V], -1)
            for net, tree in ((SPARSE, frozen['start']), (other, frozen[preference.REFERENCE]))
        ]
        answer = text['input'][:, -1]
        sums.append(np.take_along_axis(of[0] - of[1], answer[:, None], 1)[:, 0])
        unequal.append(np.asarray(routing.balance(routers(frozen['start'], text))))
    if loss == 'dpo':
        values = -np.log(special.expit(beta * (sums[0] - sums[1])))
    else:
        base = [max(0, side.mean()) for side in sums]
        right, wrong = beta * (base[1] - sums[0]), beta * (sums[1] - base[0])
        values = (special.expit(right) + special.expit(wrong)) / 2
    wanted = (values + balance * (unequal[0] + unequal[1])).mean()
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(wanted, rel=1e-4)
    margin = float(metrics['margin'].total / metrics['margin'].count)
    assert margin == pytest.approx((sums[0] - sums[1]).mean(), rel=1e-4, abs=1e-5)
    assert all(name.split('/')[2] in ('experts', 'router') for name in moved(before, after))
    if loss == 'dpo':
        return
    # Each answer is compared with the whole batch.
    halves = llava_mod.prefer(given, loss=loss, beta=beta, balance=balance, micro_batches=2)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        slope(*stepped(halves, frozen, batch)[:2]),
        slope(before, after),
    )
    # A student that is its reference has a half.
    same = {**frozen, preference.REFERENCE: frozen['start']}
    found = jax.jit(method.step)(before.replace(frozen=same), batch)[1]['loss']
    balanced = balance * (unequal[0] + unequal[1]).mean()
    assert float(found.total / found.count) == pytest.approx(0.5 + balanced, abs=1e-5)


def test_what_cannot_be_is_told(frozen, batch):
    given = context(DENSE, {llava_mod.INITIAL: DENSE})
    state = State.create(jax.random.key(0), frozen[llava_mod.INITIAL], frozen=frozen)
    pair = {**batch, 'response_mask': np.stack([batch['response_mask']] * 2, 1)}
    with pytest.raises(UserError, match=r'gives wrong answers to text \[B, T\], .* \[8, 2, 6\]'):
        llava_mod.with_wrong_answers(given, state, pair, jax.random.key(0))
    method = llava_mod.mimic(context(DENSE, {'start': DENSE}), soft_weight=0.0, trainable='expert')
    with pytest.raises(UserError, match=r"trainable='expert' matches no parameter"):
        method.init(jax.random.key(0), {'start': drawn(DENSE, 0)})
