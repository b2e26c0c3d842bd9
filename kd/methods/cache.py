"""A stage that runs the teacher once over a split and keeps what it says on disk.

    config.cache = stage(
        teacher='teacher', steps=1, batch_size=256, method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(name='kd.methods.cache.teacher_outputs', size=64)})

A later stage reads it with `data=dict(source=dict(name='kd.data.transforms.cached.cached'),
train=...)` and runs no teacher. Of rows of text the positions that count are kept, and of a decoder
its logits are formed a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import sources
from kd.data.sources import Source
from kd.errors import UserError
from kd.io import cache, checksums
from kd.io.progress import say
from kd.losses.signal import TeacherSignal
from kd.method import Batch, Method
from kd.methods import batches
from kd.methods.lm import common
from kd.metrics import Metrics, mean
from kd.network import output_shape
from kd.parallel import distributed
from kd.ranges import Count, Positive, Size
from kd.state import PyTree, State


def nothing(context: Context) -> Method:
    """A method that trains nothing, for stages that only write files."""
    del context

    def init(key: jax.Array, frozen=None) -> State:
        # Orbax saves no empty tree.
        return State.create(key, {'params': {'none': jnp.zeros(())}}, frozen=dict(frozen or {}))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        examples = mean(jnp.zeros(len(jax.tree.leaves(batch)[0])))
        return state.replace(step=state.step + 1), {'loss': examples}

    return Method(init, step)


def teacher_outputs(
    context: Context,
    *,
    split: str = 'train',
    form: str = 'top_k',
    size: Size = 0,
    temperature: Positive = 1.0,
    proposal_temperature: Positive | None = None,
    dtype: str = 'float16',
    per_file: Count = 4096,
    vocabulary: Size = 0,
    chunk: Count = 256,
) -> StageWriter:
    """Writes the teacher's signal of every example of a split to `DIRECTORY/teacher/`.

    A cache that was cut off goes on with the first file that is missing; a complete one is left
    alone. In a run of several processes all run the teacher and the files are shared out.

    Args:
      context: the stage; needs a teacher.
      split: of the stage's data, read in its order and without augmentation.
      form, size, temperature, proposal_temperature, dtype: see `kd.io.cache.Form`.
      per_file: examples in a file; rounded up to whole batches.
      vocabulary: of the student, where it is padded less than the teacher's: logits are cut to so
        many outcomes before the softmax, as `signal.cut` does where both are run. 0 for all.
      chunk: tokens at a time where logits are not formed whole.

    Raises:
      UserError: a form that is none, a teacher with fewer outcomes.
    """
    kept = cache.Form(
        form=form,
        size=size,
        temperature=temperature,
        proposal_temperature=proposal_temperature,
        dtype=dtype,
    )
    source = context.source(split)  # Raises where there is none.
    teacher = _Teacher(context, kept, vocabulary, chunk)
    if teacher.is_text(source):
        kept.record(teacher.shape[-1:])  # Raises where it cannot be.
        if source.pairs or source.spec[sources.MASK].shape != source.spec['input'].shape:
            raise UserError(
                f"{context.stage}: a teacher's outputs are of rows of text, and the data are "
                f'{"pairs" if source.pairs else "prompts"}; a source of text has rows with '
                "layout='rows' or 'packed'."
            )
    per_file = -(-per_file // context.batch_size) * context.batch_size

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source, variables = context.source(split), state.frozen['teacher']
        writer = _writer(context, teacher, directory, source, variables, per_file)
        rows_of = _rows(context, teacher, writer, source, variables)
        missing = distributed.from_first(writer.begin)
        batches = per_file // context.batch_size
        for file in missing:
            rows = rows_of(range(file * batches, (file + 1) * batches))
            if file % jax.process_count() == jax.process_index():
                writer.write(file, *rows)
        distributed.agree(lambda: None)
        if distributed.is_first() and not writer.files.complete:
            sizes = writer.finish()
            each = ' a position' if teacher.is_text(source) else ''
            say(
                context.stage,
                f'{len(source):,} examples of {sizes["record_bytes"]} bytes{each}, '
                f'{sizes["bytes_per_example"]:.0f} on disk; dense float32 would be '
                f'{sizes["dense_bytes_per_example"]}',
            )

    return write


class _Teacher:
    """What is kept of what a stage's teacher says.

    Attributes:
      network: of the teacher.
      kept: the form.
      shape: of one example's logits [..., V], cut to the vocabulary.
    """

    def __init__(self, context: Context, kept: cache.Form, vocabulary: int, chunk: int) -> None:
        self.network, self.kept, self.chunk = context.teacher, kept, chunk
        *positions, outcomes = output_shape(self.network)[1:]
        if vocabulary > outcomes:
            raise UserError(
                f'vocabulary={vocabulary:,} is more than the {outcomes:,} outcomes of the teacher: '
                'a student of a larger vocabulary cannot learn from its outputs on disk.'
            )
        self.shape = (*positions, vocabulary or outcomes)

    def is_text(self, source: Source) -> bool:
        """Whether positions are asked for the next token, and some of them count."""
        return sources.MASK in source.spec and 'label' not in source.spec

    def says(self, variables: PyTree, batch: Batch, key: jax.Array) -> TeacherSignal:
        """Of every example."""
        logits = self.network.apply(variables, *self.network.of(batch)).logits
        return self.kept.signal(logits[..., : self.shape[-1]], key)

    def says_of_tokens(
        self, variables: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TeacherSignal, jax.Array]:
        """Of every position [B, T], and which of them count.

        A draw depends on the key, the example's `index` and the position alone.
        """
        raw, leading = jax.random.key_data(key), batch['input'].shape

        def of_token(logits, _, labels, index, place):
            def said(logits, index, place):
                own = jax.random.wrap_key_data(raw)
                for number in (index, place):
                    own = jax.random.fold_in(own, number)
                return self.kept.signal(logits[: self.shape[-1]], own)

            return jnp.zeros(labels.shape), jax.vmap(said)(logits, index, place)

        index = jnp.broadcast_to(batch['index'][:, None], leading)
        place = jnp.broadcast_to(jnp.arange(leading[1]), leading)
        found = common.token_losses(
            self.network, variables, batch, of_token,
            per_token=(index, place), chunk=self.chunk, train=False,
        )  # fmt: skip
        return found.aux, found.where


def _writer(
    context: Context,
    teacher: _Teacher,
    directory: Path,
    source: Source,
    variables: PyTree,
    per_file: int,
) -> cache.Writer:
    """A writer whose manifest names the teacher, its training and the data."""
    assert context.locate is not None
    located = context.locate(context.config.teacher)
    return cache.Writer(
        directory,
        teacher.kept,
        teacher.shape,
        examples=len(source),
        per_file=per_file,
        made_of={
            **sources.tokenizer_fingerprint(source),
            'teacher': checksums.fingerprint(variables),
            'training of the teacher': cache.training_fingerprint(located),
            'data': sources.fingerprint(source),
        },
        ragged=teacher.is_text(source),
    )


def _rows(
    context: Context, teacher: _Teacher, writer: cache.Writer, source: Source, variables: PyTree
) -> Callable[[Iterable[int]], tuple[dict[str, np.ndarray], np.ndarray | None]]:
    """Numbers of batches (those past the end are left out) -> arguments of `writer.write`."""
    size, text = context.batch_size, teacher.is_text(source)
    says = teacher.says_of_tokens if text else teacher.says
    fields = None if text else teacher.network.fields
    ask = batches.asking(says, variables, source, size, fields)
    names = writer.record.names or ()
    base = jax.random.key(context.recipe.seed)

    def rows_of(numbers: Iterable[int]):
        rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        lengths: list[np.ndarray] = []
        for number in numbers:
            if number * size >= len(source):
                break
            count = min(size, len(source) - number * size)
            # By position, so that a cache that was cut off has the draws of one that was not.
            found = ask(number, base if text else jax.random.fold_in(base, number))
            chosen: Any = ()
            if text:
                found, where = found
                chosen = (where[:count],)
                lengths.append(where[:count].sum(1))
            for name in names:
                rows[name].append(getattr(found, name)[:count][chosen])
        joined = {name: np.concatenate(parts) for name, parts in rows.items()}
        return joined, np.concatenate(lengths) if text else None

    return rows_of
