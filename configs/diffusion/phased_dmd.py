"""Four steps by two experts, Phased DMD (arXiv:2510.27684).

    python -m kd.data.embed_texts FILE --model=/models/wan --encoder=wan --to=DATA/wan/train
    python -m kd.data.embed_images FOLDER --model=/models/wan/vae --size=720x1280 --frames=1 \
        --to=DATA/wan/train
    python -m kd.main --config=configs/diffusion/phased_dmd.py:wan21_14b --data_dir=DATA \
        --workdir=runs/phased

| variant | teacher in /models | parameters | latents | times |
|---|---|---:|---|---|
| wan21_14b (default) | wan21_14b/transformer | 14.3 B | 720 x 1280 pixels | 1, .938, .833, .625 |
| qwen_image | qwen_image/transformer | 20.4 B | 1328 x 1328 pixels | 1, .9, .75, .5 |

Each phase is a stage: the first has the first two times and ends at the third, the second goes from
there to the data, behind the first. Each begins as the teacher, critic included.

As the paper has it: adapters of rank 64 and alpha 8 at 5e-5 for the generators, a whole critic at
4e-7, five moves of it for one, Adam with b1 0, batches of 64, guidance 4, clocks shifted by 5 for
Wan and 3 for Qwen-Image. Which kernels have adapters and how many steps a phase has are ours; of
Qwen-Image's seven ratios of sides there is the square alone. Videos, and teachers of two experts
(Wan 2.2), are not here. `input`, which samples are compared with, may be left out of the data by
`constants`.

The paper reports for pictures of Wan 2.1 a cosine of DINOv3 between samples of a prompt of .782,
.826 for DMD2 and .708 for the teacher, less being more diverse. Nothing of this was run by us.
"""

from pathlib import Path

from kd import config as kd_config

latent = kd_config.load_module(Path(__file__).with_name('latent.py'))
VARIANTS = ('wan21_14b', 'qwen_image')
# Of attention and feed-forward layers.
ADAPTER = dict(rank=64, alpha=8.0, targets=r'(to_[qkv]|add_[qkv]_proj|to_out_0|proj|net_2)/kernel$')


def get_config(variant: str = 'wan21_14b'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'wan21_14b': wan21_14b, 'qwen_image': qwen_image})()


def wan21_14b():
    """Pictures by Wan 2.1."""
    return recipe(
        'wan21_14b', 'wan', dict(name='kd.models.wan.preset', of='wan21_14b'),
        fields=dict(text=(512, 4_096)), shape=(1, 90, 160, 16), shift=5.0,
    )  # fmt: skip


def qwen_image():
    """Pictures by Qwen-Image."""
    return recipe(
        'qwen_image', 'qwen_image', dict(name='kd.models.mmdit.preset', of='qwen_image'),
        fields=dict(text=(1_024, 3_584), mask=(1_024,)), shape=(166, 166, 16), shift=3.0,
    )  # fmt: skip


def recipe(of, encoder, network, *, fields, shape, shift):
    """Stages first, second."""
    times = latent.shifted(4, shift)
    early, late = times[:2], times[2:]
    config = latent.begun(encoder, ('first', 'second'), fields, shape=shape)
    config.pretrained = dict(teacher=latent.weights(of, latent.flow(network)))
    config.report.rows = (('Phased DMD, 4 steps', 'second'),)
    clock = dict(name='kd.sampling.times.straight', shift=shift)

    def phase(probe, references, **method):
        return latent.stage(
            network=latent.flow(network, adapter=ADAPTER),
            teacher='teacher',
            references={'start': 'teacher', **references},
            method=dict(
                name='kd.methods.diffusion.phased_dmd.phased_dmd',
                clock=clock,
                guidance=4.0,
                updates=5,
                optimizer=latent.adamw(4e-7, b1=0.0),
                **method,
            ),
            optimizer=latent.adamw(5e-5, b1=0.0),
            probe=probe,
            samples=64,
            steps=1_000,
            batch_size=64,
        )

    config.first = phase('', {}, times=early, end=late[0])
    config.second = phase(
        'phase_samples.phase_samples', {'early': 'first'}, times=late, before=(('early', early),)
    )
    return config
