"""English text that every Python brings: the docstrings of its standard library.

27 symbols: 0 is the space (and everything else that is not a letter, runs of it counted once), 1 to
26 are the letters a to z. The text differs a little between versions of Python.
"""

import ast
import functools
import sysconfig
from pathlib import Path

import numpy as np

SYMBOLS = ' abcdefghijklmnopqrstuvwxyz'
# Big modules of plain prose; found as source files, never imported.
MODULES = (
    'argparse', 'calendar', 'codecs', 'configparser', 'datetime', 'difflib', 'doctest', 'fractions',
    'inspect', 'mailbox', 'optparse', 'os', 'pathlib', 'pickle', 'pydoc', 'random', 'shutil',
    'statistics', 'subprocess', 'textwrap', 'threading', 'turtle', 'typing', 'zipfile',
)  # fmt: skip
LENGTH = 64
TEST_PERCENT = 10


@functools.cache
def text() -> np.ndarray:
    """All docstrings of `MODULES` one after the other: int32 [N] in 0..26, about 300,000.

    Raises:
      FileNotFoundError: a Python without the source files of its standard library.
    """
    library = Path(sysconfig.get_path('stdlib'))
    files = [library / f'{name}.py' for name in MODULES]
    pieces = [docstrings(file.read_text('utf-8')) for file in files if file.exists()]
    if not pieces:
        raise FileNotFoundError(f'no standard-library sources in {library}')
    return encode(' '.join(pieces))


def docstrings(code: str) -> str:
    """The docstrings of a module, its classes and functions, in the order of `ast.walk`."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    return ' '.join(filter(None, map(ast.get_docstring, nodes)))


def encode(string: str) -> np.ndarray:
    """int32 [N] symbols: every run of characters that are no letters becomes one space."""
    codes = np.frombuffer(string.lower().encode('ascii', 'replace'), np.uint8).astype(np.int32)
    symbols = codes - (ord('a') - 1)
    symbols = np.where((symbols >= 1) & (symbols <= 26), symbols, 0)
    repeated = np.concatenate([[False], (symbols[1:] == 0) & (symbols[:-1] == 0)])
    return symbols[~repeated].astype(np.int32)


def decode(symbols: np.ndarray) -> str:
    """The text of symbols [N]."""
    return ''.join(SYMBOLS[int(symbol)] for symbol in symbols)


@functools.cache
def make() -> dict[str, dict[str, np.ndarray]]:
    """{'train': {'input': int32 [N, 64], 'label': int32 [N, 64]}, 'test': ...}.

    Windows that do not overlap; the label of a symbol is the one that follows it. The test split is
    the last tenth of the text.
    """
    return windows(text())


def windows(symbols: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """`make` of the symbols int32 [N] of any text."""
    count = (len(symbols) - 1) // LENGTH
    inputs = symbols[: count * LENGTH].reshape(count, LENGTH)
    labels = symbols[1 : count * LENGTH + 1].reshape(count, LENGTH)
    first = count - count * TEST_PERCENT // 100
    return {
        'train': {'input': inputs[:first], 'label': labels[:first]},
        'test': {'input': inputs[first:], 'label': labels[first:]},
    }
