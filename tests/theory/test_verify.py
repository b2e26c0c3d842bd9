"""The verifier: every statement holds, and a wrong theorem, operator or number makes it say so."""

import dataclasses
import json
import math
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import preference, preference_family
from kd.theory import competence, figures, verify
from kd.theory import kernel_regression as kr
from kd.theory.statements import even_your_teacher, meta_operators, recursive_meta_distillation
from kd.theory.statements.rows import Paper, Row, at_least, at_most, counter_example, equal

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# (statements, rows) that each paper has at least: none may drop out unnoticed.
EXPECTED = {
    'even_your_teacher': (13, 63),
    'recursive_meta_distillation': (17, 78),
    'paced': (12, 67),
    'adpo': (9, 40),
}


@pytest.fixture(scope='module')
def rows():
    return {slug: verify.verify([slug]) for slug in verify.PAPERS}


@pytest.mark.parametrize('slug', verify.PAPERS)
def test_every_statement_of_the_paper_holds(rows, slug):
    failed = [(row.statement, row.quantity, row.measured) for row in rows[slug] if not row.holds]
    assert failed == []
    assert {row.statement for row in rows[slug]} == set(verify.PAPERS[slug].checks)
    statements, count = EXPECTED[slug]
    assert len(verify.PAPERS[slug].checks) >= statements
    assert len(rows[slug]) >= count


def swapped_weights(s, alphas):
    """The recursion with alpha on the previous model."""
    return ORIGINAL_PATH(s, 1 - jnp.asarray(alphas))


def nearly_linear(log_s, log_t, lam, power=1.0):
    """A linear operator that anchors a little less than it says."""
    return ORIGINAL_ANCHOR(log_s, log_t, 0.999 * lam, power=power)


def tilted_pool(log_ps, weights, family):
    """A pool that favours the heavier teachers a little."""
    tilted = weights**1.01
    return ORIGINAL_POOL(log_ps, tilted / tilted.sum(axis=0), family)


ORIGINAL_POOL = meta_operators._aggregate
ORIGINAL_PATH = kr.spectral_filter_path
ORIGINAL_ANCHOR = recursive_meta_distillation._anchor
WRONG_LOSSES = {0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14947, 0.15011, 0.15250)}

# name: (paper, statement that must fail, module, attribute, wrong value)
MUTATIONS = {
    'weights swapped': (
        *('even_your_teacher', 'T1: every step is diagonal in the eigenbasis'),
        *(kr, 'spectral_filter_path', swapped_weights),
    ),
    'a golden number off by one digit': (
        *('even_your_teacher', 'golden numbers: the toy of the official notebook'),
        *(even_your_teacher, 'TOY_LOSSES', WRONG_LOSSES),
    ),
    'limit with lam instead of lam / alpha': (
        *('even_your_teacher', 'T3: the limit is one ridge fit with lam / alpha'),
        *(kr, 'spectral_filter_limit', lambda d, lam, alpha: d / (d + lam)),
    ),
    'anchored a little less': (
        *(
            'recursive_meta_distillation',
            'T3: the geometric operator contracts the Hilbert metric exactly',
        ),
        *(recursive_meta_distillation, '_anchor', nearly_linear),
    ),
    'a counter-example that is none': (
        *(
            'recursive_meta_distillation',
            'T3: KL(M, T) <= (1 - lam) KL(S, T) is false for the geometric operator',
        ),
        *(
            recursive_meta_distillation,
            'anchored',
            lambda s, t, lam, power: np.broadcast_to(t, s.shape),
        ),
    ),
    'a pool with other weights': (
        *('recursive_meta_distillation', 'T10: bounds for several teachers'),
        *(meta_operators, '_aggregate', tilted_pool),
    ),
    'a bound too tight': (
        *('paced', 'T3: a kernel within e^delta of the best loses at most tanh(delta)^2'),
        *(competence, 'efficiency_bound', lambda delta: 1 / jnp.cosh(delta)),
    ),
    'a biased plug-in': (
        *('paced', 'T4: the plug-in kernel is unbiased up to a constant at a = b = 1'),
        *(competence, 'beta_kernel', lambda p, a, b: p**a * (1 - p) ** (b + 0.01)),
    ),
    'optimum with 1 / tau': (
        *('adpo', 'the optimum is pi_ref q^tau / Z'),
        *(preference, 'closed_form_policy', lambda l, q, tau: preference_optimum(l, q, 1 / tau)),
    ),
    'DPO with its arguments swapped': (
        *('adpo', 'DPO and soft DPO are special cases'),
        *(preference_family, 'dpo', lambda l, r, beta: ORIGINAL_DPO(r, l, beta)),
    ),
}
preference_optimum, ORIGINAL_DPO = preference.closed_form_policy, preference_family.dpo


