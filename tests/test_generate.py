"""The command that answers: its text is the network's, and what is wrong is told in a line."""

import jax
import jax.numpy as jnp
import pytest
import toy_tokenizers as toys

from kd import export, generate
from kd.errors import UserError
from kd.models.decoder import Decoder
from kd.text import templates, tokenizer

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A directory of a tiny model with a tokenizer, its decoder and variables."""
    folder = tmp_path_factory.mktemp('model')
    toys.write_directory(folder, toys.fields())
    tokens = tokenizer.load(f'hf:{folder}')
    of = Decoder(num_classes=tokens.size, width=16, depth=1, heads=2, max_length=48)
    variables = jax.tree.map(
        lambda x: x * 20 if x.ndim > 1 else x,
        of.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)),
    )
    export.export(of, variables, folder)
    return folder, of, variables, tokens


def started(*arguments):
    return generate.main([f'--{name}' for name in arguments])


@pytest.mark.parametrize('chat', [False, True])
def test_it_says_what_the_network_finds_most_probable(model, capsys, chat):
    folder, of, variables, tokens = model
    flags = ['chat'] if chat else []
    assert started(f'weights=hf:{folder}', 'prompt=The capital', 'max_new=6', *flags) == 0
    said, speed = capsys.readouterr()
    if chat:
        message = [{'role': 'user', 'content': 'The capital'}]
        ids = templates.render(tokens, message, add_generation_prompt=True)[0].tolist()
    else:
        ids = tokens.encode('The capital')
    # Token by token, without a cache.
    answer, apply = [], jax.jit(of.apply)
    for _ in range(6):
        row = jnp.array([*ids, *answer] + [0] * (of.max_length - len(ids) - len(answer)))[None]
        answer.append(int(apply(variables, row)[0, len(ids) + len(answer) - 1].argmax()))
        if answer[-1] in tokens.stop:
            break
    assert said == tokens.decode(answer).strip() + '\n'
    assert speed.startswith(f'{len(ids)} tokens read, {len(answer)} written in ')


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'weights': 'hf:/nowhere'}, '/nowhere is not there, or is no directory of a model.'),
        ({'weights': 'gguf:/nowhere.gguf'}, 'There is no GGUF file /nowhere.gguf'),
        ({'weights': 'nowhere'}, "is neither 'hf:DIRECTORY' nor 'gguf:FILE' nor the directory of"),
        ({'prompt': ''}, 'the prompt is empty.'),
        ({'prompt': 'x ' * 60}, 'tokens leaves no room: the model takes 48.'),
        ({'top_p': '0'}, 'top_p=0.0 in (0, 1]'),
        ({'max_new': '0'}, 'max_new=0'),
        ({'tokenizer': 'hf:/nowhere'}, '/nowhere'),
        ({'tokenizer': 'other'}, 'are not the same'),
        ({'dtype': 'float8'}, "--dtype='float8' is no floating-point type such as 'bfloat16'."),
        ({'dtype': 'int32'}, "--dtype='int32' is no floating-point type such as 'bfloat16'."),
    ],
)
def test_what_is_wrong_is_told_in_a_line(model, tmp_path, capsys, changes, told):
    if changes == {'tokenizer': 'other'}:
        toys.write_directory(tmp_path, toys.fields('qwen2'))
        changes = {'tokenizer': f'hf:{tmp_path}'}
    given = {'weights': f'hf:{model[0]}', 'prompt': 'The', **changes}
    assert started(*(f'{name}={value}' for name, value in given.items())) == 2
    said, error = capsys.readouterr()
    assert said == ''
    assert error.startswith('kd: ')
    assert told in error
    assert error.count('\n') == 1


def test_a_tokenizer_has_no_more_tokens_than_the_network(model):
    folder, _, _, tokens = model
    small = Decoder(num_classes=tokens.size - 1, width=16, depth=1, heads=2)
    with pytest.raises(UserError, match=f'A vocabulary of {tokens.size - 1} lacks tokens of'):
        generate.tokenizer_of(f'hf:{folder}', '', 'runs/mine/student', small)
    with pytest.raises(UserError, match='runs/mine/student names no tokenizer'):
        generate.tokenizer_of('', '', 'runs/mine/student', small)


def test_what_pads_a_vocabulary_is_never_said(model, tmp_path, capsys):
    folder, of, variables, tokens = model
    padded = of.clone(num_classes=tokens.size + 40)
    # One of these has by far the largest logit.
    table = variables['params']['embed']['embedding']
    pads = 1e3 * jax.random.normal(jax.random.key(1), (40, of.width))
    embed = {'embedding': jnp.concatenate([table, pads])}
    wide = {'params': {**variables['params'], 'embed': embed}}
    toys.write_directory(tmp_path, toys.fields())
    export.export(padded, wide, tmp_path)
    ids = jnp.asarray(tokens.encode('The capital'))[None]
    assert int(padded.apply(wide, ids)[0, -1].argmax()) >= tokens.size
    said = []
    for weights in (folder, tmp_path):
        assert started(f'weights=hf:{weights}', 'prompt=The capital', 'max_new=6') == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != '\n'
