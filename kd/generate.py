"""Answers of a language model.

    python -m kd.generate --weights=gguf:SmolLM2.gguf --chat --prompt='What is snow?'
    python -m kd.generate --weights=runs/mine/student --prompt='The argument is'

The answer alone goes to standard output, its speed to standard error. Weights are 'hf:DIRECTORY',
'gguf:FILE' or the directory of a finished stage, whose data name the tokenizer. Temperature 0 takes
the most probable token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd import export, files, process
from kd.errors import UserError
from kd.io import pretrained, safetensors
from kd.models.decoder import Decoder
from kd.parallel.sharding import floating
from kd.references import is_foreign
from kd.sampling.autoregressive import sampler
from kd.text import templates
from kd.text import tokenizer as tokenizers
from kd.text.tokenizer import Tokenizer


def load(weights: str, dtype: str = '') -> tuple[Decoder, Any, str]:
    """The decoder of `--weights`, its variables, and a reference to its tokenizer ('' for none).

    Raises:
      UserError: nothing there, no decoder, or no type.
    """
    changes = {}
    if dtype:
        floating(dtype, '--dtype')
        changes = {'dtype': dtype, 'param_dtype': dtype}
    if is_foreign(weights):
        described = pretrained.describe(weights)
        module = pretrained.network(weights, **changes)
        if not isinstance(module, Decoder):
            raise UserError(f"'{weights}' is a {type(module).__name__}, not a decoder of text.")
        decoder = module
        variables = pretrained.load(weights, _abstract(decoder))
        return decoder, variables, described.tokenizer
    directory = Path(weights)
    file = directory.parent / 'config.json'
    if not (directory / 'done.json').is_file() or not file.is_file():
        raise UserError(
            f"--weights='{weights}' is neither 'hf:DIRECTORY' nor 'gguf:FILE' nor the directory of "
            'a finished stage, such as runs/mine/student.'
        )
    variables = safetensors.stage_variables(directory)
    decoder = export.stage_decoder(directory, variables)
    if decoder.adapter:
        raise UserError(
            f'{weights} has adapters alone; merge them into their base, by python -m kd.export '
            f'{weights} DIRECTORY --base=REFERENCE, and name hf:DIRECTORY.'
        )
    if dtype:
        decoder = decoder.clone(dtype=dtype, param_dtype=dtype)
        variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    stored = config_lib.to_plain(files.read_json(file, 'manifest.json beside it holds it too'))
    data = config_lib.data_of(stored.get('data', {}), stored[directory.name].get('data', {}))
    # A stage may learn from what an earlier one has left of the recipe's own text.
    sources = (data.get('source', {}), stored.get('data', {}).get('source', {}))
    named = [source['tokenizer'] for source in sources if source.get('tokenizer')]
    return decoder, variables, named[0] if named else ''


def _abstract(decoder: Decoder) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def tokenizer_of(given: str, own: str, weights: str, decoder: Decoder) -> Tokenizer:
    """The tokenizer of a network.

    Args:
      given: of `--tokenizer`, '' for its own.
      own: a reference to what it has been trained with, '' if that is not known.
      weights: of `--weights`.
      decoder: the network.

    Raises:
      UserError: none is named; another one than that of files that bring theirs, or with more
        tokens than the network has.
    """
    if not (given or own):
        raise UserError(f"{weights} names no tokenizer; give --tokenizer='hf:DIR'.")
    tokenizer = tokenizers.load(given or own)
    if given and own and is_foreign(weights):
        tokenizers.check_same(tokenizer, tokenizers.load(own), where='--tokenizer')
    tokenizers.shared_size(tokenizer, decoder.num_classes)
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str, *, chat: bool, decoder: Decoder) -> np.ndarray:
    """Tokens of a prompt, int32 [P].

    Raises:
      UserError: an empty prompt, one that leaves no room for an answer, or no chat template.
    """
    if chat:
        messages = [{'role': 'user', 'content': text}]
        ids = templates.render(tokenizer, messages, add_generation_prompt=True)[0]
    else:
        begin = [tokenizer.bos] if tokenizer.begins else []
        ids = np.asarray([*begin, *tokenizer.encode(text)], np.int32)
    if not len(ids):
        raise UserError('the prompt is empty.')
    if len(ids) >= decoder.max_length:
        raise UserError(
            f'the prompt of {len(ids):,} tokens leaves no room: the model takes '
            f'{decoder.max_length:,}.'
        )
    return ids


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answer; exit status 2 for something to correct."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.generate',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--weights', required=True, help="'hf:DIR', 'gguf:FILE' or a stage")
    parser.add_argument('--prompt', required=True)
    parser.add_argument('--chat', action='store_true', help='render by the chat template')
    parser.add_argument('--max_new', type=int, default=128, help='tokens of the longest answer')
    parser.add_argument('--temperature', type=float, default=0.0)
    parser.add_argument('--top_p', type=float, default=1.0)
    parser.add_argument('--top_k', type=int, default=0)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--tokenizer', default='', help="'hf:DIR' or 'gguf:FILE', else as trained")
    parser.add_argument('--dtype', default='', help="such as 'bfloat16'; default: float32")
    arguments = parser.parse_args(argv)
    try:
        return _answer(arguments)
    except (UserError, ValueError) as error:
        print(f'kd: {error}', file=sys.stderr)
        return 2


def _answer(arguments: argparse.Namespace) -> int:
    decoder, variables, reference = load(arguments.weights, arguments.dtype)
    tokenizer = tokenizer_of(arguments.tokenizer, reference, arguments.weights, decoder)
    ids = prompt_ids(tokenizer, arguments.prompt, chat=arguments.chat, decoder=decoder)
    room = decoder.max_length - len(ids)
    draw = sampler(
        decoder,
        max_new=min(arguments.max_new, room),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        stop=tokenizer.stop,
        # What pads a vocabulary is no text.
        forbidden=range(tokenizer.size, decoder.num_classes),
    )
    prompt, mask = jnp.asarray(ids)[None], jnp.ones((1, len(ids)), bool)
    key = jax.random.key(arguments.seed)
    program = jax.jit(draw).lower(variables, prompt, mask, key).compile()
    began = time.perf_counter()
    said = jax.block_until_ready(program(variables, prompt, mask, key))
    took = time.perf_counter() - began
    tokens = np.asarray(said.tokens[0])[np.asarray(said.mask[0])]
    print(tokenizer.decode(tokens).strip())
    cut = ', cut at --max_new' if said.truncated[0] else ''
    print(
        f'{len(ids)} tokens read, {len(tokens)} written in {took:.2f} s: '
        f'{len(tokens) / took:.1f} tokens/s{cut}',
        file=sys.stderr,
    )
    return 0


if __name__ == '__main__':
    process.command(main)
