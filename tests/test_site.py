"""The site of documentation: docstrings as they are shown, pages as they are made, links."""

import ast
import importlib
import json
import pkgutil
import re
from pathlib import Path

import docstrings
import outside
import pytest
import site_pages

from kd.claims import results
from kd.context import Context
from kd.losses import divergence
from kd.method import Objective, minimize
from kd.papers import citations, index

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / 'docs').glob('*.md'))


def shown(text):
    return '\n'.join(docstrings.restructured(text.split('\n')))


@pytest.mark.parametrize(
    ('docstring', 'expected'),
    [
        ('The `loss` of `f(x, y)`.', 'The :py:obj:`loss` of ``f(x, y)``.'),
        ('|x| and x* are x_ here', '\\|x\\| and x\\* are x\\_ here'),
        ('`x`s', ':py:obj:`x`\\ s'),
        ('By arXiv 1503.02531.', 'By `arXiv:1503.02531 <https://arxiv.org/abs/1503.02531>`__.'),
        ('As a name:', 'As a name:'),
        # Equations stay as they are.
        ('So:\n\n    a = |b| * `c`\n\nand on', 'So:\n\n\n::\n\n    a = |b| * `c`\n\n\nand on'),
        # Lists begin and end with an empty line; a wrapped dash begins none.
        ('Of two:\n- a\n  b\n- c', 'Of two:\n\n- a\n  b\n- c\n'),
        ('a is b\n- c', 'a is b\n- c'),
        ('Of two:\n  a: b\n    c\n  d: e', 'Of two:\n\n- a: b\n  c\n- d: e\n'),
        # A letter and a full stop are no item of a list.
        ('Args:\n  x: K.', 'Args:\n  x: \\K.'),
        # An equation below an argument.
        ('Args:\n  x: so\n\n        a*b', 'Args:\n  x: so\n\n\n    ::\n\n        a*b\n'),
    ],
)
def test_a_docstring_is_shown_as_it_was_meant(docstring, expected):
    assert shown(docstring) == expected


def test_a_table_is_one_and_one_with_bars_in_its_cells_stays_as_it_is():
    assert shown('| a | b |\n|---|---|\n| c | |').split('\n')[2:-1] == [
        '.. list-table::', '   :header-rows: 1', '', '   * - a', '     - b', '   * - c', '     -',
    ]  # fmt: skip
    assert '    | E[x | y] | b |' in shown('| a | b |\n|---|---|\n| E[x | y] | b |')


def test_signatures_are_those_of_the_source():
    arguments, returned = docstrings.signature(divergence.forward_kl)
    assert arguments.startswith(
        '(student_logits: ArrayLike, teacher: ~kd.losses.divergence.Teacher, *, temperature: '
    )
    assert returned == 'jax.Array'
    assert docstrings.signature(minimize)[1] == '~kd.method.base.Method'
    assert docstrings.signature(Objective)[0].startswith(
        '(loss: ~kd.metrics.Mean, metrics: ~kd.metrics.Metrics = {}, '
    )
    # Fields without a default come first.
    assert docstrings.signature(Context)[0].startswith('(stage: str, ')
    assert docstrings.signature(len) is None


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """All pages that are made, by name."""
    folder = tmp_path_factory.mktemp('made')
    site_pages.write(ROOT, folder)
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob('*') if f.is_file()}


def test_every_paper_has_a_page_with_what_it_owes(made):
    measured = results.measured(ROOT)
    cited = list(citations.of_package(ROOT / 'kd'))
    for slug, paper in index.load(ROOT).items():
        page = made[f'papers/{slug}.md']
        assert page.startswith(f'# {paper.title}\n')
        for where in (*paper.methods, *paper.losses):
            assert f'{{py:obj}}`{where}`' in page
        for citation in cited:
            if citation.arxiv == paper.arxiv:
                [told] = re.findall(rf'^{{py:obj}}`{citation.where}`(.*)$', page, re.M)
                assert citation.number in told.split(', ')
        for recipe in paper.recipes(ROOT):
            assert f'python -m kd.main --config={recipe} --workdir=' in page
        if paper.claim_name in measured:
            result = measured[paper.claim_name]
            assert f'Verdict: **{result["verdict"]}**' in page
            assert f'results/{paper.claim_name}.png' in page
            for check in result['checks']:
                low, high = check['interval']
                assert f'[{low:+.3g}, {high:+.3g}]' in page
        elif paper.claim:
            assert 'Not measured yet.' in page


def test_every_module_recipe_claim_and_notebook_has_a_page(made):
    for file in (ROOT / 'kd').rglob('*.py'):
        parts = file.relative_to(ROOT).with_suffix('').parts
        if parts[-1] != '__main__':
            assert f'api/{".".join(parts).removesuffix(".__init__")}.rst' in made
    for file in (ROOT / 'configs').glob('*/*.py'):
        kind = '' if file.parent.name == 'claims' else 'recipes/'
        assert str(file.relative_to(ROOT)) in made[f'{kind}{file.parent.name}/{file.stem}.md']
    for file in (ROOT / 'colabs').glob('*.ipynb'):
        cells = json.loads(made[f'notebooks/{file.name}'])['cells']
        assert f'gallery/{file.stem}.png' in ''.join(cells[1]['source'])


def test_what_is_no_more_goes_and_what_is_the_same_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(site_pages, '_all', lambda root: iter([('a/b.md', 'x')]))
    site_pages.write(ROOT, tmp_path)
    written = (tmp_path / 'a/b.md').stat().st_mtime_ns
    (tmp_path / 'old.md').write_text('y')
    site_pages.write(ROOT, tmp_path)
    assert [f.name for f in tmp_path.rglob('*.md')] == ['b.md']
    assert (tmp_path / 'a/b.md').stat().st_mtime_ns == written


@pytest.mark.parametrize('page', [ROOT / 'README.md', *DOCS], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page, made):
    for link in re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', page.read_text()):
        if link.startswith('made/'):
            assert link.removeprefix('made/') in made
        elif '://' not in link:
            assert (page.parent / link).exists(), link


def test_messages_that_are_explained_are_said():
    """Each message of the page on troubles stands in the source, between its dots."""
    said = ' '.join(
        node.value
        for file in (ROOT / 'kd').rglob('*.py')
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / 'docs' / 'troubleshooting.md').read_text()
    messages = re.findall(r'^(?:Exit status \d+, )?`([^`]+)`\n: ', page, re.M)
    assert len(messages) > 12
    for message in messages:
        for part in re.split(r"'?\.\.\.'?|EXTRA|papers.toml", message):
            assert part.strip(" '.") in said, message


def test_names_of_other_projects_are_there_and_have_a_page():
    for short, whole in outside.SHORT.items():
        assert pkgutil.resolve_name(whole) is not None
        assert outside.outside(short) == outside.outside(whole)
    for alias, module in outside.ALIASES.items():
        assert importlib.import_module(module)
        assert module in outside.outside(f'{alias}.anything')
    assert outside.outside('jax.Array') == (
        'https://docs.jax.dev/en/latest/_autosummary/jax.Array.html'
    )
    assert outside.outside('nn.Module').endswith('/flax.linen/module.html#flax.linen.Module')
    assert outside.outside('optax.GradientTransformation').endswith(
        'transformations.html#optax.GradientTransformation'
    )
    assert outside.outside('kd.errors.UserError') is None
