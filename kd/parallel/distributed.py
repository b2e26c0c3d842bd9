"""Several processes of one run: joining them, agreeing, and noticing that one is gone.

A run is of several processes only if asked, by `--distributed` or the variable KD_DISTRIBUTED:

    auto                 Slurm, a TPU pod or Open MPI say which process this is (`jax.distributed`)
    HOST:PORT,COUNT,I    process I of COUNT; process 0 listens at HOST:PORT

Under `auto` the processes of a node share out its devices; see `kd.parallel.local_devices`.
Otherwise each takes what it sees: set CUDA_VISIBLE_DEVICES where several are on one machine.

All processes need the same work directory (a shared file system or a mounted bucket): each writes
its shards of a checkpoint, the first writes everything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

from kd.errors import UserError, reason
from kd.parallel.local_devices import local_devices

ENVIRONMENT = 'KD_DISTRIBUTED'
# Exit status of a process that lost the others.
EXIT_LOST = 76
# A process that sends no sign of life for so long counts as dead.
HEARTBEAT_S = 30
# One that is done waits so long for the others, the first of which makes the report; the dead are
# told by their heartbeat.
END_S = 30 * 24 * 3600
# How long parting takes, once all are done. JAX allows 300 s at most, whatever it is given.
SHUTDOWN_S = 60
# How long a process that stops with an error waits for the others to stop with it.
_FAREWELL_S = 10.0

T = TypeVar('T')
_NETWORK = re.compile(r'gloo|nccl|socket|peer|heartbeat|barrier|unavailable|coordination', re.I)


@contextlib.contextmanager
def session(spec: str = '') -> Iterator[None]:
    """Joins the processes of a run for the time of the block; without a `spec`, does nothing.

    Where another process dies, this one says so and exits with status EXIT_LOST: whatever it
    computes next would wait for the dead one for ever.

    Args:
      spec: see the module; '' for the variable KD_DISTRIBUTED, and if that is empty a single
        process.

    Raises:
      UserError: a spec that cannot be read, or processes that do not come together.
    """
    spec = spec or os.environ.get(ENVIRONMENT, '')
    if not spec:
        yield
        return
    _join(spec)
    _exit_on_abort()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        leave_if_lost(error)
        _crash()
    except (ValueError, RuntimeError):
        # Of an error meant for people the others know as a rule, and are about to stop too; but
        # none may wait for ever for one that does not.
        leaving = threading.Thread(target=_part, daemon=True)
        leaving.start()
        leaving.join(_FAREWELL_S)
        raise
    except BaseException:
        _crash()
    _part()


def is_first() -> bool:
    """Whether this process writes logs, configs, manifests and reports."""
    return jax.process_index() == 0


def agree(action: Callable[[], T]) -> T:
    """Runs `action` in every process; where it raises `UserError` in one, it does in all.

    Every process has finished `action` when this returns.
    """
    result: Any = None
    problem = ''
    error = None
    try:
        result = action()
    except UserError as caught:
        error, problem = caught, str(caught)
    if jax.process_count() > 1:
        problems = gather(problem)
        for process, told in enumerate(problems):
            if told and error is None:
                error = UserError(f'process {process}: {told}')
    if error is not None:
        raise error
    return result


def from_first(action: Callable[[], T]) -> T:
    """Runs `action` in the first process; all get its result, which must be JSON.

    A `UserError` of the first process is raised in all.
    """
    result = agree(action if is_first() else lambda: None)
    if jax.process_count() == 1:
        return result  # type: ignore[return-value]
    return json.loads(gather(json.dumps(result))[0])


def preemption() -> Callable[[], bool]:
    """A question to ask after every step: have all processes reached the step to stop at?

    Once any process gets SIGTERM, all answer yes from one and the same call on. JAX says it at that
    call only, which may be the last step of a stage, where nothing is stopped.
    """
    calls = itertools.count()
    reached = False

    def ask() -> bool:
        nonlocal reached
        reached = reached or multihost_utils.reached_preemption_sync_point(next(calls))
        return reached

    return ask


def leave_if_lost(error: jax.errors.JaxRuntimeError) -> None:
    """Ends this process, and says why, if `error` comes of another one's death."""
    if jax.process_count() > 1 and _NETWORK.search(str(error)):
        _leave(
            f'process {jax.process_index()} of {jax.process_count()} lost the others, one of which '
            f'has probably died ({reason(error)}).'
        )


def _join(spec: str) -> None:
    match = re.fullmatch(r'(?P<address>[^,]+:\d+),(?P<count>\d+),(?P<index>\d+)', spec)
    arguments: dict[str, Any] = {}
    if match:
        arguments = {
            'coordinator_address': match['address'],
            'num_processes': int(match['count']),
            'process_id': int(match['index']),
            # What a launcher says of this process is not asked for.
            'cluster_detection_method': 'deactivate',
        }
    elif spec != 'auto':
        raise UserError(
            f"--distributed (or {ENVIRONMENT}) is 'auto' or HOST:PORT,COUNT,INDEX such as "
            f"10.0.0.1:8476,4,0; got '{spec}'."
        )
    else:
        arguments = {'local_device_ids': local_devices()}
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
            **arguments,
        )
    except (ValueError, RuntimeError) as error:
        if 'must be called before' in str(error):
            raise UserError(
                f'--distributed={spec}: JAX was used before the processes joined, by a module '
                'that Python imports when it starts, or by the program that calls kd.'
            ) from error
        raise UserError(
            f'--distributed={spec}: the processes do not come together: {reason(error)} '
            "'auto' needs Slurm, a TPU pod or Open MPI; elsewhere give HOST:PORT,COUNT,INDEX."
        ) from error


def _part() -> None:
    """Leaves the run together with the others, when all are done."""
    get_barrier_sync_fn()(key='kd/end', timeout_ms=END_S * 1000)
    jax.distributed.shutdown()


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    # Few lengths, so that few programs are compiled.
    padded = np.zeros(-(-max(size, 1) // 4096) * 4096, np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b'\0').decode() for row in np.asarray(rows)]


def _leave(what: str) -> None:
    text = (
        f'kd: {what} The last checkpoint stands: start all processes again with the same command '
        'to resume from it.\n'
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, text.encode())
    # Not sys.exit: leaving in an orderly way means waiting for the others.
    os._exit(EXIT_LOST)


def _crash() -> None:
    """Ends this process at once with its stack trace, so that the others notice."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _exit_on_abort() -> None:
    """Gives the last word to us where JAX's coordination service aborts the process.

    It does so when it loses the first process or is told that another one is dead, from a thread
    of its own, and Python's signal handlers do not run in a process that aborts.
    """
    global _on_abort
    index, count = jax.process_index(), jax.process_count()

    def on_abort(_: int) -> None:
        _leave(f'process {index} of {count} was aborted: another process has probably died.')

    # Kept alive for as long as the process is.
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, _on_abort)


_on_abort: Any = None
