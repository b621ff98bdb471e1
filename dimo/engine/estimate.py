"""What a distillation will cost, before it runs and without its weights: parameters, memory, FLOPs.

The network is built without memory (meta device) and run once on tensors that have shapes but no
values, so every number follows from its code and not from a formula for one architecture.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dimo.config import DistillationRecipe, DistillRecipe
from dimo.methods.recipes import Di4CRecipe
from dimo.models.cpu import gpu_kernels
from dimo.zoo.loading import make_network, student_architecture
from dimo.zoo.teachers import Network, Teacher

_FLOAT = 4  # bytes: weights, gradients, optimizer states and the residual stream are float32
_LOGIT_ARRAYS = 8  # [B, L, V] alive at once, see `Memory`
_BACKWARD = 2  # forwards that a backward costs: one for the inputs' gradient, one for the weights'
_ROWS = 16  # images in the forward whose FLOPs are counted; networks may pad fewer conditions


@dataclass(frozen=True)
class Parameters:
    """Numbers of one network: all of them, and those that an optimizer changes."""

    total: int
    trainable: int

    @property
    def frozen(self) -> int:
        return self.total - self.trainable


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that trains, with P parameters of which T are trained.

    B is the batch of one process, of which `accumulate` makes parts; N ranks need B / N each. A
    mixture student (di4c) is counted for B times as many rows as latents pass it at once.

    - weights: 4 bytes x P of each network: teacher, student, EMA (which may be kept on the CPU),
      and what the method has beside them;
    - gradients: 4 x T of each network that is trained (each lives until its next update);
    - optimizer: two AdamW moments of each, 2 x 4 x T;
    - activations: what autograd keeps of the student's forward (as much as of the auxiliary
      model's, which comes later), counted tensor by tensor, autocast's casts included; twice that
      if they share samples, for then both are kept at once;
    - checkpointed: the same if only each block's input [B, L, D] were kept, and the insides of the
      one block that is being recomputed;
    - working: the insides of one block of the pass under way (of the doubled batch when the teacher
      is guided), and 8 arrays [B, L, V] in float32: Gumbel noise, the logits of student, teacher
      and auxiliary model, both distributions, the gradient and its product with the logits;
    - update: AdamW's square roots, 4 x T of one network, when the activations are gone.

    peak = weights + gradients + optimizer + max(activations + working, update). Left out: the
    libraries themselves (baseline of the process), the allocator's fragmentation (about a tenth of
    the peak on a CPU), and what writing a checkpoint takes in the host's memory.
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
        return self._peak(self.activations)

    @property
    def peak_checkpointed(self) -> int:
        """The peak if the blocks were checkpointed."""
        return self._peak(self.checkpointed)

    def _peak(self, activations: int) -> int:
        fixed = self.weights + self.gradients + self.optimizer
        return fixed + max(activations + self.working, self.update)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products; one multiply-add is two.

    Attributes:
        forward: Of one network for one image.
        parts: Forwards that one image costs in one step, by part; a backward counts two.
        per_step: Of one step at the recipe's batch size.
        run: Of all steps.
    """

    forward: int
    parts: Mapping[str, int]
    per_step: int
    run: int


@dataclass(frozen=True)
class Estimate:
    """What one distillation costs.

    Attributes:
        parameters: By network.
        device_type: "cpu" or "cuda": whose kernels the memory is counted for.
        memory: On that device.
        flops: Of the matrix products.
        images: How many the student makes an update on.
    """

    parameters: Mapping[str, Parameters]
    device_type: str
    memory: Memory
    flops: Flops
    images: int

    @property
    def all_parameters(self) -> Parameters:
        """Of all networks together."""
        networks = self.parameters.values()
        return Parameters(sum(n.total for n in networks), sum(n.trainable for n in networks))


