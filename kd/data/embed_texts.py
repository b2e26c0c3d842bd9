"""Writes what the text encoders of a diffusion model say, for `kd.data.latents`.

    python -m kd.data.embed_texts captions.txt --model=/models/sdxl --encoder=sdxl --to=DIR/train

Texts are the lines of a file. The model is a directory of diffusers, with `tokenizer`,
`text_encoder`, and `tokenizer_2` and so on. Wants `transformers` and `torch`, which the rest of kd
does without: pip install -e '.[peers]'.

| encoder | text | pooled | asked |
|---|---|---|---|
| sd15, sd21 | 77, 768 or 1024 | | CLIP, its last layer |
| sdxl | 77, 2048 | 1280 | two of CLIP, their last layer but one |
| sd3 | 333, 4096 | 2048 | the same two, padded with zeros, then 256 tokens of T5 |
| flux | 512, 4096 | 768 | T5, and CLIP for pooled |
| pixart | 120, 4096 and mask | | T5 |
| wan | 512, 4096 | | UMT5, zeros after the end of a text |

Beside them is the empty text, `null_text`, `null_pooled` and `null_mask`, for guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from kd import files
from kd.data.latents import MANIFEST, file_of
from kd.errors import UserError
from kd.process import command, path_argument
from kd.sampling.denoiser import NULL

PER_FILE = 1_024


class Said(NamedTuple):
    """What an encoder says of texts.

    Attributes:
      last, before: its last layer and the one before, [n, M, C].
      pooled: one vector each, [n, P], by its projection where it has one.
      mask: bool [n, M], which tokens are text.
    """

    last: np.ndarray
    before: np.ndarray
    pooled: np.ndarray | None
    mask: np.ndarray


# (texts, tokens or None for as many as the encoder has, whether padding is hidden from it)
Encoder = Callable[[Sequence[str], int | None, bool], Said]


def _clip(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    return {'text': first(texts, None, False).last}


def _sdxl(texts: Sequence[str], *encoders: Encoder) -> dict[str, np.ndarray]:
    said = [encoder(texts, None, False) for encoder in encoders]
    text = np.concatenate([each.before for each in said], axis=-1)
    return {'text': text, 'pooled': _pooled(said[-1])}


def _sd3(texts: Sequence[str], *encoders: Encoder) -> dict[str, np.ndarray]:
    both = [encoder(texts, None, False) for encoder in encoders[:2]]
    third = encoders[2](texts, 256, False).last
    text = np.concatenate([each.before for each in both], axis=-1)
    text = np.pad(text, ((0, 0), (0, 0), (0, third.shape[-1] - text.shape[-1])))
    pooled = np.concatenate([_pooled(each) for each in both], axis=-1)
    return {'text': np.concatenate([text, third], axis=1), 'pooled': pooled}


def _flux(texts: Sequence[str], first: Encoder, second: Encoder) -> dict[str, np.ndarray]:
    pooled = _pooled(first(texts, None, False))
    return {'text': second(texts, 512, False).last, 'pooled': pooled}


def _pixart(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    said = first(texts, 120, True)
    return {'text': said.last, 'mask': said.mask}


def _wan(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    said = first(texts, 512, True)
    return {'text': np.where(said.mask[..., None], said.last, 0)}


def _pooled(said: Said) -> np.ndarray:
    if said.pooled is None:
        raise UserError('an encoder of pooled texts has none; is it the right directory?')
    return said.pooled


# By name, how many encoders there are and what becomes of what they say.
ENCODERS: dict[str, tuple[int, Callable[..., dict[str, np.ndarray]]]] = {
    'sd15': (1, _clip),
    'sd21': (1, _clip),
    'sdxl': (2, _sdxl),
    'sd3': (3, _sd3),
    'flux': (2, _flux),
    'pixart': (1, _pixart),
    'wan': (1, _wan),
}


def write(
    folder: Path, of: str, encoders: Sequence[Encoder], texts: Sequence[str], *, batch: int = 16
) -> dict[str, Any]:
    """Writes the embeddings of texts, in files of `PER_FILE`; returns the manifest.

    Args:
      folder: of a split.
      of: one of `ENCODERS`.
      encoders: as many as it has.
      texts: one for each example.
      batch: texts at a time.
    """
    made = ENCODERS[of][1]
    null = {f'{NULL}{name}': x[0] for name, x in made([''], *encoders).items()}
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[int]] = {}
    for start in range(0, len(texts), PER_FILE):
        some = texts[start : start + PER_FILE]
        parts = [made(some[i : i + batch], *encoders) for i in range(0, len(some), batch)]
        tensors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        shapes = {name: list(x.shape[1:]) for name, x in tensors.items()}
        with files.replacing(file_of(folder, start // PER_FILE)) as partial:
            safetensors.numpy.save_file(_plain(tensors | null), partial)
    shapes |= {name: list(x.shape) for name, x in null.items()}
    manifest = dict(encoder=of, examples=len(texts), per_file=PER_FILE, fields=shapes)
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def _plain(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: np.ascontiguousarray(x, bool if x.dtype == bool else np.float32)
        for name, x in tensors.items()
    }


def load(model: Path, of: str, device: str) -> list[Encoder]:
    """The encoders of a directory of diffusers, by transformers.

    Raises:
      UserError: a part that is missing, or no transformers.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"texts are read by {error.name}, which is not installed: pip install -e '.[peers]'"
        ) from error

    def loaded(suffix: str) -> Encoder:
        place = model / f'text_encoder{suffix}'
        if not (place / 'config.json').is_file():
            raise UserError(f'{place} has no config.json: it is no text encoder of diffusers.')
        kind = files.read_json(place / 'config.json', 'fetch it again')['architectures'][0]
        network = getattr(transformers, kind).from_pretrained(place).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model / f'tokenizer{suffix}')

        def encode(texts: Sequence[str], length: int | None, masked: bool) -> Said:
            tokens = tokenizer(
                list(texts), padding='max_length', truncation=True, return_tensors='pt',
                max_length=length or tokenizer.model_max_length,
            ).to(device)  # fmt: skip
            seen = dict(attention_mask=tokens.attention_mask) if masked else {}
            with torch.no_grad():
                said = network(tokens.input_ids, output_hidden_states=True, **seen)
            pooled = getattr(said, 'text_embeds', None)
            pooled = getattr(said, 'pooler_output', None) if pooled is None else pooled

            def array(x: Any) -> np.ndarray:
                return x.float().cpu().numpy()

            return Said(
                array(said.last_hidden_state),
                array(said.hidden_states[-2]),
                None if pooled is None else array(pooled),
                tokens.attention_mask.bool().cpu().numpy(),
            )

        return encode

    return [loaded('' if i == 0 else f'_{i + 1}') for i in range(ENCODERS[of][0])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m kd.data.embed_texts', description=__doc__)
    parser.add_argument('texts', type=path_argument, metavar='FILE', help='a text a line')
    parser.add_argument('--model', type=path_argument, required=True, metavar='DIRECTORY')
    parser.add_argument('--encoder', choices=list(ENCODERS), required=True)
    parser.add_argument('--to', type=path_argument, required=True, metavar='DIRECTORY')
    parser.add_argument('--batch', type=int, default=16, help='texts at a time; default 16')
    parser.add_argument('--device', default='cpu', help="of torch; default 'cpu'")
    arguments = parser.parse_args(argv)
    lines = Path(arguments.texts).read_text(encoding='utf-8').splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f'{arguments.texts} has no texts.')
    encoders = load(Path(arguments.model), arguments.encoder, arguments.device)
    manifest = write(
        Path(arguments.to), arguments.encoder, encoders, texts, batch=max(arguments.batch, 1)
    )
    print(f'{manifest["examples"]} texts in {arguments.to}')
    return 0


if __name__ == '__main__':
    command(main)
