"""What is told of the results of claims."""

from pathlib import Path

import pytest

from kd.claims import results

ROOT = Path(__file__).parents[2]


def check(text, difference, half, verdict):
    interval = [difference - half, difference + half]
    return {'check': text, 'difference': difference, 'interval': interval, 'verdict': verdict}


WIDE = check('wide', 3.0, 2.0, results.REPRODUCED)
NARROW = check('narrow', 0.1, 0.01, results.REPRODUCED)
OPEN = check('open', 0.01, 0.02, results.INCONCLUSIVE)
FALSE = check('false', -0.2, 0.1, results.NOT_REPRODUCED)


@pytest.mark.parametrize(
    ('verdict', 'checks', 'held', 'rest'),
    [
        # Closest in units of the interval: 1.5 half widths against 10.
        (results.REPRODUCED, [NARROW, WIDE], '2 of 2', 'closest: wide +3 [+1, +5]'),
        (results.INCONCLUSIVE, [OPEN, WIDE], '1 of 2', 'open: open +0.01 [-0.01, +0.03]'),
        (
            results.NOT_REPRODUCED, [OPEN, FALSE], '0 of 2',
            'not: open +0.01 [-0.01, +0.03]; false -0.2 [-0.3, -0.1]',
        ),
    ],
)  # fmt: skip
def test_checks_in_short(verdict, checks, held, rest):
    result = {'verdict': verdict, 'checks': checks}
    assert (results.held(result), results.rest(result)) == (held, rest)


def test_time_taken():
    assert [results.took({'seconds': s}) for s in (25.9, 99.4, 130.0, 2140.0)] == [
        *('26 s', '99 s', '2 min', '36 min')
    ]


def test_a_verdict_is_that_of_the_file(tmp_path):
    assert results.verdict('x', results.measured(tmp_path)) == 'not measured'
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'x.json').write_text('{"verdict": "inconclusive"}')
    assert results.verdict('x', results.measured(tmp_path)) == 'inconclusive'
