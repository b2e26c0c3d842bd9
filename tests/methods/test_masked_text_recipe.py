"""The recipe of text: two steps of a stage, its report, and texts by the command that samples."""

import json
import sys

import numpy as np
import pytest

from kd import config as kd_config
from kd import process, sample
from kd.data.builders import characters
from kd.evaluators.masked_text import written
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp('text')
    (place / 'tiny_shakespeare.txt').write_text('To be, or not to be: that is the question. ' * 60)
    config = kd_config.load('configs/discrete/text.py:shakespeare')
    config.data_dir = str(place)
    # The first alone: what the others do is no other recipe, and compiling them takes its time.
    config.stages = ('teacher',)
    with config.unlocked():
        del config.trained_on, config.student
    config.report.rows = (('teacher', 'teacher'),)
    config.report.steps, config.report.texts = (2, 3), (2,)
    stage = config.teacher
    stage.steps, stage.batch_size = 2, 8
    stage.network.width, stage.network.depth = 8, 1
    stage.evaluators.samples.update(steps=(2, 3), samples=6, batch=4)
    loop.run(config, place / 'run')
    return place / 'run'


def test_the_report_has_likelihood_and_entropy_by_steps(run):
    report = json.loads((run / 'report.json').read_text())
    found = report['metrics']['teacher']
    for name in ('nll', 'entropy', 'bigram_entropy', 'distinct'):
        for calls in ('2', '3', 'data'):
            assert np.isfinite(found[f'samples/{name}_{calls}'])
    # Runs of a text of ten words are foreseen by it, those of two steps of training are not.
    assert found['samples/nll_data'] < 0.5 < found['samples/nll_2']
    assert found['validation/nll'] > 2
    assert len(report['texts']['teacher']['2']) == characters.LENGTH
    text = (run / 'report.md').read_text()
    assert '## Nats a symbol, to the judge' in text
    assert '| teacher |' in text
    assert (run / 'figures' / 'samples.png').is_file()


def test_texts_are_printed(run, monkeypatch, capsys):
    def started(*arguments):
        monkeypatch.setattr(sys, 'argv', ['sample', *arguments])
        return process.entry(sample.main), capsys.readouterr()

    status, said = started(f'--run={run}/teacher', '--steps=3', '--samples=2')
    assert status == 0
    lines = said.out.rstrip('\n').split('\n')
    assert [len(line) for line in lines] == [characters.LENGTH] * 2
    assert set(''.join(lines)) <= set(characters.SYMBOLS)
    status, again = started(f'--run={run}/teacher', '--steps=3', '--samples=2')
    assert again.out == said.out
    status, said = started(f'--run={run}/teacher', '--guidance=2')
    assert status == 2
    assert '--times, --base and --guidance are of pictures; texts have --steps.' in said.err


def test_symbols_without_names_are_written_as_numbers():
    class Numbers:
        class_names = None

    assert written(Numbers(), np.array([[3, 11]])) == ['3 11']
