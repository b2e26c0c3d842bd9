"""Few steps of large models with two times of noise, Decoupled DMD (arXiv:2511.22677).

    python -m kd.data.embed_texts FILE --model=/models/lumina2 --encoder=lumina2 \
        --to=DATA/lumina2/train
    python -m kd.data.embed_images FOLDER --model=/models/lumina2/vae --size=1024x1024 \
        --to=DATA/lumina2/train
    python -m kd.main --config=configs/diffusion/decoupled_dmd.py:lumina2 --data_dir=DATA \
        --workdir=runs/lumina2

| variant | teacher in /models | parameters | steps | shift |
|---|---|---:|---:|---:|
| lumina2 (default) | lumina2/transformer | 2,610 M | 4 | 6 |
| z_image | z_image/transformer | 6,155 M | 8 | 3 |
| sdxl | sdxl/unet | 2,567 M | 4 | |

All are 'hybrid': what guidance adds at times cleaner than the generator's own, and matching at any.
SDXL is as DMD2 has it (`configs/diffusion/latent.py`), discriminator included. Of the others the
paper, as far as it could be read, says neither rates nor batches nor guidance; those here are ours,
as are shifts of the released models as clocks of the noise.

The paper reports for Lumina-Image 2.0 a DPG of 85.85 and an HPSv2.1 of 32.29 (83.90 and 30.61 with
one time, 87.20 and 30.20 of the teacher in 50 steps), for SDXL an FID of 17.80 (18.95 of DMD2), on
10,000 captions of COCO. Nothing of this was run by us.
"""

from pathlib import Path

from kd import config as kd_config

latent = kd_config.load_module(Path(__file__).with_name('latent.py'))
VARIANTS = ('lumina2', 'z_image', 'sdxl')


def get_config(variant: str = 'lumina2'):
    """The recipe of a variant."""
    made = {'lumina2': lumina2, 'z_image': z_image, 'sdxl': sdxl}
    return kd_config.variant(variant, made)()


def lumina2():
    """Lumina-Image 2.0 in four steps."""
    return straight('lumina2', (256, 2_304), steps=4, shift=6.0, guidance=4.0)


def z_image():
    """Z-Image in eight steps."""
    return straight('z_image', (512, 2_560), steps=8, shift=3.0, guidance=5.0)


def sdxl():
    """Stable Diffusion XL, with the discriminator of DMD2."""
    return latent.recipe(
        'sdxl',
        label='Decoupled DMD, 4 steps',
        network=latent.unet('sdxl'),
        method=hybrid(
            times=latent.STEPS, guidance=8.0, gan=5e-3, feature='mid_block/resnets_1',
            optimizer=latent.adamw(5e-7),
        ),
        fields=dict(text=(77, 2_048), pooled=(1_280,), size=(6,)),
        constants=dict(size=(1_024, 1_024, 0, 0, 1_024, 1_024)),
        shape=(128, 128, 4),
        lr=5e-7,
        batch_size=128,
        steps=19_000,
    )  # fmt: skip


def straight(of, text, *, steps, shift, guidance):
    """A model of rectified flow at 1024 pixels."""
    return latent.recipe(
        of,
        label=f'Decoupled DMD, {steps} steps',
        network=latent.flow(dict(name='kd.models.next_dit.preset', of=of)),
        method=hybrid(
            times=latent.shifted(steps, shift), guidance=guidance, weight='flow',
            clock=dict(name='kd.sampling.times.straight', shift=shift),
            optimizer=latent.adamw(1e-6),
        ),
        fields=dict(text=text, mask=text[:1]),
        shape=(128, 128, 16),
        lr=1e-6,
        batch_size=128,
        steps=6_000,
        folder='transformer',
    )  # fmt: skip


def hybrid(**arguments):
    """The paper's method."""
    name = 'kd.methods.diffusion.decoupled_dmd.decoupled_dmd'
    return dict(name=name, levels='hybrid', updates=5, **arguments)
