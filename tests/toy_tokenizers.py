"""Tiny tokenizers, as files in both forms."""

import functools
import json

import gguf
from tokenizers import Tokenizer, pre_tokenizers, trainers

from kd.text.gguf import tokenizer_json

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
WORDS = ('<think>', '</think>')
CORPUS = (
    'The capital of France is Paris, and 12 times 3 is 36. The assistant answers the user. '
    "It's what the system says: assistant user system, the the an in on at. naïve café. "
) * 4


@functools.cache
def learnt(pre):
    """Vocabulary and merges of a byte-level tokenizer, learnt from `CORPUS`."""
    bare = {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': ['a'],
        'tokenizer.ggml.merges': [],
    }
    empty = tokenizer_json(bare, where='x')
    empty['model']['vocab'] = {}
    learner = Tokenizer.from_str(json.dumps(empty))
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([CORPUS], trainer)
    model = json.loads(learner.to_str())['model']
    return sorted(model['vocab'], key=model['vocab'].get), [' '.join(m) for m in model['merges']]


def fields(pre='smollm', template=CHATML):
    """GGUF metadata of a byte-level tokenizer."""
    pieces, merges = learnt(pre)
    tokens = [*CONTROL, *pieces, *WORDS, '[PAD0]', '[PAD1]']
    types = [3] * len(CONTROL) + [1] * len(pieces) + [4] * len(WORDS) + [5, 5]
    return {
        'general.architecture': 'llama',
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.merges': list(merges),
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.padding_token_id': 2,
        'tokenizer.ggml.add_bos_token': False,
        **({'tokenizer.chat_template': template} if template else {}),
    }


def scored_fields(template=''):
    """GGUF metadata of a scored tokenizer (SentencePiece)."""
    pieces = [
        'er', '▁t', 'he', '▁the', 'in', 'an', '▁a', 'on', '▁w', 'at', 'ing', 'is', 'ar', '▁Par',
        '▁P', '▁Paris', '▁answer', 'sw', 'answ', '▁answ', '▁▁', 'user', 'us', '▁is', '▁it',
    ]  # fmt: skip
    letters = [*'▁abcdefghijklmnopqrstuvwxyzPABT.,[]/INST']
    letters = list(dict.fromkeys(letters))
    raw = [f'<0x{byte:02X}>' for byte in range(256)]
    tokens = ['<unk>', '<s>', '</s>', *raw, *pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    return {
        'general.architecture': 'llama',
        'tokenizer.ggml.model': 'llama',
        'tokenizer.ggml.pre': 'default',
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.scores': scores,
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.unknown_token_id': 0,
        **({'tokenizer.chat_template': template} if template else {}),
    }


def write_gguf(file, metadata):
    """A GGUF file of metadata alone."""
    writer = gguf.GGUFWriter(str(file), metadata['general.architecture'])
    for key, value in metadata.items():
        if key == 'general.architecture':
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f'gguf:{file}'


def write_directory(folder, metadata, **config):
    """The same tokenizer as the directory of a Hugging Face model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = metadata['tokenizer.ggml.tokens']
    description = tokenizer_json(metadata, where='x')
    (folder / 'tokenizer.json').write_text(json.dumps(description), 'utf-8')
    roles = {
        'eos_token': tokens[metadata['tokenizer.ggml.eos_token_id']],
        'pad_token': {'content': tokens[metadata['tokenizer.ggml.eos_token_id']]},
        'chat_template': metadata.get('tokenizer.chat_template'),
    }
    (folder / 'tokenizer_config.json').write_text(json.dumps(roles | config), 'utf-8')
    return f'hf:{folder}'
