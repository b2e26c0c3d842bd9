"""The process of a verifier: judges answers one after another, as long as somebody asks.

    python -m kd.rewards.worker MODULE.FUNCTION DESCRIPTOR SECONDS

It imports nothing that the function does not. Started and ended by `kd.rewards.host`.
"""

from __future__ import annotations

import importlib
import math
import signal
import sys
from multiprocessing.connection import Connection


def serve(path: str, connection: Connection, limit: float) -> None:
    """Answers `(arguments, keywords)` with (value, '') or (None, what went wrong)."""
    module, _, name = path.rpartition('.')
    function = getattr(importlib.import_module(module), name)
    connection.send('ready')
    while True:
        try:
            arguments, keywords = connection.recv()
        except EOFError:
            return
        # Whoever asked gives up before; this ends a process that nobody can end any more.
        signal.alarm(math.ceil(limit) + 10)
        try:
            answer = float(function(*arguments, **keywords)), ''
        except Exception as error:
            answer = math.nan, f'{type(error).__name__}: {error}'
        signal.alarm(0)
        connection.send(answer)


if __name__ == '__main__':
    serve(sys.argv[1], Connection(int(sys.argv[2])), float(sys.argv[3]))
