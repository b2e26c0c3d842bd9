"""Pages that are made when the site is built: of papers, recipes, claims, notebooks and modules."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kd.claims import claim as claims
from kd.claims import results
from kd.claims.results import Result
from kd.papers import __main__ as commands
from kd.papers import citations, families, index
from kd.papers.index import Paper
from kd.papers.pages import short
from kd.theory import verify


def write(root: Path, made: Path) -> None:
    """Writes all pages below `made`; what is as it was is not touched, what is no more goes."""
    with contextlib.chdir(root):
        pages = dict(_all(root))
    for name, text in pages.items():
        file = made / name
        if not file.is_file() or file.read_text(encoding='utf-8') != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding='utf-8')
    for file in made.rglob('*'):
        if file.is_file() and str(file.relative_to(made)) not in pages:
            file.unlink()


def _all(root: Path) -> Iterator[tuple[str, str]]:
    papers, measured = index.load(root), results.measured(root)
    yield 'families.md', families_page(papers, measured)
    yield 'theorems.md', theorems()
    yield 'compiled.md', compiled((root / 'docs' / 'aot.md').read_text(encoding='utf-8'))
    yield 'papers.md', papers_page(papers, measured)
    for paper in papers.values():
        yield f'papers/{paper.slug}.md', paper_page(paper, measured, root)
    for file in sorted((root / 'configs').glob('*/*.py')):
        kind = 'claims' if file.parent.name == 'claims' else f'recipes/{file.parent.name}'
        yield f'{kind}/{file.stem}.md', config_page(file.relative_to(root))
    yield 'claims.md', tree_page('Claims, as written', 'claims/*')
    yield 'recipes.md', tree_page('Recipes, as written', 'recipes/*/*')
    for file in sorted((root / 'colabs').glob('*.ipynb')):
        yield f'notebooks/{file.name}', notebook(file, root / 'docs' / 'gallery')
    yield from api_pages(root / 'kd')


def theorems() -> str:
    """Which statements are held to numbers, by paper."""
    lines = ['| paper | statements |', '|---|---|']
    for paper in verify.PAPERS.values():
        told = ', '.join(str(name).replace('_', ' ') for name in paper.checks)
        lines.append(f'| [{paper.slug}](made/papers/{paper.slug}.md) | {_cell(told)} |')
    return '\n'.join(lines) + '\n'


def compiled(page: str) -> str:
    """The table of compiled steps, in three lines."""
    rows = [line.split(' | ') for line in page.splitlines() if re.match(r'\| \S+\.py', line)]
    verdicts = [row[-2].split(',')[0].split(':')[0] for row in rows]
    fit, open_ = verdicts.count('fits'), verdicts.count('uncertain')
    refused = len(rows) - fit - open_
    return (
        f'{len(rows)} training steps of full-scale recipes are compiled for slices of 4 to 512 '
        f'chips of TPUs: {fit} fit into memory, {open_} may, {refused} the compiler refuses. '
        'What they hold and exchange is exact, their times are lower bounds, and none was run.\n'
        'Behind it: [the table](aot.md), and [what it says about scaling](scaling.md).\n'
    )


def tree_page(title: str, pages: str) -> str:
    """A page of links to others."""
    return f'# {title}\n\n```{{toctree}}\n:glob:\n:maxdepth: 1\n\n{pages}\n```\n'


def families_page(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> str:
    """One figure for each family, for the start page: of the claim of which most has come true."""
    lines = [families.counted(papers.values(), measured), '']
    for name, family in families.FAMILIES.items():
        line = family.line[0].upper() + family.line[1:]
        lines += [f'## {family.title}', '', f'{line}.', '', '```', family.command, '```', '']
        if best := shown_for(families.of(papers.values(), name), measured):
            result = measured[best.claim_name]
            lines += [
                f'```{{figure}} ../results/{best.claim_name}.png',
                f':alt: {best.line}',
                f'[{best.slug}](made/papers/{best.slug}.md): {result["statement"]} '
                f'Verdict: {result["verdict"]}, {results.held(result)} checks hold.',
                '```',
                '',
            ]
    return '\n'.join(lines)


def shown_for(papers: Sequence[Paper], measured: Mapping[str, Result]) -> Paper | None:
    """The paper whose figure is shown: all of its checks hold, and the more the better."""
    own = [paper for paper in papers if paper.claim_name in measured]

    def held(paper: Paper) -> tuple[bool, int]:
        checks = measured[paper.claim_name]['checks']
        good = sum(check['verdict'] == results.REPRODUCED for check in checks)
        return good == len(checks), good

    return max(own, key=held, default=None)


def papers_page(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> str:
    """All papers by family, with verdicts."""
    lines = ['# Papers', '', families.counted(papers.values(), measured), '']
    for name, family in families.FAMILIES.items():
        lines += [f'## {family.title}', '', '| paper | says that | verdict |', '|---|---|---|']
        for paper in families.of(papers.values(), name):
            lines.append(
                f'| [{paper.slug}](papers/{paper.slug}.md), {paper.cited} | {paper.line} '
                f'| {families.told(paper, measured)} |'
            )
        lines.append('')
    lines += [
        '```{toctree}',
        ':hidden:',
        '',
        *(f'{slug} <papers/{slug}>' for slug in papers),
        '```',
    ]
    return '\n'.join(lines) + '\n'


def paper_page(paper: Paper, measured: Mapping[str, Result], root: Path) -> str:
    """A paper: what it says, where its equations are, how to run it, and what came out."""
    lines = [
        f'# {paper.title}',
        '',
        f'{paper.authors}{", " if paper.authors else ""}{paper.year}, '
        f'[arXiv:{paper.arxiv}]({paper.url}), here `{paper.slug}`, of '
        f'{families.FAMILIES[paper.family].title.lower()}.',
        '',
        f'Says that {paper.line}.',
        '',
    ]
    lines += _outcome(paper, measured)
    lines += _how_to_run(paper, measured, root)
    lines += _equations(paper)
    lines += ['## Tests', '', '```', f'python -m pytest {" ".join(paper.tests)}', '```', '']
    return '\n'.join(lines)


def _outcome(paper: Paper, measured: Mapping[str, Result]) -> list[str]:
    """The claim: its statement, setting, checks, verdict and figure."""
    if not paper.claim:
        return ['It has no claim of its own: methods and losses of it serve other papers.', '']
    name = paper.claim_name
    lines = ['## What came out', '']
    if name not in measured:
        claim = claims.load(name)
        checks = [f'- {check.text}' for check in claim.checks]
        return [
            *lines, f'**{claim.statement}** Not measured yet.', '', claim.setting, '',
            'It will be said to be reproduced if all of these hold:', '', *checks, '',
        ]  # fmt: skip
    result = measured[name]
    lines += [
        f'**{result["statement"]}**', '',
        f'Verdict: **{result["verdict"]}**, {results.held(result)} checks hold, '
        f'after {results.took(result)} on two cores. {result["setting"]}', '',
        f'```{{image}} ../../../results/{name}.png', f':alt: {result["statement"]}', '```', '',
        '| check | | difference beyond its margin | 95 % interval | seeds |',
        '|---|---|---:|---:|---:|',
    ]  # fmt: skip
    for check in result['checks']:
        low, high = check['interval']
        lines.append(
            f'| {_cell(check["check"])} | {check["verdict"]} | {check["difference"]:+.3g} '
            f'| [{low:+.3g}, {high:+.3g}] | {check["seeds"]} |'
        )
    lines += ['', 'A check holds where its interval lies above 0; see {doc}`/verdicts`.', '']
    if result['notes']:
        lines += [f'Besides: {result["notes"]}', '']
    lines += _arms(result)
    lines += [f'All numbers by seed: {{download}}`{name}.json <../../../results/{name}.json>`.', '']
    return lines


def _arms(result: Result) -> list[str]:
    """What each arm reached, mean and standard error over seeds, folded away."""
    columns = list(dict.fromkeys(m for metrics in result['arms'].values() for m in metrics))
    lines = ['<details><summary>Every arm</summary>', '', f'| arm | {" | ".join(columns)} |']
    lines += ['|---|' + '---:|' * len(columns)]
    for arm, metrics in result['arms'].items():
        cells = [
            f'{metrics[name]["mean"]:.4g} ± {metrics[name]["standard_error"]:.2g}'
            if name in metrics
            else ''
            for name in columns
        ]
        lines.append(f'| {_cell(arm)} | {" | ".join(cells)} |')
    return [*lines, '', '</details>', '']


def _how_to_run(paper: Paper, measured: Mapping[str, Result], root: Path) -> list[str]:
    """Commands, and what they cost."""
    lines = ['## How to run it', '']
    if recipes := list(commands.recipes(paper)):
        lines += ['```', *recipes, '```', '']
        links_to = ', '.join(
            f'[{short(file)}](../recipes/{Path(file).parent.name}/{Path(file).stem}.md)'
            for file in paper.config_files
        )
        lines += [f'What each variant needs, and what to expect of it, stands in {links_to}.', '']
    if paper.claim:
        name = paper.claim_name
        cost = f'    # took {results.took(measured[name])}' if name in measured else ''
        lines += ['```', f'python -m kd.claims {name}{cost}', '```', '']
        lines += [f'[What it does](../claims/{name}.md), in full.', '']
    if paper.theorems:
        lines += ['```', f'python -m kd.theory.verify {paper.slug}', '```', '']
        lines += ['holds its theorems to numbers; see {doc}`/theory`.', '']
    if paper.methods:
        methods = ', '.join(f'{{py:obj}}`{method}`' for method in paper.methods)
        lines += [f'What a stage names as its method: {methods}.', '']
    return lines


def _equations(paper: Paper) -> list[str]:
    """The functions of a paper, what their docstrings cite of it, and the equations in them."""
    cited: dict[str, list[str]] = {}
    for citation in cited_by_paper().get(paper.arxiv, ()):
        cited.setdefault(citation.where, []).append(citation.number)
    lines: list[str] = []
    for where in dict.fromkeys((*paper.methods, *paper.losses, *cited)):
        first, equations = _told(where)
        numbers = ', '.join(cited.get(where, ()))
        lines += [f'{{py:obj}}`{where}`{", " if numbers else ""}{numbers}', f': {first}', '']
        lines += ['' if not line else f'  {line}' for line in equations]
        lines.append('')
    return ['## Equations', '', *lines] if lines else []


_CITED: dict[str, list[citations.Citation]] = {}


def cited_by_paper() -> dict[str, list[citations.Citation]]:
    """All citations of kd, by arXiv id."""
    if not _CITED:
        for citation in citations.of_package(Path('kd')):
            _CITED.setdefault(citation.arxiv, []).append(citation)
    return _CITED


def _told(where: str) -> tuple[str, list[str]]:
    """The first paragraph of the docstring of what is named, and the equations below it."""
    parts = where.split('.')
    for cut in range(len(parts), 0, -1):
        base = Path(*parts[:cut])
        file = base / '__init__.py' if base.is_dir() else base.with_suffix('.py')
        if file.is_file():
            break
    node: ast.AST = ast.parse(file.read_text(encoding='utf-8'))
    for name in parts[cut:]:
        node = next(child for child in _body(node) if getattr(child, 'name', None) == name)
    docstring = ast.get_docstring(node) or ''  # type: ignore[arg-type]
    before = docstring.partition('Args:')[0].split('\n\n')
    equations = [
        line for block in before if block.startswith('    ') for line in [*block.split('\n'), '']
    ]
    return re.sub(r'\s+', ' ', before[0]), equations


def _body(node: ast.AST) -> list[ast.stmt]:
    return getattr(node, 'body', [])


def config_page(file: Path) -> str:
    """A recipe or a claim: what it says of itself, and its source."""
    text = file.read_text(encoding='utf-8')
    docstring = ast.get_docstring(ast.parse(text)) or ''
    title, _, rest = docstring.partition('\n\n')
    up = '../../../../' if file.parent.name != 'claims' else '../../../'
    title = re.sub(r'\s+', ' ', title).rstrip('.')
    return (
        f'# {short(str(file))}\n\n{title}.\n\n{rest}\n\n'
        f'```{{literalinclude}} {up}{file}\n:language: python\n'
        f':start-at: "{_first_line(text)}"\n```\n'
    )


def _first_line(text: str) -> str:
    """The first line after the docstring of a file."""
    return text.splitlines()[ast.parse(text).body[1].lineno - 1]


def notebook(file: Path, gallery: Path) -> str:
    """A notebook, with the figure that the gallery has of it at its beginning."""
    told = json.loads(file.read_text(encoding='utf-8'))
    figure = gallery / f'{file.stem}.png'
    if figure.is_file():
        shown = [f'![What it draws](../../gallery/{figure.name})']
        told['cells'].insert(1, {'cell_type': 'markdown', 'metadata': {}, 'source': shown})
        for i, cell in enumerate(told['cells']):
            cell['id'] = str(i)
    return json.dumps(told, indent=1)


def api_pages(package: Path) -> Iterator[tuple[str, str]]:
    """A page for each module, and the page of all."""
    modules = [
        '.'.join(file.relative_to(package.parent).with_suffix('').parts).removesuffix('.__init__')
        for file in sorted(package.rglob('*.py'))
        if file.name != '__main__.py'
    ]
    for module in modules:
        children = [m for m in modules if m.rpartition('.')[0] == module]
        lines = [module, '=' * len(module), '', f'.. automodule:: {module}']
        if children:
            # A function that is called as its module is shown on the page of the module.
            lines += [f'   :exclude-members: {", ".join(m.rpartition(".")[2] for m in children)}']
        lines.append('')
        if children:
            lines += ['.. toctree::', '   :maxdepth: 1', '', *(f'   {m}' for m in children)]
        yield f'api/{module}.rst', '\n'.join(lines) + '\n'


def _cell(text: str) -> str:
    """Text for a cell of a table of Markdown."""
    return re.sub(r'\s+', ' ', text).replace('|', '\\|').replace('$', '\\$').replace('*', '\\*')
