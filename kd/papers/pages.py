"""What is made of the index and of the results: tables of the README, and pages under docs/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kd.claims import results
from kd.claims.results import Result
from kd.errors import UserError
from kd.papers import families, index
from kd.papers.families import FAMILIES
from kd.papers.index import Paper

_MADE = '<!-- Made by `python -m kd.papers --readme`. -->'


def write(root: Path = Path()) -> list[Path]:
    """Writes the table into the README, and the pages; returns the files."""
    texts = made(root)
    for file, text in texts.items():
        file.write_text(text, encoding='utf-8')
    return list(texts)


def made(root: Path = Path()) -> dict[Path, str]:
    """What `write` writes."""
    papers, measured = index.load(root), results.measured(root)
    readme, docs = root / 'README.md', root / 'docs'
    return {
        readme: with_tables(
            readme.read_text(encoding='utf-8'),
            {'families': can_do(), 'papers': at_a_glance(papers, measured)},
        ),
        docs / 'papers.md': papers_page(papers, measured),
        docs / 'recipes.md': recipes_page(papers, root),
        docs / 'claims.md': claims_page(papers, measured),
    }


def with_tables(readme: str, tables: Mapping[str, str]) -> str:
    """The README with each table between its two markers."""
    for name, table in tables.items():
        begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
        before, found, rest = readme.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise UserError(f'README.md needs the lines {begin} and {end}.')
        readme = f'{before}{begin}\n{table}\n{end}{after}'
    return readme


def can_do() -> str:
    """What one can do with each family, and a command that does it in minutes."""
    lines = ['| family | what you can do | in minutes on two cores |', '|---|---|---|']
    for family in FAMILIES.values():
        lines.append(f'| {family.title} | {family.line} | `{family.command}` |')
    return '\n'.join(lines)


def at_a_glance(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> str:
    """How many papers are reproduced, and which of each family are."""
    lines = [families.counted(papers.values(), measured), '']
    lines += [f'| family | {" | ".join(families.VERDICTS)} |', '|---' * 5 + '|']
    for name, family in FAMILIES.items():
        by_verdict: dict[str, list[str]] = {verdict: [] for verdict in families.VERDICTS}
        for paper in families.of(papers.values(), name):
            if paper.claim:
                verdict = results.verdict(paper.claim_name, measured)
                by_verdict[verdict].append(f'[{paper.slug}]({paper.url})')
        cells = [', '.join(slugs) for slugs in by_verdict.values()]
        lines.append(f'| {" | ".join([family.title, *cells])} |')
    others = [f'[{paper.slug}]({paper.url})' for paper in papers.values() if not paper.claim]
    if others:
        lines += ['', f'Besides, without a claim of their own: {", ".join(others)}.']
    return '\n'.join(lines)


def papers_page(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> str:
    """docs/papers.md: a row per paper, by family."""
    lines = ['# Papers', '', _MADE, '', families.counted(papers.values(), measured)]
    for name, family in FAMILIES.items():
        lines += ['', f'## {family.title}', '']
        lines += ['| paper | says that | recipe | verdict, checks that hold |', '|---|---|---|---|']
        lines += [_row(paper, measured) for paper in families.of(papers.values(), name)]
    return '\n'.join(lines) + '\n'


def _row(paper: Paper, measured: Mapping[str, Result]) -> str:
    told = families.told(paper, measured)
    if paper.claim_name in measured:
        verdict, _, held = told.rpartition(', ')
        told = f'[{verdict}](../results/{paper.claim_name}.json), {held}'
    return (
        f'| [{paper.slug}]({paper.url}), {paper.cited} | {paper.line} '
        f'| {_links(paper.config_files, "../")} | {told} |'
    )


def recipes_page(papers: Mapping[str, Paper], root: Path = Path()) -> str:
    """docs/recipes.md: every config file, its variants and its papers."""
    lines = [
        '# Recipes',
        '',
        _MADE,
        '',
        '`python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=runs/mine` runs one;',
        'what stands after the colon is the variant, and without one it is the scale of the paper.',
        'Each file says what it needs and what to expect. `python -m kd.papers show SLUG` prints',
        'the commands of a paper.',
        '',
        '| recipe | what it is | variants | papers |',
        '|---|---|---|---|',
    ]
    variants: dict[str, list[str]] = {}
    users: dict[str, list[str]] = {}
    for paper in papers.values():
        for recipe in paper.recipes(root):
            file, _, variant = recipe.partition(':')
            if f'`{variant}`' not in variants.setdefault(file, []):
                variants[file].append(f'`{variant}`')
        for file in paper.config_files:
            users.setdefault(file, []).append(f'[{paper.slug}]({paper.url})')
    for file in sorted(users):
        cells = [_links([file], '../'), index.summary(root / file)]
        cells += [' '.join(variants[file]), ', '.join(users[file])]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def claims_page(papers: Mapping[str, Paper], measured: Mapping[str, Result]) -> str:
    """docs/claims.md: every claim, its verdict, and the checks that decide it."""
    lines = [
        '# Claims',
        '',
        _MADE,
        '',
        'A claim is the headline of a paper as an experiment on two cores: arms with equal tuning,',
        'several seeds, a paired 95 % interval, and a verdict that is what the seeds said.',
        '`python -m kd.claims NAME` runs one. Differences are those beyond the margin that a check',
        'names; it holds where the interval lies above 0. The last column has what does not hold,',
        'or else the check closest to 0.',
        '',
        '| claim | verdict | checks that hold | took | and |',
        '|---|---|---:|---:|---|',
    ]
    for paper in papers.values():
        name = paper.claim_name
        if name in measured:
            result = measured[name]
            told = f'[{result["verdict"]}](../results/{name}.json), [figure](../results/{name}.png)'
            lines.append(
                f'| [{name}](../{paper.claim}): {result["statement"]} ({result["paper"]}) '
                f'| {told} | {results.held(result)} | {results.took(result)} '
                f'| {results.rest(result)} |'
            )
        elif name:
            lines.append(f'| [{name}](../{paper.claim}) | {results.NOT_MEASURED} | | | |')
    return '\n'.join(lines) + '\n'


def short(config: str) -> str:
    """'vision/logit_kd' of 'configs/vision/logit_kd.py'."""
    return config.removeprefix('configs/').removesuffix('.py')


def _links(files: tuple[str, ...] | list[str], up: str = '') -> str:
    """Links to config files; those in the folder of the first go by their own name."""
    folder = Path(files[0]).parent if files else None
    names = [
        Path(file).stem if i and Path(file).parent == folder else short(file)
        for i, file in enumerate(files)
    ]
    return ', '.join(f'[{name}]({up}{file})' for name, file in zip(names, files, strict=True))
