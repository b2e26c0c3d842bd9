"""Stages that write files, killed for real: what was there stays, the rest has equal bits."""

import os
import signal
import time

import pytest
from runs import RECIPES, Command, arrays

TEXTS = str(RECIPES / 'texts.py')


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def killed(command, folder, least):
    """Kills a run once so many files are whole; the files that were."""
    process = command.start()
    while process.is_alive() and len(list(folder.glob('*.array_record'))) < least:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, command.said()
    return {file.name: file.stat().st_mtime_ns for file in folder.glob('*.array_record')}


@pytest.fixture
def slowly(monkeypatch):
    monkeypatch.setenv('TEXTS_SLOWLY', '0.05')


def test_a_killed_cache_of_text_goes_on_and_a_student_of_it_is_the_same(
    processes, slowly, tmp_path
):
    extra = ('--config.cache.writers.teacher.form=sampled',)
    whole, cut = (
        Command(processes, tmp_path / name, 'cached', extra, TEXTS) for name in ('whole', 'cut')
    )
    assert whole.run() == 0, whole.said()
    folder = cut.workdir / 'cache' / 'teacher'
    before = killed(cut, folder, 2)
    assert 2 <= len(before) < 6
    assert cut.run() == 0, cut.said()
    after = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert after == before
    assert contents(folder) == contents(whole.workdir / 'cache' / 'teacher')
    ours, theirs = (arrays(one.workdir, 'student', 'variables') for one in (whole, cut))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_killed_answers_go_on_and_are_the_same(processes, slowly, tmp_path):
    whole, cut = (
        Command(processes, tmp_path / name, 'answers', config=TEXTS) for name in ('whole', 'cut')
    )
    assert whole.run() == 0, whole.said()
    folder = cut.workdir / 'answers' / 'train_answers'
    before = killed(cut, folder, 2)
    assert 2 <= len(before) < 6
    assert cut.run() == 0, cut.said()
    after = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert after == before
    assert contents(folder) == contents(whole.workdir / 'answers' / 'train_answers')
    ours, theirs = (arrays(one.workdir, 'student', 'variables') for one in (whole, cut))
    assert all((ours[name] == theirs[name]).all() for name in ours)
