"""A masked autoencoder that learns a larger one's features (DMAE 2022, arXiv:2208.12256).

    python -m kd.main --config=configs/vision/dmae.py:cpu --workdir=runs/dmae
    python -m kd.main --config=configs/vision/dmae.py --workdir=runs/dmae_vit_b

| variant | data | teacher, student | hardware | accuracy |
|---|---|---|---|---|
| cpu | digits | 4 blocks of 64 and of 32 | 2 cores, minutes | by linear probe, below |
| vit_l_to_b (default) | ImageNet | ViT-L/16, ViT-B/16 | 8 GPUs, or v5p-64 | 84.0 fine-tuned |
| vit_b_to_s | ImageNet | ViT-B/16, ViT-S/16 | 8 GPUs | |

With seed 0 a linear probe reads .72 of validation digits in the student by pixels alone, .77 in
that of DMAE and .85 in the teacher; from 5 labels a class .43, .64 and .71.

Stages of `cpu` are the teacher, a masked autoencoder; the student by pixels alone; the student with
the teacher's features; and the last one fine-tuned on 200 labels. Of the others: the student, and
it fine-tuned.

The teacher of ImageNet is `facebook/vit-mae-large` of Hugging Face, which predicts pixels that are
not normalised, in `/models/vit-mae-large` with its weights as safetensors; another place is
`--config.pretrained.teacher.weights=hf:DIR`. ImageNet is `imagenet_224` in `--data_dir`, which you
prepare in the format of tfds, with `image`, uint8 [224, 224, 3], and `label`, and the splits
`train` and `validation`. Numbers of the recipe are the paper's; random crops are of these images
and not of whole ones, and 5,000 training images are held out. Of the fine-tuning the rates, epochs
and augmentations are those of the released code. It was not run by us at this scale.
"""

from kd import config as kd_config
from kd.training import optimizer as optim

VARIANTS = ('cpu', 'vit_l_to_b', 'vit_b_to_s')

ENCODER = 'kd.models.masked_autoencoder'
PIXELS = dict(
    pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225)
)  # Of ImageNet, in [0, 1].
EXAMPLES = 1_276_167


def get_config(variant: str = 'vit_l_to_b'):
    """The recipe of a variant."""
    known = {
        'cpu': cpu,
        'vit_l_to_b': lambda: imagenet('vit_l', 'vit_b'),
        'vit_b_to_s': lambda: imagenet('vit_b', 'vit_s'),
    }
    return kd_config.variant(variant, known)()


def cpu():
    """Minutes on two cores, most of them the teacher's."""
    digits = dict(pixel_mean=(0.305,), pixel_std=(0.376,))
    encoder = dict(name=f'{ENCODER}.Encoder', patch=2, depth=4, heads=4, **digits)
    decoder = dict(width=32, depth=1, heads=4)
    adam = dict(
        name='adamw', lr=2e-3, b2=0.95, schedule='cosine', warmup_steps=40, weight_decay=0.05
    )
    probe = dict(name='kd.evaluators.linear_probe.linear_probe', shots=(5,))
    run = dict(optimizer=adam, batch_size=128, log_every=50, evaluators={'probe': probe})
    teacher, student = dict(encoder, width=64), dict(encoder, width=32)
    config = kd_config.recipe(
        stages=('teacher', 'pixels', 'student', 'tuned'),
        data=dict(name='digits', train='train[:80%]', validation='train[80%:]', test='test'),
        report=dict(
            name='kd.reports.comparison.comparison',
            rows=(('pixels alone', 'pixels'), ('DMAE', 'student'), ('teacher', 'teacher')),
            metrics=(
                ('probe/accuracy', 'linear probe, all labels'),
                ('probe/shots_5', '5 labels a class'),
            ),
            notes='Accuracy on the validation split of a logistic regression on mean tokens.',
        ),
    )
    pixels = dict(name='kd.methods.vision.masked_autoencoder.masked_autoencoder', decoder=decoder)
    taught = dict(name='kd.methods.vision.dmae.dmae', decoder=decoder, weight=5.0)
    short = dict(steps=400, eval_every=100, checkpoint_every=200)
    config.teacher = kd_config.stage(
        network=teacher, method=pixels, steps=1_000, eval_every=500, checkpoint_every=500, **run
    )
    config.pixels = kd_config.stage(network=student, method=pixels, **short, **run)
    config.student = kd_config.stage(
        network=student, teacher='teacher', method=taught, **short, **run
    )
    config.tuned = kd_config.stage(
        data=dict(train='train[:200]'),
        network=dict(
            name='kd.models.vit.ViT', patch=2, width=32, depth=4, heads=4, pool='patches',
            places='grid', **digits,
        ),
        references={'start': 'student'},
        method=dict(name='kd.methods.vision.supervised.supervised', fresh=FRESH),
        optimizer=dict(adam, lr=1e-3, scale=optim.layer_decay(4, 0.75)),
        evaluators={'validation': dict(name='kd.evaluators.calibration.calibration')},
        steps=200, batch_size=50, log_every=50, eval_every=100, checkpoint_every=100,
    )  # fmt: skip
    return config


