"""LLaVA-MoD: a tiny model that sees, with experts, from a large one (2024, arXiv:2408.15881).

    python -m kd.main --config=configs/lm/llava_mod.py:cpu --workdir=runs/llava_mod
    python -m kd.claims llava_mod

| variant | teacher, student | data | hardware |
|---|---|---|---|
| cpu | decoders of width 48 and 12 | questions about digits | 2 cores, 3 min |
| qwen2_7b_to_0_5b (default) | Qwen2-7B, Qwen2-0.5B with experts | LLaVA's lists, RLAIF-V | v5p-64 |

Stages: the teacher that sees (`teacher_adaptor`, `teacher`), the student's `adaptor`, `d2d`, `d2s`
and `pd`; in `cpu`, where no language is there before, `sft` for comparison and no adaptors. Seed 0
gave probabilities of the truth of .826 (teacher), .774 (`sft`), .728, .739 and .704. The last stage
wins or loses with the weights that D2D began with: from other ones, behind the same teacher, D2D is
.756, D2S .765 and PD .769; five more gave .729 to .748 for D2D. The claim's PD, whose pairs are
made before, ends at the same parameters as that of the recipe, from the same D2S.

The larger one reads `/models/Qwen2-7B-Instruct`, `/models/Qwen2-0.5B-Instruct` and
`/models/clip-vit-large-patch14-336` (its weights as safetensors), and in `--data_dir` lists as
LLaVA's with a folder `images`: `captions.json` (558k or .6M captions), `instructions.json` (665k,
for the teacher), `general.json` (2.4M captions and chats), `tasks.json` (1.4M) and `pairs.json`
(80k of RLAIF-V: `question`, `image`, `chosen`, `rejected`). Rates, one epoch each, 2,048 tokens,
AdamW without decay, a cosine after 3 % of warm-up, beta .1, 4 experts, 2 of them, capacity 1.5 and
the weight .01 are the paper's and its scripts'. Ours, as the paper does not say: 128 rows a step,
gradients clipped at 1, the image before the chat and not within it, and token 151,655 for it, which
Qwen2's text does not have. The teacher is trained as LLaVA-1.5 is. The scripts have `kto_pair` for
the last stage and the paper DPO; set --config.pd.method.loss=kto_pair. The paper reports 8.8 % over
Qwen-VL-Chat-7B on average with Qwen2-1.5B; benchmarks are run elsewhere, on what is trained here.
"""

from kd import config as kd_config
from kd.models.decoder import SHARDING

VARIANTS = ('cpu', 'qwen2_7b_to_0_5b')
METHOD = 'kd.methods.lm.llava_mod'
SEES = 'kd.models.vision_language.vision_decoder'
LABELS = dict(name=f'{METHOD}.mimic', soft_weight=0.0, hard_weight=1.0)
D2D = dict(name=f'{METHOD}.mimic')
D2S = dict(
    name=f'{METHOD}.mimic', soft_weight=1.0, hard_weight=1.0, balance=0.01,
    trainable='/(experts|router)/',
)  # fmt: skip
PD = dict(name=f'{METHOD}.prefer', loss='dpo', beta=0.1, balance=0.01)
EXPERTS = dict(count=4, top_k=2, capacity=1.5, every=2)
LENGTH, IMAGE_TOKEN, BATCH = 2_048, 151_655, 128


def get_config(variant: str = 'qwen2_7b_to_0_5b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'qwen2_7b_to_0_5b': images})()


def cpu():
    """Questions about digits."""
    source = dict(name='kd.data.builders.digit_questions.digit_questions')

    def sees(width, depth, experts=None):
        language = dict(
            name='kd.models.decoder.Decoder',
            num_classes=23,
            width=width,
            depth=depth,
            heads=width // 12 if width > 12 else 2,
            mlp_hidden=width * depth,
            mlp='gelu',
            rope_theta=1e3,
            tied=False,
            deviation=None,
            max_length=6,
            experts=experts,
        )
        vision = dict(
            name='kd.models.clip.ClipVision', image=8, patch=4, width=32, depth=2, heads=2,
            mlp_hidden=64,
        )  # fmt: skip
        return dict(name=SEES, language=language, vision=vision, image_token=22)

    def stage(network, method, steps=1_200, lr=5e-3, decay=0.0, **fields):
        return kd_config.stage(
            network=network,
            method=method,
            optimizer=dict(name='adamw', lr=lr, weight_decay=decay, schedule='cosine'),
            steps=steps,
            batch_size=128,
            log_every=50,
            eval_every=400,
            evaluators=dict(test=dict(name='kd.evaluators.language.language', split='test')),
            **fields,
        )

    config = kd_config.recipe(
        stages=('teacher', 'sft', 'd2d', 'd2s', 'pd'),
        data=dict(source=source, train='train', test='test'),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(
                ('teacher', 'teacher'),
                ('fine-tuning', 'sft'),
                ('D2D', 'd2d'),
                ('D2D, D2S', 'd2s'),
                ('D2D, D2S, PD', 'pd'),
            ),
            metrics=(
                ('test/probability', 'probability of the truth'),
                ('test/accuracy', 'accuracy'),
                ('test/nll', 'NLL, nats'),
            ),
            notes='The students see through the tower of their teacher; fine-tuning has as many '
            'steps as D2D and D2S together.',
        ),
        mesh=dict(data=1),
    )
    seen = dict(vision='teacher')
    # Of one draw of the noise it would learn as little as a student.
    config.teacher = stage(
        sees(48, 2), dict(LABELS, trainable=''), steps=400, lr=3e-3, decay=0.3,
        data=dict(source=dict(source, draws=8), train='teacher', test='test'),
    )  # fmt: skip
    config.sft = stage(sees(12, 1), LABELS, steps=2_400, references=seen)
    config.d2d = stage(sees(12, 1), D2D, teacher='teacher', references=seen)
    sparse = sees(12, 1, EXPERTS)
    config.d2s = stage(sparse, D2S, teacher='teacher', references=dict(start='d2d'))
    config.pd = stage(
        sparse,
        PD,
        steps=600,
        lr=5e-4,
        references=dict(start='d2s', initial='d2s', reference='teacher'),
    )
    return config


