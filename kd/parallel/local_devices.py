"""Which devices of its machine a process takes, where a launcher started several."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kd.errors import UserError

log = logging.getLogger('kd')

# One file a GPU on Linux.
_DEVICES = Path('/dev')
_VISIBLE = ('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES')


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Places of this process's devices among those that it sees; None to leave it to JAX.

    Under Slurm and Open MPI, JAX gives a process one device, that of its rank on the node, so that
    of one process for eight GPUs seven would lie idle. Here the devices are shared out:

        one process a GPU                          each its own, as in JAX
        one process for all, or for several        all of them, or its equal share
        each sees its own only (--gpus-per-task)   all that it sees

    Raises:
      UserError: more processes on a node than devices.
    """
    if environment.get('JAX_LOCAL_DEVICE_IDS'):
        return None
    processes, rank = _place(environment)
    seen = _seen(environment)
    if not processes or not seen:
        return None
    on_node = _number(environment, 'SLURM_GPUS_ON_NODE') or seen
    if seen < on_node:
        return list(range(seen))
    if seen == 1 or processes == 1:
        return list(range(seen))
    share = seen // processes
    if not share:
        raise UserError(
            f'{processes} processes on this node share {seen} GPUs: start at most one process a '
            'GPU (ntasks-per-node in Slurm).'
        )
    if idle := seen - share * processes:
        log.warning(
            '%s of the %s GPUs of this node lie idle: %s processes take %s each.',
            idle, seen, processes, share,
        )  # fmt: skip
    return list(range(rank * share, (rank + 1) * share))


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    """(processes on this node, rank of this one among them); (0, 0) where no launcher says it."""
    if 'SLURM_LOCALID' in environment:
        rank = _number(environment, 'SLURM_LOCALID')
        node = _number(environment, 'SLURM_NODEID')
        counts = _expanded(environment.get('SLURM_STEP_TASKS_PER_NODE', ''))
        if node < len(counts):
            return counts[node], rank
        tasks = _number(environment, 'SLURM_STEP_NUM_TASKS') or _number(environment, 'SLURM_NTASKS')
        nodes = _number(environment, 'SLURM_STEP_NUM_NODES') or 1
        return max(-(-tasks // nodes), rank + 1), rank
    if 'OMPI_COMM_WORLD_LOCAL_RANK' in environment:
        rank = _number(environment, 'OMPI_COMM_WORLD_LOCAL_RANK')
        return max(_number(environment, 'OMPI_COMM_WORLD_LOCAL_SIZE'), rank + 1), rank
    return 0, 0


def _seen(environment: Mapping[str, str]) -> int:
    """How many GPUs this process sees; 0 if there are none."""
    for name in _VISIBLE:
        if name in environment:
            listed = [text.strip() for text in environment[name].split(',')]
            # What follows an invalid entry is not seen.
            return next((i for i, x in enumerate(listed) if x in ('', '-1')), len(listed))
    return _number(environment, 'SLURM_GPUS_ON_NODE') or len(
        [path for path in _DEVICES.glob('nvidia*') if re.fullmatch(r'nvidia\d+', path.name)]
    )


def _expanded(text: str) -> list[int]:
    """Slurm's '4(x2),1' as [4, 4, 1]."""
    counts = []
    for part in filter(None, text.split(',')):
        match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part)
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, '')
    return int(text) if text.isdigit() else 0
