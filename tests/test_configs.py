"""Every recipe of the index is traced at its full scale, stage by stage: nothing is computed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd import references
from kd.data import catalogue, sources
from kd.papers import index
from kd.parallel.mesh import make_mesh
from kd.training import ending
from kd.training import step as step_lib

ROOT = Path(__file__).parent.parent
# Data that a machine without a network lacks: (input shape, classes, examples by split).
ABSENT = {
    'mnist': ((28, 28, 1), 10, {'train': 60_000, 'test': 10_000}),
    'cifar10': ((32, 32, 3), 10, {'train': 50_000, 'test': 10_000}),
    'cifar100': ((32, 32, 3), 100, {'train': 50_000, 'test': 10_000}),
    'svhn_cropped': ((32, 32, 3), 10, {'train': 73_257, 'test': 26_032}),
    'tiny_imagenet': ((64, 64, 3), 200, {'train': 100_000, 'test': 10_000}),
    'imagenet_224': ((224, 224, 3), 1000, {'train': 1_281_167, 'validation': 50_000}),
    'celeb_a': ((218, 178, 3), None, {'train': 162_770, 'validation': 19_867, 'test': 19_962}),
    'imagenet_resized/64x64': ((64, 64, 3), 1000, {'train': 1_281_167, 'validation': 50_000}),
    'ffhq_256': ((256, 256, 3), None, {'train': 69_000, 'test': 1_000}),
    'imagenet_256': ((256, 256, 3), 1000, {'train': 1_281_167, 'validation': 50_000}),
    'ffhq_64': ((64, 64, 3), None, {'train': 70_000}),
    'afhq_64': ((64, 64, 3), 3, {'train': 14_303, 'test': 1_500}),
}

# Files and variants that take long to trace: UNets, three or four deep networks. Others of their
# family go the same way in a few seconds.
LARGE = (
    'dmae.py:vit_l_to_b',
    *('llava_mod.py:qwen2_7b_to_0_5b', 'flash_dmd.py:cifar10'),
    *('robust_active_distillation.py:cifar100', 'robust_active_distillation.py:svhn'),
    *('robust_active_distillation.py:cifar10', 'kd_aif.py:cifar100'),
    *('oftsr.py:ffhq256', 'oftsr.py:div2k', 'oftsr.py:imagenet256'),
    *('yonos_sr.py:x4', 'yonos_sr.py:x8'),
    *('afhq64.py', 'celeba64.py', 'hyper_sd.py:cifar10', 'slimflow.py:cifar10'),
    *('hyper_sd.py:sd15', 'hyper_sd.py:sdxl', 'arcflow.py:qwen_image'),
    *(
        'slimflow.py:cifar10,3.4M',
        'cifar10.py:few_steps',
        'edm.py',
        'latent.py:sdxl',
        'latent.py:sd15',
    ),
    *('latent.py:snoopi,sd15', 'latent.py:snoopi,sd21', 'flash_dmd.py:sdxl'),
    *('decoupled_dmd.py:sdxl', 'decoupled_dmd.py:z_image', 'phased_dmd.py:qwen_image'),
    *('infer_ufc.py:cifar10,ipc=10', 'infer_ufc.py:tiny,ipc=10,dynamic'),
    *('tad_sr.py:imagenet256_realesrgan', 'tad_sr.py:ffhq'),
    *('distil.py:smollm2,gsm8k', 'distil.py:smollm2,cached', 'paced.py:qwen3_8b_to_1_7b'),
    *('proard.py:cifar10', 'proard.py:cifar100'),
    *('proard.py:cifar10,mobilenet', 'proard.py:cifar100,mobilenet'),
    *('distil.py:llama3_8b_to_1b', 'taid.py:llama2_to_tinyllama', 'grpo.py:smollm2_gsm8k'),
)


def _recipes():
    papers = index.load(ROOT).values()
    for recipe in sorted({recipe for paper in papers for recipe in paper.recipes(ROOT)}):
        name = Path(recipe).name
        large = name in LARGE or name.partition(':')[0] in LARGE
        yield pytest.param(recipe, marks=pytest.mark.slow) if large else recipe


@pytest.fixture
def stand_ins(monkeypatch):
    """Sources of the right shapes, with nothing to read."""
    load = catalogue.load

    def loaded(name, split, *, data_dir=None):
        if name not in ABSENT:
            return load(name, split, data_dir=data_dir)
        shape, classes, sizes = ABSENT[name]
        spec = {
            'input': jax.ShapeDtypeStruct(shape, np.float32),
            'label': jax.ShapeDtypeStruct((), np.int32),
        }
        data = sources.DataSet(name, sizes, lambda split: lambda rows: {}, spec, classes)
        return sources.Source(data, split)

    monkeypatch.setattr(catalogue, 'load', loaded)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Where the small data sets are prepared, once for all recipes."""
    return str(tmp_path_factory.mktemp('data'))


@pytest.mark.parametrize('path', list(_recipes()))
def test_every_recipe_traces(path, stand_ins, data_dir):
    config = kd_config.load(path)
    config.data_dir = data_dir
    recipe = kd_config.parse(config)
    block = recipe.data.get('source', {})
    while isinstance(block.get('of'), Mapping):
        block = block['of']
    source = block.get('name', '')
    names = ('text', 'image_text', 'reasoning', 'graphs', 'tabular', 'latents')
    read = tuple(f'kd.data.{name}.' for name in names)
    if recipe.pretrained or source.startswith(read):
        # Neither weights nor text nor tokenizer are at hand.
        recipe = dataclasses.replace(recipe, data_dir=catalogue.DESCRIBED)
    mesh = make_mesh({'data': 1})
    # Generations that differ in whom they learn from, and not in what that one is, are traced once.
    for stage in {_described(recipe, stage): stage for stage in recipe.stages}.values():
        step_lib.check(recipe, stage, mesh)
    ending.check_report(recipe)
    # The last stage is asked something.
    assert list(recipe.stages.values())[-1].evaluators


def _described(recipe, name):
    """A stage, with its teacher and references described instead of named."""
    stage, others = recipe.stages[name], {}
    for label, reference in {'teacher': stage.teacher, **stage.references}.items():
        if reference:
            other, weights = references.split_reference(reference)
            of = recipe.stages.get(other)
            others[label] = weights, other if of is None else _nameless(of)
    return repr((_nameless(stage), others))


def _nameless(stage):
    return dataclasses.replace(stage, teacher='', references={})
