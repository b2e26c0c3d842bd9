"""Key figures of the notebooks in colabs/, for the README: `python docs/gallery.py`.

Each notebook is run from its first cell to its last, with the settings it stands there with, in a
process of its own (about ten minutes for all on two cores). Of the figures that its cells end with,
the chosen one is saved as docs/gallery/NAME.png. Names of notebooks after the command choose among
them: `python docs/gallery.py 03_theory`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLABS, GALLERY = ROOT / 'colabs', ROOT / 'docs' / 'gallery'
WIDTH = 640
# Which of a notebook's figures is the one to show.
FIGURES = {
    '01_logit_kd': 0,
    '02_losses_tour': 1,
    '03_theory': 0,
    '04_flow_maps': 0,
    '05_dataset_distillation': 0,
    '06_language_models': 1,
    '07_on_policy': 0,
    '08_few_steps': 0,
    '09_words_in_parallel': 0,
    '10_super_resolution': 0,
}

# Runs code cells one after another in one namespace; a last expression is a figure to draw.
_RUNNER = """
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


def run(notebook: Path, folder: Path, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """Runs the code of a notebook; returns its figures, in order, saved in `folder` as 0.png, ...

    Args:
      notebook: file.
      folder: an existing one.
      settings: values of form fields (`NAME = ...  # @param`) other than the notebook's own.

    Raises:
      ValueError: a setting that is no form field of the notebook.
      RuntimeError: a cell that fails, with the end of what it said.
    """
    cells = [
        ''.join(cell['source'])
        for cell in json.loads(notebook.read_text())['cells']
        if cell['cell_type'] == 'code'
    ]
    for name, value in (settings or {}).items():
        field = re.compile(rf'(?m)^{name} = .*(?=  # @param)')
        if not any(field.search(cell) for cell in cells):
            raise ValueError(f'{notebook.name} has no form field {name}.')
        cells = [field.sub(f'{name} = {value!r}', cell) for cell in cells]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', _RUNNER, str(folder)],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        check=False,
        cwd=COLABS,
        env={
            'JAX_PLATFORMS': 'cpu',
            'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax-notebooks'),
            **os.environ,
        },
    )
    if done.returncode:
        raise RuntimeError(f'{notebook.name} fails:\n{done.stderr[-3000:]}')
    return sorted(folder.glob('*.png'), key=lambda file: int(file.stem))


def small(figure: Path, target: Path) -> None:
    """Saves a figure at most `WIDTH` pixels wide, with a palette: a README is to load fast."""
    with Image.open(figure) as image:
        shown = image.convert('RGB')
    shown.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    shown.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python docs/gallery.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(FIGURES))
    names = parser.parse_args(argv).names or list(FIGURES)
    if unknown := set(names) - set(FIGURES):
        parser.error(f'no notebook {", ".join(sorted(unknown))}; there are {", ".join(FIGURES)}')
    GALLERY.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            figures = run(COLABS / f'{name}.ipynb', Path(folder))
            target = GALLERY / f'{name}.png'
            small(figures[FIGURES[name]], target)
        print(target.relative_to(ROOT), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
