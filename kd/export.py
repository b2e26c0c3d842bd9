"""A trained language model as a directory that `transformers` loads.

    python -m kd.export runs/mine/student exported --tokenizer=hf:/models/Qwen3-0.6B

writes config.json and model.safetensors, in parts with an index where they are large, and the files
of the tokenizer. `AutoModelForCausalLM.from_pretrained('exported')` reads them. Of a stage that
trained adapters it writes these for PEFT (`kd.io.peft`), or with --base the base with the adapters
in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import callables, files, process
from kd import config as config_lib
from kd.errors import UserError
from kd.io import decoder_names, hf_decoders, peft, pretrained, safetensors
from kd.io.torch_weights import Part
from kd.models import adapters
from kd.models.decoder import Decoder
from kd.references import is_foreign
from kd.state import path_name
from kd.text import tokenizer as tokenizers

# Bytes of tensors in a file, before the next one begins.
LARGEST = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A leaf, or a layer of a stacked one, and where it goes."""

    part: Part
    leaf: Any
    layer: int | None

    def shape(self) -> tuple[int, ...]:
        return self.part.shape(self.leaf.shape if self.layer is None else self.leaf.shape[1:])

    def write(self, out: np.ndarray) -> None:
        x = self.leaf if self.layer is None else self.leaf[self.layer]
        axes = self.part.axes or tuple(range(out.ndim))
        view = out.transpose(axes)
        rows = slice(None) if self.part.rows is None else np.asarray(self.part.rows)
        view[..., rows] = np.asarray(jax.device_get(x))


def export(
    decoder: Decoder,
    variables: Mapping[str, Any],
    directory: Path,
    *,
    tokenizer: str = '',
    largest: int = LARGEST,
) -> dict[str, int]:
    """Writes a model; what is there under the same names is replaced.

    Args:
      decoder: the network.
      variables: its own; they keep their type.
      directory: made if it is not there.
      tokenizer: 'hf:DIR' or 'gguf:FILE' whose tokenizer goes with the model; the ids of its special
        tokens go into config.json.
      largest: bytes of the tensors in a file.

    Returns:
      {file: bytes of its tensors}.

    Raises:
      UserError: a decoder that transformers does not have, variables that are not its own, or a
        directory that cannot be written.
    """
    # Where nothing is said, transformers takes ids of the models that it was written for.
    tokens = dict.fromkeys(pretrained.TOKENS)
    tokens |= pretrained.describe(tokenizer).tokens if tokenizer else {}
    config = hf_decoders.config(decoder) | tokens
    if decoder.num_classes <= max(_ids(tokens), default=-1):
        raise UserError(
            f'{tokenizer} has special tokens beyond the {decoder.num_classes:,} of the model; it '
            'is the tokenizer of another.'
        )
    tensors = _tensors(decoder, variables, config['model_type'])
    dtype = jax.tree.leaves(variables['params'])[0].dtype.name
    shards = _shards(tensors, largest)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in pretrained.WEIGHTS:
            (directory / name).unlink(missing_ok=True)
        for file, names in shards.items():
            made = {name: _made(tensors[name]) for name in names}
            safetensors.save(directory / file, made, {'format': 'pt'})
        sizes = {file: sum(_size(tensors[x]) for x in names) for file, names in shards.items()}
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': places}
            files.write_json(directory / pretrained.WEIGHTS[1], index)
        # `dtype` is the name in transformers 5.
        files.write_json(directory / 'config.json', config | dict(torch_dtype=dtype, dtype=dtype))
        if tokenizer:
            tokenizers.save(tokenizer, directory)
    except OSError as error:
        raise UserError(f'{directory} cannot be written: {error}.') from error
    return sizes


def _ids(tokens: Mapping[str, Any]) -> Iterator[int]:
    for found in tokens.values():
        yield from found if isinstance(found, list) else [] if found is None else [found]


