"""KEPO against NumPy: which answers are taught, and how hints open prompts that nobody solves."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import (
    EOS,
    SAMPLING,
    G,
    P,
    R,
    Run,
    close,
    context,
    decoder,
    forced,
    log_probs,
    prompts,
    sharp,
    value,
)
from scipy import special

from kd.errors import UserError
from kd.losses import policy
from kd.methods.rl import common, hints, scoring
from kd.methods.rl import kepo as of_kepo
from kd.methods.rl.grpo import grpo
from kd.methods.rl.hints import Hints
from kd.methods.rl.kepo import kepo
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

HINT = dict(solutions=3, temperature=1.0, top_p=1.0, before=(7,), behind=(9, 9), after=1, tries=2)


@pytest.fixture(scope='module')
def network():
    return decoder()


def opening(context):
    """Answers to prompt 0 are right where their first token is even, and to 1 and 2 behind a hint;
    the teacher's are, but to prompt 3."""

    def reward(tokens, mask, batch):
        hinted = batch['input'].shape[1] > P
        theirs = len(tokens) == 4 * HINT['solutions']
        even = jnp.where(tokens[:, 0] % 2, 0.0, 1.0) * (batch['row'] == 0)
        drawn = (batch['row'] != 3).astype(float) if hinted or theirs else even
        return jnp.where(batch['forced'], batch['verdict'], drawn)

    return reward


OPENING = dict(name='test_kepo.opening')


@pytest.fixture(scope='module')
def batch():
    return {**prompts(), 'row': np.arange(4)}


@pytest.fixture(scope='module')
def once(network):
    """KEPO with hints."""
    return Run(
        kepo, network, OPENING, chunk=64, hint=HINT, epsilon=1e-6, fields={'teacher': network}
    )


@pytest.fixture(scope='module')
def step(network, batch, once):
    """A step, and what it has sampled, by its own key."""
    teacher = sharp(network, 7)
    before, _, metrics = once(batch, frozen={'teacher': teacher})
    of = context(network, teacher=network)
    sampling = common.Sampling(**SAMPLING)
    draw = common.drawing(of, sampling, network)
    collect = hints.opened(of, draw, opening(of), sampling, Hints(**HINT))
    state = State.create(jax.random.key(0), sharp(network, 1)).replace(frozen={'teacher': teacher})
    key = jax.random.fold_in(before.step_key(), zlib.crc32(b'collect'))
    return metrics, jax.tree.map(np.asarray, jax.jit(collect)(state, batch, key)), draw


class TestHints:
    """Six prompts in question: what becomes of their groups of four answers."""

    WANTED = np.array([True, True, True, False, True, True])
    THERE = np.array([True, True, False, True, True, True])
    # Two tries of two answers each.
    REWARDS = np.array([
        [[1, 0], [1, 1]], [[1, 1], [1, 1]], [[1, 1], [1, 1]],
        [[1, 1], [1, 1]], [[1, 0], [0, 1]], [[0, 0], [1, 1]],
    ], np.float32)  # fmt: skip

    @staticmethod
    def answers(count, first):
        """Answers that say who they are."""
        tokens = np.full((count, R), 3, np.int32)
        tokens[:, 0] = first + np.arange(count)
        return {
            'tokens': tokens,
            'mask': np.arange(R) < 1 + np.arange(count)[:, None] % R,
            'truncated': np.arange(count) % 2 == 0,
            'rewards': np.zeros(count, np.float32),
            'unjudged': np.arange(count) % 3 == 0,
            'sampler_log_probs': -np.arange(count * R, dtype=np.float32).reshape(count, R),
        }

    def made(self, **changes):
        batch, tries = self.answers(24, 100), self.answers(24, 500)
        tries['rewards'] = self.REWARDS.reshape(-1)
        how = Hints(**{**HINT, **changes})
        found = hints.injected(batch, tries, self.WANTED, self.THERE, how, jax.random.key(3))
        return batch, tries, jax.tree.map(np.asarray, found)

    def test_the_first_good_try_takes_places_of_its_own_prompt(self):
        batch, tries, found = self.made()
        taken = found['injected'].reshape(6, 4)
        # Prompt 2 has no hint, 3 is not in question, and no try of 4 is good.
        assert taken.sum(1).tolist() == [2, 2, 0, 0, 0, 2]
        said = found['tokens'][:, 0].reshape(6, 4)
        assert [sorted(said[n][taken[n]]) for n in (0, 1, 5)] == [
            [502, 503], [504, 505], [522, 523],
        ]  # fmt: skip
        # All of an answer goes with it, and all else stays bit for bit.
        for name in found.keys() - {'injected'}:
            for row, who in enumerate(found['tokens'][:, 0]):
                source = tries[name][who - 500] if who >= 500 else batch[name][row]
                np.testing.assert_array_equal(found[name][row], source, err_msg=name)

    def test_places_differ_by_prompt_and_by_key(self):
        batch, tries = self.answers(40, 100), self.answers(40, 500)
        tries['rewards'][:] = 1
        everywhere, how = np.ones(10, bool), Hints(**HINT)
        places = [
            np.asarray(hints.injected(batch, tries, everywhere, everywhere, how, key)['injected'])
            for key in map(jax.random.key, (1, 2))
        ]
        for one in places:
            assert (one.reshape(10, 4).sum(1) == 2).all()
            assert len({tuple(row) for row in one.reshape(10, 4)}) > 2
        assert (places[0] != places[1]).any()

    def test_the_released_rule_takes_a_try_that_is_right_for_all_prompts_in_question(self):
        # Prompt 4 has no good try: nothing is taken.
        assert not self.made(accept='batch')[2]['injected'].any()
        batch, tries = self.answers(8, 100), self.answers(8, 500)
        tries['rewards'] = np.array([1, 1, 1, 1, 0, 1, 1, 1], np.float32)
        both = np.ones(2, bool)
        found = hints.injected(
            batch, tries, both, both, Hints(**{**HINT, 'accept': 'batch'}), jax.random.key(0)
        )
        said = np.asarray(found['tokens'])[:, 0]
        # The second try of both, though the first of prompt 0 was good.
        assert sorted(said[said >= 500]) == [502, 503, 506, 507]