# What fine-tuning does not take over: there is no such layer, or its norm is of another thing.
FRESH = '^(head|encoder_norm|positions)'


def imagenet(of, to):
    """100 epochs of features, 100 of fine-tuning."""
    sizes = {'vit_s': (384, 6), 'vit_b': (768, 12), 'vit_l': (1_024, 16)}
    half = dict(dtype='bfloat16')
    teacher = dict(name=f'{ENCODER}.preset', of=of, **half)
    student = dict(name=f'{ENCODER}.preset', of=to, **half)
    width, heads = sizes[to]
    folder = {'vit_l': 'vit-mae-large', 'vit_b': 'vit-mae-base'}[of]
    batch, tuning = 4_096, 1_024
    config = kd_config.recipe(
        stages=('student', 'tuned'),
        data=dict(
            name='imagenet_224', train='train[:1276167]', validation='train[1276167:]',
            test='validation',
        ),
        pretrained=dict(teacher=dict(weights=f'hf:/models/{folder}', network=teacher)),
        report=dict(
            name='kd.reports.classification.classification',
            rows=(('DMAE, fine-tuned', 'tuned'),), student='tuned', teacher='',
        ),
        mesh=dict(data=-1),
    )  # fmt: skip
    config.student = kd_config.stage(
        network=student,
        teacher='teacher',
        method=dict(
            name='kd.methods.vision.dmae.dmae',
            mask_ratio=0.75,
            student_blocks=(8,),
            teacher_blocks={'vit_l': (17,), 'vit_b': (8,)}[of],
            decoder=dict(width=512, depth=8, heads=16, **half),
            augmentation=(
                ('resized_crop', {'area': (0.2, 1.0), 'method': 'bicubic'}), 'flip',
            ),
        ),
        optimizer=dict(
            name='adamw', lr=1.5e-4 * batch / 256, b2=0.95, weight_decay=0.05,
            schedule='cosine', warmup_steps=20 * EXAMPLES // batch,
        ),
        evaluators={
            'probe': dict(name='kd.evaluators.linear_probe.linear_probe', shots=(5,), limit=50_000)
        },
        steps=100 * EXAMPLES // batch,
        batch_size=batch,
        log_every=100,
        eval_every=20 * EXAMPLES // batch,
        checkpoint_every=1_000,
    )  # fmt: skip
    config.tuned = kd_config.stage(
        network=dict(
            name='kd.models.vit.ViT', patch=16, width=width, depth=12, heads=heads, pool='patches',
            places='grid', drop_path=0.15, **PIXELS, **half,
        ),
        references={'start': 'student'},
        method=dict(
            name='kd.methods.vision.supervised.supervised',
            fresh=FRESH,
            label_smoothing=0.1,
            augmentation=(
                ('resized_crop', {'method': 'bicubic'}), 'flip', ('rand_augment', 2, 9),
                ('random_erasing', 0.25), ('mixup_or_cutmix', 0.8, 1.0),
            ),
        ),
        optimizer=dict(
            name='adamw', lr=5e-4 * tuning / 256, weight_decay=0.05,
            schedule='cosine', schedule_args=dict(end=1e-6 / (5e-4 * tuning / 256)),
            warmup_steps=20 * EXAMPLES // tuning, scale=optim.layer_decay(12, 0.75),
        ),
        evaluators={'validation': dict(name='kd.evaluators.classification.classification')},
        steps=100 * EXAMPLES // tuning,
        batch_size=tuning,
        log_every=100,
        eval_every=5 * EXAMPLES // tuning,
        checkpoint_every=1_000,
    )  # fmt: skip
    return config
