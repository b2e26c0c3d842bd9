"""SRPO and SDPO against plain forward passes, enumeration and sums by hand."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import EOS, REWARD, SAMPLING, G, R, context, decoder, prompts, sharp

from kd.errors import UserError
from kd.method import with_nonfinite_guard
from kd.methods.rl import common, srpo
from kd.methods.rl.srpo import Quote, Routing
from kd.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR, SHARPNESS = 0.5, 1.5
BEFORE, AFTER = (9, 10), (11,)
QUOTE = dict(opening=BEFORE, closing=AFTER, after=1)
SRPO = Routing(sharpness=SHARPNESS)
SDPO = Routing(right=1, wrong=1, others=0, sharpness=0.0)
NONE = Routing(right=0, wrong=0)
MIXED = Routing(right=1, wrong=1, sharpness=0.0, mix=0.9)


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    return prompts()


class Run:
    """A method, compiled once, whose routing is an argument."""

    def __init__(self, network, **options):
        made = srpo.srpo(context(network), reward=REWARD, sampling=SAMPLING, chunk=32, **options)
        self.network, self.method = network, with_nonfinite_guard(made, 'skip')
        self.first = jax.jit(self.method.init)(jax.random.key(0), {})
        self.step = jax.jit(self.method.step)

    def start(self, route=SRPO, seed=1, teacher=None):
        params = {'network': sharp(self.network, seed)['params']}
        ema = {srpo.TEACHER: {'network': sharp(self.network, teacher or seed)['params']}}
        route = jax.tree.map(jnp.float32, route)
        return self.first.replace(params=params, ema=ema, frozen={'routing': route})

    def __call__(self, batch, route=SRPO, teacher=None):
        state = self.start(route, teacher=teacher)
        return state, *self.step(state, batch)


OPTIONS = dict(quote=QUOTE, routing=lambda state: state.frozen['routing'], top_k=0)


@pytest.fixture(scope='module')
def one(network):
    return Run(network, rate=0.25, **OPTIONS)


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def close(first, second, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


def forced(batch, verdict):
    return {**batch, 'forced': ~batch['forced'], 'verdict': np.full(4, verdict, np.float32)}


# One step, by hand


def answers(network, before, batch):
    """What a step has sampled, by its own key, and the prompts."""
    draw = common.drawing(context(network), common.Sampling(**SAMPLING))
    key = jax.random.fold_in(before.step_key(), zlib.crc32(b'collect'))
    rows = {name: np.repeat(x, G, axis=0) for name, x in batch.items()}
    said = jax.jit(draw)(before.variables(), rows['input'], rows['prompt_mask'], key)
    return rows, jax.tree.map(np.asarray, said)


def texts(asked, said):
    """Prompts and answers as lists of tokens, and the sibling that each answer's teacher reads."""
    both = (asked['input'], asked['prompt_mask']), (said.tokens, said.mask)
    prompt, answer = ([x[there].tolist() for x, there in zip(*of, strict=True)] for of in both)
    right = [words[0] % 2 == 0 for words in answer]
    siblings = []
    for row in range(16):
        group = range(row // G * G, row // G * G + G)
        others = [j for j in group if j != row and right[j]]
        siblings.append(others[0] if others else None)
    return prompt, answer, np.array(right), siblings


def rows(prompts, answers):
    """Texts that begin in their first slot, [16, T], and the slots that predict answers [16, R]."""
    text = np.zeros((16, 24), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text[row, : len(prompt) + len(answer)] = [*prompt, *answer]
    return text, np.array([len(prompt) for prompt in prompts])[:, None] - 1 + np.arange(R)


def laws(network, params, text, slots):
    """log p [16, R, V] at these slots."""
    logits = network.apply({'params': params}, text).logits[np.arange(16)[:, None], slots]
    return jax.nn.log_softmax(logits.at[..., :2].set(-1e9))


@pytest.fixture(scope='module')
def by_hand(network, batch):
    """`by_hand(before, route)`: the gradient of the objective, at what a step has sampled."""

    @jax.jit
    @jax.grad
    def slope(params, teacher, prompt, shown, tokens, mask, advantage, routed):
        log_q, log_t = laws(network, params, *prompt), laws(network, teacher, *shown)
        log_t = jax.lax.stop_gradient(log_t)
        entropy = jax.scipy.special.entr(jnp.exp(log_t)).sum(-1)
        counted = mask & routed[:, None]
        raw = jnp.exp(-SHARPNESS * entropy) * counted
        weight = raw / jnp.maximum(raw.sum() / jnp.maximum(counted.sum(), 1), 1e-9)
        q, p = jnp.exp(log_q), jnp.exp(log_t)
        middle = jnp.log(jnp.maximum(p + q, 1e-30) / 2)
        distance = (p * (log_t - middle) + q * (log_q - middle)).sum(-1) / 2
        log_p = jnp.take_along_axis(log_q, tokens[..., None], -1)[..., 0]
        each = jnp.where(routed[:, None], weight * distance, -advantage[:, None] * log_p)
        return jnp.where(mask, each, 0.0).sum() / mask.sum()

    def found(before, route):
        asked, said = answers(network, before, batch)
        prompt, answer, right, siblings = texts(asked, said)
        available = np.array([s is not None for s in siblings])
        shown = [
            [words[0], *BEFORE, *[t for t in answer[s] if t != EOS], *AFTER, *words[1:]]
            if s is not None else words
            for words, s in zip(prompt, siblings, strict=True)
        ]  # fmt: skip
        routed = available & (right if route.right else ~right) & bool(route.right or route.wrong)
        rewards = right.astype(float).reshape(4, G)
        advantage = (rewards - rewards.mean(1, keepdims=True)).reshape(-1)
        gradient = slope(
            before.params['network'], before.ema[srpo.TEACHER]['network'], rows(prompt, answer),
            rows(shown, answer), said.tokens, said.mask, advantage, routed,
        )  # fmt: skip
        return gradient, routed, available, said.mask

    return found


def moved(before, after):
    return jax.tree.map(lambda x, y: (x - y) / LR, before.params, after.params)['network']


def test_a_step_is_the_gradient_of_the_objective(batch, one, by_hand):
    before, after, metrics = one(batch, SRPO, teacher=2)
    slope, routed, available, mask = by_hand(before, SRPO)
    close(moved(before, after), slope)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) > 1e-2
    assert 0 < routed.sum() < available.sum() < 16
    assert value(metrics, 'routed') == pytest.approx(routed.mean())
    assert value(metrics, 'available') == pytest.approx(available.mean())
    counted = mask & routed[:, None]
    assert value(metrics, 'routed_tokens') == pytest.approx(counted.sum() / mask.sum())
    assert value(metrics, 'ratio') == value(metrics, 'ratio_max') == 1
    # The average is taken once the policy has moved, a quarter of the way to it.
    slow = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, before.ema[srpo.TEACHER], after.params)
    close(after.ema[srpo.TEACHER], slow, atol=1e-6)


