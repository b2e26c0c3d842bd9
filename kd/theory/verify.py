"""Checks every assertable statement of the theory papers, in float64.

    python -m kd.theory.verify                          all papers
    python -m kd.theory.verify even_your_teacher adpo   some
    python -m kd.theory.verify --list                   what there is
    python -m kd.theory.verify --output=results/theory  and a report, rows.json and figures

One row per number: what was measured, the exact value or bound that it is held to, the tolerance
and the verdict. Where a statement is false in one direction, the row shows a counter-example. The
exit status is 1 if any row fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import pkgutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from kd import process
from kd.errors import did_you_mean
from kd.theory import figures, statements
from kd.theory.statements.rows import Paper, Row


def _registered() -> dict[str, Paper]:
    """The papers of all modules of statements; several modules may have one paper."""
    names = [module.name for module in pkgutil.iter_modules(statements.__path__)]
    modules = [importlib.import_module(f'{statements.__name__}.{name}') for name in names]
    papers = [module.PAPER for module in modules if hasattr(module, 'PAPER')]
    return {paper.slug: paper for paper in papers}


PAPERS = _registered()


def verify(papers: Iterable[str] = tuple(PAPERS), seed: int = 0) -> list[Row]:
    """All rows of the papers. float64 is enabled for the call only."""
    rows: list[Row] = []
    with jax.enable_x64(True):
        for slug in papers:
            rows += PAPERS[slug].rows(seed)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows; returns 1 if any fails."""
    arguments = _parse(argv)
    if arguments.list:
        for paper in PAPERS.values():
            print(f'{paper.slug}  (arXiv {paper.arxiv}: {paper.title})')
            print(''.join(f'    {name}\n' for name in paper.checks), end='')
        return 0
    began = time.perf_counter()
    rows = []
    for slug in arguments.papers:
        found = verify([slug], arguments.seed)
        rows += found
        print(text(PAPERS[slug], found))
    failed = sum(not row.holds for row in rows)
    if arguments.output:
        write_report(rows, arguments.papers, arguments.seed, arguments.output)
        print(f'Report, rows and figures: {arguments.output}')
    print(f'{len(rows)} rows, {failed} failed, {time.perf_counter() - began:.0f} s.')
    return int(failed > 0)


def text(paper: Paper, rows: Sequence[Row]) -> str:
    """A paper's rows for the terminal, grouped by statement."""
    lines = [f'{paper.slug}  (arXiv {paper.arxiv})']
    statement = None
    for row in rows:
        if row.statement != statement:
            statement = row.statement
            lines.append(f'  {statement}')
        verdict = 'ok  ' if row.holds else 'FAIL'
        lines.append(f'    {verdict} {row.quantity}: {_held_to(row)}')
        if row.note:
            lines.append(f'           {row.note}')
    return '\n'.join([*lines, ''])


def write_report(rows: Sequence[Row], papers: Sequence[str], seed: int, directory: Path):
    """Writes report.md, rows.json and the papers' figures."""
    directory.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        drawn = figures.write(list(papers), directory)
    report = markdown(rows, papers, seed, drawn)
    (directory / 'report.md').write_text(report, encoding='utf-8')
    document = {'seed': seed, 'jax': jax.__version__, 'rows': [_as_json(row) for row in rows]}
    text = json.dumps(document, indent=1, allow_nan=False)
    (directory / 'rows.json').write_text(text + '\n', encoding='utf-8')


def markdown(
    rows: Sequence[Row],
    papers: Sequence[str],
    seed: int,
    drawn: dict[str, list[tuple[str, str]]],
) -> str:
    """The report: a table per paper, notes on counter-examples, and the figures."""
    failed = [row for row in rows if not row.holds]
    lines = [
        '# Theorems, verified',
        '',
        f'`python -m kd.theory.verify`, float64, jax {jax.__version__}, seed {seed}: '
        f'{len(rows)} rows, {len(failed)} failed.',
        '',
    ]
    for slug in papers:
        paper = PAPERS[slug]
        lines += [f'## {paper.title}', '', f'arXiv {paper.arxiv}', '']
        lines += [f'![{caption}]({name})\n\n*{caption}*\n' for name, caption in drawn.get(slug, ())]
        lines += [
            '| statement | quantity | measured | held to | off by | tolerance | verdict |',
            '|---|---|---:|---:|---:|---:|---|',
        ]
        for row in rows:
            if row.paper == slug:
                # A bar would end the cell.
                cells = [row.statement, row.quantity + (f'<br>*{row.note}*' if row.note else '')]
                cells += [_number(row.measured), f'{row.relation} {_number(row.bound)}']
                off = f'{abs(row.measured - row.bound):.0e}' if row.relation == '=' else ''
                cells += [off, f'{row.tolerance:.0e}' if row.tolerance else '0']
                cells += ['holds' if row.holds else '**fails**']
                lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
        lines.append('')
    return '\n'.join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m kd.theory.verify',
        description='Checks every assertable statement of the theory papers, in float64.',
    )
    parser.add_argument('papers', nargs='*', metavar='paper', help=f'of {", ".join(PAPERS)}')
    parser.add_argument('--list', action='store_true', help='list papers and statements')
    parser.add_argument(
        '--output', type=process.path_argument, help='folder for report.md, rows.json, figures'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the random draws')
    arguments = parser.parse_args(argv)
    for slug in arguments.papers:
        if slug not in PAPERS:
            parser.error(f'no paper {slug!r}; see --list.{did_you_mean(slug, PAPERS)}')
    arguments.papers = arguments.papers or list(PAPERS)
    return arguments


def _held_to(row: Row) -> str:
    relation = f'{_number(row.measured)} {row.relation} {_number(row.bound)}'
    if row.relation == '=':
        return (
            f'{relation}  (off by {abs(row.measured - row.bound):.0e}, {row.tolerance:.0e} allowed)'
        )
    return relation + (f'  ({row.tolerance:+.0e} allowed)' if row.tolerance else '')


def _number(value: float) -> str:
    return f'{value:.6g}'


def _as_json(row: Row) -> dict:
    fields = dataclasses.asdict(row)
    if not math.isfinite(row.measured):
        fields['measured'] = None
    return {**fields, 'holds': row.holds}


if __name__ == '__main__':
    process.command(main)
