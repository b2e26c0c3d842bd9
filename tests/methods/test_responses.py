"""Answers on disk: of the sampler, whatever the batches; and what later stages make of them."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special

from kd import config as kd_config
from kd.data import generated
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import answers
from kd.networks import trained_network
from kd.parallel.mesh import make_mesh
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

K, R, N = 3, 6, 24


@pytest.fixture(scope='module')
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/recipes')
        import texts

        yield texts


@pytest.fixture(scope='module')
def run(texts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('texts') / 'run'
    loop.run(texts.get_config('answers'), workdir)
    return workdir


@pytest.fixture(scope='module')
def recipe(texts):
    return kd_config.parse(texts.get_config('answers'))


@pytest.fixture(scope='module')
def kept(run):
    return answers.Reader(run / 'answers' / 'train_answers', {}).fetch(np.arange(N))


@pytest.fixture(scope='module')
def asked(texts, recipe):
    return texts.prompts(SourceContext('train', recipe)).fetch(np.arange(N))


def context(recipe, run, split='train'):
    return SourceContext(split, recipe, run)


def test_answers_are_drawn_by_the_law_that_they_say_and_end_where_they_should(
    texts, run, recipe, kept, asked
):
    source = texts.prompts(SourceContext('train', recipe))
    teacher = trained_network(recipe, 'teacher', run, make_mesh({'data': 1}), texts.rows(
        SourceContext('train', recipe)), where='test')  # fmt: skip
    variables, network = teacher.restore(), teacher.network
    assert len(source) == N
    ends = np.isin(kept.tokens, (2, 3))
    apply = jax.jit(lambda *x: network.apply(variables, *x).logits)
    for row, number in np.ndindex(N, K):
        length = kept.lengths[row, number]
        stopped = np.flatnonzero(ends[row, number, :length])
        # The stop token is the last one of the answer, or there is none.
        assert list(stopped) == ([] if kept.truncated[row, number] else [length - 1])
        assert length == R or not kept.truncated[row, number]
    assert 0 < kept.truncated.sum() < N * K
    for row, number in [(0, 0), (5, 2), (23, 1)]:
        prompt = asked['input'][row][asked['prompt_mask'][row]]
        said = kept.tokens[row, number, : kept.lengths[row, number]]
        size = len(prompt) + len(said)
        text = np.zeros((1, 10), np.int32)
        text[0, :size] = [*prompt, *said]
        used, places = np.arange(10)[None] < size, np.arange(10, dtype=np.int32)[None]
        logits = np.asarray(apply(text, places, used.astype(np.int32))[0], np.float64)
        log_p = scipy.special.log_softmax(logits, -1)
        wanted = log_p[np.arange(len(prompt) - 1, size - 1), said]
        found = kept.log_probs[row, number, : len(said)]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_an_answer_depends_on_the_prompts_place_and_its_own_number_alone(
    texts, run, kept, tmp_path
):
    config = texts.get_config('answers')
    config.answers.batch_size = 8
    config.answers.writers.answers.update(per_file=24, block=2)
    config.answers.data.source.size = 16
    recipe = kd_config.parse(config)
    stage = prepare(recipe, 'answers', make_mesh({'data': 1}), run)
    state = stage.method.init(stage.key(), stage.frozen)
    [(_, write)] = stage.writers.values()
    write(state, 1, tmp_path)
    found = answers.Reader(tmp_path / 'train_answers', {}).fetch(np.arange(16))
    np.testing.assert_array_equal(found.tokens, kept.tokens[:16])
    # The answers to one prompt are different ones.
    assert (kept.tokens[:, 0] != kept.tokens[:, 1]).any(-1).mean() > 0.5


def test_text_is_the_prompt_and_the_answer_token_by_token(recipe, run, kept, asked):
    rows = generated.teacher_text(
        context(recipe, run), stage='answers', length=10, layout='rows', rates='answers'
    )
    assert len(rows) == N * K
    assert rows.tokenizer.eos == 2
    # Who has learnt from the prompts' data knows these.
    assert rows.domain == 'texts'
    batch = rows.fetch(np.arange(N * K))
    right = (kept.tokens[..., 0] % 2 == 1).mean(1)
    for at, (row, number) in enumerate(np.ndindex(N, K)):
        prompt = asked['input'][row][asked['prompt_mask'][row]]
        said = kept.tokens[row, number, : kept.lengths[row, number]]
        size = len(prompt) + len(said)
        np.testing.assert_array_equal(batch['input'][at, :size], [*prompt, *said])
        learnt = np.flatnonzero(batch['response_mask'][at])
        np.testing.assert_array_equal(learnt, np.arange(len(prompt), size))
        assert batch['pass_rate'][at] == pytest.approx(right[row])
    packed = generated.teacher_text(context(recipe, run), stage='answers', length=20)
    assert len(packed) < len(rows)
    every = packed.fetch(np.arange(len(packed)))
    assert every['response_mask'].sum() == kept.lengths.sum()


def test_slices_are_of_prompts_and_filters_of_answers(recipe, run, kept):
    def text(split='train', **options):
        options = dict(stage='answers', length=10, layout='rows') | options
        return generated.teacher_text(context(recipe, run, split), **options)

    assert len(text('train[4:10]+train[:2]', samples=2)) == 16
    np.testing.assert_array_equal(
        text('train[4:10]').fetch([3])['input'], text().fetch([4 * K + 3])['input']
    )
    assert len(text(least=1.0)) == (kept.scores >= 1).sum()
    assert len(text(ended=True)) == (~kept.truncated).sum()
    lengths = kept.lengths + text().fetch(np.arange(N * K))['segments'].sum(1).reshape(N, K)
    prompt = lengths - 2 * kept.lengths
    fit = prompt + kept.lengths <= 6
    assert 0 < fit.sum() < N * K
    assert len(text(length=6, long='drop')) == fit.sum()
    with pytest.raises(UserError, match=r"of the answers of 'answers' to train none is left"):
        text(least=2.0)
    with pytest.raises(UserError, match=r"has no split 'test'"):
        text('test')


def test_what_is_solved_is_left_out_and_of_the_rest_far_answers_stay(recipe, run, kept):
    right = np.nan_to_num(kept.scores) == 1
    rates = right.mean(1)
    options = dict(stage='answers', length=10, layout='rows', rates='answers')
    made = generated.teacher_text(context(recipe, run), most=0.5, **options)
    batch = made.fetch(np.arange(len(made)))
    assert len(made) == K * (rates <= 0.5).sum() < N * K
    assert batch['pass_rate'].max() == pytest.approx(1 / 3)
    # Two of the right answers, and the two that are farthest apart where all three are right.
    far = generated.teacher_text(context(recipe, run), least=1.0, farthest=2, **options)
    assert len(far) == np.minimum(right.sum(1), 2).sum()
    rows = iter(far.fetch(np.arange(len(far)))['input'])

    def distance(a, b):
        table = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
        for i, j in np.ndindex(len(a), len(b)):
            table[i + 1, j + 1] = min(
                table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j])
            )
        return table[-1, -1]

    for row in range(N):
        said = [kept.tokens[row, n, : kept.lengths[row, n]].tolist() for n in range(K)]
        texts = [next(rows).tolist() for _ in range(min(right[row].sum(), 2))]
        assert all(any(str(one)[1:-1] in str(text) for one in said) for text in texts)
        if right[row].all():
            best = max(distance(said[a], said[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
            inside = [n for n in range(K) if any(str(said[n])[1:-1] in str(t) for t in texts)]
            assert best in {distance(said[a], said[b]) for a in inside for b in inside}
    with pytest.raises(UserError, match=r'most=0\.5 is a pass rate: name the stage'):
        generated.teacher_text(context(recipe, run), stage='answers', length=10, most=0.5)


def test_pass_rates_count_what_has_passed_and_no_verdict_is_no_pass(recipe, run, kept, asked):
    source = generated.pass_rates(context(recipe, run), stage='answers')
    batch = source.fetch(np.arange(N))
    np.testing.assert_array_equal(batch['input'], asked['input'])
    first = kept.tokens[..., 0]
    assert (first == 4).any()
    assert np.isnan(kept.scores[first == 4]).all()
    np.testing.assert_allclose(batch['pass_rate'], (first % 2 == 1).mean(1), rtol=1e-6)


def test_what_is_solved_is_left_out_of_prompts_and_what_is_never_solved_stays(
    recipe, run, kept, asked
):
    rates = (kept.tokens[..., 0] % 2 == 1).mean(1)
    nested = []
    for most in (0.0, 0.5, 0.9, 1.0):
        source = generated.pass_rates(context(recipe, run), stage='answers', most=most)
        found = source.fetch(np.arange(len(source)))
        rows = np.flatnonzero(rates <= most + 1e-6)
        np.testing.assert_array_equal(found['input'], asked['input'][rows])
        np.testing.assert_allclose(found['pass_rate'], rates[rows], rtol=1e-6)
        nested.append(set(rows))
    assert 0 < len(nested[0]) < len(nested[1]) < len(nested[2]) < len(nested[3]) == N
    assert nested[0] < nested[1] < nested[2] < nested[3]
    with pytest.raises(UserError, match=r"of the prompts of 'answers' none has a pass rate of at"):
        generated.pass_rates(context(recipe, run), stage='answers', passing=-1.0, most=0.0)


def test_pairs_are_of_the_best_and_the_worst_or_of_two_stages(texts, recipe, run, kept, asked):
    batch = generated.pairs(context(recipe, run), chosen='answers', length=10)
    scores = np.where(np.isnan(kept.scores), -1, kept.scores)
    decided = np.flatnonzero(scores.max(1) > scores.min(1))
    assert len(batch) == len(decided)
    rows = batch.fetch(np.arange(len(batch)))
    for at, row in enumerate(decided):
        size = asked['prompt_mask'][row].sum()
        first, last = rows['input'][at][:, size]
        assert first % 2 == 1 or (scores[row].max() == 0 and last == 4)
        assert last % 2 == 0
        np.testing.assert_array_equal(rows['input'][at, 0, :size], rows['input'][at, 1, :size])
    # Answers of the data before the first of a stage, and of these only those that have ended.
    batch = texts.prompts(SourceContext('train', recipe), answers=True).fetch(np.arange(N))
    for ended, rows in ((False, np.arange(N)), (True, np.flatnonzero(~kept.truncated[:, 0]))):
        made = generated.pairs(context(recipe, run), rejected='answers', length=10, ended=ended)
        found = made.fetch(np.arange(len(made)))
        own = [batch['response'][row][batch['response_mask'][row]].tolist() for row in rows]
        first = [kept.tokens[row, 0, : kept.lengths[row, 0]].tolist() for row in rows]
        assert 0 < len(rows) == len(made)
        for side, said in enumerate((own, first)):
            learnt = [
                ids[mask].tolist() for ids, mask in
                zip(found['input'][:, side], found['response_mask'][:, side], strict=True)
            ]  # fmt: skip
            assert learnt == said
    with pytest.raises(UserError, match='name it as `chosen` or `rejected`'):
        generated.pairs(context(recipe, run), length=10)
    # Of one stage with itself every pair is the same answer twice.
    with pytest.raises(UserError, match="of the answers of 'answers' to train no two are a pair"):
        generated.pairs(context(recipe, run), chosen='answers', rejected='answers', length=10)


def test_answers_of_others_are_one_line(texts, run, recipe):
    def read(recipe, **options):
        return generated.pass_rates(context(recipe, run), **(dict(stage='answers') | options))

    def changed(**source):
        config = texts.get_config('answers')
        config.answers.data.source.update(source)
        return kd_config.parse(config)

    with pytest.raises(UserError, match=r'set of answers in .* made from another tokenizer'):
        read(changed(symbols=(*texts.SYMBOLS[:-1], 'z')))
    with pytest.raises(UserError, match='was made from another data'):
        read(changed(seed=5))
    with pytest.raises(UserError, match=r"'teacher' has no writer kd\.methods\.generate"):
        read(recipe, stage='teacher')
    with pytest.raises(UserError, match="names the stage 'nobody', of"):
        read(recipe, stage='nobody')
    with pytest.raises(UserError, match="layout='rows', not 'packed'"):
        generated.teacher_text(context(recipe, run), stage='answers', length=9, rates='answers')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'writers.answers.who': 'start'}, "there is no 'start' to answer; the stage has teacher"),
        ({'data.source': {'name': 'texts.rows'}}, "the data has no 'prompt_mask'"),
        ({'writers.answers.stop': (20,)}, 'stop token 20 is outside the vocabulary of 20'),
        ({'writers.answers.reward': {}}, "the answers of 'answers' have no scores; give"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(texts, tmp_path, change, message):
    config = texts.get_config('answers')
    with config.unlocked():
        for name, value in change.items():
            *path, last = name.split('.')
            place = config.answers
            for part in path:
                place = place[part]
            place[last] = value
    with pytest.raises(UserError, match=message):
        loop.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'teacher').exists()


def test_what_pads_a_vocabulary_is_never_said(texts, run):
    config = texts.get_config('answers')
    config.teacher.network.num_classes = texts.V + 40
    stage = prepare(kd_config.parse(config), 'answers', make_mesh({'data': 1}))
    assert stage.frozen['teacher']['params']['embed']['embedding'].shape[0] == texts.V + 40
    [(_, write)] = stage.writers.values()
    form = next(
        cell.cell_contents
        for cell in write.__closure__
        if isinstance(cell.cell_contents, answers.Form)
    )
    assert form.forbidden == tuple(range(texts.V, texts.V + 40))
    assert dataclasses.asdict(form)['outcomes'] == texts.V
    assert jax.tree.leaves(stage.frozen)[0].sharding is not None
