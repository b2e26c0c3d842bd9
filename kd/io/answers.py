"""Sampled answers on disk, as the tokens that were drawn; files as of `kd.io.shards`.

    DIRECTORY/train_answers/00003.array_record      K answers to each prompt 3 S .. 4 S - 1

A record is the heads of the K answers and then their tokens one after the other, little-endian: an
answer takes as many bytes as it has tokens. Nothing is decoded to text and encoded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd.io import shards

WHAT = 'set of answers'
_HEAD = np.dtype([('length', '<u4'), ('truncated', '?'), ('score', '<f4')])


class Answers(NamedTuple):
    """K answers to each of N prompts.

    Attributes:
      tokens: int32 [N, K, R]; 0 after the end.
      lengths: int32 [N, K], of the answers, a stop token included.
      log_probs: float32 [N, K, R], as of `kd.sampling.autoregressive.Rollout`; 0 after the end.
      truncated: bool [N, K], whether an answer came to no stop token.
      scores: float32 [N, K], of a reward; NaN where there is no verdict.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    truncated: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How answers were drawn; see `kd.methods.generate.responses`.

    Attributes:
      samples: K.
      max_new: R.
      temperature, top_p, top_k, stop, forbidden: of the sampler.
      reward: block of what judged them, {} for nothing.
      outcomes: size of the vocabulary.
    """

    samples: int
    max_new: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[int, ...]
    forbidden: tuple[int, ...]
    reward: Mapping[str, Any]
    outcomes: int

    @property
    def token(self) -> np.dtype:
        """A token of a record."""
        index = '<u2' if self.outcomes <= 1 << 16 else '<u4'
        return np.dtype([('token', index), ('log_prob', '<f4')])


def folder(directory: Path, split: str) -> Path:
    """Where a stage keeps its answers to a split."""
    return directory / f'{split}_answers'


class Writer:
    """Writes the answers to the prompts of one split, file by file.

    Args:
      place: see `folder`.
      form: how they are drawn.
      examples: number of prompts.
      per_file: S, prompts of a file.
      made_of: fingerprints of whose answers they are and of the data.

    Raises:
      UserError: the folder holds other answers.
    """

    def __init__(
        self, place: Path, form: Form, examples: int, per_file: int, made_of: Mapping[str, Any]
    ) -> None:
        manifest = {
            **dataclasses.asdict(form),
            'examples': examples,
            'per_file': per_file,
            'made_of': dict(made_of),
        }
        self.form, self.files = form, shards.Writer(place, manifest, WHAT)

    def write(self, index: int, answers: Answers) -> None:
        """Writes file `index`."""
        heads = np.zeros(answers.lengths.shape, _HEAD)
        heads['length'], heads['truncated'] = answers.lengths, answers.truncated
        heads['score'] = answers.scores
        said = np.zeros(answers.tokens.shape, self.form.token)
        said['token'], said['log_prob'] = answers.tokens, answers.log_probs
        used = np.arange(said.shape[-1]) < answers.lengths[..., None]
        records = [
            head.tobytes() + tokens[mask].tobytes()
            for head, tokens, mask in zip(heads, said, used, strict=True)
        ]
        self.files.write(index, records)


class Reader:
    """Complete answers, read at random.

    Raises:
      UserError: no answers, not all of them, or those of something else.
    """

    def __init__(self, place: Path, made_of: Mapping[str, Any]) -> None:
        names = [field.name for field in dataclasses.fields(Form)]
        self._stored = shards.Reader(place, WHAT, keys=names, made_of=made_of)
        kept = {name: self._stored.manifest[name] for name in names}
        self.form = Form(**kept)

    def __len__(self) -> int:
        return len(self._stored)

    def fetch(self, indices: np.ndarray) -> Answers:
        """Answers to the prompts `indices` [N]."""
        shape = (len(indices), self.form.samples)
        size = _HEAD.itemsize * self.form.samples
        heads, said = np.zeros(shape, _HEAD), np.zeros((*shape, self.form.max_new), self.form.token)
        places = np.arange(self.form.max_new)
        for row, (index, record) in enumerate(
            zip(indices, self._stored.records(indices), strict=True)
        ):
            if len(record) < size:
                raise self._stored.refuse(index)
            heads[row] = np.frombuffer(record[:size], _HEAD)
            used = places < heads[row]['length'][:, None]
            if len(record) != size + used.sum() * self.form.token.itemsize:
                raise self._stored.refuse(index)
            said[row][used] = np.frombuffer(record[size:], self.form.token)
        return Answers(
            said['token'].astype(np.int32),
            heads['length'].astype(np.int32),
            said['log_prob'].astype(np.float32),
            heads['truncated'],
            heads['score'].astype(np.float32),
        )
