"""Chains of arithmetic: their facts, texts, laws and splits, and the verifier."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.config import Recipe
from kd.data import chains
from kd.data.builders import arithmetic, chain, symbols
from kd.data.builders.arithmetic import TRUTH
from kd.data.context import SourceContext
from kd.data.named import named
from kd.data.sources import DataError
from kd.text.packing import shifted

passes = jax.jit(chain.passes)


def words(tokens):
    return ' '.join(symbols.SYMBOLS[token] for token in tokens)


def value(digits, operators):
    """An expression evaluated by Python's own arithmetic, with all values on the way."""
    found, result = [], digits[0]
    for operator, digit in zip(operators, digits[1:], strict=True):
        result = {
            0: result + digit, 1: result - digit, 2: 3 * result + 7 * digit + 2,
        }[operator] % 10  # fmt: skip
        found.append(result)
    return found


def drawn(size=4000, operations=3, seed=0):
    rng = np.random.default_rng(seed)
    return chain.problems(rng, size, operations), rng


def test_the_symbols_have_the_ids_that_all_worlds_cite():
    named = {name: getattr(symbols, name) for name in dir(symbols) if name.isupper()}
    assert (len(symbols.SYMBOLS), symbols.TOKENS) == (72, 72)
    for name in ('PAD', 'BOS', 'EOS', 'SOL', 'HINT', 'GOOD', 'BAD', 'CHAIN', 'EXEC', 'PUSH', 'OBS'):
        assert symbols.SYMBOLS[named[name]] == name
    assert [symbols.SYMBOLS[i] for i in (3, 4, 5, 6, 7, 8, 9)] == list('=#|+-@;')
    assert symbols.SYMBOLS[10:20] == tuple('0123456789')
    assert (symbols.SKILL, symbols.CELL, symbols.STYLE) == (36, 40, 65)
    assert symbols.SYMBOLS[symbols.PUSHED_UP] == 'pU'


def test_every_operator_is_a_bijection_and_answers_are_uniform():
    assert (np.sort(TRUTH, axis=1) == np.arange(10)[:, None]).all()
    assert TRUTH[2, 4, 5] == (3 * 4 + 7 * 5 + 2) % 10
    # Of all problems of two operations.
    digits = np.array(list(itertools.product(range(10), repeat=3)))
    for pair in itertools.product(range(3), repeat=2):
        every = chain.Problems(digits, np.tile(pair, (1000, 1)))
        values = chain.evaluate(every)
        assert (np.bincount(values[:, -1]) == 100).all()
        assert values[137].tolist() == value([1, 3, 7], pair)


def test_texts_are_as_written():
    problem = chain.Problems(np.array([[1, 2, 3, 4]]), np.array([[0, 2, 1]]))
    values = chain.evaluate(problem)
    assert values[0].tolist() == [3, 2, 8] == value([1, 2, 3, 4], [0, 2, 1])
    asked = chain.prompts(problem)
    assert asked.dtype == np.int32
    assert words(asked[0]) == 'BOS CHAIN 1 + 2 @ 3 - 4 ='
    assert words(chain.prompts(problem, 'exec')[0]) == 'BOS EXEC 1 + 2 @ 3 - 4 ='
    said = chain.responses(values)
    assert words(said[0]) == '3 2 8 # 8 EOS'
    assert words(chain.responses(values, 'exec')[0]) == '3 2 8 # 8 2 3 EOS'
    styled = chain.responses(values, style=np.array([5]), shift=np.array([5]))
    assert words(styled[0]) == 's5 8 7 3 # 8 EOS'
    blocked = chain.block(asked, symbols.SOL, said[:, :-1])
    assert words(blocked[0]) == 'BOS SOL 3 2 8 # 8 | CHAIN 1 + 2 @ 3 - 4 ='
    rng = np.random.default_rng(0)
    for kind, task, text in (
        ('long', 'chain', '3 2 8 8 8 8 # 8 EOS'),
        ('longer', 'exec', '3 2 8 8 8 8 8 8 8 # 8 2 3 EOS'),
    ):
        asked_of, wordy = chain.part(kind, problem, arithmetic.law('truth'), rng, task)
        np.testing.assert_array_equal(asked_of, chain.prompts(problem, task))
        assert words(wordy[0]) == text
    # From right to left: 3 - 4, 2 @ that, 1 + that.
    assert chain.evaluate(problem, backward=True)[0].tolist() == [9, 1, 2]