def estimate_distillation(
    recipe: DistillationRecipe, teacher: Teacher, *, device_type: str = "cpu"
) -> Estimate:
    """Counts what distilling `teacher` by `recipe` takes; needs no weights and next to no memory.

    Args:
        recipe: What would be done.
        teacher: Its row of the table.
        device_type: "cuda" counts what a GPU's kernels keep (see `_GpuKernels`), whether there is
            one or not.
    """
    network = _network(teacher, recipe)
    frozen = _frozen_names(network, recipe)
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    total = sum(sizes.values())
    trained = Parameters(total, sum(n for name, n in sizes.items() if name not in frozen))
    untrained = Parameters(total, 0)
    parameters = {"teacher": _size_of(teacher), "student": trained}
    if isinstance(recipe, DistillRecipe):
        parameters["auxiliary"] = trained
    elif not isinstance(recipe, Di4CRecipe):
        parameters["round_teacher"] = untrained
    parameters["ema"] = untrained
    images = recipe.steps * recipe.batch_size
    forward, parts = _forward_flops(network, recipe), _parts(recipe)
    per_image = forward * sum(parts.values())
    return Estimate(
        parameters,
        device_type,
        _memory(recipe, teacher, parameters, on_gpu=device_type == "cuda"),
        Flops(forward, parts, per_image * recipe.batch_size, per_image * images),
        images,
    )


def _size_of(teacher: Teacher) -> Parameters:
    with torch.device("meta"):
        network = make_network(teacher)
    return Parameters(sum(value.numel() for value in network.parameters()), 0)


def _parts(recipe: DistillationRecipe) -> dict[str, int]:
    """Forwards an image and step: 10 of Di[M]O with a guided teacher and one auxiliary step.

    Shared samples are neither drawn nor evaluated apart: 8.
    """
    if isinstance(recipe, Di4CRecipe):
        latents, again = recipe.num_latents, _in_chunks(recipe)
        return {
            "teacher": 1,
            "student after the teacher's step": latents,
            "student forward and backward": (1 + again + _BACKWARD) * latents,
        }
    if not isinstance(recipe, DistillRecipe):
        return {"teacher": recipe.substeps, "student forward and backward": 1 + _BACKWARD}
    turns, shared = recipe.auxiliary_steps, _is_shared(recipe)
    parts = {
        "student forward and backward": 1 + _BACKWARD,
        "teacher": 1 + _is_guided(recipe),
        "auxiliary evaluation": 1 - shared,
        "student re-sample": turns - shared,
        "auxiliary forward and backward": (1 + _BACKWARD) * turns,
    }
    return {name: forwards for name, forwards in parts.items() if forwards}


def _is_guided(recipe: DistillationRecipe) -> bool:
    return isinstance(recipe, DistillRecipe) and recipe.teacher_guidance_scale != 1


def _is_shared(recipe: DistillationRecipe) -> bool:
    return isinstance(recipe, DistillRecipe) and recipe.auxiliary_samples == "shared"


def _in_chunks(recipe: Di4CRecipe) -> bool:
    return 0 < recipe.latent_chunk < recipe.num_latents


def _memory(
    recipe: DistillationRecipe,
    teacher: Teacher,
    parameters: Mapping[str, Parameters],
    *,
    on_gpu: bool,
) -> Memory:
    def kept_bytes(network: Network) -> int:
        return _kept_bytes(network, recipe, on_gpu=on_gpu)

    whole = _network(teacher, recipe)
    kept, depth = kept_bytes(whole), _depth(whole)
    one, two = (kept_bytes(_network(teacher, recipe, depth=number)) for number in (1, 2))
    block, tokens = two - one, _rows(recipe) * whole.num_tokens
    inner = _rows(recipe) * whole.block_tokens
    there = sum(
        size.total
        for name, size in parameters.items()
        if not (name == "ema" and on_gpu and recipe.ema_on_cpu)
    )
    trainable = [size.trainable for size in parameters.values()]
    at_once = 1 + _is_shared(recipe)  # networks whose activations are kept
    return Memory(
        weights=_FLOAT * there,
        gradients=_FLOAT * sum(trainable),
        optimizer=2 * _FLOAT * sum(trainable),
        activations=kept * at_once,
        # one = a block and the rest
        checkpointed=one + at_once * depth * _FLOAT * inner * whole.hidden_dim,
        working=block * (1 + _is_guided(recipe))
        + _LOGIT_ARRAYS * _FLOAT * tokens * whole.codebook_size,
        update=_FLOAT * max(trainable),
    )


