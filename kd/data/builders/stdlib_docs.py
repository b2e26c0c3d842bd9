"""English text at hand with every Python: the documentation of its standard library.

A document is a docstring below the name of what it is about, or a chapter of the language reference
that `help()` shows. Modules go to one of the splits with all their text. The documents are a pure
function of the Python version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kd.data.sources import DataError

SPLITS = ('train', 'validation')
# No part of the library that is documented, or not there everywhere.
_LEFT_OUT = (
    'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo',
    'idle_test', 'pydoc_data', '__pycache__', 'lib-dynload',
)  # fmt: skip
# In characters; what is shorter says little.
_SHORTEST = 64


def split_of(module: str) -> str:
    """The split of a module or chapter: one in ten, by a digest of the name, is for validation."""
    return SPLITS[hashlib.sha256(module.encode()).digest()[0] % 10 == 0]


@functools.cache
def documents() -> dict[str, list[str]]:
    """All documents by split, in the order of the names of modules; each text once.

    Raises:
      DataError: a Python without the source files of its standard library.
    """
    library = Path(sysconfig.get_path('stdlib'))
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen = set()
    for module, name, text in [*_docstrings(library), *_chapters()]:
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            found[split_of(module)].append(f'{name}\n\n{text}\n')
    if not all(found.values()):
        raise DataError(f'there are no source files of the standard library in {library}')
    return found


def _docstrings(library: Path) -> Iterator[tuple[str, str, str]]:
    """(module, name with arguments, docstring) of everything that has one."""
    for file in sorted(library.rglob('*.py')):
        parts = file.relative_to(library).with_suffix('').parts
        if set(parts) & set(_LEFT_OUT):
            continue
        try:
            code = file.read_bytes()
            tree = ast.parse(code) if b'"""' in code or b"'''" in code else None
        except (SyntaxError, ValueError, OSError):
            continue
        if tree is not None:
            name = '.'.join(parts).removesuffix('.__init__')
            for title, text in _of(tree, name):
                yield parts[0], title, text


def _of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(name with arguments, docstring) of a module or class and what is defined in it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds):
        text = ast.get_docstring(node)
        if text:
            arguments = ''
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = f'({ast.unparse(node.args)})'
            yield f'{name}{arguments}', text
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, kinds):
                yield from _of(inner, f'{name}.{inner.name}')


def _chapters() -> Iterator[tuple[str, str, str]]:
    """Chapters of the language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for title in sorted(topics):
        yield title, title, topics[title].strip()
