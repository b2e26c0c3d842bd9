"""Examples of tokens as sources of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from absl import logging

from kd.data import catalogue, sources
from kd.data.builders import examples as builder
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.text import packing, tokenizer
from kd.text.tokenizer import Tokenizer

Layout = Literal['packed', 'rows', 'prompts']
# Examples of every split where only shapes count.
_DESCRIBED = 10_000_000


class TextSource(sources.Source):
    """Rows of tokens.

    Attributes:
      tokenizer: of the tokens; None where only shapes count.
      counts: of examples and what became of them, see `kd.text.packing.Rows`.
    """

    tokenizer: Tokenizer | None = None
    counts: Mapping[str, int]

    # Where the rows are answers: the source of their prompts.
    prompts: sources.Source | None = None

    @property
    def domain(self) -> str:
        """A network that has read one text can read another, of the same tokens; what has answered
        prompts of another kind knows these."""
        return 'text' if self.prompts is None else self.prompts.domain


@dataclasses.dataclass(frozen=True)
class Form:
    """How examples become the rows of a source; for the fields see `kd.data.text.chats`.

    Attributes:
      name: of the data set.
      context: a split.
      layout: one of `Layout`, or 'pairs'.
    """

    name: str
    context: SourceContext
    tokenizer: str
    length: int
    layout: str = 'packed'
    response_length: int = 0
    long: str = 'cut'
    window: int = 64
    vocabulary: int = 0
    seed: int = 0
    template: str = ''

    def source(self, examples: Mapping[str, Callable[[Tokenizer], Sequence[Any]]]) -> TextSource:
        """The source of `examples[split](tokenizer)`; where only shapes count nothing is read.

        Raises:
          UserError: an unknown layout, a vocabulary smaller than the tokenizer's, and what
            tokenizers, files and packing raise.
        """
        if self.layout not in (*get_args(Layout), 'pairs'):
            known = list(get_args(Layout))
            raise UserError(f'data.source.layout is one of {known}, got {self.layout!r}.')
        if self.context.recipe.data_dir == catalogue.DESCRIBED:
            return self.described(self.vocabulary or None)
        taken = tokenizer.load(self.tokenizer, template=self.template)
        classes = tokenizer.shared_size(taken, self.vocabulary or taken.size)
        return self.filled(self.chosen(examples, taken), taken, classes)

    def described(
        self, classes: int | None, further: Mapping[str, np.ndarray] | None = None
    ) -> TextSource:
        """A source of which only shapes count; `further` fields are one example's [1, ...]."""
        return self._made({**self._nothing(), **(further or {})}, _DESCRIBED, classes)

    def filled(
        self,
        chosen: Sequence[Any],
        taken: Tokenizer | None,
        classes: int | None,
        further: Mapping[str, np.ndarray] | None = None,
    ) -> TextSource:
        """The source of chosen examples; `further` fields [N, ...] are those of the rows."""
        rows = self._rows(chosen, taken.pad if taken else 0)
        arrays = {**rows.arrays, **(further or {})}
        made = self._made(arrays, len(arrays['input']), classes)
        made.tokenizer, made.counts = taken, rows.counts
        counts = ', '.join(f'{name} {count:,}' for name, count in rows.counts.items() if count)
        logging.info('%s, %s: %s', self.name, self.context.split, counts)
        return made

    def chosen(
        self, examples: Mapping[str, Callable[[Tokenizer], Sequence[Any]]], taken: Tokenizer
    ) -> list[Any]:
        """The examples of the split; of splits that it does not name none are read."""
        split = self.context.split
        named = [base for base in examples if base in split] or list(examples)
        found = {base: examples[base](taken) for base in named}
        sizes = {base: len(of) for base, of in found.items()}
        parts = sources.parse_split(split, sizes, name=self.name)
        chosen = [found[base][i] for base, start, stop in parts for i in range(start, stop)]
        if not chosen:
            raise sources.DataError(f'split {split!r} of data set {self.name!r} has no examples')
        return chosen

    def _rows(self, chosen: Sequence[Any], pad: int) -> packing.Rows:
        where = f'{self.name}, split {self.context.split}, example'
        options: dict[str, Any] = {'pad': pad, 'long': self.long, 'where': where}
        if self.layout == 'packed':
            options |= {'seed': self.seed, 'window': self.window}
            return packing.pack(chosen, self.length, **options)
        if self.layout == 'rows':
            return packing.unpacked(chosen, self.length, **options)
        if self.layout == 'pairs':
            better, worse = zip(*chosen, strict=True)
            return packing.pairs(better, worse, self.length, **options)
        prompts, answers = zip(*map(builder.halves, chosen), strict=True)
        return packing.prompts(
            prompts, self.length, responses=answers, response_length=self.response_length, **options
        )

    def _nothing(self) -> sources.Batch:
        """Arrays of a row of each field, with nothing in it."""
        row = (2, self.length) if self.layout == 'pairs' else (self.length,)
        if self.layout != 'prompts':
            names = ('input', 'positions', 'segments')
            shapes = dict.fromkeys(names, (row, np.int32)) | {'response_mask': (row, np.bool_)}
        else:
            shapes = {'input': (row, np.int32), 'prompt_mask': (row, np.bool_)}
            if self.response_length:
                answer = (self.response_length,)
                shapes |= {'response': (answer, np.int32), 'response_mask': (answer, np.bool_)}
        return {name: np.zeros((1, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def _made(self, arrays: sources.Batch, size: int, classes: int | None) -> TextSource:
        spec = {
            name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            for name, value in arrays.items()
        }
        split = self.context.split
        data = sources.DataSet(
            self.name, {split: size}, lambda _: sources.in_memory(arrays), spec, classes
        )
        source = TextSource(data, split)
        source.pairs = self.layout == 'pairs'
        return source
