"""Docstrings of kd as Sphinx reads them.

They are written to be read in an editor: `names` in single backticks, equations and commands as
indented blocks, lists and tables of Markdown, and sections of Google's style, which
`sphinx.ext.napoleon` knows. `restructured` makes all but these sections reStructuredText.
Signatures are shown as they stand in the source, so that a type goes by the name that its author
gave it.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = ('Args:', 'Attributes:', 'Raises:', 'Returns:', 'Yields:')
_CODE = re.compile(r'(``[^`]+``|`[^`]+`)')
_NAME = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*')
_ARXIV = re.compile(r'\barXiv[: ](\d{4}\.\d{4,5})\b')
_BULLET = re.compile(r'(- |\d+\. )')


def restructured(lines: Sequence[str]) -> list[str]:
    """The lines of a docstring as reStructuredText; sections of Google's style stay."""
    made: list[str] = []
    for kind, block in _blocks(lines):
        if kind == 'table' and (rows := _rows(block)):
            made += ['', *_table(rows), '']
        elif kind in ('literal', 'table'):
            indent = min(len(line) - len(line.lstrip()) for line in block if line.strip()) or 4
            made += ['', f'{" " * (indent - 4)}::', '', *_indented(block), '']
        elif kind == 'list':
            made += ['', *_inline(block), '']
        elif kind == 'items':
            made += ['', *_inline(_items(block)), '']
        else:
            made += _inline(block)
    return made


def signature(thing: Any) -> tuple[str, str | None] | None:
    """('(x: Array, *, y: int = 1)', 'Array') as the source of a function or class has it.

    None where the source does not say: what is built in, or made at run time.
    """
    module = getattr(thing, '__module__', None)
    node = _node(module, getattr(thing, '__qualname__', ''))
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, module)
    if isinstance(node, ast.ClassDef):
        own = next((child for child in node.body if _is_init(child)), None)
        if own is not None:
            return _of_function(own, module)[0], None
        if fields := list(_fields(thing)):
            return f'({", ".join(fields)})', None
    return None


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """('text' | 'literal' | 'table' | 'list' | 'items', lines): the docstring cut up."""
    kind, block, section = 'text', [], False
    for line in lines:
        section = (section and line[:1] in ('', ' ')) or line in SECTIONS
        found = _kind(line, kind, block, section)
        if found != kind:
            yield kind, block
            kind, block = found, []
        block.append(line)
    yield kind, block


def _kind(line: str, kind: str, block: Sequence[str], section: bool) -> str:
    """Of which kind a line is, after a block that is not yet complete."""
    indent = len(line) - len(line.lstrip())
    if not line.strip():
        return 'text' if kind == 'table' else kind
    # What is said of an argument goes on four characters in.
    if indent >= (8 if section else 4) and (kind == 'literal' or _may_be_literal(kind, block)):
        return 'literal'
    if section:
        return 'text'
    if indent and kind == 'list':
        return 'list'
    if indent and (kind == 'items' or _ends_in_a_colon(block)):
        return 'items'
    if line.startswith('|') and line.rstrip().endswith('|'):
        return 'table'
    if _BULLET.match(line) and (kind == 'list' or _may_begin_a_list(block)):
        return 'list'
    return 'text'


def _ends_in_a_colon(block: Sequence[str]) -> bool:
    told = [line for line in block if line.strip()]
    return bool(told) and told[-1].endswith(':')


def _may_be_literal(kind: str, block: Sequence[str]) -> bool:
    """Items of a list go on with an indentation, without an empty line."""
    return not block or not block[-1].strip() or (kind == 'text' and block[-1].endswith(':'))


def _may_begin_a_list(block: Sequence[str]) -> bool:
    """A sentence may wrap at a dash; it then has no end on the line before."""
    return not block or not block[-1].strip() or block[-1].rstrip().endswith((':', '.'))


def _rows(lines: Sequence[str]) -> list[list[str]]:
    """The cells of a table of Markdown, without its rule; none where a cell has a bar in it."""
    rows = [[cell.strip() for cell in line.strip()[1:-1].split('|')] for line in lines]
    rows = [row for row in rows if not all(cell and set(cell) <= set('-:') for cell in row)]
    return rows if len({len(row) for row in rows}) == 1 else []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    made = ['.. list-table::', '   :header-rows: 1', '']
    for row in rows:
        for i, cell in enumerate(row):
            made.append(f'   {"  -" if i else "* -"} {_escaped(cell)}'.rstrip())
    return made


def _items(lines: Sequence[str]) -> list[str]:
    """What stands indented below a line that ends in a colon, as a list."""
    first = len(lines[0]) - len(lines[0].lstrip())
    return [
        f'- {line[first:]}' if line[first : first + 1].strip() else f'  {line[first:].lstrip()}'
        for line in lines
    ]


def _indented(lines: Sequence[str]) -> list[str]:
    return lines if lines[0].startswith('    ') else [f'    {line}' for line in lines]


