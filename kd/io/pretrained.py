"""Networks that others have trained: directories of Hugging Face models, and GGUF files.

    described = pretrained.describe('hf:/models/Qwen3-8B')       what it is; no weights are read
    module = pretrained.network('gguf:SmolLM2.gguf', dtype='bfloat16')
    variables = pretrained.load('gguf:SmolLM2.gguf', abstract)   onto the shardings of `abstract`

In a config they stand wherever a trained network is named, see `kd.config.Recipe.pretrained`.
`FAMILIES` are the architectures that are known; one more is a module that reads its description,
one that says where its leaves lie, and a line there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from kd import files
from kd.errors import UserError, did_you_mean
from kd.io import (
    autoencoder_settings,
    clip_names,
    decoder_names,
    diffusion_names,
    diffusion_settings,
    gguf,
    gguf_decoders,
    hf_decoders,
    mae_names,
    shape_names,
    torch_weights,
    vgg_names,
)
from kd.io.decoder_names import Names
from kd.io.torch_weights import Find, Tensor
from kd.models.autoencoder_kl import AutoencoderKL
from kd.models.autoencoder_wan import WanAutoencoder
from kd.models.clip import ClipVision
from kd.models.decoder import Decoder
from kd.models.denoiser import Denoised
from kd.models.edm import DhariwalUNet, SongUNet
from kd.models.latent_dit import LatentDiT
from kd.models.masked_autoencoder import Encoder
from kd.models.mmdit import MMDiT
from kd.models.next_dit import NextDiT
from kd.models.one_time import OneTime
from kd.models.shape_dit import ShapeDiT, VoxelDiT
from kd.models.unet_conditional import UNetConditional
from kd.models.vgg_features import VGGFeatures
from kd.models.wan import Wan
from kd.references import split_foreign

# Files of weights in the directory of a model, in the order in which they are looked for.
WEIGHTS = tuple(
    f'{name}.safetensors{index}'
    for name in ('model', 'diffusion_pytorch_model')
    for index in ('', '.index.json')
)

# Special tokens, as config.json names their ids.
TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


class Family(NamedTuple):
    """What there is to know of an architecture.

    Attributes:
      network: the linen module.
      arguments: (description, tensors, place) -> what `network` takes. The description is a
        config.json or the metadata of a GGUF file; tensors are those of a GGUF file, else {}.
      find: (module, tensors, place) -> where the leaves of the module lie, and an expression that
        finds the names of tensors that may be left over.
      unseen: attributes of the module that shapes of tensors do not tell.
    """

    network: Callable[..., nn.Module]
    arguments: Callable[[Mapping[str, Any], Mapping[str, Tensor], Path], dict[str, Any]]
    find: Callable[[Any, Mapping[str, Tensor], Path], tuple[Find, str]]
    unseen: tuple[str, ...] = ()


def _decoder(names: Names, arguments: Callable[..., dict[str, Any]]) -> Family:
    def find(of: Any, tensors: Mapping[str, Tensor], where: Path) -> tuple[Find, str]:
        return decoder_names.find(of, names.of_file(tensors), where), names.left

    unseen = ('heads', 'mlp', 'norm', 'epsilon', 'rope_theta', 'rope_scaling', 'window')
    return Family(Decoder, arguments, find, unseen)


def _hf(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    del tensors
    return hf_decoders.arguments(config, where)


def _vision(description: Mapping[str, Any], tensors: Any, where: Path) -> dict[str, Any]:
    del tensors
    return clip_names.arguments(description, where)


_CLIP = Family(
    ClipVision,
    _vision,
    clip_names.find,
    ('depth', 'heads', 'mlp', 'layer', 'epsilon', 'pixel_mean', 'pixel_std'),
)

_DIT = ('heads', 'grid', 'stretch', 'epsilon')
_NEXT = ('heads', 'axes', 'theta', 'clock', 'activated', 'epsilon')


def _latent(network: Any, arguments: Any, *unseen: str) -> Family:
    return Family(network, arguments, diffusion_names.find, unseen)


# By kind of reference, and what names the architecture: `model_type`, `_class_name` or
# `architecture`, `general.architecture`.
FAMILIES: dict[str, dict[str, Family]] = {
    'hf': {
        **{name: _decoder(names, _hf) for name, names in decoder_names.HF.items()},
        'clip_vision_model': _CLIP,
        'clip': _CLIP,
        'vit_mae': Family(
            Encoder, mae_names.arguments, mae_names.find, ('heads', 'pixel_mean', 'pixel_std')
        ),
        'SongUNet': Family(
            SongUNet,
            diffusion_names.edm,
            diffusion_names.find,
            ('noise', 'encoder', 'decoder', 'taps'),
        ),
        'DhariwalUNet': Family(DhariwalUNet, diffusion_names.edm, diffusion_names.find),
        'UNet2DConditionModel': Family(
            UNetConditional, diffusion_names.unet, diffusion_names.find, ('heads', 'groups')
        ),
        'DiTTransformer2DModel': _latent(LatentDiT, diffusion_settings.dit, *_DIT),
        'Transformer2DModel': _latent(LatentDiT, diffusion_settings.transformer, *_DIT),
        'PixArtTransformer2DModel': _latent(LatentDiT, diffusion_settings.pixart, *_DIT),
        'SD3Transformer2DModel': _latent(MMDiT, diffusion_settings.sd3, 'heads', 'grid'),
        'FluxTransformer2DModel': _latent(MMDiT, diffusion_settings.flux, 'heads', 'axes'),
        'QwenImageTransformer2DModel': Family(
            MMDiT,
            diffusion_settings.qwen,
            partial(diffusion_names.find, renames=diffusion_names.QWEN),
            ('heads', 'axes', 'centred'),
        ),
        'Lumina2Transformer2DModel': _latent(NextDiT, diffusion_settings.lumina2, *_NEXT),
        'ZImageTransformer2DModel': Family(
            NextDiT,
            diffusion_settings.z_image,
            partial(diffusion_names.find, renames=diffusion_names.Z_IMAGE),
            _NEXT,
        ),
        'WanTransformer3DModel': _latent(Wan, diffusion_settings.wan, 'heads', 'epsilon'),
        'SparseStructureFlowModel': Family(
            ShapeDiT, shape_names.structure, shape_names.find, ('heads',)
        ),
        'SLatFlowModel': Family(VoxelDiT, shape_names.latents, shape_names.find, ('heads', 'side')),
        'ElasticSLatFlowModel': Family(
            VoxelDiT, shape_names.latents, shape_names.find, ('heads', 'side')
        ),
        'AutoencoderKL': _latent(
            AutoencoderKL, autoencoder_settings.autoencoder, 'groups', 'scale', 'shift'
        ),
        **dict.fromkeys(
            ('AutoencoderKLWan', 'AutoencoderKLQwenImage'),
            _latent(WanAutoencoder, autoencoder_settings.wan_autoencoder, 'mean', 'deviation'),
        ),
        'vgg16': Family(VGGFeatures, vgg_names.arguments, vgg_names.find),
        'VQModel': _latent(AutoencoderKL, autoencoder_settings.vq, 'groups', 'scale'),
    },
    'gguf': {
        name: _decoder(names, gguf_decoders.arguments) for name, names in decoder_names.GGUF.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says of its network.

    Attributes:
      reference: 'hf:DIR' or 'gguf:FILE'.
      architecture: such as 'llama'.
      arguments: what the architecture's module takes.
      tokenizer: reference for `kd.text.tokenizer.load`, '' where there is no tokenizer.
      tokens: ids by role as config.json names them, `eos_token_id` for example.
    """

    reference: str
    architecture: str
    arguments: dict[str, Any]
    tokenizer: str
    tokens: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Symbols of the embedding, one a row: the tokenizer's, or more."""
        return self.arguments['num_classes']

    @property
    def family(self) -> Family:
        """Of the architecture."""
        return FAMILIES[split_foreign(self.reference)[0]][self.architecture]


