"""Tables of scaling: what they compute, and that the page says what they say."""

import json
from pathlib import Path

import pytest

from kd.aot import table as aot_table
from kd.benchmarks import scaling

PAGE = Path(__file__).parent.parent.parent / 'docs' / 'scaling.md'


def _cells(text):
    head, _, *rows = [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_weak_scaling_reduces_the_gradient_whatever_the_devices(monkeypatch):
    monkeypatch.setattr(scaling, 'DEVICES', (1, 2, 4))
    one, two, four = _cells(scaling.devices())
    gradient = 4 * (64 * 64 + 64 + 64 * 10 + 10)
    assert one['bytes reduced'] == '0'
    assert two['bytes reduced'] == four['bytes reduced'] == f'{gradient + 12:,}'
    assert four['bytes sent, ring of n'] == f'{1.5 * (gradient + 12):,.0f}'
    assert len({row['operations a device'] for row in (one, two, four)}) == 1


def test_the_roofline_is_of_the_record_of_compiled_programs():
    record = json.loads(PAGE.with_name('aot.json').read_text())
    row = aot_table.ROWS[0]
    told = record[row.key('v5e:4x4')]
    [found] = [
        cells
        for cells in _cells(scaling.roofline())
        if (cells['recipe, stage'], cells['slice']) == (row.label(), 'v5e:4x4')
    ]
    assert float(found['examples a chip']) == 128 / 16
    seconds = {
        'arithmetic': told['flops'] / 16 / 197e12,
        'memory': told['traffic'] / 819e9,
        'communication': sum(
            (2 if kind == 'all-reduce' else 1) * size * times
            for kind, size, times, _ in told['collectives']
        )
        / 200e9,
    }
    longest = max(seconds, key=seconds.get)
    assert found['bound by'] == longest
    assert float(found['step, ms, at least']) == pytest.approx(1e3 * seconds[longest], rel=0.01)


def test_a_page_gets_its_tables_and_keeps_its_text():
    page = 'a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb <!-- y: begin --><!-- y: end -->'
    new = scaling.written(page, {'x': 'new'})
    assert new == page.replace('old', 'new')
    assert scaling.written(new, {'x': 'new'}) == new
    with pytest.raises(ValueError, match='no <!-- z: begin -->'):
        scaling.written(page, {'z': ''})


@pytest.mark.parametrize(('text', 'told'), [('no place', 'no <!-- chips'), (None, 'No such file')])
def test_a_page_that_cannot_take_the_tables_is_told_before_any_work(tmp_path, capsys, text, told):
    page = tmp_path / 'page.md'
    if text:
        page.write_text(text)
    with pytest.raises(SystemExit):
        scaling.main(['chips', f'--page={page}'])
    assert told in capsys.readouterr().err


def test_the_page_has_every_table_and_those_of_the_record_are_up_to_date():
    page = PAGE.read_text()
    for name in scaling.TABLES:
        begin, end = f'<!-- {name}: begin -->\n', f'\n<!-- {name}: end -->'
        text = page.partition(begin)[2].partition(end)[0]
        assert text.startswith('| ')
        if name in ('chips', 'roofline'):
            assert text == scaling.TABLES[name]()
