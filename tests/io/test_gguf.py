"""GGUF files written by the package gguf, whole and damaged."""

import gguf as package
import hf_models
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import gguf

FIELDS = {
    'a.u8': ('add_uint8', 7),
    'a.i8': ('add_int8', -7),
    'a.u16': ('add_uint16', 700),
    'a.i16': ('add_int16', -700),
    'a.u32': ('add_uint32', 70_000),
    'a.i32': ('add_int32', -70_000),
    'a.u64': ('add_uint64', 1 << 40),
    'a.i64': ('add_int64', -(1 << 40)),
    'a.f32': ('add_float32', 0.5),
    'a.f64': ('add_float64', 0.1),
    'a.bool': ('add_bool', True),
    'a.text': ('add_string', 'Größe'),
    'a.texts': ('add_array', ['ab', '', 'ü']),
    'a.numbers': ('add_array', [3, -1, 2]),
    'a.nested': ('add_array', [[1, 2], [3]]),
}


def write(file, tensors=()):
    writer = package.GGUFWriter(file, 'llama')
    for key, (method, value) in FIELDS.items():
        getattr(writer, method)(key, value)
    for name, raw, kind in tensors:
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_metadata_of_every_type_come_back(tmp_path):
    found = gguf.metadata(write(tmp_path / 'a.gguf'))
    assert found['general.architecture'] == 'llama'
    assert {key: found[key] for key in FIELDS} == {key: value for key, (_, value) in FIELDS.items()}


@pytest.mark.parametrize('kind', gguf.TYPES)
def test_parts_of_a_tensor_are_those_of_the_whole(tmp_path, kind):
    of = package.GGMLQuantizationType[kind]
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    raw = package.quants.quantize(x, of)
    file = write(tmp_path / 'a.gguf', [('x', raw, of), ('y', raw[0], of)])
    tensors = gguf.read(file)[1]
    wanted = package.quants.dequantize(raw, of)
    # At most half a step of the blocks' 4 bits.
    np.testing.assert_allclose(wanted, x, atol=0.3)
    stored = {'F16': 'float16', 'BF16': 'bfloat16'}.get(kind, 'float32')
    assert (tensors['x'].shape, tensors['x'].dtype.name) == ((3, 5, 64), stored)
    np.testing.assert_array_equal(tensors['x'].read().astype(np.float32), wanted)
    part = (slice(1, 3), slice(0, 4, 2), slice(10, 40))
    np.testing.assert_array_equal(tensors['x'].read(part).astype(np.float32), wanted[part])
    np.testing.assert_array_equal(tensors['y'].read().astype(np.float32), wanted[0])


def test_other_types_are_refused_by_name_and_their_metadata_are_read(tmp_path):
    of = package.GGMLQuantizationType.Q4_K
    file = write(tmp_path / 'a.gguf', [('blk.0.ffn_up.weight', np.zeros((2, 144), np.uint8), of)])
    with pytest.raises(UserError, match=r"'blk\.0\.ffn_up\.weight' has the type Q4_K; .* are F32,"):
        gguf.read(file)
    assert gguf.metadata(file)['a.text'] == 'Größe'


def test_a_file_that_is_cut_short_anywhere_is_one_line(tmp_path):
    whole = tmp_path / 'whole.gguf'
    hf_models.write_gguf(whole, 'llama', types=('Q8_0',))
    content, cut = whole.read_bytes(), tmp_path / 'cut.gguf'
    gguf.read(whole)
    for size in (0, 3, 10, 23, 24, 30, 100, 500, 1000, len(content) // 2, len(content) - 33):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match=r'cut\.gguf is no whole GGUF file') as e:
            gguf.read(cut)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=r"'output_norm.weight' ends at byte [\d,]+, of "):
        gguf.read(cut)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'PK\3\4' + b'\0' * 99, 'it does not begin with GGUF'),
        (b'GGUF\1\0\0\0' + b'\0' * 99, r'version 1 is none of \[2, 3\]'),
        # Of a machine of the other byte order.
        (b'GGUF\0\0\0\3' + b'\0' * 99, r'version 50331648 is none of'),
    ],
)
def test_other_files_are_told(tmp_path, content, message):
    (tmp_path / 'a.gguf').write_bytes(content)
    with pytest.raises(UserError, match=message):
        gguf.metadata(tmp_path / 'a.gguf')


def test_a_missing_file_is_told_with_the_nearest(tmp_path):
    write(tmp_path / 'model-q8.gguf')
    with pytest.raises(
        UserError, match=r"GGUF file .*model-q4\.gguf\. Did you mean '.*-q8.gguf'\?"
    ):
        gguf.metadata(tmp_path / 'model-q4.gguf')
