"""Self-Distillation Zero: records of revisions, both losses of them, and the teacher that reads an
answer again."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import EOS, SAMPLING, SPEC, V, context, decoder, prompts, sharp
from scipy import special

from kd import callables
from kd import config as config_lib
from kd.data import generated, revisions
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import answers
from kd.losses import divergence
from kd.methods.rl import common, sd_zero
from kd.methods.rl.self_teacher import Comparison
from kd.text import packing
from kd.text.revision import Cues, revised
from kd.text.table import table

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RIGHT, WRONG, BAR = 10, 11, 9
CUES = dict(right=((RIGHT,), (BAR,)), wrong=((WRONG,), (BAR,)), after=1)
ODD = dict(name='answering.verdicts')


@pytest.fixture(scope='module')
def network():
    return decoder()


# Records


LATER = dict(right=((), 'a a'), wrong=((), 'b'))


@pytest.fixture(scope='module')
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/recipes')
        import texts

        yield texts


def recipe_of(texts, cues=LATER, **options):
    """A teacher, its answers, revisions of these and a student of the records."""
    config = texts.get_config('answers')
    config.stages = ('teacher', 'answers', 'revised', 'student')
    config.revised = config.answers.copy_and_resolve_references()
    config.revised.data.source = dict(
        name='kd.data.revisions.prompts', stage='answers', length=9, cues=cues
    )
    config.student.data.source = dict(
        name='kd.data.revisions.records', stage='revised', length=14, **options
    )
    config.student.method = dict(name='kd.methods.rl.sd_zero.srt')
    return config


def drawn(rng, rows):
    """Three answers to each prompt: a third has come to no end, and one in six has no verdict."""
    lengths = rng.integers(2, 7, (rows, 3)).astype(np.int32)
    tokens = np.where(np.arange(6) < lengths[..., None], rng.integers(3, 20, (rows, 3, 6)), 0)
    scores = rng.choice([0.0, 1.0, np.nan], (rows, 3), p=[0.5, 0.3, 0.2])
    truncated = rng.random((rows, 3)) < 0.3
    return answers.Answers(tokens, lengths, np.zeros(tokens.shape), truncated, scores)


@pytest.fixture
def first(texts, monkeypatch):
    """What stages have answered, where others read it from disk."""
    source = texts.prompts(SourceContext('train', config_lib.parse(recipe_of(texts))))
    rng, there = np.random.default_rng(6), {}
    monkeypatch.setattr(generated, 'answered', lambda context, stage, scored: there[stage])
    there['answers'] = generated.Answered(source.fetch(np.arange(24)), drawn(rng, 24), source)
    asked = revisions.prompts(of(texts), stage='answers', length=8, cues=LATER)
    batch = asked.fetch(np.arange(len(asked)))
    there['revised'] = generated.Answered(batch, drawn(rng, len(asked)), asked)
    return there


def of(texts, workdir='somewhere', **options):
    workdir = Path(workdir) if workdir else None
    return SourceContext('train', config_lib.parse(recipe_of(texts, **options)), workdir)


def ids(batch, row, name='input', mask='prompt_mask'):
    return batch[name][row][batch[mask][row]].tolist()


def test_wrong_answers_are_shown_without_their_end_and_right_revisions_are_learnt_twice(
    texts, first
):
    said_first, again = first['answers'], first['revised'].answers
    asked = revisions.prompts(of(texts), stage='answers', length=8, cues=LATER)
    batch, cue = asked.fetch(np.arange(len(asked))), table(texts.SYMBOLS).encode('b')
    scores, wanted = said_first.answers.scores, []
    for row, number in np.ndindex(*scores.shape):
        said = said_first.said(row, number).tolist()
        said = said if said_first.answers.truncated[row, number] else said[:-1]
        text = [*ids(said_first.batch, row), *said, *cue]
        # Right ones, and those without a verdict (NaN), are not revised.
        if scores[row, number] == 0 and len(text) <= 8:
            wanted.append((ids(said_first.batch, row), text))
    found = [(ids(batch, i, 'plain', 'plain_mask'), ids(batch, i)) for i in range(len(asked))]
    assert found == wanted
    assert 0 < len(wanted) < (scores == 0).sum()
    good = [
        (row, again.tokens[row, number, : again.lengths[row, number]].tolist())
        for row, number in np.ndindex(*again.scores.shape)
        if again.scores[row, number] == 1 and not again.truncated[row, number]
    ]
    good = [(row, said) for row, said in good if len(found[row][1]) + len(said) <= 14]
    options = dict(stage='revised', length=14)
    rows = revisions.records(of(texts), **options)
    both = rows.fetch(np.arange(len(rows)))
    assert len(rows) == len(good) > 0
    for i, (row, said) in enumerate(good):
        plain, text = found[row]
        whole = both['segments'][i, 0] > 0
        assert both['input'][i, 0][whole].tolist() == [*text, *said]
        # The generator is taught all behind the prompt, the reviser a part of that.
        np.testing.assert_array_equal(both['input'][i, 1], both['input'][i, 0])
        learnt = both['response_mask'][i]
        np.testing.assert_array_equal(learnt[1], whole & (np.arange(14) >= len(plain)))
        np.testing.assert_array_equal(learnt[0], whole & (np.arange(14) >= len(text)))
        assert not (learnt[0] & ~learnt[1]).any()
    assert len(revisions.records(of(texts), **options, size=3)) == 3
    # Or the revision alone, after the original prompt.
    alone = revisions.records(of(texts), **options, generation='revised').fetch(
        np.arange(len(good))
    )
    for i, (row, said) in enumerate(good):
        assert alone['input'][i, 1][alone['segments'][i, 1] > 0].tolist() == [*found[row][0], *said]
        assert alone['response_mask'][i, 1].sum() == len(said)
    options = dict(stage='answers', length=12, cues=LATER, revise='all', samples=1)
    every = revisions.prompts(of(texts), **options)
    assert len(every) == (~np.isnan(scores[:, 0])).sum()


def test_what_is_no_revision_is_told(texts, first):
    records = dict(stage='revised', length=14)
    with pytest.raises(UserError, match=r"'answers' has revised nothing: its prompts are to be"):
        revisions.records(of(texts), **{**records, 'stage': 'answers'})
    with pytest.raises(UserError, match=r"of the revisions of 'revised' to train none is right"):
        revisions.records(of(texts), **records, least=2.0)
    with pytest.raises(UserError, match='none is to be revised in a prompt of 1 tokens'):
        revisions.prompts(of(texts), stage='answers', length=1, cues=LATER)
    first['revised'].batch['plain'][:] = 19
    with pytest.raises(UserError, match=r"do not go on from their prompts.*generation='revised'"):
        revisions.records(of(texts), **records)


def test_shapes_are_known_before_anybody_has_answered(texts):
    asked = revisions.prompts(of(texts, None), stage='answers', length=9, cues=LATER)
    shapes = {name: x.shape for name, x in asked.spec.items() if name != 'index'}
    assert shapes == {
        'input': (9,), 'prompt_mask': (9,), 'plain': (4,), 'plain_mask': (4,),
        'response': (5,), 'response_mask': (5,),
    }  # fmt: skip
    rows = revisions.records(of(texts, None), stage='revised', length=14)
    fields = ('input', 'positions', 'segments', 'response_mask')
    assert {name: rows.spec[name].shape for name in fields} == dict.fromkeys(fields, (2, 14))
    # Who has learnt from the prompts' data knows these.
    assert rows.domain == asked.domain == 'texts'


def test_cues_stand_around_an_answer():
    prompt, said = np.array([1, 2, 3]), np.array([7, 8])
    for cues, right, wanted in (
        (CUES, True, [1, RIGHT, 7, 8, BAR, 2, 3]),
        (CUES, False, [1, WRONG, 7, 8, BAR, 2, 3]),
        (dict(right=((), ()), wrong=((4,), (5, 6))), False, [1, 2, 3, 4, 7, 8, 5, 6]),
    ):
        around = Cues(**cues).around(None)[right]
        assert revised(prompt, said, around, Cues(**cues).after).tolist() == wanted
    # Where nothing is read the longest text that a cue can be.
    assert [len(x) for x in Cues(('', 'ab'), ('c', '')).around(None)[1]] == [0, 2]


# Phase 1


def pair_rows(rng):
    """Two records of different lengths: (x, y, cue, y') with both masks."""
    text = rng.integers(3, V, 9).astype(np.int32)
    examples = [
        [packing.Example(text[:n], np.arange(n) >= at) for n, at in ((9, 7), (9, 3))],
        [packing.Example(text[:n], np.arange(n) >= at) for n, at in ((6, 5), (6, 2))],
    ]
    return packing.pairs(*zip(*examples, strict=True), 10, pad=0).arrays


def test_both_losses_are_means_over_their_own_tokens_whatever_the_parts(network):
    weights, batch = (0.5, 2.0), pair_rows(np.random.default_rng(4))
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    made = sd_zero.srt(
        context(network, spec=spec), revision_weight=weights[0], generation_weight=weights[1],
        micro_batches=2, chunk=7,
    )  # fmt: skip
    state = jax.jit(made.init)(jax.random.key(0), {})
    state = state.replace(params={'network': sharp(network, 1)['params']})
    _, metrics = jax.jit(made.step)(state, {**batch, 'index': np.arange(2)})
    forward, wanted = jax.jit(lambda t: network.apply(state.variables(), t).logits), []
    for side in (0, 1):
        logits = np.asarray(forward(batch['input'][:, side]))
        log_p = special.log_softmax(logits[:, :-1].astype(float), -1)
        chosen = np.take_along_axis(log_p, batch['input'][:, side, 1:, None], -1)[..., 0]
        wanted.append(-chosen[batch['response_mask'][:, side, 1:]].mean())
    values = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert values['revision_loss'] == pytest.approx(wanted[0], abs=1e-5)
    assert values['generation_loss'] == pytest.approx(wanted[1], abs=1e-5)
    total = weights[0] * wanted[0] + weights[1] * wanted[1]
    assert values['loss'] == pytest.approx(total, abs=1e-5)
    with pytest.raises(UserError, match='srt learns from records of revisions'):
        sd_zero.srt(context(network, spec=SPEC))


# Phase 2


def method(network, fields=(), **options):
    options = dict(sampling=dict(SAMPLING, group=1), reward=ODD, cues=CUES, chunk=7) | options
    fields = dict(teacher=network) | dict(fields)
    return sd_zero.sd_zero(context(network, **fields), **options)


@pytest.fixture(scope='module')
def batch():
    """Prompts, and right answers that have a token more than answers may."""
    response = np.random.default_rng(5).integers(3, V, (4, 5)).astype(np.int32)
    return {**prompts(), 'response': response}


LOCATED = {'spec': {**SPEC, 'response': jax.ShapeDtypeStruct((5,), jnp.int32)}}


@pytest.fixture(scope='module')
def step(network):
    made = method(network, LOCATED, located='response')
    state = jax.jit(made.init)(jax.random.key(0), {})
    update = jax.jit(made.step)

    def one(batch, seed=1, teacher=2):
        before = state.replace(params={'network': sharp(network, seed)['params']})
        return before, *update(before.replace(frozen={'teacher': sharp(network, teacher)}), batch)

    return one


def forced(batch, verdict):
    verdict = np.broadcast_to(np.float32(verdict), 4).copy()
    return {**batch, 'forced': np.ones(4, bool), 'verdict': verdict}


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def test_the_policy_stands_first_in_the_divergence_of_the_paper():
    policy, teacher = np.log([0.5, 0.5, 1e-12]), np.log(np.ones(3) / 3)
    reverse = callables.resolve(Comparison().divergence)
    assert float(reverse(policy, teacher)) == pytest.approx(np.log(1.5), abs=1e-4)
    assert float(divergence.forward_kl(policy, teacher)) > 8


@pytest.fixture(scope='module')
def answered(network):
    """What a step has sampled, by its own key."""
    draw = jax.jit(common.drawing(context(network), common.Sampling(**dict(SAMPLING, group=1))))

    def of_step(before, batch):
        key = jax.random.fold_in(before.step_key(), zlib.crc32(b'collect'))
        said = draw(before.variables(), batch['input'], batch['prompt_mask'], key)
        return jax.tree.map(np.asarray, said)

    return of_step


def rows_of(batch, said, rewards):
    """[(prompt of the policy, prompt of the teacher, answer)]."""
    made = []
    for row in range(4):
        asked = ids(batch, row)
        answer = said.tokens[row][said.mask[row]].tolist()
        quoted = answer if said.truncated[row] else answer[:-1]
        cue = RIGHT if rewards[row] >= 0.5 else WRONG
        made.append((asked, [asked[0], cue, *quoted, BAR, *asked[1:]], answer))
    return made


def test_a_step_goes_down_the_reverse_kl_to_who_has_read_the_answer(network, batch, step, answered):
    """Loss and gradient by plain forward passes; all answers wrong, which teach nothing in GRPO."""
    before, after, metrics = step(forced(batch, 0.0))
    said = answered(before, batch)
    rows = rows_of(batch, said, np.zeros(4))
    frozen = sharp(network, 2)

    def laws(variables, which):
        text = np.zeros((4, 20), np.int32)
        at = np.zeros((4, said.mask.shape[1]), int)
        for row, parts in enumerate(rows):
            whole = [*parts[which], *parts[2]]
            text[row, : len(whole)] = whole
            at[row] = np.minimum(len(parts[which]) - 1 + np.arange(at.shape[1]), 19)
        logits = network.apply(variables, text).logits.at[..., :2].set(-1e9)
        return jax.nn.log_softmax(logits)[np.arange(4)[:, None], at]

    def total(params):
        log_q, log_p = laws({'params': params}, 0), laws(frozen, 1)
        kl = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
        return jnp.where(said.mask, kl, 0).sum() / said.mask.sum(), kl

    (wanted, kl), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(before.params['network'])
    assert value(metrics, 'loss') == pytest.approx(float(wanted), abs=1e-4)
    moved = jax.tree.map(lambda x, y: (x - y) / 0.5, before.params, after.params)['network']
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), moved, slope)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) > 1e-2
    assert value(metrics, 'reward') == 0
    # Where the teacher disagrees: the first token that is not that of the data's answer.
    kl, length = np.asarray(kl), said.mask.shape[1]
    differs = said.mask & (said.tokens != batch['response'][:, :length])
    first = np.zeros_like(differs)
    first[np.arange(4), differs.argmax(1)] = differs.any(1)
    assert value(metrics, 'divergence_at_error') == pytest.approx(kl[first].mean(), abs=1e-4)
    elsewhere = kl[said.mask & ~first].mean()
    assert value(metrics, 'divergence_elsewhere') == pytest.approx(elsewhere, abs=1e-4)
    assert metrics['divergence_right'].count == 0


