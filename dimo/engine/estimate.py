"""The cost of a distillation, without running it or loading weights: parameters, memory, FLOPs.

The networks are built on the meta device. Memory follows from formulas in their sizes (`Memory`),
FLOPs from the shapes of one forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from dimo.methods import METHODS
from dimo.methods.base import Cost, DistillationRecipe
from dimo.models import MaskedModel
from dimo.zoo.loading import make_network, student_architecture
from dimo.zoo.teachers import Teacher

_FLOAT = 4  # bytes: weights, gradients, optimizer states and the residual stream are float32
_LOGIT_ARRAYS = 8  # [B, L, V] alive at once, see `Memory`
_ROWS = 16  # images in the forward whose FLOPs are counted; networks may pad fewer conditions


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one network."""

    total: int
    trainable: int

    @property
    def frozen(self) -> int:
        return self.total - self.trainable


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device, for P parameters of which T are trained.

    B is the images of one micro-batch on one rank, D the width and S the sequence length.

    - weights: 4 P per network: teacher, student, EMA and those of the method;
    - gradients: 4 T per network in training;
    - optimizer: two AdamW moments, 2 x 4 T per network in training;
    - activations: inputs of the matrix products, norms and residual sums of the student's forward,
      B S (4 D + P' / D) numbers for a block of P' parameters; half precision stores the residual
      stream (2 D) in 4 bytes and the rest in 2, beside a cast copy of the weights, and dropout
      adds a byte per number;
    - checkpointed: one block's activations and each block's input B S D;
    - working: one block's activations in the pass under way (twice for a guided teacher), and 8
      float32 arrays [B, L, V]: Gumbel noise, logits of student, teacher and auxiliary model, both
      distributions, the gradient and its product with the logits;
    - update: AdamW's square roots, 4 T of one network, after the activations are freed.

    peak = weights + gradients + optimizer + max(activations + working, update). Not counted: the
    libraries, fragmentation of the allocator (about a tenth of the peak on a CPU), and attention
    weights where a CPU has no fused kernel (dropout above 64 tokens).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    working: int
    update: int

    @property
    def peak(self) -> int:
        fixed = self.weights + self.gradients + self.optimizer
        return fixed + max(self.activations + self.working, self.update)

    @property
    def peak_checkpointed(self) -> int:
        """The peak with `gradient_checkpointing`."""
        return replace(self, activations=self.checkpointed).peak


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products; a multiply-add counts two."""

    forward: int  # of the student for one image
    parts: Mapping[str, int]  # forwards per image and step, by part; a backward counts two
    per_step: int
    run: int


@dataclass(frozen=True)
class Estimate:
    """What one distillation costs."""

    parameters: Mapping[str, Parameters]  # by network
    device_type: str  # "cpu" or "cuda"
    memory: Memory
    flops: Flops
    images: int  # steps times batch size

    @property
    def all_parameters(self) -> Parameters:
        networks = self.parameters.values()
        return Parameters(sum(n.total for n in networks), sum(n.trainable for n in networks))


def estimate_distillation(
    recipe: DistillationRecipe, teacher: Teacher, *, device_type: str = "cpu"
) -> Estimate:
    """Estimates what distilling `teacher` by `recipe` takes."""
    cost = METHODS[recipe.method].distillation.cost(recipe)
    architecture = student_architecture(teacher, recipe.method)
    with torch.device("meta"):
        original = make_network(teacher)
        student = make_network(teacher, architecture=architecture, dropout=recipe.dropout)
    total = _count(student)
    frozen = student.embedding_parameters() if cost.freezes_embeddings else []
    trained = Parameters(total, total - sum(value.numel() for value in frozen))
    untrained = Parameters(total, 0)
    parameters = {
        "teacher": Parameters(_count(original), 0),
        "student": trained,
        **{
            name: trained if is_trained else untrained for name, is_trained in cost.networks.items()
        },
        "ema": untrained,
    }
    memory = _memory(recipe, cost, student, parameters, on_gpu=device_type == "cuda")
    forward, images = _forward_flops(student, cost), recipe.steps * recipe.batch_size
    per_image = forward * sum(cost.forwards.values())
    flops = Flops(forward, cost.forwards, per_image * recipe.batch_size, per_image * images)
    return Estimate(parameters, device_type, memory, flops, images)


def _count(network: MaskedModel) -> int:
    return sum(value.numel() for value in network.parameters())


def _memory(
    recipe: DistillationRecipe,
    cost: Cost,
    student: MaskedModel,
    parameters: Mapping[str, Parameters],
    *,
    on_gpu: bool,
) -> Memory:
    images = recipe.batch_size // recipe.accumulate * cost.rows
    width, depth = student.hidden_dim, student.depth
    inner = images * student.block_tokens
    stream, products = 2 * depth * width, 2 * depth * width + _count(student) // width
    if recipe.precision == "float32":
        per_token, casts = _FLOAT * (stream + products), 0
    else:
        per_token, casts = _FLOAT * stream + 2 * products, 2 * _count(student)
    if recipe.dropout:
        per_token += stream + products
    activations = inner * per_token + casts
    block = inner * per_token // depth
    trainable = [size.trainable for size in parameters.values()]
    ema_away = on_gpu and recipe.ema_on_cpu
    on_device = sum(n.total for name, n in parameters.items() if not (ema_away and name == "ema"))
    logits = _LOGIT_ARRAYS * _FLOAT * images * student.num_tokens * student.codebook_size
    return Memory(
        weights=_FLOAT * on_device,
        gradients=_FLOAT * sum(trainable),
        optimizer=2 * _FLOAT * sum(trainable),
        activations=cost.kept * activations,
        checkpointed=block + casts + cost.kept * depth * _FLOAT * inner * width,
        working=block * cost.teacher_batches + logits,
        update=_FLOAT * max(trainable),
    )


def _forward_flops(student: MaskedModel, cost: Cost) -> int:
    """FLOPs of the student for one image, under one latent if it takes any."""
    tokens = torch.zeros(_ROWS, student.num_tokens, dtype=torch.int64, device="meta")
    inputs = {"z": tokens[:, 0].float()} if cost.takes_latent else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student.eval()(tokens, tokens[:, 0], **inputs)
    return int(counter.get_total_flops()) // _ROWS
