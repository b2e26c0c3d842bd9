"""CRD: an example's own teacher features told from those of thousands of others.

Source: Tian et al. 2020 (Contrastive Representation Distillation), arXiv:1910.10699.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import classification, contrastive, divergence
from kd.method import Method, Objective, minimize
from kd.metrics import mean
from kd.models.projectors import Embed
from kd.network import feature_names, feature_shape, from_linen
from kd.ranges import Count, Decay, NonNegative, Positive, Size
from kd.state import NETWORK, PyTree

# The part beside the network: embeddings of both sides, and their memory.
EMBEDDINGS, MEMORY = 'embeddings', 'memory'


def crd(
    context: Context,
    *,
    student: str = 'features',
    teacher: str = 'features',
    weight: Positive = 0.8,
    hard_weight: NonNegative = 1.0,
    soft_weight: NonNegative = 0.0,
    temperature: Positive = 4.0,
    size: Count = 128,
    negatives: Count = 16_384,
    momentum: Decay = 0.5,
    contrast_temperature: Positive = 0.07,
    examples: Size = 0,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Labels, softened outputs, and `kd.losses.contrastive.crd` with its bank in the state.

        loss = w CE(y, f(x)) + a T^2 KL_T(g || f) + b crd(bank, E_s(f(x)), E_t(g(x)))

    E_s and E_t are linear maps to unit vectors, both trained. The bank has two rows for each
    example of the training split, found by the batch's `index`; rows are moved after the loss has
    read them. Negatives are drawn anew in every step among the examples of other classes; in the
    first epoch among those seen so far, as the state learns labels with the batches. All of these
    are the part `embeddings` of the state; the stage's result is `network` alone.

    Args:
      context: the stage; needs a network, an optimiser, a teacher and integer labels.
      student, teacher: names of features of either.
      weight: b.
      hard_weight, soft_weight, temperature: w, a and T.
      size: of the embeddings.
      negatives: K.
      momentum: of a row of the bank.
      contrast_temperature: of the inner products.
      examples: rows of the bank; 0 for as many as the split `train` has.
      augmentation: for `kd.data.transforms.augment.augment`; not mixup, after which an example is
        no longer one.
      micro_batches: parts over which gradients are accumulated; the bank moves after each.

    Raises:
      UserError: there is no such feature.

    Source: Tian et al. 2020 (CRD), arXiv:1910.10699, and its code (weights, K, momentum).
    """
    network = context.classifier
    sides = ((context.network, student, 'student'), (context.teacher, teacher, 'teacher'))
    embed = {side: _embedding(context, net, name, side, size) for net, name, side in sides}
    rows = examples or len(context.source('train'))

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, 4)
        bank = contrastive.start_bank(keys[3], rows, size)
        beside = {
            'params': {
                side: embed[side].init(k)['params']
                for side, k in zip(embed, keys[1:3], strict=True)
            },
            MEMORY: {**bank._asdict(), 'label': jnp.full(rows, -1, jnp.int32)},
        }
        return {NETWORK: network.init(keys[0]), EMBEDDINGS: beside}

    def contrasted(params, state, batch, key, features):
        """([B] of the term, the memory after it)."""
        memory, index = state.mutables[EMBEDDINGS][MEMORY], batch['index']
        labels = memory['label'].at[index].set(batch['label'])
        bank = contrastive.Bank(*(memory[name] for name in contrastive.Bank._fields))
        ours, theirs = (
            embed[side].apply({'params': params[EMBEDDINGS][side]}, x).logits
            for side, x in zip(embed, features, strict=True)
        )
        drawn = contrastive.draw_negatives(key, batch['label'], labels, negatives)
        values, scale = contrastive.crd(
            bank, ours, theirs, index, drawn, temperature=contrast_temperature
        )
        bank = contrastive.update_bank(bank, ours, theirs, index, scale, momentum=momentum)
        return values, {**bank._asdict(), 'label': labels}

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key, draw_key = jax.random.split(key, 3)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        output = network.apply(
            state.variables(part=NETWORK, params=params[NETWORK]), *network.of(batch),
            train=True, key=dropout_key, capture=(student,),
        )  # fmt: skip
        said = context.teacher.apply(
            state.frozen['teacher'], *context.teacher.of(batch), capture=(teacher,)
        )
        features = (output.features[student], said.features[teacher])
        term, memory = contrasted(params, state, batch, draw_key, features)
        hard = classification.cross_entropy(output.logits, batch['label'])
        losses, metrics = hard_weight * hard + weight * term, {'hard_loss': mean(hard)}
        if soft_weight:
            soft = temperature**2 * divergence.forward_kl(
                output.logits, said.logits, temperature=temperature
            )
            losses, metrics['soft_loss'] = losses + soft_weight * soft, mean(soft)
        metrics |= {'crd': mean(term), 'accuracy': mean(output.logits.argmax(-1) == batch['label'])}
        mutables = {NETWORK: output.mutables, EMBEDDINGS: {MEMORY: memory}}
        return Objective(mean(losses), metrics, mutables)

    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def _embedding(context, network, name, side, size):
    names = feature_names(network)
    if name not in names:
        raise UserError(
            f"{context.stage}.method.{side}: there is no feature '{name}'; there are: "
            f'{", ".join(names)}.'
        )
    return from_linen(Embed(size), feature_shape(network, name))
