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
| lumina2 | 256, 2304 and mask | | Gemma 2, its last layer but one, after an instruction |
| z_image | 512, 2560 and mask | | Qwen 3, its last layer but one, as a question |
| qwen_image | 1024, 3584 and mask | | Qwen 2.5 VL, after an instruction that is cut off |

Beside them is the empty text, `null_text`, `null_pooled` and `null_mask`, for guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd import files
from kd.data import latents
from kd.errors import UserError
from kd.process import command, path_argument
from kd.sampling.velocity import NULL

# What texts stand in, as pipelines of diffusers have it; of the last the first tokens are cut off.
LUMINA2 = (
    'You are an assistant designed to generate superior images with the superior degree of '
    'image-text alignment based on textual prompts or user prompts. <Prompt Start> '
)
QUESTION = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'
QWEN_IMAGE = (
    '<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, '
    'quantity, text, spatial relationships of the objects and background:<|im_end|>\n'
)
CUT = 34


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


def _lumina2(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    # The empty text stands for no instruction either.
    return _before([LUMINA2 + text if text else text for text in texts], first, 256)


def _z_image(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    return _before([QUESTION.format(text) for text in texts], first, 512)


def _before(texts: Sequence[str], first: Encoder, length: int) -> dict[str, np.ndarray]:
    said = first(texts, length, True)
    return {'text': said.before, 'mask': said.mask}


def _qwen_image(texts: Sequence[str], first: Encoder) -> dict[str, np.ndarray]:
    said = first([QWEN_IMAGE + QUESTION.format(text) for text in texts], 1_024 + CUT, True)
    return {'text': said.last[:, CUT:], 'mask': said.mask[:, CUT:]}


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
    'lumina2': (1, _lumina2),
    'z_image': (1, _z_image),
    'qwen_image': (1, _qwen_image),
}


def write(
    folder: Path, of: str, encoders: Sequence[Encoder], texts: Sequence[str], *, batch: int = 16
) -> dict[str, Any]:
    """Writes the embeddings of texts, in files of `latents.PER_FILE`; returns the manifest.

    Args:
      folder: of a split.
      of: one of `ENCODERS`.
      encoders: as many as it has.
      texts: one for each example.
      batch: texts at a time.
    """
    made = ENCODERS[of][1]
    null = {f'{NULL}{name}': x[0] for name, x in made([''], *encoders).items()}

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(texts), latents.PER_FILE):
            some = texts[start : start + latents.PER_FILE]
            said = [made(some[i : i + batch], *encoders) for i in range(0, len(some), batch)]
            yield {name: np.concatenate([each[name] for each in said]) for name in said[0]}

    return latents.write(folder, len(texts), parts(), null, encoder=of)


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
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model / f'tokenizer{suffix}', padding_side='right'
        )

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

            last = getattr(said, 'last_hidden_state', None)
            return Said(
                array(said.hidden_states[-1] if last is None else last),
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
