"""Tiny models as Hugging Face and llama.cpp write them, by hand, and what they compute, in NumPy.

Nothing here knows of kd: names, layouts and formulas are those of transformers.
"""

import json

import numpy as np
import safetensors.numpy

V, D, F, DEPTH, HEADS, GROUPS, LENGTH = 40, 32, 64, 2, 4, 2, 32

_SHARED = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    hidden_act='silu',
    max_position_embeddings=LENGTH,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
CONFIGS = {
    'llama': dict(
        model_type='llama',
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **_SHARED,
    ),
    'qwen2': dict(
        model_type='qwen2',
        # As transformers 5 writes it.
        rope_parameters=dict(rope_type='default', rope_theta=1000.0),
        use_sliding_window=False,
        sliding_window=9,
        **_SHARED,
    ),
    'qwen3': dict(model_type='qwen3', head_dim=16, rope_theta=1000.0, **_SHARED),
    'phi3': dict(model_type='phi3', sliding_window=5, pad_token_id=None, **_SHARED),
    'gpt2': dict(
        model_type='gpt2',
        vocab_size=V,
        n_embd=D,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=None,
        n_positions=LENGTH,
        activation_function='gelu_new',
        layer_norm_epsilon=1e-5,
    ),
}


def head_dim(config):
    return config.get('head_dim') or D // HEADS


def tensors_of(kind, seed=0):
    """Random tensors by the names that transformers writes."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        offset = 1.0 if len(shape) == 1 else 0.0
        return (rng.normal(size=shape) * 0.2 + offset).astype(np.float32)

    size = head_dim(CONFIGS[kind])
    q, kv, found = HEADS * size, GROUPS * size, {}
    if kind == 'gpt2':
        found['transformer.wte.weight'] = draw(V, D)
        found['transformer.wpe.weight'] = draw(LENGTH, D)
        for layer in range(DEPTH):
            at = f'transformer.h.{layer}.'
            for name, shape in {
                'attn.c_attn': (D, 3 * D),
                'attn.c_proj': (D, D),
                'mlp.c_fc': (D, 4 * D),
                'mlp.c_proj': (4 * D, D),
            }.items():
                found[f'{at}{name}.weight'] = draw(*shape)
                found[f'{at}{name}.bias'] = draw(shape[1]) - 1
            for name in ('ln_1', 'ln_2'):
                found |= {f'{at}{name}.weight': draw(D), f'{at}{name}.bias': draw(D) - 1}
        found |= {'transformer.ln_f.weight': draw(D), 'transformer.ln_f.bias': draw(D) - 1}
        return found
    found['model.embed_tokens.weight'] = draw(V, D)
    for layer in range(DEPTH):
        at = f'model.layers.{layer}.'
        if kind == 'phi3':
            shapes = {'self_attn.qkv_proj': (q + 2 * kv, D), 'mlp.gate_up_proj': (2 * F, D)}
        else:
            shapes = {
                'self_attn.q_proj': (q, D),
                'self_attn.k_proj': (kv, D),
                'self_attn.v_proj': (kv, D),
                'mlp.gate_proj': (F, D),
                'mlp.up_proj': (F, D),
            }
        for name, shape in (shapes | {'self_attn.o_proj': (D, q), 'mlp.down_proj': (D, F)}).items():
            found[f'{at}{name}.weight'] = draw(*shape)
            if kind == 'qwen2' and name[-6:-5] in 'qkv' and 'self' in name:
                found[f'{at}{name}.bias'] = draw(shape[0]) - 1
        for name in ('input_layernorm', 'post_attention_layernorm'):
            found[f'{at}{name}.weight'] = draw(D)
        if kind == 'qwen3':
            for name in ('q_norm', 'k_norm'):
                found[f'{at}self_attn.{name}.weight'] = draw(size)
    found['model.norm.weight'] = draw(D)
    if not CONFIGS[kind].get('tie_word_embeddings', False):
        found['lm_head.weight'] = draw(V, D)
    return found


def write(folder, kind, tensors=None, files=1, **changes):
    """A directory as `save_pretrained` leaves it, in one file or several with an index."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_of(kind) if tensors is None else tensors
    (folder / 'config.json').write_text(json.dumps(CONFIGS[kind] | changes))
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return folder
    places = {name: f'model-{i % files:05}.safetensors' for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: x for name, x in tensors.items() if places[name] == file}
        safetensors.numpy.save_file(part, folder / file, {'format': 'pt'})
    index = dict(metadata={}, weight_map=places)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


