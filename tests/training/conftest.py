"""A run in processes of its own, which tests kill, stop and damage."""

import multiprocessing
import sys

import pytest
from runs import RECIPES, Command


@pytest.fixture(scope='session')
def processes():
    """Starts `kd.main` in fresh processes whose imports were paid for once."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['kd.main', 'kd.training.loop', 'kd.reports.classification'])
    sys.path.insert(0, str(RECIPES))
    yield context
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope='session')
def uninterrupted(processes, tmp_path_factory):
    """The directory of a run that was left alone."""
    command = Command(processes, tmp_path_factory.mktemp('whole') / 'run')
    assert command.run() == 0, command.said()
    return command.workdir
