"""Event files of TensorBoard, written without TensorFlow, whose import takes seconds."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from kd import files

# Of one process no two files have a name.
_COUNT = itertools.count()


class EventFile:
    """A new event file in a directory; each write is in the file when the call returns."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory and begins the file."""
        name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
        self._path = directory / f'{name}.{next(_COUNT)}.v2'
        with files.naming(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(self._path.open('wb'))
        self._append(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag at a step."""
        self._summary(
            step, *(summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items())
        )

    def text(self, step: int, tag: str, text: str) -> None:
        """A text, shown as Markdown, at a step."""
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name='text')
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._summary(step, summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata))

    def close(self) -> None:
        with files.naming(self._path):
            self._records.close()

    def _summary(self, step: int, *values: summary_pb2.Summary.Value) -> None:
        summary = summary_pb2.Summary(value=values)
        self._append(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: event_pb2.Event) -> None:
        with files.naming(self._path):
            self._records.write(event.SerializeToString())
            self._records.flush()
