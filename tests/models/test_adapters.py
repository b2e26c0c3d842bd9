"""Adapters compute as if merged, are all that a step changes, and go out under PEFT's names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from kd import config as kd_config
from kd import export
from kd.claims import seeds
from kd.errors import UserError
from kd.io import peft
from kd.io import safetensors as kd_safetensors
from kd.main import main
from kd.method import with_base
from kd.methods.lm.distillation import distillation
from kd.models import adapters, decoders
from kd.models.adapters import lora
from kd.models.decoder import SHARDING, Decoder
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.state import joined, paths
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, RANK, ALPHA = 11, 5, 2, 6.0
BASE = dict(
    name='kd.models.decoder.Decoder', width=8, depth=2, heads=2, kv_heads=1, mlp_hidden=12,
    tied=False, max_length=16, deviation=None,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)


def wrapped(targets=adapters.TARGETS, **changes):
    module = lora(V, base={**BASE, **changes}, rank=RANK, alpha=ALPHA, targets=targets)
    return from_linen(module, jax.ShapeDtypeStruct((1, T), jnp.int32))


def drawn(network, seed=0):
    """Every leaf random, also those that begin at 0."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), abstract)


@pytest.mark.parametrize(
    'changes', [{}, dict(stacked=True, remat='block')], ids=['apart', 'stacked']
)
def test_a_network_with_adapters_is_that_with_them_merged(changes):
    network = wrapped(r'(query|value|up|down)/kernel$', **changes)
    params = drawn(network)['params']
    own, base = adapters.own(params), adapters.without(params)
    assert len(jax.tree.leaves(own)) == 2 * 4 * (1 if changes else 2)
    jax.tree.map(np.testing.assert_array_equal, joined(base, own), params)
    made = adapters.merged(base, own, ALPHA / RANK)
    plain = network.module.clone(adapter=None)
    found = jax.jit(network.apply)({'params': params}, TOKENS).logits
    wanted = jax.jit(plain.apply)({'params': made}, TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(found - jax.jit(plain.apply)({'params': base}, TOKENS)).max() > 0.1
    # W + (alpha / rank) (B A)^T, by hand.
    at = ('blocks', 'attention', 'query') if changes else ('block0', 'attention', 'query')
    kernel, down, up, new = (
        np.asarray(tree[at[0]][at[1]][at[2]][leaf], np.float64)
        for tree, leaf in ((base, 'kernel'), (own, 'lora_a'), (own, 'lora_b'), (made, 'kernel'))
    )
    np.testing.assert_allclose(new, kernel + ALPHA / RANK * (down @ up), atol=1e-6)


def test_any_network_with_dense_layers_has_adapters_also_in_stacked_and_repeated_blocks():
    """Beside those of a UNet, under its own names: merged, they are the UNet."""
    unet = dict(
        name='kd.models.unet_conditional.preset', of='sd15', channels=(8, 8), depths=(2, 0),
        heads=(2, 2), groups=2, context=6, blocks=1, remat=True,
    )  # fmt: skip
    given = dict(
        name='kd.models.adapters.lora', base=unet, rank=RANK, alpha=ALPHA,
        targets=r'(attn\d/(to_q|to_out_0)|net_2|linear_1)/kernel$',
    )  # fmt: skip
    module = kd_config.build(given, where='network')
    spec = {'input': jax.ShapeDtypeStruct((4, 4, 2), jnp.float32)}
    network = from_linen(module, *module.example_inputs(spec))
    assert adapters.adapter_of(module).rank == RANK
    assert module.conditions == ('text',)
    params = drawn(network)['params']
    own, base = adapters.own(params), adapters.without(params)
    blocks = own['down_blocks_0']['attentions_0']['transformer_blocks']
    assert blocks['attn1']['to_q']['lora_a'].shape == (2, 8, RANK)
    assert own['time_embedding']['linear_1']['lora_b'].shape == (RANK, 32)
    plain = adapters.plain(module)
    wanted = jax.eval_shape(from_linen(plain, *network.inputs).init, jax.random.key(0))
    assert paths(wanted['params']) == paths(base)
    rng = np.random.default_rng(0)
    t, x, text = np.array([3.0]), rng.normal(size=(1, 4, 4, 2)), rng.normal(size=(1, 3, 6))
    x, text = x.astype('f4'), text.astype('f4')
    found = jax.jit(module.apply)({'params': params}, t, x, text=text)
    apply = jax.jit(plain.apply)
    made = adapters.merged(base, own, ALPHA / RANK)
    np.testing.assert_allclose(found, apply({'params': made}, t, x, text=text), atol=1e-5)
    assert np.abs(found - apply({'params': base}, t, x, text=text)).max() > 0.03


def test_a_step_changes_the_adapters_alone_and_the_base_is_a_free_reference():
    network = wrapped()
    base = adapters.without(drawn(network)['params'])
    frozen = {'start': {'params': base}}
    plain = from_linen(network.module.clone(adapter=None), *network.inputs)
    context = seeds.context(
        network=network, tx=optax.adam(0.1), references={'start': plain}, num_classes=V
    )
    method = with_base(distillation(context, soft_weight=0.0), 'start')
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    assert {name.rpartition('/')[2] for name in paths(state.params)} == {'lora_a', 'lora_b'}
    count = sum(x.size for x in jax.tree.leaves(state.params))
    # Query and output of 8 x 8, key and value of 8 x 4, in two blocks.
    assert count == 2 * RANK * (2 * (8 + 8) + 2 * (8 + 4))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * count
    # B is 0: before the first step the policy is the reference.
    np.testing.assert_array_equal(
        jax.jit(network.apply)(state.variables(), TOKENS).logits,
        jax.jit(plain.apply)(frozen['start'], TOKENS).logits,
    )
    batch = {'input': TOKENS, 'response_mask': np.ones(TOKENS.shape, bool)}
    after, metrics = jax.jit(method.step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, frozen)
    # A has no gradient while B is 0, and Adam's first step on B is the rate.
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), after.params, state.params)
    for name, change in zip(paths(moved), jax.tree.leaves(moved), strict=True):
        assert change == pytest.approx(0.1 if name.endswith('lora_b') else 0, rel=1e-2), name

    def whole(params):
        logits = network.apply({'params': params}, TOKENS).logits[:, :-1]
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], -1).mean()

    value, slope = jax.jit(jax.value_and_grad(whole))(state.variables()['params'])
    assert metrics['loss'].total / metrics['loss'].count == pytest.approx(float(value), rel=1e-5)
    norm = float(optax.tree.norm(adapters.own(slope)))
    assert float(metrics['grad_norm'].total) == pytest.approx(norm, rel=1e-5)


