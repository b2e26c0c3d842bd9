"""Numbered equations that docstrings cite, read from the source without importing it.

A docstring cites as in 'Source: Zhao et al. 2022, arXiv YYMM.NNNNN, eqs. 5-7': what follows the
arXiv id of a paper, up to a semicolon, the next id or the end of the paragraph, is of that paper.
Where the docstring of a module names one paper alone, what its functions cite without an id is of
this one.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# By kind: one of it, several of it.
_WORDS = {
    'eq.': (r'eq\.|equation', r'eqs\.|equations'),
    'algorithm': ('algorithm', 'algorithms'),
    'theorem': (r'theorem|thm\.', r'theorems|thms\.'),
    'lemma': ('lemma', 'lemmas'),
    'proposition': (r'proposition|prop\.', r'propositions|props\.'),
    'corollary': ('corollary', 'corollaries'),
    'definition': ('definition', 'definitions'),
}
_NUMBER = r'\(?(?:[A-Z]\.?)?\d+(?:\.\d+)*[a-z]?\)?'
_RANGE = rf'{_NUMBER}(?:\s?[-–]\s?{_NUMBER})?'
_CITED = {
    kind: re.compile(
        rf'\b(?i:{one})\s*({_RANGE})|\b(?i:{several})\s*({_RANGE}(?:(?:, | and |, and ){_RANGE})*)'
    )
    for kind, (one, several) in _WORDS.items()
}
_ARXIV = re.compile(r'\b(\d{4}\.\d{4,5})\b')


class Citation(NamedTuple):
    """A numbered equation, algorithm or theorem of a paper, and the docstring that cites it.

    Attributes:
      arxiv: id of the paper; '' where none is named.
      number: such as 'eq. 5'.
      where: import path of what has the docstring.
    """

    arxiv: str
    number: str
    where: str


def numbered(text: str) -> set[str]:
    """{'eq. 5', 'eq. 6', 'algorithm 1'} of 'eqs. 5-6; algorithm 1'."""
    return {
        f'{kind} {number}'
        for kind, pattern in _CITED.items()
        for match in pattern.finditer(text)
        for number in _spelt_out(match[1] or match[2])
    }


def of_docstring(text: str, paper: str = '') -> set[tuple[str, str]]:
    """{(arXiv id, number)} that a docstring cites; without an id, of `paper`."""
    found: set[tuple[str, str]] = set()
    for paragraph in re.split(r'\n\s*\n', text):
        first, *others = _ARXIV.split(re.sub(r'\s+', ' ', paragraph))
        told = [(paper, first)]
        for arxiv, after in zip(others[::2], others[1::2], strict=True):
            here, _, beyond = after.partition(';')
            told += [(arxiv, here), (paper, beyond)]
        found |= {(arxiv, number) for arxiv, part in told for number in numbered(part)}
    return found


def of_file(file: Path, module: str) -> Iterator[Citation]:
    """All that the docstrings of a file cite, by the import path of what has the docstring."""
    tree = ast.parse(file.read_text(encoding='utf-8'))
    named = set(_ARXIV.findall(ast.get_docstring(tree) or ''))
    paper = named.pop() if len(named) == 1 else ''
    for where, docstring in _docstrings(tree, module):
        for arxiv, number in sorted(of_docstring(docstring, paper)):
            yield Citation(arxiv, number, where)


def of_module(module: str) -> Iterator[Citation]:
    """All that a module cites, by its import path; only the packages that hold it are imported."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:
        yield from of_file(Path(spec.origin), module)


def of_package(package: Path) -> Iterator[Citation]:
    """All that a package cites, `kd` for example."""
    for file in sorted(package.rglob('*.py')):
        parts = file.relative_to(package.parent).with_suffix('').parts
        yield from of_file(file, '.'.join(parts).removesuffix('.__init__'))


def _docstrings(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, str]]:
    yield path, ast.get_docstring(node) or ''
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f'{path}.{child.name}')
        elif isinstance(child, ast.FunctionDef):
            yield f'{path}.{child.name}', ast.get_docstring(child) or ''


def _spelt_out(text: str) -> Iterator[str]:
    """'5', '6', '7', '9' of '5-7 and (9)'."""
    for part in re.split(r', and | and |, ', text):
        first, *last = (end.strip(' ()') for end in re.split('[-–]', part))
        if last and first.isdigit() and last[0].isdigit():
            yield from map(str, range(int(first), int(last[0]) + 1))
        else:
            yield from (first, *last)
