"""The page of performance: verdicts, what is kept of others, and the command that writes it."""

import json
import types

import pytest

from kd.benchmarks import __main__ as command
from kd.benchmarks import page
from kd.benchmarks.turns import Row
from kd.errors import UserError


@pytest.mark.parametrize(
    ('ratios', 'least', 'missed'),
    # Targets of 1 by the median.
    [([0.5, 0.9, 7], False, False), ([0.5, 1.1, 7], False, True), ([0.5, 1.1, 7], True, False),
     ([0.1, 0.9, 7], True, True), ([1.0], False, False), ([1.0], True, False)],
)  # fmt: skip
def test_a_target_is_of_the_median_and_from_one_side(ratios, least, missed):
    assert Row('', '', ratios, 1.0, least=least).missed() == missed


def test_a_ratio_without_a_target_is_never_missed():
    row = Row('a part', 'plain', [3.0], float('nan'))
    assert not row.missed()
    assert page.table([row]).splitlines()[2] == (
        '| a part | plain | CPU time | 3.00 (3.00-3.00) | 1 |  |  |'
    )


def test_a_line_has_median_range_and_verdict_and_a_miss_its_reason():
    rows = [
        Row('a', 'torch 2', [0.25, 0.5, 0.012], 0.3, reason='never told'),
        Row('b', 'x', [900, 1100], 2000.0, 'speed', least=True, reason='because.'),
    ]
    assert page.table(rows).splitlines()[2:] == [
        '| a | torch 2 | CPU time | 0.25 (0.0120-0.50) | 3 | at most 0.3 | met |',
        '| b | x | speed | 1,000 (900-1,100) | 2 | at least 2000 | missed |',
        '',
        'Missed: b, speed: because.',
    ]


@pytest.mark.parametrize(
    ('value', 'text'), [(0.07412, '0.0741'), (0.95, '0.95'), (2.744, '2.74'), (86.03, '86.0'),
                        (1860.3, '1,860'), (0.00123, '0.0012')],
)  # fmt: skip
def test_numbers_have_the_digits_that_mean_something(value, text):
    assert page.number(value) == text


@pytest.fixture
def sides(monkeypatch):
    """Comparisons 'one' and 'two' whose ratios are given, and 'none' without its peer."""
    made = {'one': [1.0], 'two': [2.0], 'none': []}
    modules = {
        f'kd.benchmarks.{name}': types.SimpleNamespace(
            rows=lambda options, name=name: [
                Row(name, f'peer of {options.rounds}', [ratio], 1.5) for ratio in made[name]
            ]
        )
        for name in made
    }
    monkeypatch.setattr(command, 'TITLES', {name: f'work {name}' for name in made})
    monkeypatch.setattr(command.os, 'sched_setaffinity', lambda *_: None)
    monkeypatch.setattr(command.importlib, 'import_module', modules.__getitem__)
    return made


def test_what_is_measured_again_is_replaced_and_the_rest_kept(sides, tmp_path, capsys):
    file = tmp_path / 'performance.md'
    there = ['--page', f'--file={file}', '--rounds=3']
    assert command.main(there) == 1  # 'two' misses
    assert 'none: left out' in capsys.readouterr().err
    first = json.loads(file.with_suffix('.json').read_text())
    assert sorted(first) == ['one', 'two']
    sides['two'] = [1.25]
    assert command.main([*there, 'two']) == 0
    second = json.loads(file.with_suffix('.json').read_text())
    assert second['one'] == first['one']
    assert second['two']['rows'][0]['ratios'] == [1.25]
    assert second['two']['command'] == 'python -m kd.benchmarks two --page --rounds=3'
    text = file.read_text()
    assert text.index('## Work one') < text.index('## Work two') < text.index('## On a GPU')
    assert '| two | peer of 3 | CPU time | 1.25 (1.25-1.25) | 1 | at most 1.5 | met |' in text
    assert 'Not measured yet: `none` (work none).' in text
    assert page.NO_DEVICE in text


def test_what_a_device_said_is_put_there_alone(sides, tmp_path):
    file, said = tmp_path / 'performance.md', tmp_path / 'said'
    said.write_text('| fused | 3 ms |\n')
    assert command.main(['--page', f'--file={file}', f'--device={said}']) == 0
    assert '## On a GPU\n\n| fused | 3 ms |\n' in file.read_text()
    assert sorted(json.loads(file.with_suffix('.json').read_text())) == ['device']


def test_a_name_that_is_none_is_told(sides, capsys):
    with pytest.raises(UserError, match=r"no comparison 'tow'\. Did you mean 'two'\?"):
        command.main(['tow'])
    with pytest.raises(SystemExit):
        command.main(['--rounds=0'])
    assert '--rounds must be at least 1' in capsys.readouterr().err
