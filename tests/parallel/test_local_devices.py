"""Which devices each process of a node takes, for every documented way to start them."""

import pytest

from kd.errors import UserError
from kd.parallel import local_devices as local_devices_lib
from kd.parallel.local_devices import local_devices

EIGHT = {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7', 'SLURM_GPUS_ON_NODE': '8'}


def slurm(tasks, rank, node='0', **more):
    place = {'SLURM_LOCALID': str(rank), 'SLURM_NODEID': node, 'SLURM_STEP_TASKS_PER_NODE': tasks}
    return {**EIGHT, **place, **more}


@pytest.mark.parametrize(
    ('environment', 'devices'),
    [
        # One process a GPU, as launch/slurm.sbatch starts them.
        (slurm('8(x4)', 3), [3]),
        # One for the whole node, one for half of it.
        (slurm('1(x4)', 0), list(range(8))),
        (slurm('2(x4)', 1), [4, 5, 6, 7]),
        # Nodes of different counts.
        (slurm('1,4(x2)', 1, node='2'), [2, 3]),
        (slurm('1,4(x2)', 0, node='0'), list(range(8))),
        # Each task is bound to its own devices (--gpus-per-task, --gpu-bind).
        (slurm('8', 5, CUDA_VISIBLE_DEVICES='5'), [0]),
        (slurm('4', 2, CUDA_VISIBLE_DEVICES='4,5'), [0, 1]),
        # Without the counts by node, as in older Slurm.
        (
            {**EIGHT, 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_TASKS': '1'},
            list(range(8)),
        ),
        (
            {**EIGHT, 'SLURM_LOCALID': '1', 'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_NODES': '2'},
            [4, 5, 6, 7],
        ),
        # Open MPI, with what CUDA is told, and AMD's name for it.
        (
            {
                'OMPI_COMM_WORLD_LOCAL_RANK': '1',
                'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
                'CUDA_VISIBLE_DEVICES': '0,1,2,3',
            },
            [2, 3],
        ),
        (
            {
                'OMPI_COMM_WORLD_LOCAL_RANK': '0',
                'OMPI_COMM_WORLD_LOCAL_SIZE': '1',
                'ROCR_VISIBLE_DEVICES': '0,1',
            },
            [0, 1],
        ),
        # CUDA sees nothing from an invalid entry on.
        (slurm('1', 0, CUDA_VISIBLE_DEVICES='0,1,-1,3'), [0, 1]),
        # Someone has chosen; no GPUs; no launcher.
        (slurm('1', 0, JAX_LOCAL_DEVICE_IDS='0,1'), None),
        (slurm('2', 0, CUDA_VISIBLE_DEVICES=''), None),
        (EIGHT, None),
    ],
)
def test_the_devices_of_a_node_are_shared_out(environment, devices):
    assert local_devices(environment) == devices


@pytest.mark.parametrize('processes', [1, 2, 4, 8])
def test_every_device_belongs_to_one_process(processes):
    taken = [local_devices(slurm(str(processes), rank)) for rank in range(processes)]
    assert sorted(device for devices in taken for device in devices) == list(range(8))


def test_idle_devices_are_told_and_too_many_processes_refused(caplog):
    assert local_devices(slurm('3', 2)) == [4, 5]
    assert '2 of the 8 GPUs of this node lie idle: 3 processes take 2 each' in caplog.text
    with pytest.raises(UserError, match='16 processes on this node share 8 GPUs'):
        local_devices(slurm('16', 2))


def test_where_nothing_is_said_the_gpus_of_the_machine_are_counted(monkeypatch, tmp_path):
    for name in ('nvidia0', 'nvidia1', 'nvidiactl', 'nvidia-uvm'):
        (tmp_path / name).touch()
    monkeypatch.setattr(local_devices_lib, '_DEVICES', tmp_path)
    mpi = {'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}
    assert local_devices(mpi) == [1]
