"""Directories of diffusers with weights of ours, and what diffusers says of them.

Tests of networks hold a few numbers that diffusers said of the same weights. With

    KD_PEERS=/path/to/python pytest tests/models

for a Python that has diffusers (the extra `peers`), it is asked anew and every output is compared.
"""

import functools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kd.io import pretrained

PEERS = os.environ.get('KD_PEERS', '')
asked_anew = pytest.mark.skipif(not PEERS, reason='KD_PEERS names no Python with diffusers')


def numbers(shape, start, scale=1.0):
    """Normal numbers of a seed, float32."""
    return (np.random.default_rng(start).normal(size=shape) * scale).astype(np.float32)


@functools.cache
def abstract(module, *shapes, **told):
    """Variables of a network as shapes, of inputs of these shapes."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(functools.partial(module.init, **told), jax.random.key(0), *inputs)


@functools.cache
def variables_of(module, *shapes, scale=0.2):
    """Of numbers: no leaf is a neutral element, and none of them is that of another."""
    leaves, structure = jax.tree.flatten(abstract(module, *shapes))
    made, start = [], 0
    for x in leaves:
        made.append(numbers(x.shape, start, scale) + (len(x.shape) == 1) * np.float32(0.5))
        start += x.size
    return jax.tree.unflatten(structure, made)


def tensors_of(config, variables):
    """The weights under the names and in the layouts of a file."""
    family = pretrained.FAMILIES['hf'][config['_class_name']]
    module = family.network(**family.arguments(config, {}, 'config.json'))
    find, tensors = family.find(module, {}, '')[0], {}
    for path, x in jax.tree_util.tree_flatten_with_path(variables)[0]:
        found = find(tuple(key.key for key in path[1:]), x.shape)
        parts = found if isinstance(found, tuple) else (found,)
        leaves = x if isinstance(found, tuple) else x[None]
        for part, leaf in zip(parts, leaves, strict=True):
            axes = np.argsort(part.axes) if part.axes else range(leaf.ndim)
            tensors[part.name] = np.ascontiguousarray(np.transpose(leaf, axes))
    return tensors


def write(folder, config, tensors):
    """A directory as diffusers writes it; its reference."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
    return f'hf:{folder}'


def summary(x):
    """Sum, sum of squares and one entry of what a network says."""
    x = np.asarray(x, np.float64)
    return x.sum(), (x**2).sum(), x.reshape(-1)[x.size // 3]


def said(folder, *calls):
    """What diffusers says of the weights in a directory.

    Args:
      folder: as of `write`.
      *calls: (what is called, 'forward' or a method; what of its result, 'sample'; arguments).
        Arrays are float32, int64 or bool; a dot in a name is a mapping, or with numbers a list.
    """
    listed, arrays = [], {}
    for i, (method, result, arguments) in enumerate(calls):
        listed.append((method, result, list(arguments)))
        arrays |= {f'{i}/{name}': np.asarray(x) for name, x in arguments.items()}
    np.savez(folder / 'inputs.npz', **arrays)
    (folder / 'calls.json').write_text(json.dumps(listed))
    script = Path(__file__).with_name('diffusers_says.py')
    subprocess.run([PEERS, script, folder], check=True, env=os.environ | {'PYTHONPATH': ''})
    with np.load(folder / 'outputs.npz') as outputs:
        return [outputs[str(i)] for i in range(len(calls))]
