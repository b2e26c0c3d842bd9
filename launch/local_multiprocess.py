"""Starts a recipe in several processes on this machine: a pod on loopback.

    python launch/local_multiprocess.py --processes=2 --devices=2 -- \\
        --config=configs/vision/logit_kd.py:cpu --workdir=runs/two

Everything after `--` goes to `kd.main`. Each process has `--devices` virtual CPU devices; they
speak over Gloo. The exit status is that of the first process to fail, 0 if none does. SIGTERM,
SIGHUP and Ctrl-C are passed on to all. `--dry_run` prints the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

# The others find out themselves that one is gone; who has not after so long is ended.
PATIENCE_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parse(argv)
    port = arguments.port or _free_port()
    commands = [
        [
            *(sys.executable, '-m', 'kd.main'),
            f'--distributed=127.0.0.1:{port},{arguments.processes},{index}',
            *arguments.command,
        ]
        for index in range(arguments.processes)
    ]
    settings = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(arguments.devices)}
    if arguments.dry_run:
        prefix = ' '.join(f'{name}={value}' for name, value in settings.items())
        print('\n'.join(f'{prefix} {shlex.join(command)}' for command in commands))
        return 0
    environment = os.environ | settings
    processes = [subprocess.Popen(command, env=environment) for command in commands]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    return _wait(processes)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--devices', type=int, default=2, help='virtual devices of each process')
    parser.add_argument('--port', type=int, default=0, help='0 takes a free one')
    parser.add_argument('--dry_run', action='store_true')
    parser.add_argument('command', nargs='+', help='arguments of kd.main, after --')
    arguments = parser.parse_args(argv)
    if arguments.processes < 1 or arguments.devices < 1:
        parser.error('--processes and --devices must be positive')
    return arguments


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """Waits for all; returns the status of the first that failed."""
    status, failed_at = 0, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        failed = [i for i, process in enumerate(processes) if process.poll()]
        if failed and not status:
            status, failed_at = processes[failed[0]].returncode, time.monotonic()
            how = f'status {status}' if status > 0 else signal.Signals(-status).name
            # A reader that is gone is no reason to leave the processes alone.
            with contextlib.suppress(OSError):
                print(f'local_multiprocess: process {failed[0]} ended with {how}', file=sys.stderr)
        if status and time.monotonic() - failed_at > PATIENCE_S:
            for process in processes:
                process.kill()
    codes = [process.returncode for process in processes]
    status = status or next((code for code in codes if code), 0)
    # A shell knows a process that died of signal n by 128 + n.
    return status if status >= 0 else 128 - status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


if __name__ == '__main__':
    sys.exit(main())