def only(monkeypatch, slug, statement):
    """Leaves the paper with one statement, to run no more than needed."""
    paper = verify.PAPERS[slug]
    alone = dataclasses.replace(paper, checks={statement: paper.checks[statement]})
    monkeypatch.setitem(verify.PAPERS, slug, alone)


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_wrong_theorem_makes_its_row_fail_and_the_exit_status_one(name, monkeypatch, capsys):
    slug, statement, module, attribute, wrong = MUTATIONS[name]
    only(monkeypatch, slug, statement)
    assert verify.main([slug]) == 0
    monkeypatch.setattr(module, attribute, wrong)
    capsys.readouterr()
    assert verify.main([slug]) == 1
    assert 'FAIL' in capsys.readouterr().out


def test_an_error_inside_a_statement_is_a_failed_row_that_says_why(monkeypatch, capsys):
    def refuse(gram, lam):
        raise ValueError('the Gram matrix is bad')

    only(monkeypatch, 'even_your_teacher', 'T1: every step is diagonal in the eigenbasis')
    monkeypatch.setattr(kr, 'ridge_smoother', refuse)
    assert verify.main(['even_your_teacher']) == 1
    assert 'the Gram matrix is bad' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('row', 'holds'),
    [
        (equal('', 1.0, 1.0 + 1e-9, 1e-8), True),
        (equal('', 1.0, 1.0 + 1e-7, 1e-8), False),
        (equal('', [1.0, 2.0], [1.0, 2.1], 0.05), False),
        (equal('', [1.0, math.nan], 1.0, 1.0), False),
        (at_most('', 1.0, 0.9), False),
        (at_most('', [0.0, 0.8], 0.9), True),
        (at_most('', math.nan, 0.9), False),
        (at_most('', -math.inf, 0.9), False),
        (at_most('', 0.95, 1.0, -0.1), False),
        (at_least('', [0.8, 1.0], 0.9), False),
        (at_least('', 0.9, 0.9), True),
        (counter_example('', [0.0, 0.2], 0.1), True),
        (counter_example('', 1e-12, 0.1), False),
    ],
)
def test_verdicts(row, holds):
    assert row.holds is holds


def test_rows_report_the_worst_entry():
    row = equal('', [[1.0, 5.0], [2.0, 3.0]], [[1.0, 5.5], [2.0, 4.0]], 0.1)
    assert (row.measured, row.bound) == (3.0, 4.0)
    row = at_most('', [1.0, 2.0], [0.5, 2.0])
    assert (row.measured, row.bound) == (1.0, 0.5)


def test_a_statement_cannot_be_registered_twice():
    paper = Paper('slug', 'title', '0')
    paper.statement('T1')(lambda rng: [])
    with pytest.raises(ValueError, match="'T1' is registered twice"):
        paper.statement('T1')


def test_report_holds_every_row_and_a_figure_for_every_drawing(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.STYLE, 'savefig.dpi', 60)
    every = [row for found in rows.values() for row in found]
    verify.write_report(every, list(verify.PAPERS), 0, tmp_path)
    document = json.loads((tmp_path / 'rows.json').read_text())
    assert len(document['rows']) == len(every)
    assert all(row['holds'] for row in document['rows'])
    report = (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert f'{len(every)} rows, 0 failed' in report
    assert report.count('| holds |') == len(every)
    drawn = [drawing for slug in verify.PAPERS for drawing in figures.drawings(slug)]
    assert report.count('![') == len(drawn) >= 6
    for drawing in drawn:
        assert f'({drawing.name}.png)' in report
        assert (tmp_path / f'{drawing.name}.png').read_bytes()[:4] == b'\x89PNG'


def test_figures_are_those_of_papers():
    named = {module.name for module in pkgutil.iter_modules(figures.__path__)}
    assert named <= set(verify.PAPERS)
    assert figures.drawings('no_such_paper') == ()


def test_a_failed_row_is_marked_in_report_and_json(tmp_path):
    bad = Row('q', math.nan, '=', 1.0, 0.0, 'why', 'adpo', 's')
    report = verify.markdown([bad], ['adpo'], 0, {})
    assert '1 rows, 1 failed' in report
    assert '**fails**' in report
    assert verify._as_json(bad)['measured'] is None


@pytest.mark.parametrize('paper', ['even_your_teacher', 'paced', 'adpo'])
def test_axes_of_figures_are_labelled(paper):
    with jax.enable_x64(True):
        figure = figures.drawings(paper)[0].draw()
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert figure.axes[0].get_ylabel()


def test_unknown_papers_are_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as error:
        verify.main(['adop'])
    assert error.value.code == 2
    assert "Did you mean 'adpo'?" in capsys.readouterr().err


def test_the_command_lists_papers_and_statements():
    command = [sys.executable, '-m', 'kd.theory.verify', '--list']
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for slug, paper in verify.PAPERS.items():
        assert slug in listed
        assert all(name in listed for name in paper.checks)


def test_float64_is_not_left_enabled(rows):
    assert jnp.ones(()).dtype == jnp.float32