def images():
    """Qwen2-7B to Qwen2-0.5B with experts, behind CLIP's ViT-L/14 at 336 pixels."""
    shape = dict(dtype='bfloat16', remat='block')
    tower = dict(
        name='kd.models.clip.preset', of='vit_l_14_336', dtype='bfloat16', stacked=True
    )  # fmt: skip

    def language(of, **changes):
        return dict(name='kd.models.decoders.preset', of=of, **shape, **changes)

    def sees(decoder):
        return dict(name=SEES, language=decoder, vision=tower, image_token=IMAGE_TOKEN)

    large = language('qwen2_7b', stacked=True)
    # Experts in every second block are not stacked.
    small, sparse = language('qwen2_0_5b'), language('qwen2_0_5b', experts=EXPERTS)

    def about(path, kind='chats', **fields):
        source = dict(
            name=f'kd.data.image_text.{kind}', path=path, images='images', length=LENGTH,
            tokenizer='hf:/models/Qwen2-0.5B-Instruct', image_token=IMAGE_TOKEN,
            vocabulary=151_936, **fields,
        )  # fmt: skip
        return dict(source=source, train='train[:99%]', validation='train[99%:]')

    config = kd_config.recipe(
        stages=('teacher_adaptor', 'teacher', 'adaptor', 'd2d', 'd2s', 'pd'),
        data=about('tasks.json'),
        pretrained=dict(
            qwen2_7b=dict(weights='hf:/models/Qwen2-7B-Instruct', network=large),
            qwen2_0_5b=dict(weights='hf:/models/Qwen2-0.5B-Instruct', network=small),
            clip=dict(weights='hf:/models/clip-vit-large-patch14-336', network=tower),
        ),
        report=dict(
            name='kd.reports.language.language',
            rows=(('D2D', 'd2d'), ('D2S', 'd2s'), ('PD', 'pd'), ('teacher', 'teacher')),
            batches=16,
        ),
        mesh=dict(data=1, fsdp=-1),
        sharding=SHARDING,
        frozen_sharding=SHARDING,
    )

    def stage(network, method, data, steps, lr, **fields):
        warmup = dict(schedule='cosine', warmup_steps=max(1, round(0.03 * steps)))
        return kd_config.stage(
            network=network,
            method=method,
            data=data,
            optimizer=dict(name='adamw', lr=lr, weight_decay=0.0, clip_norm=1.0, **warmup),
            steps=steps,
            batch_size=BATCH,
            log_every=10,
            eval_every=500,
            checkpoint_every=500,
            evaluators=fields.pop('evaluators', _LANGUAGE),
            **fields,
        )

    adaptor = dict(LABELS, trainable='^adaptor/')
    captions = about('captions.json')
    config.teacher_adaptor = stage(
        sees(large), adaptor, captions, 4_360, 1e-3,
        references=dict(language='qwen2_7b', vision='clip'),
    )  # fmt: skip
    config.teacher = stage(
        sees(large), LABELS, about('instructions.json'), 5_200, 2e-5,
        references=dict(start='teacher_adaptor'),
    )  # fmt: skip
    config.adaptor = stage(
        sees(small), adaptor, captions, 4_690, 1e-3,
        references=dict(language='qwen2_0_5b', vision='clip'),
    )  # fmt: skip
    config.d2d = stage(
        sees(small), D2D, about('general.json'), 18_750, 2e-5,
        teacher='teacher', references=dict(start='adaptor'),
    )  # fmt: skip
    config.d2s = stage(
        sees(sparse), D2S, about('tasks.json'), 10_940, 2e-5,
        teacher='teacher', references=dict(start='d2d'),
    )  # fmt: skip
    config.pd = stage(
        sees(sparse), PD, about('pairs.json', 'preferences', fields=('question',)), 625, 2e-6,
        references=dict(start='d2s', reference='teacher'),
        evaluators=dict(pairs=dict(name='kd.evaluators.preference.preference')),
    )  # fmt: skip
    return config


_LANGUAGE = dict(validation=dict(name='kd.evaluators.language.language'))