def _rows(recipe: DistillationRecipe) -> int:
    """Rows that pass a network at once: images, or images times latents."""
    images = recipe.batch_size // recipe.accumulate
    if isinstance(recipe, Di4CRecipe):
        return images * (recipe.latent_chunk or recipe.num_latents)
    return images


def _network(teacher: Teacher, recipe: DistillationRecipe, **changes: Any) -> Network:
    """The student without memory, in train mode; `changes` are constructor arguments."""
    architecture = student_architecture(teacher, recipe.method)
    with torch.device("meta"):
        network = make_network(
            teacher, architecture=architecture, dropout=recipe.dropout, **changes
        )
    return network.train()


def _depth(network: Network) -> int:
    """Number of its blocks."""
    return network.depth


def _frozen_names(network: Network, recipe: DistillationRecipe) -> set[str]:
    """Di[M]O alone freezes any."""
    if not isinstance(recipe, DistillRecipe):
        return set()
    frozen = {id(parameter) for parameter in network.embedding_parameters()}
    return {name for name, value in network.named_parameters() if id(value) in frozen}


def _forward_flops(network: Network, recipe: DistillationRecipe) -> int:
    """Of the student for one image, under one latent if it takes any."""
    tokens = torch.zeros(_ROWS, network.num_tokens, dtype=torch.int64, device="meta")
    inputs = {"z": tokens[:, 0].float()} if isinstance(recipe, Di4CRecipe) else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(tokens, tokens[:, 0], **inputs)
    return int(counter.get_total_flops()) // _ROWS


class _GpuKernels(TorchFunctionMode):
    """What autograd keeps on a GPU where it differs from a CPU.

    Fused attention keeps its inputs and output and one number a row, with dropout too; dropout
    keeps a byte a number; autocast computes layer norms in float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        if func in (F.dropout, torch.dropout):
            rate, training = (*args, *(kwargs or {}).values())[1:3]
            return _ByteDropout.apply(args[0]) if rate and training else args[0]
        if func is F.layer_norm:
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1]))
        return out


class _ByteDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool))
        return torch.empty_like(x)


def _kept_bytes(network: Network, recipe: DistillationRecipe, *, on_gpu: bool) -> int:
    """Bytes that autograd keeps of the student's forward, its parameters left out."""
    frozen, kept = _frozen_names(network, recipe), dict[int, torch.UntypedStorage]()
    with FakeTensorMode():
        parameters = {
            name: torch.empty(value.shape, requires_grad=name not in frozen)
            for name, value in network.named_parameters()
        }
        own = {value.untyped_storage()._cdata for value in parameters.values()}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that its number stays its own
            return value

        tokens = torch.zeros(_rows(recipe), network.num_tokens, dtype=torch.int64)
        inputs: dict[str, object] = {}
        if isinstance(recipe, DistillRecipe):
            noise = torch.zeros(*tokens.shape, network.hidden_dim)
            inputs = {"embedding_noise": recipe.embedding_noise, "noise": noise}
        elif isinstance(recipe, Di4CRecipe):
            inputs = {"z": torch.zeros(len(tokens))}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision != "float32"),
            gpu_kernels() if on_gpu else nullcontext(),
            _GpuKernels() if on_gpu else nullcontext(),
        ):
            logits = _call(network, parameters, (tokens, tokens[:, 0]), inputs)
        found = sum(storage.nbytes() for storage in kept.values())
        del logits
    return found


def _call(
    network: nn.Module,
    parameters: dict[str, Tensor],
    arguments: tuple[Tensor, ...],
    keywords: dict[str, object],
) -> Tensor:
    """The network with other parameters."""
    out: Tensor = torch.func.functional_call(network, parameters, arguments, keywords)
    return out
