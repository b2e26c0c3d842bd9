"""A small language model, its outputs on disk, and a student that learns from them.

Arguments: `cached`, or `live` for a student of the teacher itself; `answers` for one of what its
teacher answers to prompts. Where TEXTS_SLOWLY is set, so
many seconds pass before a batch is read.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as kd_config
from kd.data import sources
from kd.losses import divergence, signal
from kd.text import packing
from kd.text.table import table

V, T, EXAMPLES = 20, 7, 24
SYMBOLS = ('PAD', 'BOS', 'EOS', *'abcdefghijklmnopq')
DISTILLATION = 'kd.methods.lm.distillation.distillation'


def examples(count, seed):
    """Prompts of 1 to 3 tokens with answers of 1 to 4."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = rng.integers(1, 4), rng.integers(1, 5)
        ids = rng.integers(3, V, prompt + answer).astype(np.int32)
        made.append(packing.Example(ids, np.arange(len(ids)) >= prompt))
    return made


class Slow(sources.Source):
    """Rows that may take their time."""

    tokenizer = None

    def fetch(self, indices):
        time.sleep(float(os.environ.get('TEXTS_SLOWLY', 0)))
        return super().fetch(indices)


def rows(context, *, symbols=SYMBOLS):
    """Packed rows of text."""
    arrays = packing.pack(examples(2 * EXAMPLES, 0), T, pad=0).arrays
    arrays = {name: value[:EXAMPLES] for name, value in arrays.items()}
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    made = sources.DataSet(
        'texts', {'train': EXAMPLES}, lambda _: sources.in_memory(arrays), spec, V
    )
    source = Slow(made, context.split)
    source.tokenizer = table(symbols)
    return source


def prompts(context, *, symbols=SYMBOLS, size=EXAMPLES, seed=1, answers=False):
    """Prompts, to be answered; with answers where they are asked for."""
    made = examples(size, seed)
    asked, said = ([one.ids[of] for one, of in zip(made, masks, strict=True)] for masks in (
        [~one.response for one in made], [one.response for one in made]))  # fmt: skip
    arrays = packing.prompts(asked, 4, pad=0, responses=said, response_length=5 * answers).arrays
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    data = sources.DataSet('texts', {'train': size}, lambda _: sources.in_memory(arrays), spec, V)
    source = Slow(data, context.split)
    source.tokenizer = table(symbols)
    return source


def odd(context):
    """Answers whose first token is odd are right; those that begin with 4 cannot be judged."""
    del context

    def reward(tokens, mask, batch):
        assert tokens.shape[0] == batch['index'].shape[0]
        first = tokens[:, 0]
        return jnp.where(first == 4, jnp.nan, (first % 2).astype(jnp.float32))

    return reward


def answering(reads, **learns):
    """A teacher of rows, its answers to prompts, and a student of these."""
    config = get_config()
    config.stages = ('teacher', 'answers', 'student')
    del config['cache']
    config.teacher.steps = 1
    config.answers = kd_config.stage(
        method=dict(name='kd.methods.cache.nothing'),
        writers={'answers': dict(
            name='kd.methods.generate.responses', samples=3, max_new=6, per_file=4, stop=(2, 3),
            reward=dict(name='texts.odd'))},
        data=dict(source=dict(name='texts.prompts', answers=True), train='train'),
        teacher='teacher', steps=1, batch_size=4,
    )  # fmt: skip
    config.student.data = dict(source=dict(name=f'kd.data.generated.{reads}', **learns),
                               train='train')  # fmt: skip
    config.student.method = dict(name=DISTILLATION, soft_weight=0.0)
    return config


def of_top_k(student_logits, teacher, *, temperature=1.0, k=5):
    """Forward KL from the live teacher's k favourites."""
    said = signal.top_k(signal.all_logits('test', teacher), k, temperature=temperature)
    return divergence.forward_kl(student_logits, said, temperature=temperature)


def decoder(outcomes=V):
    return dict(name='kd.models.decoder.Decoder', num_classes=outcomes, width=16, depth=1,
                heads=2, mlp_hidden=28, max_length=32, fields=None)  # fmt: skip


def get_config(argument: str = 'cached', form=None, batch_size=4):
    if argument == 'answers':
        return answering('teacher_text', stage='answers', length=10, layout='rows', rates='answers')
    form = form or dict(form='top_k', size=5, dtype='float32')
    source = dict(name='texts.rows')
    config = kd_config.recipe(
        stages=('teacher', 'cache', 'student'),
        data=dict(source=source, train='train'),
        mesh=dict(data=1),
    )
    run = dict(optimizer=dict(name='sgd', lr=1.0), batch_size=8, log_every=2)
    config.teacher = kd_config.stage(
        network=decoder(), method=dict(name=DISTILLATION, soft_weight=0.0), steps=3, **run
    )
    config.cache = kd_config.stage(
        method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(
            name='kd.methods.cache.teacher_outputs', per_file=batch_size, chunk=5, **form)},
        teacher='teacher', steps=1, batch_size=batch_size,
    )  # fmt: skip
    if argument == 'cached':
        source = dict(name='kd.data.transforms.cached.cached')
        learn = dict(data=dict(source=source, train='train'))
        method = dict(name=DISTILLATION, temperature=form.get('temperature', 1.0))
    else:
        learn, method = (
            dict(teacher='teacher'),
            dict(name=DISTILLATION, divergence='texts.of_top_k'),
        )
    config.student = kd_config.stage(
        network=decoder(), method=dict(**method, chunk=5), steps=3, **learn, **run
    )
    return config