def _rms(x, weight, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def _frequencies(config, size):
    theta = config.get('rope_parameters', config).get('rope_theta', 10000.0)
    plain = theta ** (-np.arange(0, size, 2) / size)
    if not config.get('rope_scaling'):
        return plain
    # Llama 3: slowed by the factor above a wavelength of 8192, kept below 8192 / 4.
    length = 2 * np.pi / plain
    smooth = (8192 / length - 1) / 3
    mixed = (1 - smooth) * plain / 8 + smooth * plain
    return np.where(length > 8192, plain / 8, np.where(length < 2048, plain, mixed))


def _attention(config, q, k, v):
    """[T, heads * d], [T, groups * d] twice -> [T, heads * d], with transformers' `rotate_half`."""
    count, window = len(q), config.get('sliding_window') or LENGTH
    if config['model_type'] != 'phi3':
        window = LENGTH
    size = head_dim(config)
    groups = k.shape[1] // size
    out = []
    for head in range(HEADS):
        group = head // (HEADS // groups)
        a = q[:, head * size : (head + 1) * size]
        b = k[:, group * size : (group + 1) * size]
        scores = a @ b.T / np.sqrt(size)
        behind = np.arange(count)[:, None] - np.arange(count)
        scores = np.where((behind >= 0) & (behind < window), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(
            weights / weights.sum(-1, keepdims=True) @ v[:, group * size : (group + 1) * size]
        )
    return np.concatenate(out, -1)


def _rotated(config, x):
    size = head_dim(config)
    angle = np.arange(len(x))[:, None] * _frequencies(config, size)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    heads = []
    for at in range(0, x.shape[1], size):
        h = x[:, at : at + size]
        heads.append(h * cos + np.concatenate([-h[:, size // 2 :], h[:, : size // 2]], -1) * sin)
    return np.concatenate(heads, -1)


def _gpt2(tensors, tokens):
    def linear(x, name):
        return x @ tensors[f'{name}.weight'] + tensors[f'{name}.bias']

    def norm(x, name):
        return _layer_norm(x, tensors[f'{name}.weight'], tensors[f'{name}.bias'])

    at = 'transformer.'
    x = tensors[at + 'wte.weight'][tokens] + tensors[at + 'wpe.weight'][: len(tokens)]
    for layer in range(DEPTH):
        at = f'transformer.h.{layer}.'
        q, k, v = np.split(linear(norm(x, at + 'ln_1'), at + 'attn.c_attn'), 3, -1)
        x = x + linear(_attention(CONFIGS['gpt2'], q, k, v), at + 'attn.c_proj')
        y = linear(norm(x, at + 'ln_2'), at + 'mlp.c_fc')
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, at + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ tensors['transformer.wte.weight'].T


def logits(kind, tensors, tokens):
    """float64 [T, V] of tokens [T]."""
    tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
    if kind == 'gpt2':
        return _gpt2(tensors, tokens)
    config, size = CONFIGS[kind], head_dim(CONFIGS[kind])
    q_size, kv_size = HEADS * size, GROUPS * size
    x = tensors['model.embed_tokens.weight'][tokens]
    for layer in range(DEPTH):
        at = f'model.layers.{layer}.'

        def linear(y, name, at=at):
            return y @ tensors[f'{at}{name}.weight'].T + tensors.get(f'{at}{name}.bias', 0)

        y = _rms(x, tensors[at + 'input_layernorm.weight'])
        if kind == 'phi3':
            q, k, v = np.split(linear(y, 'self_attn.qkv_proj'), [q_size, q_size + kv_size], -1)
        else:
            q, k, v = (linear(y, f'self_attn.{name}_proj') for name in 'qkv')
        if kind == 'qwen3':
            q, k = (
                _rms(z.reshape(len(z), -1, size), tensors[f'{at}self_attn.{name}_norm.weight'])
                .reshape(z.shape) for z, name in ((q, 'q'), (k, 'k'))
            )  # fmt: skip
        out = _attention(config, _rotated(config, q), _rotated(config, k), v)
        x = x + linear(out, 'self_attn.o_proj')
        y = _rms(x, tensors[at + 'post_attention_layernorm.weight'])
        if kind == 'phi3':
            gate, up = np.split(linear(y, 'mlp.gate_up_proj'), 2, -1)
        else:
            gate, up = linear(y, 'mlp.gate_proj'), linear(y, 'mlp.up_proj')
        x = x + linear(gate / (1 + np.exp(-gate)) * up, 'mlp.down_proj')
    head = tensors.get('lm_head.weight', tensors['model.embed_tokens.weight'])
    return _rms(x, tensors['model.norm.weight']) @ head.T


# --- as llama.cpp's converter writes it ---

_GGUF_NAMES = {
    'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output',
    'transformer.wte': 'token_embd', 'transformer.wpe': 'position_embd',
    'transformer.ln_f': 'output_norm',
}  # fmt: skip
_GGUF_INSIDE = {
    'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
    'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm', 'self_attn.qkv_proj': 'attn_qkv',
    'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down',
    'mlp.gate_up_proj': 'ffn_up', 'ln_1': 'attn_norm', 'ln_2': 'ffn_norm',
    'attn.c_attn': 'attn_qkv', 'attn.c_proj': 'attn_output', 'mlp.c_fc': 'ffn_up',
    'mlp.c_proj': 'ffn_down',
}  # fmt: skip


def write_gguf(file, kind, tensors=None, types=('F32',), architecture=None, tokens=()):
    """A GGUF file; matrices take the types in turn. Returns the tensors as they come back."""
    import gguf

    tensors = tensors_of(kind) if tensors is None else tensors
    config, size = CONFIGS[kind], head_dim(CONFIGS[kind])
    arch = architecture or kind
    writer = gguf.GGUFWriter(file, arch)
    writer.add_vocab_size(V)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(D)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(4 * D if kind == 'gpt2' else F)
    writer.add_head_count(HEADS)
    if kind == 'gpt2':
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(GROUPS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(size)
        theta = config.get('rope_parameters', config).get('rope_theta', 10000.0)
        writer.add_rope_freq_base(theta)
    if kind == 'qwen3':
        writer.add_key_length(size)
        writer.add_value_length(size)
    if kind == 'phi3':
        writer.add_sliding_window(config['sliding_window'])
    if config.get('rope_scaling'):
        plain = theta ** (-np.arange(0, size, 2) / size)
        writer.add_tensor('rope_freqs.weight', (plain / _frequencies(config, size)).astype('f4'))
    writer.add_eos_token_id(2)
    if tokens:
        writer.add_token_list(tokens)
    back, turn = {}, 0
    for name, x in tensors.items():
        module, _, leaf = name.rpartition('.')
        new = _GGUF_NAMES.get(module)
        if new is None:
            inside = module.split('.', 3)
            new = f'blk.{inside[2]}.{_GGUF_INSIDE[inside[3]]}'
        conv1d = kind == 'gpt2' and x.ndim == 2 and module[12] != 'w'
        y = x.T if conv1d else x
        permuted = kind == 'llama' and new.endswith(('attn_q', 'attn_k'))
        if permuted:  # LlamaModel.permute of llama.cpp.
            heads = y.shape[0] // size
            y = y.reshape(heads, 2, size // 2, *y.shape[1:]).swapaxes(1, 2).reshape(y.shape)
        y = np.ascontiguousarray(y)
        type_ = gguf.GGMLQuantizationType['F32']
        if x.ndim == 2:
            type_ = gguf.GGMLQuantizationType[types[turn % len(types)]]
            turn += 1
        raw = gguf.quants.quantize(y, type_)
        writer.add_tensor(f'{new}.{leaf}', raw, raw_dtype=type_)
        y = gguf.quants.dequantize(raw, type_)
        if permuted:
            y = y.reshape(heads, size // 2, 2, *y.shape[1:]).swapaxes(1, 2).reshape(y.shape)
        back[name] = np.ascontiguousarray(y.T if conv1d else y)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back