def test_without_routing_it_is_grpo_with_a_mean_over_tokens(batch, one, by_hand):
    before, after, metrics = one(batch, NONE, teacher=2)
    close(moved(before, after), by_hand(before, NONE)[0], atol=1e-6)
    assert value(metrics, 'routed') == 0
    assert metrics['teacher_entropy'].count == 0
    # Nobody is taught: the teacher makes no difference.
    close(one(batch, NONE, teacher=3)[1].params, after.params, atol=0)


def test_nothing_is_learnt_where_all_are_wrong_nor_by_srpo_where_all_are_right(batch, one):
    for verdict, route in ((0.0, SRPO), (1.0, SRPO), (0.0, SDPO), (0.0, MIXED)):
        before, after, metrics = one(forced(batch, verdict), route, teacher=2)
        for name in ('loss', 'grad_norm', 'nonfinite', 'routed'):
            assert value(metrics, name) == 0, (name, verdict)
        jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_sdpo_distils_right_answers_too(batch, one):
    _, _, metrics = one(forced(batch, 1.0), SDPO, teacher=2)
    assert value(metrics, 'routed') == value(metrics, 'available') == 1
    assert value(metrics, 'grad_norm') > 1e-3
    assert value(metrics, 'loss') == pytest.approx(value(metrics, 'self_distillation'), rel=1e-5)


def test_the_teacher_is_the_average_and_draws_nearer_to_a_policy_that_stays(batch, one):
    state, still = one.start(teacher=2), forced(batch, 1.0)
    far = jax.tree.map(jnp.subtract, state.ema[srpo.TEACHER], state.params)
    for _ in range(3):
        state, _ = one.step(state, still)
    near = jax.tree.map(jnp.subtract, state.ema[srpo.TEACHER], state.params)
    close(near, jax.tree.map(lambda x: 0.75**3 * x, far), atol=1e-6)


