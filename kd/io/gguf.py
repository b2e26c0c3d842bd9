"""GGUF files: metadata and tensors, as llama.cpp writes them.

The header is read here and not by the reader of the package `gguf`, which makes an array of every
token: seconds, and hundreds of megabytes. The package knows the types, and dequantises.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np

from kd import packages
from kd.errors import UserError, did_you_mean, reason
from kd.io.safetensors import Index

# Types of tensors that are read, by their names in the package.
TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1')

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
# Numbers among metadata by their codes in the file; a string is 8 and an array 9.
_NUMBERS: dict[int, str] = {
    **dict(enumerate(('u1', 'i1', '<u2', '<i2', '<u4', '<i4', '<f4', '?'))),
    10: '<u8',
    11: '<i8',
    12: '<f8',
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a file; a quantised one is float32 where it is read.

    Attributes:
      name: in the file.
      shape: as NumPy has it, the last axis the one along which quantised blocks lie.
      dtype: of what is read.
      kind: one of `TYPES`.
      raw: the mapped bytes, uint8 [*shape[:-1], bytes of a row].
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    raw: np.ndarray

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part that a slice per dimension names; only its rows are read."""
        index = index or (slice(None),) * len(self.shape)
        rows = np.ascontiguousarray(self.raw[index[:-1]])
        if self.kind in ('F32', 'F16', 'BF16'):
            return rows.view(self.dtype)[..., index[-1]]
        package = packages.need('gguf')
        kind = package.GGMLQuantizationType[self.kind]
        return package.quants.dequantize(rows, kind)[..., index[-1]]


def metadata(file: str | Path) -> dict[str, Any]:
    """The metadata of a file by key: numbers, strings, and lists of these.

    Raises:
      UserError: no GGUF file, one of a version that is not known, or one that is cut short.
    """
    return _open(Path(file))[1]


def read(file: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and all tensors by name, none of them read yet.

    Raises:
      UserError: as `metadata`, or a tensor of a type that is none of `TYPES`.
    """
    header, found = _open(Path(file))
    tensors = {}
    for name, shape, code, offset in header.tensors():
        kind, block, size = _kind(code)
        if kind not in TYPES:
            raise UserError(
                f"{file}: '{name}' has the type {kind}; those that can be read are "
                f'{", ".join(TYPES)}. Take a file in one of these.'
            )
        if shape[-1] % block:
            raise UserError(f"{file} is damaged: rows of '{name}' are no whole blocks.")
        row = shape[-1] // block * size
        count = row * int(np.prod(shape[:-1], dtype=np.int64))
        start = header.start + offset
        if start + count > header.bytes.size:
            raise UserError(
                f"{file} is no whole GGUF file: '{name}' ends at byte {start + count:,}, of "
                f'{header.bytes.size:,}; fetch it again.'
            )
        raw = header.bytes[start : start + count].reshape(*shape[:-1], row)
        tensors[name] = Tensor(name, shape, _dtype(kind), kind, raw)
    return found, tensors


def _open(file: Path) -> tuple[_Header, dict[str, Any]]:
    try:
        header = _Header(np.memmap(file, mode='r'))
        return header, header.fields()
    except FileNotFoundError as error:
        near = [str(each) for each in file.parent.glob('*.gguf')]
        raise UserError(f'There is no GGUF file {file}.{did_you_mean(str(file), near)}') from error
    except (OSError, ValueError, struct.error) as error:
        raise UserError(
            f'{file} is no whole GGUF file ({reason(error)}); fetch it again.'
        ) from error


class _Header:
    """What comes before the tensors, read from front to back; ValueError where it breaks off.

    Attributes:
      bytes: uint8 [size of the file], mapped.
      start: where the tensors begin.
    """

    def __init__(self, mapped: np.ndarray):
        self.bytes = mapped
        self._view = mapped.data
        self._at = len(_MAGIC)
        if bytes(self._view[: self._at]) != _MAGIC:
            raise ValueError('it does not begin with GGUF')
        version = self._number('<u4')
        if version not in _VERSIONS:
            raise ValueError(f'version {version} is none of {list(_VERSIONS)}')
        self._tensors, self._fields = self._number('<u8'), self._number('<u8')

    def fields(self) -> dict[str, Any]:
        """The metadata."""
        fields = {}
        for _ in range(self._fields):
            key = self._string()
            fields[key] = self._value(self._number('<u4'))
        alignment = int(fields.get('general.alignment', 32))
        self._infos = [self._info() for _ in range(self._tensors)]
        self.start = -(-self._at // alignment) * alignment
        return fields

    def tensors(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape, code of its type, bytes after `start`) of each."""
        return self._infos

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        # The file counts axes from the innermost one.
        sizes = [self._number('<u8') for _ in range(self._number('<u4'))]
        return name, tuple(reversed(sizes)) or (1,), self._number('<u4'), self._number('<u8')

    def _value(self, code: int) -> Any:
        if code in _NUMBERS:
            return self._number(_NUMBERS[code])
        if code == _STRING:
            return self._string()
        if code != _ARRAY:
            raise ValueError(f'metadata of an unknown type, {code}')
        of, count = self._number('<u4'), self._number('<u8')
        if of in _NUMBERS:
            return self._numbers(_NUMBERS[of], count).tolist()
        return [self._value(of) for _ in range(count)]

    def _number(self, kind: str) -> Any:
        return self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        found = np.frombuffer(self._view, kind, count, self._at)
        self._at += found.nbytes
        return found

    def _string(self) -> str:
        (count,) = struct.unpack_from('<Q', self._view, self._at)
        text = bytes(self._view[self._at + 8 : self._at + 8 + count])
        if len(text) < count:
            raise ValueError('a text breaks off')
        self._at += 8 + count
        return text.decode('utf-8', 'replace')


def _kind(code: int) -> tuple[str, int, int]:
    """Name of a type, and values and bytes of one of its blocks."""
    package = packages.need('gguf')
    try:
        kind = package.GGMLQuantizationType(code)
    except ValueError:
        return f'number {code}', 1, 1
    return (kind.name, *package.GGML_QUANT_SIZES[kind])


def _dtype(kind: str) -> np.dtype:
    if kind == 'BF16':
        import jax.numpy as jnp

        return np.dtype(jnp.bfloat16)
    return np.dtype(np.float16 if kind == 'F16' else np.float32)