def describe(reference: str) -> Description:
    """What a file says of its network; only its header is read.

    Raises:
      UserError: no such file or directory, one that is damaged, an architecture that is not known,
        or a setting that its module does not have.
    """
    kind, place = split_foreign(reference)
    return (_described_hf if kind == 'hf' else _described_gguf)(reference, place)


def network(of: str, **changes: Any) -> nn.Module:
    """The module that a file describes, with changes; for the block of a network in a config.

        network=dict(name='kd.io.pretrained.network', of='gguf:SmolLM2.gguf', depth=10)

    Args:
      of: 'hf:DIR' (of which config.json is read alone) or 'gguf:FILE'.
      **changes: attributes of the module, such as `dtype`, `param_dtype`, `remat`.

    Raises:
      UserError: as `describe`.
      ValueError: an attribute that is not there.
    """
    described = describe(of)
    kind: Any = described.family.network
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name in changes if name not in names]:
        near = did_you_mean(unknown[0], names)
        raise ValueError(f"{kind.__name__} has no '{unknown[0]}'.{near}")
    return kind(**{**described.arguments, **changes})


def load(reference: str, abstract: Any, *, dtype: Any = None) -> Any:
    """Variables of a network from a file, leaf by leaf, on the devices of their shardings.

    Args:
      reference: 'hf:DIR' or 'gguf:FILE'.
      abstract: tree of the network's variables as shapes, with or without shardings.
      dtype: of floating-point leaves; None for those of `abstract`.

    Raises:
      UserError: as `describe` and `check`.
    """
    return torch_weights.restore(
        abstract=abstract, dtype=lambda leaf: dtype or leaf.dtype, **_opened(reference)
    )