def test_two_right_answers_of_eight_have_these_advantages():
    """A dead group has none, and no gradient; with two right ones it has."""
    batch = {'mask': np.ones((8, 3), bool), 'rewards': np.zeros(8, np.float32)}
    batch['unjudged'] = np.zeros(8, bool)
    dead = common.valued(batch, 8, ddof=1, epsilon=1e-4)
    assert not np.asarray(dead['advantage']).any()
    batch['rewards'][[2, 5]] = 1
    found = np.asarray(common.valued(batch, 8, ddof=1, epsilon=1e-4)['advantage'])
    assert found[[2, 5]] == pytest.approx([1.6202] * 2, abs=1e-3)
    assert found[[0, 1, 3, 4, 6, 7]] == pytest.approx([-0.5401] * 6, abs=1e-3)


def test_answers_that_do_not_pass_are_no_part_of_the_mean():
    mask = np.arange(4) < np.array([4, 2, 3, 1])[:, None]
    batch = {'mask': mask, 'rewards': np.array([1, 0, 1, 0], np.float32)}
    found = jax.tree.map(np.asarray, of_kepo.gated(batch, 1.0))
    assert found['gate'].tolist() == [True, False, True, False]
    # The mean over rows of sum_t w l is sum over passing tokens / 7.
    np.testing.assert_allclose(found['gated_weight'] / 4, mask * found['gate'][:, None] / 7)
    more = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    more['mask'][4:] = True
    twice = np.asarray(of_kepo.gated(more, 1.0)['gated_weight'])
    np.testing.assert_allclose(twice / 8, np.pad(found['gated_weight'] / 4, ((0, 4), (0, 0))))
    assert not np.asarray(of_kepo.gated(batch, 2.0)['gated_weight']).any()
    # Of all answers it is the mean over tokens.
    everywhere = np.asarray(of_kepo.gated(batch, 0.0)['gated_weight'])
    np.testing.assert_allclose(everywhere / 4, mask / 10)


