"""Every notebook is run from its first cell to its last, with its small settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COLABS = Path(__file__).parent.parent / 'colabs'
NOTEBOOKS = sorted(COLABS.glob('*.ipynb'))

# Runs code cells one after another in one namespace; a last expression is a figure to draw.
RUNNER = """
import ast, json, sys
cells, folder = json.load(sys.stdin), sys.argv[1]
space, drawn = {'__name__': '__main__'}, 0
for cell in cells:
    tree = ast.parse(cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, 'cell', 'exec'), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), 'cell', 'eval'), space)
        if hasattr(value, 'savefig'):
            value.savefig(f'{folder}/{drawn}.png')
            drawn += 1
print(f'figures drawn: {drawn}')
"""


def _code(notebook: dict, small: dict) -> list[str]:
    cells = [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code']
    for name, value in small.items():
        changed = [
            re.sub(rf'(?m)^{name} = .*(?=  # @param)', f'{name} = {value!r}', cell)
            for cell in cells
        ]
        assert changed != cells, f'the notebook has no form field {name}'
        cells = changed
    return cells


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_runs(path, tmp_path):
    notebook = json.loads(path.read_text())
    cells = _code(notebook, notebook['metadata']['kd']['small'])
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', RUNNER, str(tmp_path)],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=COLABS,
        env=os.environ
        | {
            'JAX_PLATFORMS': 'cpu',
            'JAX_COMPILATION_CACHE_DIR': str(COLABS.parent / '.cache' / 'jax-notebooks'),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = list(tmp_path.glob('*.png'))
    assert figures
    assert all(figure.stat().st_size > 5_000 for figure in figures)


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