def test_micro_batches_and_devices_change_nothing(network, batch, one):
    """Groups are torn by micro-batches, and what is averaged over is of the whole batch."""
    torn = Run(network, rate=0.25, micro_batches=4, **OPTIONS)
    mesh = mesh_lib.make_mesh({'data': 4})
    spread = mesh_lib.put_batch(batch, mesh_lib.batch_sharding(mesh))
    _, first, whole = one(batch, teacher=2)
    _, other, parts = torn(spread, teacher=2)
    assert len(other.step.sharding.device_set) == 4
    close((first.params, first.ema), (other.params, other.ema))
    for name in set(whole) - {'grad_norm'}:
        assert value(whole, name) == pytest.approx(value(parts, name), abs=1e-4), name
    assert value(whole, 'routed') > 0


# Its parts


@pytest.mark.parametrize(
    ('right', 'available', 'route', 'wanted'),
    [
        (True, True, SRPO, False),
        (True, False, SRPO, False),
        (False, False, SRPO, False),
        (False, True, SRPO, True),
        (True, True, SDPO, True),
        (True, False, SDPO, False),
        (True, True, Routing(right=1, wrong=0), True),
        (False, True, Routing(right=1, wrong=0), False),
    ],
)
def test_who_is_routed(right, available, route, wanted):
    found = route.routed(jnp.array([right]), jnp.array([available]))
    assert bool(found[0]) == wanted


def test_weights_are_of_one_mean_over_the_tokens_of_both_kinds():
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    entropy = np.array([[5.0, 5, 5], [0.0, np.log(3), 7], [2.0, 2, 2]], np.float32)
    routed = np.array([False, True, False])
    of_policy, of_teacher = srpo.routed_weights(mask, routed, entropy, Routing())
    # Six tokens, whose losses are added up over three rows; w is 3/2 and 1/2.
    np.testing.assert_allclose(of_policy, [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(of_teacher, [[0, 0, 0], [0.75, 0.25, 0], [0, 0, 0]], rtol=1e-6)
    # SDPO: the mean over the tokens of the routed row alone.
    of_policy, of_teacher = srpo.routed_weights(mask, routed, entropy, SDPO)
    assert not np.any(of_policy)
    np.testing.assert_allclose(of_teacher, [[0, 0, 0], [1.5, 1.5, 0], [0, 0, 0]], rtol=1e-6)
    # Nobody is routed: no NaN.
    nobody = srpo.routed_weights(mask, np.zeros(3, bool), entropy, SDPO)
    assert not np.any(nobody)
    # Mixed advantages keep a share of the policy gradient in routed rows.
    of_policy, of_teacher = srpo.routed_weights(mask, routed, entropy, MIXED)
    np.testing.assert_allclose(of_policy[1], [0.45, 0.45, 0], rtol=1e-6)
    np.testing.assert_allclose(of_teacher[1], [0.05, 0.05, 0], rtol=1e-5)
    # A batch that is there twice has the same weights.
    twice = srpo.routed_weights(*(np.concatenate([x, x]) for x in (mask, routed, entropy)), SRPO)
    once = srpo.routed_weights(mask, routed, entropy, SRPO)
    for both, single in zip(twice, once, strict=True):
        np.testing.assert_allclose(both, np.tile(single, (2, 1)), rtol=1e-6)


def test_names_of_the_config_are_routings(network, monkeypatch):
    seen = []
    monkeypatch.setattr(srpo, '_teacher', lambda *given: seen.append(given[3](None)))
    for options in (
        {},
        dict(taught='all', reinforced=False, sharpness=0.0),
        dict(taught='right', mix=0.5),
    ):
        srpo.srpo(context(network), reward=REWARD, sampling=SAMPLING, quote=QUOTE, **options)
    assert seen == [(0, 1, 1, 1.0, 0.0), (1, 1, 0, 0.0, 0.0), (1, 0, 1, 1.0, 0.5)]


def test_text_around_an_answer_needs_a_tokenizer(network):
    class Described:
        tokenizer = None

    of = context(network, source=lambda split: Described())
    opening, closing = Quote('before', (7,)).around(of)
    assert opening.tolist() == [0] * 6
    assert closing.tolist() == [7]
    bare = context(network, source=lambda split: object())
    with pytest.raises(UserError, match='the data have no tokenizer; quote by tokens'):
        Quote('before').around(bare)


def test_what_does_not_fit_is_told(network):
    given = dict(reward=REWARD, quote=QUOTE)
    with pytest.raises(UserError, match=r"tokens='said' estimates the reverse KL; set alpha to 1"):
        srpo.srpo(context(network), sampling=SAMPLING, tokens='said', **given)
    playing = dict(SAMPLING, environment=dict(name='kd.rewards.push.environment'))
    with pytest.raises(UserError, match='answers that are quoted are those of one turn'):
        srpo.srpo(context(network), sampling=playing, **given)