def _tensors(decoder: Decoder, variables: Mapping[str, Any], kind: str) -> dict[str, list[_Piece]]:
    """The tensors of the file, each with what it is made of."""
    find = decoder_names.find(decoder, decoder_names.HF[kind], 'transformers')
    abstract = jax.eval_shape(decoder.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    wanted, tensors = dict(_leaves(abstract)), dict[str, list[_Piece]]()
    if {n: x.shape for n, x in _leaves(variables)} != {n: x.shape for n, x in wanted.items()}:
        raise UserError('the variables are not of the names and shapes of the decoder.')
    for name, leaf in _leaves(variables):
        found = find(tuple(name.split('/')[1:]), leaf.shape)
        parts = {None: found} if isinstance(found, Part) else dict(enumerate(found))
        for layer, part in parts.items():
            tensors.setdefault(part.name, []).append(_Piece(part, leaf, layer))
    return tensors


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _made(pieces: list[_Piece]) -> np.ndarray:
    out = np.empty(pieces[0].shape(), pieces[0].leaf.dtype)
    for piece in pieces:
        piece.write(out)
    return out


def _size(pieces: list[_Piece]) -> int:
    return int(np.prod(pieces[0].shape())) * pieces[0].leaf.dtype.itemsize


def _shards(tensors: Mapping[str, list[_Piece]], largest: int) -> dict[str, list[str]]:
    """{file: names of its tensors}, in order, a file full before the next begins."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, pieces in tensors.items():
        if groups[-1] and filled + _size(pieces) > largest:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _size(pieces)
    if len(groups) == 1:
        return {pretrained.WEIGHTS[0]: groups[0]}
    count = len(groups)
    return {f'model-{i:05}-of-{count:05}.safetensors': group for i, group in enumerate(groups, 1)}


def stage_decoder(directory: Path, variables: Mapping[str, Any]) -> Decoder:
    """The decoder that a stage trained, from the config of its run.

    Raises:
      UserError: no config beside the stage, or a network that is no decoder.
    """
    file = directory.parent / 'config.json'
    if not file.is_file():
        raise UserError(f'{directory} is no stage of a run: {file} is not there.')
    stored = config_lib.to_plain(files.read_json(file, 'manifest.json beside it holds it too'))
    block = dict(stored.get(directory.name, {}).get('network', {}))
    where = f'{file}, {directory.name}.network'
    embedding = variables['params'].get('embed', {}).get('embedding')
    beside = adapters.own(variables['params'])
    if not block or (embedding is None and not beside):
        raise UserError(f'{where} is no kd.models.decoder.Decoder; export it by kd.io.safetensors.')
    # The vocabulary, where the block left it to the data; adapters do not know it.
    takes = inspect.signature(callables.resolve(block['name'])).parameters
    if embedding is not None and 'num_classes' in takes:
        block.setdefault('num_classes', embedding.shape[0])
    decoder = config_lib.build(block, where=where)
    if not isinstance(decoder, Decoder):
        raise UserError(f'{where} is no kd.models.decoder.Decoder; export it by kd.io.safetensors.')
    return decoder


def on_base(
    decoder: Decoder, variables: Mapping[str, Any], base: str
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder and its variables with the adapters merged into their base.

    Args:
      decoder: with an `adapter`.
      variables: {'params': the adapters}.
      base: 'hf:DIR', 'gguf:FILE' or the directory of a stage.
    """
    assert decoder.adapter is not None
    plain = decoder.clone(adapter=None)
    if is_foreign(base):
        plain = plain.clone(num_classes=pretrained.describe(base).vocabulary)
        tree = jax.eval_shape(plain.init, jax.random.key(0), np.zeros((1, 1), np.int32))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        below = pretrained.load(
            base,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree),
        )
    else:
        below = safetensors.stage_variables(Path(base))
        plain = plain.clone(num_classes=below['params']['embed']['embedding'].shape[0])
    made = adapters.merged(below['params'], variables['params'], decoder.adapter.scale)
    return plain, {**below, 'params': made}


def main() -> int:
    """Writes the language model of a finished stage as a directory that transformers loads."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    path = process.path_argument
    parser.add_argument('stage', type=path, help='directory of a stage, such as runs/mine/student')
    parser.add_argument('directory', type=path)
    parser.add_argument('--weights', default='final', help="'final' or the name of an average")
    parser.add_argument(
        '--tokenizer', default='', help="'hf:DIR' or 'gguf:FILE' whose tokenizer goes with it"
    )
    parser.add_argument('--base', default='', help="of adapters: 'hf:DIR', 'gguf:FILE' or a stage")
    arguments = parser.parse_args()
    variables = safetensors.stage_variables(arguments.stage, arguments.weights)
    decoder = stage_decoder(arguments.stage, variables)
    if decoder.adapter and arguments.base:
        decoder, variables = on_base(decoder, variables, arguments.base)
    if decoder.adapter:
        sizes = peft.export(decoder, variables, arguments.directory)
        print(f'{arguments.directory}: adapters, {sum(sizes.values()):,} bytes')
        return 0
    sizes = export(decoder, variables, arguments.directory, tokenizer=arguments.tokenizer)
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    kind = json.loads((arguments.directory / 'config.json').read_text())['model_type']
    print(f'{arguments.directory}: {kind}, {count:,} parameters, {sum(sizes.values()):,} bytes')
    return 0


if __name__ == '__main__':
    process.command(main)