def test_the_verdict_is_one_token_of_the_teachers_prompt_and_of_no_other(network, batch):
    said = dict(
        tokens=jnp.asarray([[5, 6, EOS, 0]] * 4), mask=jnp.asarray([[True, True, True, False]] * 4),
        truncated=jnp.zeros(4, bool), unjudged=jnp.zeros(4, bool),
    )  # fmt: skip
    again = sd_zero.read_again(context(network), CUES)
    good, bad = (again({**batch, **said, 'rewards': jnp.full(4, r)}) for r in (1.0, 0.0))
    differs = np.asarray(good['input'] != bad['input'])
    assert differs.sum(1).tolist() == [1] * 4
    assert set(np.asarray(good['input'])[differs]) == {RIGHT}
    assert set(np.asarray(bad['input'])[differs]) == {WRONG}
    for made in (good, bad):
        # Prompt, cue, the answer without its end, and what closes the block.
        np.testing.assert_array_equal(
            made['prompt_mask'].sum(1), batch['prompt_mask'].sum(1) + 1 + 2 + 1
        )
    # Cues of different lengths leave no hole.
    uneven = sd_zero.read_again(context(network), dict(right=((), (3,)), wrong=((), (4, 5))))
    made = uneven({**batch, **said, 'rewards': jnp.asarray([1.0, 0.0, 1.0, 0.0])})
    assert [ids(jax.tree.map(np.asarray, made), row)[-3:] for row in range(4)] == [
        [5, 6, 3], [6, 4, 5], [5, 6, 3], [6, 4, 5],
    ]  # fmt: skip