def test_the_loss_is_that_of_the_equation(network, step):
    """By plain forward passes behind the plain prompts."""
    metrics, made, _ = step
    grouped = made['rewards'].reshape(4, G)
    centred = grouped - grouped.mean(1, keepdims=True)
    advantage = (centred / (grouped.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1)
    mask = made['mask']
    distance = jsd(network, made, sharp(network, 1), sharp(network, 7))
    passing = mask & (made['rewards'] >= 1)[:, None]
    assert 0 < passing.sum() < mask.sum()
    wanted = -advantage.mean() + distance[passing].mean()
    assert value(metrics, 'loss') == pytest.approx(wanted, abs=1e-5)
    assert value(metrics, 'to_teacher') == pytest.approx(distance[mask].mean(), abs=1e-5)
    assert value(metrics, 'gate') == pytest.approx(grouped.mean())
    assert value(metrics, 'injected') == pytest.approx(made['injected'].mean())


@functools.cache
def _logits(network):
    return jax.jit(lambda variables, text: network.apply(variables, text).logits)


def laws(network, made, variables):
    """Log-probabilities [B, R, V] of plain forward passes."""
    rows, length = made['tokens'].shape
    text = np.zeros((rows, P + R), np.int32)
    asked = made['prompt_mask'].sum(1)
    for row in range(rows):
        whole = [*made['input'][row][made['prompt_mask'][row]], *made['tokens'][row]]
        text[row, : len(whole)] = whole
    logits = np.array(_logits(network)(variables, text), np.float64)
    logits[..., :2] = -np.inf
    slots = asked[:, None] - 1 + np.arange(length)
    return special.log_softmax(logits[np.arange(rows)[:, None], slots], -1)


def jsd(network, made, variables, teacher):
    own, theirs = laws(network, made, variables), laws(network, made, teacher)
    middle = np.logaddexp(own, theirs) - np.log(2)
    p, q = np.exp(own), np.exp(theirs)
    with np.errstate(invalid='ignore'):
        terms = np.nan_to_num(p * (own - middle)) + np.nan_to_num(q * (theirs - middle))
    return terms.sum(-1) / 2


def test_hints_open_prompts_and_stay_out_of_them(network, batch, step):
    _, made, draw = step
    assert made['injected'].reshape(4, G).sum(1).tolist() == [0, 2, 2, 0]
    assert made['unsolved'].reshape(4, G).all(1).tolist() == [False, True, True, True]
    np.testing.assert_array_equal(made['rewards'][G:], made['injected'][G:])
    # No sign of a hint is left in a prompt, and what is scored is what follows the plain one.
    np.testing.assert_array_equal(made['input'], np.repeat(batch['input'], G, axis=0))
    plain = log_probs(network, sharp(network, 1), made)[0]
    scored = scoring.score(network, sharp(network, 1), made, draw, chunk=64).log_probs
    np.testing.assert_allclose(scored, plain, atol=1e-4)
    own = ~made['injected']
    np.testing.assert_allclose(made['sampler_log_probs'][own], plain[own], atol=1e-4)
    # Behind the hint they were drawn by another law.
    assert np.abs(made['sampler_log_probs'] - plain)[made['injected']].max() > 1e-2
    weights = np.asarray(hints.corrected(made, plain))
    wanted = np.exp(plain.sum(1) - made['sampler_log_probs'].sum(1))
    np.testing.assert_allclose(weights, np.where(own, 1, wanted), rtol=1e-3)


def test_the_hint_is_the_first_right_solution_without_its_end(network, batch):
    rng = np.random.default_rng(5)
    theirs = {
        'tokens': np.where(np.arange(R) == 2, EOS, rng.integers(3, 7, (12, R))).astype(np.int32),
        'mask': np.broadcast_to(np.arange(R) < 3, (12, R)),
        'truncated': np.zeros(12, bool),
        'rewards': np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1], np.float32),
    }
    made, there = hints._hinted(batch, theirs, Hints(**HINT), [(7,), (9, 9)])
    assert there.tolist() == [True, True, False, True]
    for prompt, solution in ((0, 1), (1, 3), (3, 11)):
        asked = batch['input'][prompt][batch['prompt_mask'][prompt]].tolist()
        quoted = theirs['tokens'][solution, :2].tolist()
        found = np.asarray(made['input'])[prompt][np.asarray(made['prompt_mask'])[prompt]]
        assert found.tolist() == [asked[0], 7, *quoted, 9, 9, *asked[1:]]


def test_where_all_is_solved_and_the_teacher_is_the_student_it_is_grpo(network, batch, once):
    even = {**batch, 'row': np.zeros(4, int)}
    for seed in range(3, 30):
        _, found, metrics = once(even, seed, frozen={'teacher': sharp(network, seed)})
        if value(metrics, 'unsolved') == 0 and value(metrics, 'dead_groups') < 1:
            break
    assert value(metrics, 'unsolved') == 0
    before, wanted, _ = Run(grpo, network, OPENING, chunk=64, ddof=1)(even, seed)
    close(found.params, wanted.params, atol=1e-5)
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), wanted.params, before.params)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-2


def test_where_no_answer_passes_nothing_is_learnt(network, batch, once):
    """Groups of wrong answers that hints do not open: loss 0, gradient 0, no NaN."""
    wrong = forced(batch, 0.0)
    before, after, metrics = once(wrong, frozen={'teacher': sharp(network, 7)})
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    for name in ('loss', 'grad_norm', 'nonfinite', 'gate', 'injected'):
        assert value(metrics, name) == 0, name
    assert value(metrics, 'unsolved') == 1


def test_right_answers_learn_from_the_teacher_unless_it_is_the_student(network, batch, once):
    right = forced(batch, 1.0)
    _, _, same = once(right, frozen={'teacher': sharp(network, 1)})
    assert value(same, 'loss') == pytest.approx(0, abs=1e-7)
    assert value(same, 'grad_norm') == pytest.approx(0, abs=1e-5)
    _, _, other = once(right, frozen={'teacher': sharp(network, 7)})
    assert 0.01 < value(other, 'loss') < np.log(2)
    assert value(other, 'grad_norm') > 1e-2
    assert policy.dead_groups(np.ones(8), 8).tolist() == [True]


def test_what_does_not_fit_is_told(network):
    with pytest.raises(UserError, match=r'needs stage\.teacher'):
        Run(kepo, network)
    with pytest.raises(UserError, match=r'injected=5 is more than the 4 answers to a prompt'):
        Run(kepo, network, hint=dict(HINT, injected=5), fields={'teacher': network})
