"""A student as a pipeline of diffusers: `dimo export --format diffusers` copies this file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

try:
    import dimo
except ImportError as error:
    raise ImportError(
        "this folder is drawn by the Python package dimo, which is not installed; install it and "
        "load the folder again"
    ) from error


class DimoPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws the images of `dimo.load(folder).sample(...)`; the folder is loaded at first use."""

    def __init__(self) -> None:
        super().__init__()
        self._place = torch.empty(0, dtype=torch.float32)  # has the device and the precision
        self._student: dimo.Generator | None = None

    @property
    def device(self) -> torch.device:
        """The CPU, until `to` says otherwise."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network: float32, until `to` says bfloat16."""
        return self._place.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of any pipeline; the networks are loaded there at the next use."""
        kwargs.pop("silence_dtype_warnings", None)
        place = self._place.to(*args, **kwargs)
        if place is not self._place:
            self._place, self._student = place, None
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image per prompt or class label.

        Args:
            num_inference_steps: Default: the student's own, 1 for a one-step student.
            generator: Its initial seed is the `seed` of `sample`, so it draws the same images
                again. None: a seed from torch's global generator.
            output_type: "pil"; or "np", float32 [B, H, W, 3], or "pt", float32 [B, 3, H, W] on
                the CPU, both from 0 to 1.
            **settings: Other arguments of `sample`, e.g. `temperature` and `batch_size`.

        Raises:
            DimoError: Another `output_type` or generator; as `dimo.load` and `sample`.
        """
        if output_type not in ("pil", "np", "pt"):
            raise dimo.DimoError(f"output_type {output_type!r} is unknown; allowed: pil, np, pt")
        if isinstance(generator, Sequence):
            raise dimo.DimoError("generator is a list; give one torch.Generator for all images")
        images = self._load().sample(
            [class_labels] if isinstance(class_labels, int) else class_labels,
            prompts=[prompt] if isinstance(prompt, str) else prompt,
            steps=num_inference_steps,
            seed=generator.initial_seed() if generator else int(torch.randint(2**63 - 1, ())),
            **settings,
        )
        pixels: Any = images.as_subclass(Tensor).float() / 255
        if output_type != "pt":
            pixels = images.pil() if output_type == "pil" else pixels.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=pixels) if return_dict else (pixels,)

    def _load(self) -> "dimo.Generator":
        if self._student is None:
            folder = Path(self.name_or_path)
            if not folder.is_dir():
                raise dimo.DimoError(
                    f"no folder {folder}; of a student on Hugging Face, give from_pretrained what "
                    "huggingface_hub.snapshot_download returns"
                )
            precision = str(self.dtype).removeprefix("torch.")
            self._student = dimo.load(folder, device=self.device, precision=precision)
        return self._student