def test_what_nobody_can_judge_teaches_nothing_and_parts_change_nothing(
    network, batch, step, answered
):
    verdicts = np.array([1.0, np.nan, 0.0, np.nan])
    before, _, metrics = step(forced(batch, verdicts))
    assert value(metrics, 'unjudged') == 0.5
    # The loss is the mean over the tokens of the two that have a verdict.
    said = answered(before, batch)
    judged = ~np.isnan(verdicts)[:, None] & said.mask
    made = method(network, LOCATED, located='response', micro_batches=4)
    state = jax.jit(made.init)(jax.random.key(0), {})
    state = before.replace(frozen={'teacher': sharp(network, 2)}, opt_state=state.opt_state)
    _, parts = jax.jit(made.step)(state, forced(batch, verdicts))
    for name in set(metrics) - {'grad_norm'}:
        assert value(metrics, name) == pytest.approx(value(parts, name), abs=1e-4), name
    right = float(metrics['divergence_right'].total)
    # Those without a verdict count as wrong where it is about the divergence alone.
    assert metrics['divergence_right'].count == said.mask[0].sum()
    _, _, third = step(forced(batch, [np.nan, np.nan, 0.0, np.nan]))
    wrong = value(third, 'loss') * said.mask[2].sum()
    assert value(metrics, 'loss') == pytest.approx((right + wrong) / judged.sum(), abs=1e-4)
    _, after, nothing = step(forced(batch, np.nan))
    assert value(nothing, 'loss') == value(nothing, 'grad_norm') == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_what_does_not_fit_is_told(network):
    with pytest.raises(UserError, match=r"located: the data have no 'response'"):
        method(network, located='response')
    with pytest.raises(UserError, match=r'needs stage\.teacher'):
        sd_zero.sd_zero(context(network), sampling=SAMPLING, reward=ODD, cues=CUES)