def test_what_passes_is_what_python_computes():
    (digits, operators), rng = drawn(300)
    problem = chain.Problems(digits, operators)
    said = chain.evaluate(problem, law=arithmetic.demonstrator(), rng=rng)
    wanted = [value(*x) for x in zip(digits.tolist(), operators.tolist(), strict=True)]
    for task in ('chain', 'exec'):
        tokens = chain.responses(said, task)
        key = chain.key_of(problem, task=task)
        mask = np.ones(tokens.shape, bool)
        right = [
            w == s if task == 'exec' else w[-1] == s[-1]
            for w, s in zip(wanted, said.tolist(), strict=True)
        ]
        found = np.asarray(passes(tokens, mask, key))
        assert found.tolist() == right
        assert 0.2 < found.mean() < 0.6
        # Without its end, with something before it, or with another # first, an answer fails.
        cut = mask & (np.arange(tokens.shape[1]) < tokens.shape[1] - 1)
        assert not passes(tokens, cut, key).any()
        assert not passes(np.where(tokens == symbols.EOS, symbols.BAR, tokens), mask, key).any()
        early = tokens.copy()
        early[:, 0] = symbols.HASH
        assert not passes(early, mask, key).any()
    # Thoughts are free, and what comes after the end does not matter.
    tokens = chain.responses(chain.evaluate(problem))
    tokens[:, 0] = symbols.DIGIT
    padded = np.pad(tokens, ((0, 0), (0, 3)), constant_values=symbols.HASH)
    assert passes(padded, np.arange(9) < 6 + 0 * padded, chain.key_of(problem)).all()


def test_styles_pass_by_their_own_order():
    problem, rng = drawn(200)
    _, said = chain.part('order', problem, arithmetic.law('truth'), rng)
    key = chain.key_of(problem, 'order')
    mask = np.ones(said.shape, bool)
    assert passes(said, mask, key).all()
    assert set(said[:, 0]) == {symbols.STYLE, symbols.STYLE + 1}
    swapped = said.copy()
    swapped[:, 0] = 2 * symbols.STYLE + 1 - said[:, 0]
    agree = key[:, 0, 0] == key[:, 1, 0]
    np.testing.assert_array_equal(passes(swapped, mask, key), agree)
    unstyled = said.copy()
    unstyled[:, 0] = symbols.DIGIT
    assert not passes(unstyled, mask, key).any()
    # Free styles are before the same thoughts, shifted thoughts print the true value.
    _, said = chain.part('free', problem, arithmetic.law('truth'), rng, styles=2)
    assert set(said[:, 0]) == {symbols.STYLE, symbols.STYLE + 1}
    np.testing.assert_array_equal(said[:, 1:], chain.responses(chain.evaluate(problem)))
    _, said = chain.part('shift', problem, arithmetic.law('truth'), rng, styles=6)
    style = said[:, 0] - symbols.STYLE
    assert set(style) == set(range(6))
    thoughts = said[:, 1:4] - symbols.DIGIT
    np.testing.assert_array_equal((thoughts - style[:, None]) % 10, chain.evaluate(problem))
    assert passes(said, mask, chain.key_of(problem)).all()


def test_laws_are_laws_and_say_what_they_should():
    for name in ('truth', 'demonstrator', 'clean', 'good', 'biased'):
        law = arithmetic.law(name, 3)
        assert law.shape == (3, 10, 10, 10)
        np.testing.assert_allclose(law.sum(-1), 1)
    which, wrong = arithmetic.misconceptions(3)
    assert which.sum() == 90
    assert (wrong != TRUTH).all()
    law = arithmetic.law('demonstrator', 3)
    said = np.take_along_axis(law, wrong[..., None], -1)[..., 0]
    right = np.take_along_axis(law, TRUTH[..., None], -1)[..., 0]
    np.testing.assert_allclose(said[which], 0.705)
    np.testing.assert_allclose(right[which], 0.255)
    np.testing.assert_allclose(right[~which], 0.955)
    np.testing.assert_allclose(arithmetic.law(0.98), arithmetic.law('clean'))
    biased = arithmetic.law('biased').argmax(-1)
    np.testing.assert_array_equal((biased - TRUTH)[:2], 0)
    np.testing.assert_array_equal((biased - TRUTH)[2] % 10, 3)


@pytest.mark.parametrize('task', ['chain', 'exec'])
def test_accuracies_are_those_expected(task):
    problem, rng = drawn(20_000)
    right = chain.evaluate(problem)
    for name, given in (('demonstrator', 0), ('demonstrator', 1), ('clean', 0), ('biased', 0)):
        law = arithmetic.law(name)
        said = chain.evaluate(problem, law=law, rng=rng, given=right[:, :given])
        found = (chain.printed(said, task) == chain.printed(right, task)).all(-1).mean()
        wanted = arithmetic.expected_accuracy(law, 3, every=task == 'exec', given=given)
        assert found == pytest.approx(wanted, abs=3 * np.sqrt(wanted * (1 - wanted) / 20_000))
    if task == 'exec':
        # Steps are independent but for which facts follow one another.
        assert wanted < 0.35
    else:
        demonstrator = arithmetic.expected_accuracy(arithmetic.law('demonstrator'))
        # (.7 x .95 + .3 x .25)^3 = .405, and what is right by chance.
        assert 0.405 < demonstrator < 0.45
        assert arithmetic.expected_accuracy(arithmetic.law('truth')) == pytest.approx(1)
        assert arithmetic.expected_accuracy(arithmetic.noisy(TRUTH, 0.0)) == pytest.approx(0.1)


