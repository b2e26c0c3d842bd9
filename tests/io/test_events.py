"""Event files are what TensorBoard reads, record by record, and need no TensorFlow."""

import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2

from kd.io import events


def crc32c(data):
    """Bit by bit, of Castagnoli's polynomial; 0xE3069283 for the digits 1 to 9."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def records(file):
    content, found = file.read_bytes(), []
    while content:
        length, crc = struct.unpack('<QI', content[:12])
        assert crc == masked(content[:8])
        data = content[12 : 12 + length]
        assert struct.unpack('<I', content[12 + length : 16 + length])[0] == masked(data)
        found.append(event_pb2.Event.FromString(data))
        content = content[16 + length :]
    return found


def test_every_record_is_there_at_once_with_its_checksums(tmp_path):
    assert crc32c(b'123456789') == 0xE3069283
    log = events.EventFile(tmp_path / 'tensorboard')
    [file] = (tmp_path / 'tensorboard').iterdir()
    assert 'tfevents' in file.name
    log.text(0, 'stage', 'the *student*')
    log.scalars(100, {'train/loss': 0.5, 'validation/nll': float('nan')})
    version, text, scalars = records(file)  # before it is closed
    log.close()
    assert version.file_version == 'brain.Event:2'
    assert (text.step, text.summary.value[0].tensor.string_val[0]) == (0, b'the *student*')
    assert scalars.step == 100
    assert [(v.tag, v.simple_value) for v in scalars.summary.value] == [
        ('train/loss', 0.5), ('validation/nll', pytest.approx(np.nan, nan_ok=True))
    ]  # fmt: skip
    # A run that goes on begins a file of its own.
    events.EventFile(tmp_path / 'tensorboard').close()
    assert len(list((tmp_path / 'tensorboard').iterdir())) == 2


def test_tensorboard_shows_them(tmp_path, monkeypatch):
    # Its own reader in Python, in place of TensorFlow's.
    monkeypatch.setitem(sys.modules, 'tensorboard.compat.notf', types.ModuleType('notf'))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = events.EventFile(tmp_path)
    log.text(0, 'stage', 'student')
    for step in (1, 2):
        log.scalars(step, {'train/loss': 1 / step})
    log.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    [stage] = shown.Tensors('stage')
    assert stage.tensor_proto.string_val == [b'student']
    assert shown.SummaryMetadata('stage').plugin_data.plugin_name == 'text'
    loss = shown.Scalars('train/loss')
    assert [(each.step, each.value) for each in loss] == [(1, 1.0), (2, 0.5)]


def test_a_run_that_logs_imports_no_tensorflow(tmp_path):
    code = (
        'import sys, pathlib; from kd.training import loop; from kd.io.workdir import MetricLog; '
        'log = MetricLog(pathlib.Path(sys.argv[1]), resume_step=0); log.write(1, {"a": 1.0}); '
        'log.close(); print("tensorflow" in sys.modules)'
    )
    command = [sys.executable, '-c', code, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == 'False\n'