def check(reference: str, abstract: Any) -> None:
    """Holds a file to a network; no weights are read.

    Raises:
      UserError: a tensor that is missing, has another shape, or is left over.
    """
    torch_weights.check(abstract=abstract, **_opened(reference))


def check_agreement(described: Description, module: nn.Module, given: Mapping[str, Any]) -> None:
    """Holds a network to what a file says of it where shapes of tensors do not tell.

    Args:
      described: of the file.
      module: the network, of a preset for example, or a denoiser or flow around it.
      given: attributes that were set on purpose; they may differ. Those of a denoiser's network are
        in its own block, `network`.

    Raises:
      UserError: another kind of module, or an attribute that differs.
    """
    if isinstance(module, Denoised | OneTime):
        module, given = module.inner, given.get('network', {})
    family = described.family
    theirs = family.network(**described.arguments)
    if type(module) is not type(theirs):
        raise UserError(
            f'{described.reference} is a {type(theirs).__name__}, and the network a '
            f'{type(module).__name__}.'
        )
    for name in family.unseen:
        a, b = getattr(theirs, name), getattr(module, name)
        if a != b and name not in given:
            raise UserError(
                f'{described.reference} says {name}={a!r}, and the network has {b!r}; name '
                f'another network, or set its {name} on purpose.'
            )


def _opened(reference: str) -> dict[str, Any]:
    """Arguments of `torch_weights.restore` and `check`."""
    described = describe(reference)
    kind, place = split_foreign(reference)
    tensors: Mapping[str, Any]
    if kind == 'hf':
        place = weights_of(place)
        tensors = torch_weights.tensors_of(place)
    else:
        tensors = gguf.read(place)[1]
    module = described.family.network(**described.arguments)
    find, left = described.family.find(module, tensors, place)
    return dict(where=place, tensors=tensors, find=find, ignore=left)


def weights_of(directory: Path) -> Path:
    """The file of weights, or the index of several, in the directory of a model."""
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    others = [each.name for each in sorted(directory.glob('*.bin'))]
    advice = 'save it anew with save_pretrained' if others else 'fetch it'
    raise UserError(f'{directory} has no {" or ".join(WEIGHTS[:2])}; {advice}.')


def _described_hf(reference: str, directory: Path) -> Description:
    file = directory / 'config.json'
    if not directory.is_dir():
        raise UserError(f'{directory} is not there, or is no directory of a model.')
    if not file.is_file():
        raise UserError(f'{directory} has no config.json: it is no directory of a model.')
    config = files.read_json(file, 'fetch it again')
    # Of transformers, of diffusers, of timm.
    kinds = ('model_type', '_class_name', 'architecture')
    architecture = _known('hf', next((config[k] for k in kinds if k in config), None), file)
    # That of a whole CLIP is no matter of its tower.
    reads = FAMILIES['hf'][architecture].network is Decoder
    has_tokenizer = reads and (directory / 'tokenizer.json').is_file()
    return Description(
        reference=reference,
        architecture=architecture,
        arguments=FAMILIES['hf'][architecture].arguments(config, {}, file),
        tokenizer=reference if has_tokenizer else '',
        tokens={name: config.get(name) for name in TOKENS if config.get(name) is not None},
    )


def _described_gguf(reference: str, file: Path) -> Description:
    fields, tensors = gguf.read(file)
    architecture = _known('gguf', fields.get('general.architecture'), file)
    tokens = {
        name: fields.get(f'tokenizer.ggml.{name.replace("pad_", "padding_")}') for name in TOKENS
    }
    return Description(
        reference=reference,
        architecture=architecture,
        arguments=FAMILIES['gguf'][architecture].arguments(fields, tensors, file),
        tokenizer=reference if fields.get('tokenizer.ggml.tokens') else '',
        tokens={name: index for name, index in tokens.items() if index is not None},
    )


def _known(kind: str, architecture: Any, file: Path) -> str:
    if architecture not in FAMILIES[kind]:
        raise UserError(
            f"{file}: the architecture '{architecture}' is none of those known: "
            f'{", ".join(FAMILIES[kind])}.'
        )
    return architecture