RECIPE = f"""
from kd import config as kd_config

BASE = {BASE!r}
METHOD = dict(name='kd.methods.lm.distillation.distillation')

def get_config():
    config = kd_config.recipe(
        stages=('base', 'tuned', 'student'),
        data=dict(
            source=dict(name='kd.data.builders.markov.markov', size=64),
            train='train', validation='validation',
        ),
        mesh=dict(data=1),
    )

    def stage(network, **fields):
        return kd_config.stage(
            network=network, optimizer=dict(name='adam', lr=0.02), steps=3, batch_size=8,
            log_every=1, **fields,
        )

    base = dict(BASE, max_length=32, depth=1)
    config.base = stage(base, method=dict(METHOD, soft_weight=0.0))
    config.tuned = stage(
        dict(name='kd.models.adapters.lora', base=base, rank=3, targets='attention/'),
        method=dict(METHOD, soft_weight=0.0), references=dict(start='base'),
        evaluators=dict(v=dict(name='kd.evaluators.language.language')),
    )
    config.student = stage(base, method=METHOD, teacher='tuned', references=dict(start='tuned'))
    return config
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lora')
    (folder / 'recipe.py').write_text(RECIPE)
    assert main([f'--config={folder}/recipe.py', f'--workdir={folder}/run']) == 0
    return folder / 'run'


def test_a_stage_keeps_adapters_and_later_ones_see_them_merged(run, tmp_path):
    base, own = (
        kd_safetensors.stage_variables(run / stage)['params'] for stage in ('base', 'tuned')
    )
    assert {name.rpartition('/')[2] for name in paths(own)} == {'lora_a', 'lora_b'}
    done = json.loads((run / 'tuned' / 'done.json').read_text())
    assert done['parameters'] == sum(x.size for x in jax.tree.leaves(own))
    recipe = kd_config.parse(kd_config.load(f'{run.parent}/recipe.py'))
    student = prepare(recipe, 'student', make_mesh({'data': 1}), run)
    wanted = adapters.merged(base, own, 16.0 / 3)
    for label in ('teacher', 'start'):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
            student.frozen[label]['params'],
            wanted,
        )
    assert student.context.teacher.module.adapter is None
    # The same by the command, as a directory of its own.
    decoder = export.stage_decoder(run / 'tuned', {'params': own})
    plain, merged = export.on_base(decoder, {'params': own}, str(run / 'base'))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged['params'], wanted)
    export.export(plain, merged, tmp_path / 'whole')
    tensors = safetensors.numpy.load_file(tmp_path / 'whole' / 'model.safetensors')
    np.testing.assert_array_equal(
        tensors['model.layers.0.self_attn.o_proj.weight'],
        merged['params']['block0']['attention']['output']['kernel'].T,
    )


@pytest.mark.parametrize('stacked', [False, True])
def test_peft_adds_the_product_of_what_lies_in_the_file(tmp_path, stacked):
    """lora_B @ lora_A * lora_alpha / r, added to the weight [out, in] of the module so named."""
    network = wrapped(r'(query|down)/kernel$', stacked=stacked)
    params = drawn(network)['params']
    own, base = adapters.own(params), adapters.without(params)
    peft.export(network.module, {'params': own}, tmp_path / 'peft', base='the/base')
    config = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA'
    assert config['base_model_name_or_path'] == 'the/base'
    assert config['target_modules'] == ['down_proj', 'q_proj']
    assert not config['fan_in_fan_out']
    tensors = safetensors.numpy.load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    plain = network.module.clone(adapter=None)
    folders = {}
    for name, tree in (
        ('base', base), ('merged', adapters.merged(base, own, ALPHA / RANK))
    ):  # fmt: skip
        export.export(plain, {'params': tree}, tmp_path / name)
        folders[name] = safetensors.numpy.load_file(tmp_path / name / 'model.safetensors')
    assert len(tensors) == 2 * 2 * 2
    changed = {name for name, x in folders['base'].items() if (x != folders['merged'][name]).any()}
    for name in changed:
        down, up = (
            tensors[f'base_model.model.{name.removesuffix("weight")}{factor}.weight']
            for factor in ('lora_A', 'lora_B')
        )
        assert down.shape[0] == up.shape[1] == config['r']
        added = up @ down * (config['lora_alpha'] / config['r'])
        np.testing.assert_allclose(
            folders['base'][name] + added, folders['merged'][name], atol=1e-5
        )
    assert len(changed) == 4


def test_adapters_of_some_blocks_are_named_in_full(tmp_path):
    network = wrapped(r'block1/attention/query/kernel$')
    peft.export(network.module, drawn(network), tmp_path)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['target_modules'] == ['model.layers.1.self_attn.q_proj']


def test_factors_lie_as_their_kernels_do():
    config = kd_config.recipe(
        stages=('base', 'tuned'),
        data=dict(
            source=dict(name='kd.data.builders.markov.markov', size=64), train='train'
        ),
        mesh=dict(data=1, fsdp=2, tensor=2),
        sharding=SHARDING,
    )  # fmt: skip
    base = dict(BASE, max_length=32, stacked=True, num_classes=32)
    method = dict(name='kd.methods.lm.distillation.distillation', soft_weight=0.0)
    fields = dict(method=method, optimizer=dict(name='adam', lr=1.0), steps=1, batch_size=8)
    config.base = kd_config.stage(network=base, **fields)
    config.tuned = kd_config.stage(
        network=dict(name='kd.models.adapters.lora', base=base, rank=3, targets='(query|down)/'),
        references=dict(start='base'),
        **fields,
    )
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    state = prepare(kd_config.parse(config), 'tuned', mesh).abstract_state()
    inside = state.params['network']['blocks']
    specs = {
        name: x.sharding.spec
        for name, x in (*inside['attention']['query'].items(), *(
            (f'down_{name}', x) for name, x in inside['mlp']['down'].items()
        ))
    }  # fmt: skip
    P = jax.sharding.PartitionSpec
    assert specs == {
        'lora_a': P(None, 'fsdp'),
        'lora_b': P(None, None, 'tensor'),
        'down_lora_a': P(None, 'tensor'),
        'down_lora_b': P(None, None, 'fsdp'),
    }


def test_what_cannot_be_is_told(tmp_path):
    network = wrapped()
    plain = from_linen(network.module.clone(adapter=None), *network.inputs)
    frozen = {'start': drawn(plain)}

    def context(network, **references):
        return seeds.context(network=network, tx=optax.sgd(1.0), references=references)

    with pytest.raises(UserError, match=r'network has adapters, .* as stage\.references\.start'):
        distillation(context(network), soft_weight=0.0)
    lost = wrapped('attention/kweri')
    with pytest.raises(UserError, match=r"targets='attention/kweri' matches no kernel"):
        distillation(context(lost, start=plain), soft_weight=0.0).init(jax.random.key(0), frozen)
    other = from_linen(Decoder(**{k: v for k, v in BASE.items() if k != 'name'}), *plain.inputs)
    with pytest.raises(UserError, match=r"start: 'params/embed/embedding' is \(72, 8\) in what"):
        distillation(context(network, start=other), soft_weight=0.0).init(
            jax.random.key(0), {'start': drawn(other)}
        )
    with pytest.raises(UserError, match=r"targets='\(' is no regular expression"):
        lora(3, base=dict(name='kd.models.mlp.MLP', widths=(4,)), targets='(')
    gpt2 = decoders.preset('gpt2', depth=1, width=12, mlp_hidden=8, num_classes=V)
    gpt2 = gpt2.clone(adapter=adapters.Adapter())
    variables = drawn(from_linen(gpt2, *network.inputs))
    with pytest.raises(UserError, match=r"transformers keeps 'block0/attention/key' and others"):
        peft.export(gpt2, variables, tmp_path)


def test_stacked_kernels_have_adapters_for_each_layer():
    shapes = {'blocks': {'q': {'kernel': np.ones((3, 40, 5), np.float32)}}}
    made = adapters.drawn(jax.random.key(0), shapes, adapters.Adapter(rank=4, targets='q/kernel$'))
    down, up = made['blocks']['q']['lora_a'], made['blocks']['q']['lora_b']
    assert (down.shape, up.shape) == ((3, 40, 4), (3, 4, 5))
    # Each is drawn as one alone would be, and they differ.
    alone = adapters.drawn(
        jax.random.key(0), {'q': {'kernel': np.ones((40, 5))}}, adapters.Adapter(4, targets='q/')
    )
    bound = np.abs(alone['q']['lora_a']).max()
    np.testing.assert_allclose(np.abs(down).max((1, 2)), bound, rtol=0.05)
    assert np.abs(down[0] - down[1]).max() > bound / 2
    base = adapters.merged(shapes, made, 2.0)
    np.testing.assert_array_equal(base['blocks']['q']['kernel'], shapes['blocks']['q']['kernel'])
