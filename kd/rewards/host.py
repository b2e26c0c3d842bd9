"""Verifiers written in Python, inside a compiled step."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from kd import callables
from kd.errors import UserError
from kd.method import Batch
from kd.parallel.mesh import BATCH_AXES
from kd.rewards.reward import Reward

# What a verifier is asked: its positional arguments and its keywords, of what pickles.
Question = tuple[Sequence[Any], Mapping[str, Any]]
Encode = Callable[[np.ndarray, Mapping[str, np.ndarray]], Question]

# Seconds in which a process has to have imported the verifier.
_START = 120.0
# Complaints that are logged of each verifier.
_TOLD = 10


def plain(tokens: np.ndarray, row: Mapping[str, np.ndarray]) -> Question:
    """The tokens of an answer, int [n], and the fields of its prompt as keywords."""
    return (tokens,), dict(row)


def host(
    function: str,
    *,
    fields: Iterable[str] = (),
    encode: Encode = plain,
    mesh: Mesh | None = None,
    limit: float = 5.0,
    workers: int = 4,
) -> Reward:
    """The reward that a function of Python gives, an answer at a time.

    Answers are judged by `workers` processes (on each host) that run nothing else, in the middle of
    the step. One that takes longer than `limit` seconds, raises, dies, or is judged NaN or infinite
    has the reward NaN, as has every answer of a hung process, which is ended and begun anew. What
    is right within the limit on one day may not be on another: keep it far from what is usual, or
    a run that is interrupted may not end as it would have.

    Over several devices each judges the answers that lie on it; over the axis 'tensor', along which
    they lie more than once, the first one does for all.

    Args:
      function: import path; `function(*arguments, **keywords) -> float` of a question.
      fields: of the batch that belong to the question.
      encode: `encode(tokens int [n], {field: array}) -> (arguments, keywords)`, in the process of
        the run: where tokens become text.
      mesh: of the step; None for one device.
      limit: seconds for an answer.
      workers: processes.

    Raises:
      UserError: no such function, or a number out of range.
    """
    callables.resolve(function)
    if limit <= 0 or workers < 1:
        raise UserError(f'a verifier needs limit > 0 and workers >= 1, got {limit} and {workers}.')
    names, pool = tuple(fields), Pool(function, limit, workers)

    def judge(tokens: jax.Array, mask: jax.Array, *values: jax.Array) -> np.ndarray:
        rows = [np.asarray(x) for x in (tokens, mask, *values)]
        questions = [
            encode(said[there], dict(zip(names, row, strict=True)))
            for said, there, *row in zip(*rows, strict=True)
        ]
        return np.asarray(pool.ask(questions), np.float32)

    def local(*arrays: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(arrays[0].shape[:1], jnp.float32)
        return jax.pure_callback(judge, shape, *arrays)

    def once(*arrays: jax.Array) -> jax.Array:
        first = jax.lax.axis_index('tensor') == 0
        nothing = jnp.zeros(arrays[0].shape[0], jnp.float32)
        return jax.lax.psum(jax.lax.cond(first, local, lambda *_: nothing, *arrays), 'tensor')

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        arrays = (tokens, mask, *(batch[name] for name in names))
        if mesh is None or mesh.size == 1:
            return local(*arrays)
        rows = PartitionSpec(BATCH_AXES)
        of_device = once if mesh.shape['tensor'] > 1 else local
        spread = jax.shard_map(of_device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return spread(*arrays)

    return reward


class Pool:
    """Processes of a verifier; `ask` may be called by several threads at once."""

    def __init__(self, function: str, limit: float, workers: int) -> None:
        self.function, self.limit = function, limit
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix='verifier')
        self.idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(_Worker(function, limit))
        self.told, self.lock = 0, threading.Lock()
        weakref.finalize(self, _close, self.idle, self.threads)

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """A verdict on each; NaN where there is none."""
        return list(self.threads.map(self._one, questions))

    def _one(self, question: Question) -> float:
        worker = self.idle.get()
        try:
            value, wrong = worker.ask(question)
        finally:
            self.idle.put(worker)
        if not wrong and not math.isfinite(value):
            wrong = f'the verdict is {value}'
        if wrong:
            self._tell(wrong)
            return math.nan
        return value

    def _tell(self, wrong: str) -> None:
        with self.lock:
            self.told += 1
            if self.told <= _TOLD:
                last = '; further ones are not told' if self.told == _TOLD else ''
                logging.warning('%s: no verdict: %s%s', self.function, wrong, last)


class _Worker:
    """A process, begun when it is first asked."""

    def __init__(self, function: str, limit: float) -> None:
        self.function, self.limit = function, limit
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None

    def ask(self, question: Question) -> tuple[float, str]:
        """(verdict, '') or (NaN, what went wrong)."""
        connection = self._begun()
        began = time.monotonic()
        try:
            connection.send(question)
            if connection.poll(self.limit):
                return connection.recv()
            self.end()
            return math.nan, f'it took longer than {self.limit:g} s'
        except (EOFError, OSError):
            self.end()
            return math.nan, f'its process died after {time.monotonic() - began:.1f} s'

    def _begun(self) -> Connection:
        if self.connection is not None:
            return self.connection
        ours, theirs = multiprocessing.Pipe()
        arguments = [self.function, str(theirs.fileno()), str(self.limit)]
        # In a session of its own: a signal to the run, which may go on for a while, is not for it.
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'kd.rewards.worker', *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.connection = ours
        try:
            ready = ours.poll(_START) and ours.recv() == 'ready'
        except EOFError:
            ready = False
        if not ready:
            self.end()
            raise RuntimeError(f'the process of the verifier {self.function} does not start.')
        return ours

    def end(self) -> None:
        """Ends the process; the next question begins another."""
        if self.connection is not None and self.process is not None:
            self.connection.close()
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection = self.process = None


def _close(idle: queue.SimpleQueue[_Worker], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=True)
    while not idle.empty():
        idle.get().end()
