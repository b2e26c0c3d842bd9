"""The index of papers: every word of it is true, nothing is missing, and what is made of it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd import callables
from kd import config as kd_config
from kd.claims import claim as claims
from kd.claims import results
from kd.errors import UserError
from kd.papers import citations, families, index, pages
from kd.papers.__main__ import main
from kd.process import entry
from kd.theory import verify

ROOT = Path(__file__).parents[2]
PAPERS = index.load(ROOT)
CITED = [c for c in citations.of_package(ROOT / 'kd') if not c.where.startswith('kd.papers')]

# Modules of methods that no paper owns: training as such, and what several papers share.
SHARED = {
    *('kd.methods.cache', 'kd.methods.privacy', 'kd.methods.vision.supervised'),
    *('kd.methods.flow.common', 'kd.methods.dataset.matching', 'kd.methods.dataset.coreset'),
    *('kd.methods.rl.surrogate', 'kd.methods.diffusion.distribution_matching'),
    'kd.methods.discrete.masked_diffusion',
    'kd.methods.vision.feature_kd',
}
# Equations of works that are not on arXiv: Gretton et al. 2012; Cichocki et al. 2011.
ELSEWHERE = {'kd.evaluators.distribution.mmd', 'kd.losses.divergence.alpha_beta'}
# Papers whose authors no source at hand names.
ANONYMOUS = {
    *('dp_opd', 'paced', 'redi', 'soda', 'kdrl', 'curiosft', 'tsd_kd', 'ded', 'sd_zero'),
    *('decoupled_dmd', 'phased_dmd', 'embedding_loss', 'llava_mod'),
    *('srpo', 'sdpo', 'skill_sd', 'rlad', 'kepo'),
    'innate_one_step',
    'snoopi',
    'flash_dmd',
    'agd',
    'dmgd',
    'distillation_dpo',
    'asd_video',
    *('hierarchical_prune', 'ppcl'),
    'imdn',
    'tad_sr',
    'yonos_sr',
    'crd',
    'dmae',
    'mirage',
    'fair_data',
    'proard',
}
# Methods that write files, for which nothing is trained.
WRITERS = {'kd.methods.graph.mirage'}

ENTRY = """
[one]
title = 'A Title'
authors = 'Ada, Bob, Cy'
year = 2020
arxiv = '2001.00001'
family = 'vision'
line = 'it works'
methods = []
losses = []
tests = []
"""


def started(arguments):
    """The exit status of the command."""
    return entry(lambda: main(arguments))


@pytest.mark.parametrize('slug', PAPERS)
def test_an_entry_is_true(slug):
    paper = PAPERS[slug]
    for path in (*paper.methods, *paper.losses):
        assert callable(callables.resolve(path))
    for path in paper.methods:
        assert path.startswith((f'kd.methods.{paper.family}.', f'kd.methods.{slug}.'))
    for file in (*paper.config_files, *paper.tests, *filter(None, [paper.claim])):
        assert (ROOT / file).is_file()
    for path in paper.theorems:
        stated = callables.resolve(f'{path}.PAPER')
        assert (stated.slug, stated.title, stated.arxiv) == (slug, paper.title, paper.arxiv)
    assert 20 < len(paper.line) <= 90
    assert paper.line[-1] != '.'
    assert '|' not in paper.line
    names = paper.authors.split(', ')
    assert all(name.strip() == name and name for name in names) == (slug not in ANONYMOUS)
    if paper.claim:
        told = claims.load(paper.claim_name, smoke=True).paper
        assert f'arXiv:{paper.arxiv}' in told
        assert paper.cited in told


@pytest.mark.parametrize('slug', PAPERS)
def test_the_numbered_equations_of_an_entry_are_those_that_docstrings_cite(slug):
    paper = PAPERS[slug]
    cited = [citation for citation in CITED if citation.arxiv == paper.arxiv]
    assert citations.numbered(paper.equations) == {citation.number for citation in cited}
    losses = {c.where for c in cited if c.where.startswith('kd.losses.')}
    assert losses <= set(paper.losses)


def test_every_cited_equation_is_of_a_named_paper():
    assert {citation.where for citation in CITED if not citation.arxiv} == ELSEWHERE


def test_nothing_is_without_an_entry():
    papers = PAPERS.values()
    assert len({paper.arxiv for paper in papers}) == len(papers)
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / 'configs').glob('*/*.py')}
    claimed = {paper.claim for paper in papers if paper.claim}
    assert configs == {file for paper in papers for file in paper.config_files} | claimed
    assert set(verify.PAPERS) == {paper.slug for paper in papers if paper.theorems}
    methods = {path.rpartition('.')[0] for paper in papers for path in paper.methods}
    assert methods | SHARED == set(_modules_of_methods()) | WRITERS
    assert not methods & SHARED


def _modules_of_methods():
    """Modules below kd/methods with a public function that returns a Method."""
    for file in (ROOT / 'kd' / 'methods').rglob('*.py'):
        for node in ast.parse(file.read_text()).body:
            made = isinstance(node, ast.FunctionDef) and node.name[0] != '_' and node.returns
            if made and ast.unparse(made) == 'Method':
                yield '.'.join(file.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize(
    'file', ['README.md', 'docs/papers.md', 'docs/recipes.md', 'docs/claims.md']
)
def test_readme_and_pages_are_what_the_command_writes(file):
    made = pages.made(ROOT)[ROOT / file]
    assert made == (ROOT / file).read_text(), 'run python -m kd.papers --readme'


def test_a_row_of_each_kind(tmp_path):
    (tmp_path / 'papers.toml').write_text(
        ENTRY
        + "configs = ['configs/vision/a.py', 'configs/vision/b.py:x']\n"
        + "claim = 'configs/claims/one.py'\n"
        + ENTRY.replace('one', 'two').replace("'Ada, Bob, Cy'", "'Ada, Bob'")
        + "claim = 'configs/claims/two.py'\n"
        + ENTRY.replace('one', 'three').replace("authors = 'Ada, Bob, Cy'\n", '')
    )
    papers = index.load(tmp_path)
    held = {'verdict': results.REPRODUCED, 'checks': [{'verdict': results.REPRODUCED}] * 3}
    assert pages.papers_page(papers, {'one': held}).splitlines()[4:13] == [
        'Of 2 papers with a claim 1 are reproduced, 0 inconclusive, 0 not reproduced at this '
        'scale, 1 not measured.',
        '',
        '## Classifiers',
        '',
        '| paper | says that | recipe | verdict, checks that hold |',
        '|---|---|---|---|',
        '| [one](https://arxiv.org/abs/2001.00001), Ada et al. 2020 | it works '
        '| [vision/a](../configs/vision/a.py), [b](../configs/vision/b.py) '
        '| [reproduced](../results/one.json), 3 of 3 |',
        '| [two](https://arxiv.org/abs/2001.00001), Ada and Bob 2020 | it works |  '
        '| not measured |',
        '| [three](https://arxiv.org/abs/2001.00001), 2020 | it works |  | no claim of its own |',
    ]
    glance = pages.at_a_glance(papers, {'one': held}).splitlines()
    assert glance[4] == (
        '| Classifiers | [one](https://arxiv.org/abs/2001.00001) |  |  '
        '| [two](https://arxiv.org/abs/2001.00001) |'
    )
    assert glance[-1] == (
        'Besides, without a claim of their own: [three](https://arxiv.org/abs/2001.00001).'
    )
    with pytest.raises(UserError, match='needs the lines <!-- x: begin --> and <!-- x: end -->'):
        pages.with_tables('<!-- x: end -->\n<!-- x: begin -->', {'x': ''})


def test_every_family_is_told_and_its_command_is_a_recipe():
    assert {paper.family for paper in PAPERS.values()} == set(families.FAMILIES)
    recipes = {recipe for paper in PAPERS.values() for recipe in paper.recipes(ROOT)}
    for family in families.FAMILIES.values():
        assert family.command.partition('--config=')[2].split()[0] in recipes


def test_variants_are_read_without_running_a_config(tmp_path):
    (tmp_path / 'papers.toml').write_text(ENTRY + "configs = ['a.py', 'a.py:y', 'a.py:z']\n")
    (tmp_path / 'a.py').write_text(
        '"""One\nline.\n\nMore."""\nVARIANTS = ("x", "y")\nraise OSError'
    )
    assert index.load(tmp_path)['one'].recipes(tmp_path) == ('a.py:x', 'a.py:y', 'a.py:z')
    assert index.summary(tmp_path / 'a.py') == 'One line.'
    (tmp_path / 'a.py').write_text('')
    with pytest.raises(UserError, match=r'a\.py has no VARIANTS'):
        index.variants(tmp_path / 'a.py')


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        (ENTRY + 'theorem = []', "[one] has an unknown field 'theorem'. Did you mean 'theorems'?"),
        (ENTRY.replace('year = 2020\n', ''), '[one] lacks year.'),
        (ENTRY.replace('2020', "'2020'"), "[one] year must be a number, got '2020'."),
        (
            ENTRY.replace('tests = []', "tests = 'a'"),
            "[one] tests must be a list of texts, got 'a'",
        ),
        (
            ENTRY.replace('tests = []', 'tests = [1]'),
            '[one] tests must be a list of texts, got [1]',
        ),
        (
            ENTRY.replace('Ada, Bob, Cy', ''),
            '[one] authors is empty; what is not known has no line.',
        ),
        ("slug = 'one'", "'slug' stands outside of an entry."),
        ('[one', "Expected ']'"),
    ],
)
def test_a_wrong_entry_is_said_in_one_line(tmp_path, monkeypatch, capsys, text, told):
    (tmp_path / 'papers.toml').write_text(text)
    monkeypatch.chdir(tmp_path)
    assert started([]) == 2
    error = capsys.readouterr().err
    assert error.startswith('kd: papers.toml: ')
    assert told in error
    assert error.count('\n') == 1


def test_elsewhere_than_at_the_root(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert started([]) == 2
    assert capsys.readouterr().err == (
        'kd: There is no papers.toml; start the command at the root of the checkout.\n'
    )


def test_the_list_by_family(capsys):
    assert started(['--family=lm']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    known = [
        ['recursive_meta_distillation', '2601.13100', 'lm', 'lm/recursive_meta_distillation'],
        ['paced', '2603.11178', 'lm', 'lm/paced'],
        ['taid', '2501.16937', 'lm', 'lm/taid'],
        ['redi', '2505.24850', 'lm', 'lm/redi'],
        ['curiosft', '2602.02244', 'lm', 'lm/curiosft'],
    ]
    assert [row[:4] for row in rows if row[:4] in known] == known
    assert all('lm' in (row[2], row[3].partition('/')[0]) for row in rows)
    # A family is also that of a recipe.
    assert started(['--family=vision']) == 0
    assert 'recursive_meta_distillation' in capsys.readouterr().out
    assert started(['--family=vison']) == 2
    assert capsys.readouterr().err == (
        "kd: There is no family 'vison'. Did you mean 'vision'? "
        'Families: dataset, diffusion, discrete, flow, graph, lm, rl, sr, tabular, vision.\n'
    )


def test_a_paper_is_shown_with_its_commands_and_their_cost(capsys):
    assert started(['show', 'adpo']) == 0
    shown = capsys.readouterr().out
    assert started(['show', '2510.18913']) == 0
    assert capsys.readouterr().out == shown
    result = results.measured(ROOT)['adpo']
    steps = kd_config.load('configs/rl/adpo.py:ema').student.steps
    for line in (
        'adpo: ADPO: Anchored Direct Preference Optimization',
        '  python -m kd.main --config=configs/rl/adpo.py:ema --workdir=runs/rl/adpo/ema',
        f'student {steps}',
        '  python -m kd.claims adpo',
        f'took {result["seconds"] / 60:.0f} min',
        '  python -m kd.theory.verify adpo',
        '  kd.losses.preference.anchored_cross_entropy',
        '  python -m pytest tests/methods/test_adpo.py',
    ):
        assert line in shown
    assert started(['show', 'mtt']) == 0
    assert '  kd.losses.trajectory.mtt_loss  eq. 2\n' in capsys.readouterr().out
    assert started(['show', 'paced']) == 0
    assert capsys.readouterr().out.splitlines()[1] == '  2026, https://arxiv.org/abs/2603.11178'
    assert started(['show', 'mtx']) == 2
    assert capsys.readouterr().err == "kd: There is no paper 'mtx'. Did you mean 'mtt'?\n"


def test_the_list_needs_neither_jax_nor_numpy():
    code = (
        'import sys; from kd.papers.__main__ import main; main([]); '
        'print(*sorted({"jax", "numpy", "scipy", "matplotlib"} & set(sys.modules)))'
    )
    done = _python(['-c', code], stdout=subprocess.PIPE)
    *rows, loaded = done.stdout.splitlines()
    assert len(rows) == len(PAPERS)
    assert loaded == ''


@pytest.mark.parametrize('arguments', [[], ['show', 'flow_maps']])
def test_output_that_nobody_reads_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = _python(['-m', 'kd.papers', *arguments], stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, '')


def _python(arguments, stdout):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=stdout, stderr=subprocess.PIPE,
        text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ('text', 'numbers'),
    [
        ('eqs. 1, 5-7 and (9)', {f'eq. {n}' for n in (1, 5, 6, 7, 9)}),
        ('Eq. (12a), 3 seeds', {'eq. 12a'}),
        ('equations 2 and 4; Algorithm 2', {'eq. 2', 'eq. 4', 'algorithm 2'}),
        ('Theorem A.3, Lemmas 1–2, prop. 4.1',
         {'theorem A.3', 'lemma 1', 'lemma 2', 'proposition 4.1'}),
        ('Corollaries 1 and 2, definition 5', {'corollary 1', 'corollary 2', 'definition 5'}),
        ('equal 1, section 3, algorithms for 2 nets, eq. of 2', set()),
    ],
)  # fmt: skip
def test_numbers_of_equations(text, numbers):
    assert citations.numbered(text) == numbers


def test_an_equation_is_of_the_paper_named_before_it(tmp_path):
    (
        tmp_path / 'module.py'
    ).write_text('''"""Two: Ada 2020, arXiv 2001.00001, Bob, arXiv 2002.00002."""
def one():
    """Source: Ada 2020, arXiv 2001.00001,
    eq. 3; Bob 2021, arXiv 2002.00002, eqs. 1-2; Cy 1990, eq. 9.

    As algorithm 4 says."""
class Two:
    """Without any."""
    def three(self):
        """arXiv:2002.00002, theorem 1."""
''')
    found = set(citations.of_file(tmp_path / 'module.py', 'm'))
    assert found == {
        ('2001.00001', 'eq. 3', 'm.one'),
        ('2002.00002', 'eq. 1', 'm.one'),
        ('2002.00002', 'eq. 2', 'm.one'),
        ('', 'eq. 9', 'm.one'),
        ('', 'algorithm 4', 'm.one'),
        ('2002.00002', 'theorem 1', 'm.Two.three'),
    }


def test_in_a_module_of_one_paper_an_equation_needs_no_id(tmp_path):
    (tmp_path / 'module.py').write_text(
        '"""Ada, arXiv:2001.00001."""\ndef one():\n    """Eq. 7."""'
    )
    found = list(citations.of_file(tmp_path / 'module.py', 'm'))
    assert found == [('2001.00001', 'eq. 7', 'm.one')]
