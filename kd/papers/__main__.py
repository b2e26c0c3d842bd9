"""The papers that are here.

    python -m kd.papers                    a line each: slug, arXiv id, family, recipe, verdict
    python -m kd.papers --family=vision    those of a family
    python -m kd.papers show adpo          how to run one and what it costs; losses, theorems, tests
    python -m kd.papers --readme           rewrite the table of the README and its pages under docs/

They are entries of papers.toml; see `kd.papers.index`. Verdicts and costs come from results/.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence

from kd.claims import results
from kd.claims.results import Result
from kd.papers import citations, index, pages
from kd.papers.index import Paper
from kd.process import active, command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; raises `UserError` for an unknown paper or family and for a wrong index."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.papers',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--family', metavar='FAMILY')
    parser.add_argument('--readme', action='store_true')
    commands = parser.add_subparsers(dest='command', metavar='[show SLUG]')
    commands.add_parser('show').add_argument('slug', metavar='SLUG', help='or an arXiv id')
    arguments = parser.parse_args(argv)
    papers, measured = index.load(), results.measured()
    if arguments.readme:
        print('\n'.join(map(str, pages.write())))
    elif arguments.command:
        print('\n'.join(shown(index.find(papers, arguments.slug), measured)))
    else:
        if arguments.family:
            papers = index.of_family(papers, arguments.family)
        print('\n'.join(listed(papers, measured)))
    return 0


def listed(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> list[str]:
    """A line per paper, in columns."""
    rows = [
        (
            paper.slug,
            paper.arxiv,
            paper.family,
            pages.short(paper.config_files[0]) if paper.configs else '-',
            results.verdict(paper.claim_name, measured) if paper.claim else '-',
        )
        for paper in papers.values()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def shown(paper: Paper, measured: Mapping[str, Result]) -> list[str]:
    """What `show` prints."""
    lines = [
        f'{paper.slug}: {paper.title}',
        f'  {f"{paper.authors} {paper.year}".strip()}, {paper.url}',
        f'  {paper.line}',
    ]
    for title, part in (
        ('Recipes', recipes(paper)),
        ('Claim', _claim(paper, measured)),
        ('Theorems', [f'python -m kd.theory.verify {paper.slug}'] if paper.theorems else []),
        ('Methods', paper.methods),
        ('Losses', _losses(paper)),
        ('Equations', [paper.equations] if paper.equations else []),
        ('Tests', [f'python -m pytest {" ".join(paper.tests)}']),
    ):
        if part:
            lines += ['', title, *(f'  {line}' for line in part)]
    return lines


def recipes(paper: Paper) -> Iterator[str]:
    """A command per recipe, each with a work directory of its own, and the steps of its stages."""
    # Configs may import JAX, which takes seconds: the list of papers goes without.
    with active().nothing_to_lose():
        from kd import config as config_lib

    for recipe in paper.recipes():
        workdir = re.sub(r'[^\w/]+', '_', pages.short(recipe.replace('.py:', '/')))
        yield f'python -m kd.main --config={recipe} --workdir=runs/{workdir}'
        config = config_lib.load(recipe)
        steps = ', '.join(f'{stage} {config[stage].steps:,}' for stage in config.stages)
        yield f'    steps: {steps}'


def _claim(paper: Paper, measured: Mapping[str, Result]) -> list[str]:
    name = paper.claim_name
    if not name:
        return []
    told = results.NOT_MEASURED
    if name in measured:
        result = measured[name]
        told = (
            f'{result["verdict"]}, {results.held(result)} checks hold; '
            f'took {results.took(result)}; results/{name}.json and .png'
        )
    return [f'python -m kd.claims {name}', f'    {told}']


def _losses(paper: Paper) -> list[str]:
    """The functions, each with the numbers of the paper that its docstring cites."""
    lines = []
    for loss in paper.losses:
        cited = [
            citation.number
            for citation in citations.of_module(loss.rpartition('.')[0])
            if citation.arxiv == paper.arxiv and citation.where == loss
        ]
        lines.append(f'{loss}  {", ".join(cited)}'.rstrip())
    return lines


if __name__ == '__main__':
    command(main)