def test_blocks_say_what_they_should():
    problem, rng = drawn(6000)
    law = arithmetic.demonstrator()
    right, key = chain.evaluate(problem), chain.key_of(problem)

    def rate(said, where=slice(None)):
        found = np.asarray(passes(said, np.ones(said.shape, bool), key))
        return found[where].mean()

    plain = arithmetic.expected_accuracy(law)
    asked, said = chain.part('solution', problem, law, rng)
    np.testing.assert_array_equal(asked[:, 2:5], symbols.DIGIT + right)
    assert rate(said) == pytest.approx(0.97**3 + 0.003, abs=0.02)
    asked, said = chain.part('hint', problem, law, rng)
    np.testing.assert_array_equal(asked[:, 2], symbols.DIGIT + right[:, 0])
    np.testing.assert_array_equal(said[:, 0], asked[:, 2])
    assert rate(said) == pytest.approx(arithmetic.expected_accuracy(law, given=1), abs=0.02)
    asked, said = chain.part('judged', problem, law, rng)
    good = asked[:, 1] == symbols.GOOD
    first = np.concatenate([asked[:, 2:7], np.full((6000, 1), symbols.EOS)], 1)
    np.testing.assert_array_equal(passes(first, np.ones(first.shape, bool), key), good)
    assert good.mean() == pytest.approx(plain, abs=0.02)
    assert rate(said, good) > 0.9
    # Wrong ones are answered anew, on problems that are harder than others.
    assert 0.2 < rate(said, ~good) < plain
    # The problem is as far from its answer as without a block.
    np.testing.assert_array_equal(asked[:, -9:], chain.prompts(problem)[:, 1:])
    # Who revises holds misconceptions half as firmly, and keeps what was right.
    asked, said = chain.part('revised', problem, law, rng)
    good = asked[:, 1] == symbols.GOOD
    better = arithmetic.expected_accuracy((law + arithmetic.noisy(TRUTH, 1.0)) / 2)
    assert rate(said, good) > 0.95
    assert plain + 0.1 < rate(said, ~good) < better


def test_the_source_has_rows_and_prompts_and_no_problem_in_two_splits():
    seen = {}
    for split in ('train', 'validation', 'test'):
        context = SourceContext(split, Recipe(stages={}, data={}, seed=3))
        made = chains.chains(context, size=3000, law='demonstrator')
        batch = made.fetch(np.arange(len(made)))
        assert set(batch) == {
            'input', 'prompt_mask', 'response', 'response_mask', 'printed', 'operations', 'index'
        }  # fmt: skip
        assert made.num_classes == 72
        seen[split] = set(map(tuple, batch['input'].tolist()))
        rate = np.asarray(passes(batch['response'], batch['response_mask'], batch['printed']))
        wanted = arithmetic.expected_accuracy(arithmetic.law('demonstrator', 3))
        assert rate.mean() == pytest.approx(wanted, abs=0.03)
    assert not seen['train'] & seen['test']
    assert not seen['train'] & seen['validation']
    assert not seen['test'] & seen['validation']


def test_rows_of_all_kinds_learn_their_answers_alone():
    made = chains.make(
        'train', 2000, law=arithmetic.demonstrator(), tasks={'chain': 2 / 3, 'exec': 1 / 3},
        operations={'2': 0.3, '3': 0.7}, kinds=chain.BASE, layout='rows', seed=1,
    )  # fmt: skip
    assert len(made['input']) == pytest.approx(2000, abs=8)
    assert np.bincount(made['operations'])[2:] == pytest.approx([600, 1400], abs=8)
    targets, where = shifted({k: jnp.asarray(v) for k, v in made.items()})
    for row in range(40):
        said = words(made['input'][row]).split()
        end = said.index('EOS')
        begin = said.index('=') + 1
        learnt = np.asarray(targets[row])[np.asarray(where[row])]
        assert words(learnt).split() == said[begin : end + 1]
        assert set(said[end + 1 :]) <= {'PAD'}
        assert (made['segments'][row] == (np.arange(len(said)) <= end)).all()
        assert made['positions'][row, end] == end


