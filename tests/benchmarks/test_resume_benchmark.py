"""The resume benchmark times what it says, shown with a stand-in for Python that trains nothing."""

import re
import stat
import sys

import pytest

from kd.benchmarks import resume
from kd.errors import UserError

# Takes half a second to its first step if its cache is empty, a tenth if not; goes on where it was.
TRAINER = """#!{python}
import os, signal, sys, time
from pathlib import Path
assert sys.argv[1:3] == ['-m', 'kd.main'], sys.argv
given = dict(a.split('=', 1) for a in sys.argv[3:])
if given['--config'] == 'wrong.py':
    sys.exit('there is no such recipe')
cache = Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
time.sleep(0.1 if cache.exists() else 0.5)
cache.mkdir(exist_ok=True)
log = Path(given['--workdir']) / 'teacher' / 'metrics.jsonl'
log.parent.mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
step = len(log.read_text().splitlines()) if log.exists() else 0
with log.open('a') as out:
    while not stopped:
        step += 1
        out.write('{{"step": %d}}\\n' % step)
        out.flush()
        time.sleep(0.02)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    script = tmp_path / 'python'
    script.write_text(TRAINER.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, 'executable', str(script))


def test_the_second_start_goes_on_from_the_first_and_finds_its_cache(trainer, tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    cold, resumed = resume.measure('recipe.py', 'teacher', folder)
    assert cold.wall >= 0.5
    # Less than the first by the time that the cache saves, up to what the machine does beside.
    assert 0.1 <= resumed.wall < cold.wall
    assert resumed.step > cold.step >= 1
    assert 0 < resumed.cpu < resumed.wall


def test_a_run_that_fails_is_shown(trainer, tmp_path):
    with pytest.raises(UserError, match='no such recipe'):
        resume.measure('wrong.py', 'teacher', tmp_path)


def test_medians_and_the_target(monkeypatch, capsys):
    starts = iter([(30.0, 15.0), (40.0, 10.0), (20.0, 18.0)])
    pairs = ((resume.Start(a, a / 2, 1), resume.Start(b, b / 4, 2)) for a, b in starts)
    monkeypatch.setattr(resume, 'measure', lambda *_: next(pairs))
    assert resume.main([]) == 0
    cold, resumed = capsys.readouterr().out.splitlines()[2:]
    assert cold == '| from nothing | 30.0 | 15.0 | 1 | |'
    # Ratios 1/2, 1/4 and 9/10; seconds 15, 10 and 18.
    assert re.sub(' +', ' ', resumed) == '| resumed | 15.0 | 3.8 | 0.50 | 20 |'
    monkeypatch.setattr(resume, 'measure', lambda *_: 2 * (resume.Start(21.0, 1.0, 1),))
    assert resume.main(['--rounds=1']) == 1
