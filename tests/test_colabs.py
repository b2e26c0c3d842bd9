"""Every notebook is run from its first cell to its last, with its small settings."""

import json
import sys
from pathlib import Path

import gallery
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_runs(path, tmp_path, monkeypatch):
    # Compiling well takes longer than running.
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    small = json.loads(path.read_text())['metadata']['kd']['small']
    figures = gallery.run(path, tmp_path, small)
    # The one that the gallery shows is among them.
    assert len(figures) > gallery.FIGURES[path.stem]
    assert all(figure.stat().st_size > 5_000 for figure in figures)


def test_a_notebook_that_fails_says_where_and_settings_must_exist(tmp_path):
    cell = {'cell_type': 'code', 'source': ['n = 3  # @param {type:"integer"}\n', '1 / n']}
    notebook = tmp_path / 'x.ipynb'
    notebook.write_text(json.dumps({'cells': [cell]}))
    assert gallery.run(notebook, tmp_path) == []
    with pytest.raises(RuntimeError, match='ZeroDivisionError'):
        gallery.run(notebook, tmp_path, {'n': 0})
    with pytest.raises(ValueError, match='no form field m'):
        gallery.run(notebook, tmp_path, {'m': 0})


def test_the_gallery_shows_every_notebook_and_stays_small():
    page = (ROOT / 'docs' / 'notebooks.md').read_text()
    assert [path.stem for path in NOTEBOOKS] == list(gallery.FIGURES)
    for name in gallery.FIGURES:
        file = gallery.GALLERY / f'{name}.png'
        assert 5_000 < file.stat().st_size < 150_000
        assert f'(gallery/{name}.png)' in page
        assert f'(../colabs/{name}.ipynb)' in page


def test_the_install_cell_clones_where_the_notebook_came_alone(tmp_path, monkeypatch):
    cells = {''.join(json.loads(path.read_text())['cells'][1]['source']) for path in NOTEBOOKS}
    [source] = cells
    ran = []
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    monkeypatch.setattr('subprocess.run', lambda command, check: ran.append(command[-3:]))
    monkeypatch.setattr('sys.path', ['elsewhere'])
    monkeypatch.chdir(tmp_path)
    exec(source, {})
    there = str(tmp_path / 'kd-jax')
    assert ran == [
        ['--depth=1', 'https://github.com/kd-jax/kd', there],
        ['--quiet', '-e', f'{there}[colab]'],
    ]
    assert sys.path[0] == there
    # Within a clone nothing is cloned; where kd is installed nothing happens.
    ran.clear()
    monkeypatch.chdir(ROOT / 'colabs')
    exec(source, {})
    assert ran == [['--quiet', '-e', f'{ROOT}[colab]']]
    monkeypatch.setattr('importlib.util.find_spec', lambda name: object())
    exec(source, {})
    assert len(ran) == 1


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_is_committed_clean_and_explains_before_it_computes(path):
    cells = json.loads(path.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code)
    assert 'colab-badge.svg' in ''.join(cells[0]['source'])
    assert 'pip' in ''.join(cells[1]['source'])
    assert any('# @param' in ''.join(cell['source']) for cell in code)
    # After the badge, the install cell and the form, prose comes before code.
    assert [cell['cell_type'] for cell in cells[:3]] == ['markdown', 'code', 'markdown']
