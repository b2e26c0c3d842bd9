"""Signals and output of a process: in this one where they can be, in real ones where not."""

import argparse
import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kd import process
from kd.errors import NonFiniteError, Preempted, UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Signals as a program finds them there; in the background a shell has Ctrl-C ignored."""
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_is_done_now_and_is_only_noted_where_it_is_deferred(number):
    before = signal.getsignal(number)
    with process.signals() as signals:
        with pytest.raises(process.Stopped) as stop:
            kill(number)
        assert stop.value.number == number
        assert process.active() is signals
    assert signal.getsignal(number) is before
    with process.signals() as signals, signals.deferred():
        assert not signals.asked()
        kill(number)
        assert signals.asked()
        with pytest.raises(process.Stopped), signals.at_once():
            pytest.fail('it came before')


def test_of_several_signals_the_first_counts_and_a_second_ctrl_c_ends_at_once():
    with process.signals() as signals, signals.deferred():
        kill(signal.SIGTERM)
        kill(signal.SIGHUP)
        assert signals.came == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            kill(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    try:
        with process.signals() as signals:
            kill(signal.SIGHUP)
            assert not signals.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_statuses():
    assert process.exit_status(signal.SIGTERM) == process.exit_status(signal.SIGHUP) == 75
    assert process.exit_status(signal.SIGINT) == 130


def test_a_process_that_sits_in_a_call_is_ended_by_a_thread_which_saves_first(tmp_path):
    code = f"""
        import hashlib, threading
        from pathlib import Path
        from kd import process
        process._GRACE_S = 0.2
        def rescue():
            Path({str(tmp_path)!r}, 'saved').write_text('x')
        with process.signals(own=True) as signals, signals.deferred(), signals.at_once(rescue):
            threading.Timer(0.5, print, ['ready'], {{'flush': True}}).start()
            hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10 ** 9)  # Minutes in C.
    """
    child = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = child.communicate(timeout=20)[1]
    assert child.returncode == 75
    assert time.monotonic() - began < 15
    assert said == 'kd: stopped by SIGTERM; run the same command to go on.\n'
    assert (tmp_path / 'saved').exists()


class Gone(io.StringIO):
    """A stream that fails in one of the ways in which they do."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    'error',
    [OSError(errno.ENOSPC, 'full'), BrokenPipeError(errno.EPIPE, 'gone'), ValueError('closed')],
)
def test_what_cannot_be_said_is_not(monkeypatch, error):
    monkeypatch.setattr(sys, 'stdout', Gone(error))
    monkeypatch.setattr(sys, 'stderr', Gone(error))
    with process.output():
        print('a word', flush=True)
        print('a word', file=sys.stderr)
    assert isinstance(sys.stdout, Gone)


@pytest.mark.parametrize(
    ('error', 'status', 'said'),
    [
        (UserError('wrong'), 2, 'kd: wrong\n'),
        (NonFiniteError('nan'), 3, 'kd: nan\n'),
        (Preempted('saved', signal.SIGTERM), 75, 'kd: saved\n'),
        (process.Stopped(signal.SIGHUP), 75, 'kd: stopped by SIGHUP.\n'),
        (KeyboardInterrupt(), 130, 'kd: interrupted.\n'),
        (OSError(errno.ENOSPC, 'No space left on device'), 2, 'kd: No space left on device.\n'),
        (FileNotFoundError(errno.ENOENT, 'No such file', '/x'), 2, 'kd: No such file: /x.\n'),
    ],
)
def test_errors_for_people_are_one_line_and_a_status(capsys, error, status, said):
    def main():
        raise error

    assert process.entry(main) == status
    assert capsys.readouterr().err == said


def test_other_errors_keep_their_trace():
    def main():
        raise OSError('a slip of ours')

    with pytest.raises(OSError, match='a slip of ours'):
        process.entry(main)


def test_an_error_that_a_library_makes_of_a_signal_is_not_told(capsys):
    def main():
        try:
            kill(signal.SIGTERM)
        except BaseException as error:
            raise ImportError('failed to import') from error

    assert process.entry(main) == 75
    assert capsys.readouterr().err == 'kd: stopped by SIGTERM.\n'


