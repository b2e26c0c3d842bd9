"""Verdicts of claims, and that the claim of every paper of the index starts."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageChops, ImageStat

from kd.claims import claim as claims
from kd.claims.__main__ import main
from kd.claims.claim import Check
from kd.errors import UserError
from kd.papers import index
from kd.process import entry

ROOT = Path(__file__).parents[2]
PAPERS = index.load(ROOT).values()


def started(arguments):
    """The exit status of the command."""
    return entry(lambda: main(arguments))


def test_a_check_is_the_paired_t_interval_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(1.0, 1.0, 6), rng.normal(0.0, 1.0, 6)
    measured = {'a': {'m': first}, 'b': {'m': second}}
    judged = claims.judge(Check('', 'm', 'a', 'b'), measured)
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert judged['interval'] == pytest.approx([expected.low, expected.high], rel=1e-12)
    assert judged['difference'] == pytest.approx(np.mean(first - second))


@pytest.mark.parametrize(
    ('check', 'verdict'),
    [
        (Check('', 'm', 'high', 'low'), claims.REPRODUCED),
        (Check('', 'm', 'low', 'high'), claims.NOT_REPRODUCED),
        (Check('', 'm', 'low', 'high', lower=True), claims.REPRODUCED),
        (Check('', 'm', 'high', 'low', margin=1.5), claims.NOT_REPRODUCED),
        (Check('', 'm', 'high', 'high'), claims.INCONCLUSIVE),
        (Check('', 'm', 'high', 1.5), claims.REPRODUCED),
        (Check('', 'm', 'low', 'high', lower=True, ratio=0.4), claims.NOT_REPRODUCED),
        (Check('', 'm', 'low', 'high', lower=True, ratio=0.6), claims.REPRODUCED),
    ],
)
def test_verdicts(check, verdict):
    measured = {'high': {'m': [2.0, 2.1, 1.9]}, 'low': {'m': [1.0, 1.05, 1.0]}}
    assert claims.judge(check, measured)['verdict'] == verdict


def test_one_seed_or_two_give_no_verdict():
    with pytest.raises(ValueError, match='at least 3 seeds'):
        claims.judge(Check('', 'm', 'a', 0.0), {'a': {'m': [1.0, 2.0]}})


def test_the_verdict_of_a_claim_is_that_of_its_weakest_check():
    good, bad, open_ = claims.REPRODUCED, claims.NOT_REPRODUCED, claims.INCONCLUSIVE
    assert claims.overall([good, good]) == good
    assert claims.overall([good, open_]) == open_
    assert claims.overall([good, open_, bad]) == bad


def test_every_result_belongs_to_a_claim_and_has_its_figure():
    for file in (ROOT / 'results').glob('*.json'):
        result = json.loads(file.read_text())
        assert result['claim'] == file.stem
        assert file.stem in claims.names()
        assert file.with_suffix('.png').stat().st_size > 5_000
        for check in result['checks']:
            assert check['seeds'] >= 3


@pytest.mark.parametrize('name', [paper.claim_name for paper in PAPERS if paper.claim])
def test_every_claim_starts(name, tmp_path, capsys, quick_compilation):
    with quick_compilation():
        assert main([name, '--smoke', f'--output={tmp_path}']) == 0
    assert 'Verdict:' in capsys.readouterr().out
    result = json.loads((tmp_path / f'{name}.json').read_text())
    values = [v for arm in result['arms'].values() for m in arm.values() for v in m['values']]
    assert np.isfinite(values).all()
    assert (tmp_path / f'{name}.png').stat().st_size > 5_000
    # No other claim has use of its programs, and together they take 2.8 GB.
    jax.clear_caches()


def test_data_that_is_not_there_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TFDS_DATA_DIR', 'elsewhere')
    assert started(['mtt', f'--data_dir={tmp_path / "empty"}', f'--output={tmp_path}']) == 2
    told = capsys.readouterr()
    assert f'kd.data.prepare mnist --data_dir={tmp_path / "empty"}' in told.err
    assert told.out == ''
    assert not list(tmp_path.glob('mtt*'))


def test_an_unknown_claim_is_said_with_the_nearest(capsys):
    assert started(['logit_kdd']) == 2
    assert "Did you mean 'logit_kd'" in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [[], ['--list']])
def test_without_a_name_the_claims_are_listed_with_their_verdicts(arguments, capsys):
    assert main(arguments) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed == {
        paper.claim_name: _verdict(paper.claim_name) for paper in PAPERS if paper.claim
    }


def _verdict(name):
    file = ROOT / 'results' / f'{name}.json'
    return json.loads(file.read_text())['verdict'] if file.exists() else 'not measured'


def test_a_figure_is_drawn_anew_from_what_was_measured(tmp_path):
    (tmp_path / 'taid.json').write_bytes(Path('results/taid.json').read_bytes())
    assert main(['taid', '--draw', f'--output={tmp_path}']) == 0
    with Image.open(tmp_path / 'taid.png') as new, Image.open('results/taid.png') as old:
        assert new.size == old.size
        difference = ImageChops.difference(new.convert('RGB'), old.convert('RGB'))
        assert ImageStat.Stat(difference).mean == pytest.approx([0, 0, 0], abs=2)


def test_a_figure_of_what_was_not_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'python -m kd\.claims taid'):
        main(['taid', '--draw', f'--output={tmp_path}'])
