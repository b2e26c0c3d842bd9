"""A distillation step by TRL's chunked divergence, as `kd.benchmarks.distil_step` asks for it.

As its `DistillationTrainer` computes: hidden states of both models go into
`_chunked_divergence_loss`, with `whole` those of all tokens and a mask, else those of the answers
alone; the optimiser is torch's fused AdamW, as its default is.
"""

from __future__ import annotations

import copy
from typing import Any

from kd.benchmarks import turns

_HELD: dict[str, Any] = {}


def prepare(
    directory: str, blocks: list[int], tokens: list[list[int]], prompt: int, lr: float, whole: bool
) -> None:
    """Loads the teacher, and makes the student of some of its blocks."""
    import torch
    import transformers
    from trl.trainer import distillation_trainer

    torch.set_num_threads(1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    teacher = load(directory, dtype=torch.float32).eval().requires_grad_(False)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(blocks)
    student = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for own, of in enumerate(blocks):
        student.model.layers[own].load_state_dict(teacher.model.layers[of].state_dict())
    for part in ('embed_tokens', 'norm'):
        getattr(student.model, part).load_state_dict(getattr(teacher.model, part).state_dict())
    if not config.tie_word_embeddings:
        student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    _HELD.update(
        teacher=teacher,
        student=student.train(),
        optimizer=torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0, fused=True),
        tokens=torch.tensor(tokens),
        prompt=prompt,
        whole=whole,
        loss=distillation_trainer._chunked_divergence_loss,
    )


def step() -> dict[str, float]:
    """{'cpu_s', 'loss'} of a step."""
    took, loss = turns.cpu_seconds(_step)
    return {'cpu_s': took, 'loss': loss}


def _step() -> float:
    import torch

    teacher, student, tokens = (_HELD[name] for name in ('teacher', 'student', 'tokens'))
    first = 0 if _HELD['whole'] else _HELD['prompt'] - 1
    taken = slice(first, -1)
    counted = torch.arange(first + 1, tokens.shape[1]) >= _HELD['prompt']
    with torch.no_grad():
        theirs = teacher.model(tokens, use_cache=False).last_hidden_state[:, taken]
    ours = student.model(tokens, use_cache=False).last_hidden_state[:, taken]
    loss, _, _ = _HELD['loss'](
        ours,
        theirs,
        student.lm_head.weight,
        teacher.lm_head.weight,
        counted.expand(len(tokens), -1),
        beta=0.5,
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    _HELD['optimizer'].step()
    _HELD['optimizer'].zero_grad()
    return loss.item()


def name() -> str:
    """What the peer is, with its version."""
    import torch
    import trl

    return f'trl {trl.__version__}, torch {torch.__version__}'


FUNCTIONS = {'prepare': prepare, 'step': step, 'peak_mib': turns.peak_mib, 'name': name}