def test_what_a_library_says_of_a_full_disk_is_a_word():
    full = ValueError('RESOURCE_EXHAUSTED: Error writing "/x/y": [28: No space left on device]')
    assert process.cause(full) == 'No space left on device'
    assert process.cause(ValueError('something\nelse')) == 'something'


# Started by kd alone: on a pipe, and as a peer that knows nothing of kd.
STARTED = [
    ROOT / 'kd' / 'rewards' / 'worker.py',
    ROOT / 'kd' / 'benchmarks' / 'plain' / 'quickstart.py',
]
COMMANDS = [
    file.relative_to(ROOT)
    for file in sorted((ROOT / 'kd').rglob('*.py'))
    if "if __name__ == '__main__':" in file.read_text() and file not in STARTED
]


@pytest.mark.parametrize('file', COMMANDS, ids=str)
def test_every_command_ends_as_a_person_expects(file):
    started = (ROOT / file).read_text().rpartition("if __name__ == '__main__':\n")[2].strip()
    assert started in ('process.command(main)', 'command(main)', 'process.command(_main)')


def _said(*arguments, **environment):
    """Exit status and errors of a process that has Ctrl-C as a program in a terminal has it."""
    code = """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *arguments],
        cwd=ROOT, env=os.environ | environment, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_ctrl_c_during_the_imports_of_a_command_is_silent(tmp_path):
    (tmp_path / 'jax.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    path = f'{tmp_path}:{ROOT}'
    said = _said('-m', 'kd.theory.verify', PYTHONPATH=path)
    assert said == (-signal.SIGINT, '')


def test_a_signal_that_a_destructor_loses_comes_again():
    code = """
        import os, signal, time
        from kd import process

        class Lost:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

        def main():
            Lost()
            time.sleep(20)

        process.command(main)
    """
    said = _said('-c', textwrap.dedent(code))
    assert said == (130, 'kd: stopped by SIGINT.\n')


@pytest.mark.parametrize(
    ('module', 'arguments'),
    [
        ('kd.claims.__main__', ['adpo', '--output=gs://bucket/results']),
        ('kd.claims.__main__', ['adpo', '--data_dir=gs://bucket/data']),
        ('kd.aot.__main__', ['--table=gs://bucket/aot.md']),
        ('kd.aot.__main__', ['--config=x.py', '--json=s3://bucket/x.json']),
        ('kd.theory.verify', ['--output=gs://bucket/theory']),
        ('kd.data.prepare', ['digits', '--data_dir=gs://bucket/data']),
        ('kd.benchmarks.fused_divergence', ['--json=gs://bucket/x.json']),
        ('kd.benchmarks.scaling', ['--page=gs://bucket/x.md']),
        ('kd.io.safetensors', ['gs://bucket/run/student', 'x']),
        ('kd.io.safetensors', ['run/student', 'gs://bucket/x']),
        ('kd.io.quantised', ['run/student', 'gs://bucket/x']),
        ('kd.export', ['run/student', 'gs://bucket/x']),
        ('kd.main', ['--config=x.py', '--workdir=gs://bucket/run']),
        ('kd.main', ['--config=x.py', '--workdir=run', '--data_dir=gs://bucket/data']),
    ],
)
def test_addresses_are_refused_at_once_wherever_a_path_is_given(
    module, arguments, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [module, *arguments])
    try:
        status = process.entry(importlib.import_module(module).main)
    except SystemExit as end:
        status = end.code
    assert status == 2
    [*_, line] = capsys.readouterr().err.strip().splitlines()
    assert "'" in line
    assert 'is an address; kd reads and writes folders of this machine only' in line
    assert not os.listdir(tmp_path)


def test_a_folder_for_what_is_written_must_be_there_before_anything_is_computed(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match=r'there is no folder .*none'):
        process.file_argument(str(tmp_path / 'none' / 'x.json'))
    assert process.file_argument(str(tmp_path / 'x.json')) == tmp_path / 'x.json'
