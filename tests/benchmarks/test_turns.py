"""Processes that take turns: what they answer, what is told when one fails, and what is made of
the answers."""

import argparse
import os
import subprocess
import sys

import pytest

from kd.benchmarks import turns
from kd.errors import UserError

WORKER = """
import time
from kd.benchmarks import turns

HELD = []

def fill(mib):
    print('a library says something')
    HELD.append(bytearray(mib << 20))
    return turns.peak_mib()

def wait(seconds):
    return turns.cpu_seconds(lambda: time.sleep(seconds), 2)

def where(text):
    import os
    return [text, sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]

def fail():
    raise ValueError('no such thing')

FUNCTIONS = dict(fill=fill, wait=wait, where=where, fail=fail, peak=turns.peak_mib)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / 'side.py').write_text(WORKER)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    core = min(os.sched_getaffinity(0))
    made = turns.Worker(sys.executable, 'side', core)
    yield made, core
    made.close()


def test_a_worker_answers_from_one_core_and_tells_its_own_peak(worker):
    ask, core = worker[0].ask, worker[1]
    assert ask('where', text='é\n') == ['é\n', [core], '1']
    # Of Python alone: this process, which is far larger, does not count.
    before = ask('peak')
    assert 5 < before < 60
    assert ask('fill', mib=64) - before == pytest.approx(64, abs=8)
    # Sleep is no work.
    took, nothing = ask('wait', seconds=0.05)
    assert 0 <= took < 0.02
    assert nothing is None


def test_a_worker_that_fails_or_cannot_start_is_one_line(worker):
    with pytest.raises(UserError, match=r'python.*: ValueError: no such thing$'):
        worker[0].ask('fail')
    with pytest.raises(UserError, match=r'^/none/python cannot be started: No such file'):
        turns.Worker('/none/python', 'side', worker[1])
    gone = turns.Worker(sys.executable, 'kd.no_such_module', worker[1])
    with pytest.raises(UserError, match=r"No module named 'kd.no_such_module'$"):
        gone.ask('name')
    gone.close()


def test_every_round_has_a_turn_of_each_and_ratios_are_of_one_round():
    order = []

    def side(name, seconds):
        def ask():
            order.append(name)
            return {'cpu_s': seconds.pop(0)}

        return ask

    answers = turns.take_turns(
        {'kd': side('kd', [9.0, 1.0, 2.0, 4.0]), 'peer': side('peer', [9.0, 3.0, 2.0, 6.0])}, 3
    )
    assert order == ['kd', 'peer'] * 4
    rates = turns.rates(answers, 12)
    assert rates == {'kd': [12.0, 6.0, 3.0], 'peer': [4.0, 6.0, 2.0]}
    found = turns.Comparison('work', rates['kd'], rates['peer'], 1.5)
    assert found.ratios() == [3.0, 1.0, 1.5]
    assert not found.missed()
    assert found._replace(target=1.6).missed()
    row = turns.table([found], 'them').splitlines()[-1]
    assert row == ('| work | 6.0 (3.0-12.0) | 4.0 (2.0-6.0) | 1.50 (1.00-3.00) | 1.5 |')
    alone = turns.Comparison('work', rates['kd'], turns.rates({'kd': []}, 12)['peer'], 1.5)
    assert not alone.missed()
    assert turns.table([alone], 'them').splitlines()[-1] == '| work | 6.0 (3.0-12.0) |  |  | 1.5 |'


def test_without_a_peer_one_line_says_so(capsys):
    options = argparse.Namespace(peers='', core=min(os.sched_getaffinity(0)))
    with turns.sides('kd.benchmarks.turns', '', options) as (workers, peer):
        assert set(workers) == {'kd'}
        assert peer == 'peer'
    assert capsys.readouterr().out.count('\n') == 1


def test_the_other_side_needs_python_alone():
    """Neither jax nor numpy are where the peers are, and nothing of kd asks for them there."""
    asked = f'import sys; sys.path.insert(0, {str(turns.ROOT)!r}); import kd.benchmarks.turns'
    subprocess.run([sys.executable, '-I', '-S', '-c', asked], check=True)