def _inline(lines: Sequence[str]) -> list[str]:
    """Marks code as code, and takes their meaning from the characters of reStructuredText."""
    text = '\n'.join(lines)
    # Code does not go on into another paragraph.
    return '\n\n'.join(_escaped(part) for part in text.split('\n\n')).split('\n')


def _escaped(text: str) -> str:
    parts = _CODE.split(text)
    made = ''
    for i, part in enumerate(parts):
        if i % 2 == 0:
            made += _ARXIV.sub(r'`arXiv:\1 <https://arxiv.org/abs/\1>`__', _plain(part))
            continue
        code = part.strip('`')
        before = '' if not made or made[-1] in ' \n([{"\'/-:<' else '\\ '
        following = parts[i + 1][:1]
        after = '\\ ' if following.isalnum() or (following in '_`(*' and following) else ''
        role = f':py:obj:`{code}`' if _NAME.fullmatch(code) else f'``{code}``'
        made += f'{before}{role}{after}'
    return made


def _plain(text: str) -> str:
    text = text.replace('\\', '\\\\').replace('*', '\\*').replace('|', '\\|').replace('`', '\\`')
    text = re.sub(r'(?<=\w)_(?=\W|$)', r'\\_', text)
    text = re.sub(r'::(?=\s*$)', r':\\:', text, flags=re.MULTILINE)
    # 'K. ' at the beginning is a letter, and not the eleventh item of a list.
    return re.sub(r'^(\s*(?:[\w, ]+: )?)([A-Za-z]\.)(?=\s|$)', r'\1\\\2', text, flags=re.MULTILINE)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding='utf-8'))


def _node(module: str | None, qualname: str) -> ast.AST | None:
    """The definition of a function or class, by where it was defined."""
    file = getattr(sys.modules.get(module or ''), '__file__', None)
    if not file or not (module or '').startswith('kd'):
        return None
    node: ast.AST = _tree(Path(file))
    for name in qualname.split('.'):
        children = getattr(node, 'body', [])
        named = [c for c in children if getattr(c, 'name', None) == name]
        if not named:
            return None
        node = named[-1]
    return node


def _of_function(node: ast.FunctionDef, module: str) -> tuple[str, str | None]:
    named = _Named(vars(sys.modules[module]))
    arguments = named.visit(copy.deepcopy(node.args))
    text = re.sub(r'^(self|cls)(, |$)', '', ast.unparse(arguments))
    returns = ast.unparse(named.visit(copy.deepcopy(node.returns))) if node.returns else None
    return f'({text})', returns


class _Named(ast.NodeTransformer):
    """Classes and aliases of kd in annotations by their whole name, shown as its last part:
    `~kd.x.Y`.

    Several modules may have one of one name.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names, self.aliases = names, _aliases(names['__name__'])

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.annotation is not None:
            node.annotation = self.visit(node.annotation)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._whole(node, self.names.get(node.id), self.aliases.get(node.id, ''))

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        owner = self.names.get(node.value.id) if isinstance(node.value, ast.Name) else None
        own = getattr(owner, '__name__', '').startswith('kd.') and hasattr(owner, node.attr)
        alias = f'{owner.__name__}.{node.attr}' if own else ''
        return self._whole(node, getattr(owner, node.attr, None), alias)

    def _whole(self, node: ast.expr, thing: Any, alias: str) -> ast.expr:
        if isinstance(thing, type):
            named = thing.__module__.startswith('kd.')
            alias = f'{thing.__module__}.{thing.__qualname__}' if named else ''
        return ast.parse(f'~{alias}', mode='eval').body if alias else node


@functools.cache
def _aliases(module: str) -> dict[str, str]:
    """{name: whole name} of what a module of kd sets or takes from another module of kd."""
    file = getattr(sys.modules.get(module), '__file__', None)
    if not file or not module.startswith('kd'):
        return {}
    found = {}
    for node in _tree(Path(file)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('kd.'):
            found |= {name.asname or name.name: f'{node.module}.{name.name}' for name in node.names}
        elif isinstance(node, ast.Assign):
            targets = [target for target in node.targets if isinstance(target, ast.Name)]
            found |= {target.id: f'{module}.{target.id}' for target in targets}
    return found


def _is_init(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == '__init__'


def _fields(thing: type) -> Iterator[str]:
    """The annotated fields of a class and of the classes of kd that it is made of."""
    fields: dict[str, str] = {}
    for kind in reversed(thing.__mro__):
        named = _Named(vars(sys.modules[kind.__module__]))
        for child in getattr(_node(kind.__module__, kind.__qualname__), 'body', []):
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                told = ast.unparse(named.visit(copy.deepcopy(child.annotation)))
                name = child.target.id
                if name[0] != '_' and not told.startswith('ClassVar'):
                    default = f' = {ast.unparse(child.value)}' if child.value else ''
                    fields[name] = f'{name}: {told}{default}'
    # Fields without a default come first, whatever the order of the classes.
    yield from (field for field in fields.values() if ' = ' not in field)
    yield from (field for field in fields.values() if ' = ' in field)
