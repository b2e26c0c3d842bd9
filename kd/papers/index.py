"""The index of papers, `papers.toml`: what is where for each, read without importing any of it."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.errors import UserError, did_you_mean

INDEX = Path('papers.toml')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """An entry of the index.

    Files are named from the root of the checkout, everything in `kd` by its import path.

    Attributes:
      slug: its name in this codebase.
      title: the paper's, in full.
      authors: surnames, separated by commas; '' where no source at hand names them.
      year: of the first version.
      arxiv: its id there, without a version.
      family: the folder of its methods and configs.
      line: what it says, in one line.
      methods: what a stage names as its method.
      losses: functions that compute what the paper minimises.
      equations: all numbered ones that docstrings cite: 'eqs. 1, 5-7; algorithm 2; theorem 3'.
      configs: recipes, 'FILE' with all of its `VARIANTS` or 'FILE:VARIANT' with this one.
      claim: file of its claim; '' where there is none.
      theorems: modules of `kd.theory.statements`.
      tests: files.
    """

    slug: str
    title: str
    authors: str = ''
    year: int
    arxiv: str
    family: str
    line: str
    methods: tuple[str, ...]
    losses: tuple[str, ...]
    equations: str = ''
    configs: tuple[str, ...] = ()
    claim: str = ''
    theorems: tuple[str, ...] = ()
    tests: tuple[str, ...]

    @property
    def url(self) -> str:
        return f'https://arxiv.org/abs/{self.arxiv}'

    @property
    def cited(self) -> str:
        """'Hinton et al. 2015'; '2015' where the authors are not known."""
        names = self.authors.split(', ') if self.authors else []
        who = f'{names[0]} et al.' if len(names) > 2 else ' and '.join(names)
        return f'{who} {self.year}'.strip()

    @property
    def claim_name(self) -> str:
        """What `python -m kd.claims` calls it; '' where there is none."""
        return Path(self.claim).stem if self.claim else ''

    @property
    def config_files(self) -> tuple[str, ...]:
        """Its config files, each once."""
        return tuple(dict.fromkeys(config.partition(':')[0] for config in self.configs))

    def recipes(self, root: Path = Path()) -> tuple[str, ...]:
        """'FILE:VARIANT' of every recipe, the variants of a file in its own order."""
        found: list[str] = []
        for config in self.configs:
            file, _, chosen = config.partition(':')
            found += [f'{file}:{v}' for v in ((chosen,) if chosen else variants(root / file))]
        return tuple(dict.fromkeys(found))


def load(root: Path = Path()) -> dict[str, Paper]:
    """The papers by slug, in the order of the index, below the root of a checkout.

    Raises:
      UserError: no index, no TOML, or an entry with wrong fields.
    """
    file = root / INDEX
    try:
        entries = tomllib.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(
            f'There is no {file}; start the command at the root of the checkout.'
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f'{file}: {error}') from error
    return {slug: _paper(slug, entry) for slug, entry in entries.items()}


def of_family(papers: Mapping[str, Paper], family: str) -> dict[str, Paper]:
    """The papers of a family, or with a recipe among its configs."""
    families = {
        slug: {paper.family, *(Path(file).parent.name for file in paper.config_files)}
        for slug, paper in papers.items()
    }
    known = sorted(set().union(*families.values()))
    if family not in known:
        raise UserError(
            f"There is no family '{family}'.{did_you_mean(family, known)} "
            f'Families: {", ".join(known)}.'
        )
    return {slug: paper for slug, paper in papers.items() if family in families[slug]}


def find(papers: Mapping[str, Paper], slug: str) -> Paper:
    """The paper of a slug or of an arXiv id."""
    for paper in papers.values():
        if slug in (paper.slug, paper.arxiv):
            return paper
    raise UserError(f"There is no paper '{slug}'.{did_you_mean(slug, papers)}")


def variants(config: Path) -> tuple[str, ...]:
    """The `VARIANTS` of a config file, which is not run."""
    for node in ast.parse(config.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'VARIANTS':
            return ast.literal_eval(node.value)
    raise UserError(f'{config} has no VARIANTS.')


def summary(config: Path) -> str:
    """The first paragraph of a config file's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(config.read_text(encoding='utf-8'))) or ''
    return re.sub(r'\s+', ' ', docstring.split('\n\n')[0])


def _paper(slug: str, entry: Any) -> Paper:
    if not isinstance(entry, dict):
        raise UserError(f"{INDEX}: '{slug}' stands outside of an entry.")
    fields = {field.name: field for field in dataclasses.fields(Paper) if field.name != 'slug'}
    for name, value in entry.items():
        if name not in fields:
            raise UserError(
                f"{INDEX}: [{slug}] has an unknown field '{name}'.{did_you_mean(name, fields)}"
            )
        kind = _KINDS.get(str(fields[name].type), 'a list of texts')
        if not _is(kind, value):
            raise UserError(f'{INDEX}: [{slug}] {name} must be {kind}, got {value!r}.')
        if value == '':
            raise UserError(f'{INDEX}: [{slug}] {name} is empty; what is not known has no line.')
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in entry]:
        raise UserError(f'{INDEX}: [{slug}] lacks {", ".join(missing)}.')
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    return Paper(slug=slug, **values)


_KINDS = {'int': 'a number', 'str': 'a text'}


def _is(kind: str, value: Any) -> bool:
    if kind == 'a list of texts':
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, int if kind == 'a number' else str)