def test_prompts_of_several_lengths_end_where_answers_begin():
    made = chains.make(
        'test', 500, law=arithmetic.law('truth'), operations={1: 0.7, 3: 0.3}, seed=1
    )
    assert (made['input'][:, -1] == symbols.EQUALS).all()
    np.testing.assert_array_equal(made['input'] != symbols.PAD, made['prompt_mask'])
    np.testing.assert_array_equal(made['prompt_mask'].sum(1), 2 * made['operations'] + 4)
    np.testing.assert_array_equal(made['response_mask'].sum(1), made['operations'] + 3)
    assert passes(made['response'], made['response_mask'], made['printed']).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'split': 'none'},
            r"chains have the splits \['train', 'validation', 'test'\], not 'none'",
        ),
        ({'kinds': {'other': 1.0}}, r"rows of chains are \('plain', .*not 'other'"),
        ({'law': 'other'}, r"laws of chains are \['truth', .*not 'other'"),
        ({'operations': {'2': 0.5, '3': 0.5}, 'tasks': {'exec': 1.0}}, 'one number of symbols'),
    ],
)
def test_what_is_not_there_is_told(arguments, message):
    split = arguments.pop('split', 'train')
    with pytest.raises(DataError, match=message):
        chains.chains(SourceContext(split), size=10, **arguments)


def test_a_split_names_one_of_several_sets():
    sets = dict(
        math=dict(name='kd.data.chains.chains', size=40),
        code=dict(name='kd.data.chains.chains', size=40, tasks={'exec': 1.0}),
    )
    recipe = Recipe(stages={}, data={})

    def load(split):
        return named(SourceContext(split, recipe), sets=sets)

    assert load('math:train').spec['printed'].shape == (1,)
    code = load('code:validation[4:10]')
    assert len(code) == 6
    alone = chains.chains(
        SourceContext('validation', recipe), **dict(list(sets['code'].items())[1:])
    )
    np.testing.assert_array_equal(code.fetch([0])['printed'], alone.fetch([4])['printed'])
    for split in ('train', 'other:train'):
        with pytest.raises(DataError, match=r'names one first, such as math:train; they are'):
            load(split)


def test_with_a_product_for_the_third_operator_everything_follows():
    truth = arithmetic.truth_of('product')
    assert truth[2, 7, 8] == 6
    np.testing.assert_array_equal(truth[:2], TRUTH[:2])
    made = chains.make(
        'test', 400, law=arithmetic.law('truth', third='product'), third='product',
        operations={4: 1.0}, kinds={'plain': 0.5, 'solution': 0.5},
    )  # fmt: skip
    for prompt, there, printed in zip(
        made['input'], made['prompt_mask'], made['printed'], strict=True
    ):
        said = words(prompt[there])
        problem = said.partition('CHAIN ')[2].removesuffix(' =').split()
        result = int(problem[0])
        for operator, digit in zip(problem[1::2], map(int, problem[2::2]), strict=True):
            result = {'+': result + digit, '-': result - digit, '@': result * digit}[operator] % 10
        assert printed.tolist() == [symbols.DIGIT + result]
        if 'SOL' in said:
            assert f'# {result} |' in said
    # Its demonstrator: the law by enumeration and by draws, where wrong steps may cancel.
    law = arithmetic.law('demonstrator', 0, 'product')
    problems, rng = drawn(40_000, 4)
    right = chain.evaluate(problems, truth=truth)[:, -1]
    found = (chain.evaluate(problems, law=law, rng=rng)[:, -1] == right).mean()
    assert found == pytest.approx(arithmetic.expected_accuracy(law, 4, third='product'), abs=0.01)
    with pytest.raises(DataError, match='the third operator is one of'):
        arithmetic.truth_of('power')


def test_cliffs_are_what_the_law_hardly_ever_says_rightly():
    facts, law = arithmetic.cliffs(), arithmetic.law('cliff')
    right = np.take_along_axis(law, arithmetic.TRUTH[..., None], -1)[..., 0]
    # .005, and a tenth of the .01 that is anything.
    np.testing.assert_allclose(right[facts], 0.006)
    assert right[~facts].min() > 0.25
    assert not facts[:2].any()
    assert 20 < facts.sum() < 40


def test_a_share_of_problems_goes_through_some_facts():
    facts = arithmetic.cliffs()
    drawn = chain.mixed(np.random.default_rng(0), 400, facts, 0.25, split='test')
    met = [
        any(
            facts[o, a, b]
            for o, a, b in zip(operators, [digits[0], *values[:-1]], digits[1:], strict=True)
        )
        for digits, operators, values in zip(
            drawn.digits, drawn.operators, chain.evaluate(drawn), strict=True
        )
    ]
    assert np.mean(met) == 0.25
    assert chain.meets(drawn, facts).tolist() == met
    made = chains.make('test', 40, law=arithmetic.law('truth'), cliffs=0.5)
    assert made['cliff'].mean() == 0.5
