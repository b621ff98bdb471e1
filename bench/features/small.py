"""The bundled extractor of digits, the convolutions for scenes, and the training of both."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.data.scenes.prompts import SHAPES
from dimo.weights.files import load_state_dict

TrainingStep: TypeAlias = Callable[[int, float], None]


def fit_network(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: Callable[[int], float],
    weight_decay: float,
    on_step: TrainingStep | None = None,
) -> None:
    """Trains in place by AdamW; `loss_at(step)` is a scalar, `on_step` gets steps done and loss."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=weight_decay)
    for step in range(steps):
        loss = loss_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))


class SceneNetwork(nn.Module):
    """uint8 images [B, 3, 32, 32] -> maps and features.

    `shapes` [B, 7, 16, 16] and `foreground` [B, 32, 32] are logits; `boxes` [B, 4, 16, 16] pixels
    from the middle of a cell to the left, top, right and bottom of its object; `features` [B, 112]
    averages over two layers.
    """

    feature_dim = 112
    stride = 2

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=self.stride),
            nn.GELU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(48, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
        )
        self.up = nn.Conv2d(64, 48, 1)
        self.joined = nn.Sequential(
            nn.Conv2d(48, 48, 3, padding=1), nn.GELU(), nn.Conv2d(48, 48, 3, padding=1), nn.GELU()
        )
        self.heads = nn.Conv2d(48, len(SHAPES) + 4 + self.stride**2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images.float() / 127.5 - 1)
        coarse = self.coarse(fine)
        both = self.joined(fine + F.interpolate(self.up(coarse), scale_factor=2))
        shapes, boxes, foreground = self.heads(both).split([len(SHAPES), 4, self.stride**2], dim=1)
        return {
            "shapes": shapes,
            "boxes": F.softplus(boxes) * 4,
            "foreground": F.pixel_shuffle(foreground, self.stride)[:, 0],
            "features": torch.cat([fine.mean(dim=(2, 3)), coarse.mean(dim=(2, 3))], dim=1),
        }


class DigitsCNN(nn.Module):
    """uint8 images [B, 3, 8, 8] -> features float32 [B, 64] and class logits float32 [B, 10]."""

    feature_dim = 64
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
        )
        self.features = nn.Linear(64 * 4 * 4, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, self.num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float().div(255)
        features = F.gelu(self.features(self.convolutions(x).flatten(1)))
        return {"features": features, "logits": self.head(features)}


def load_digits_cnn(weights: Path, resize: str) -> DigitsCNN:
    """The classifier with the weights of a file; images are never resized.

    Raises: DimoError: Unreadable file, or weights of another network.
    """
    network = DigitsCNN()
    load_state_dict(network, weights)
    return network


def train_digits_cnn(
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    weight_decay: float,
    label_smoothing: float,
    pixel_noise: float,
    shift_probability: float,
    seed: int,
    on_step: TrainingStep | None = None,
) -> DigitsCNN:
    """Trains the classifier with shifts of one pixel and additive noise.

    Args:
        data: Images uint8 [N, 3, 8, 8] and labels int64 [N].
        label_smoothing: Keeps the features' scale bounded.
        pixel_noise: Standard deviation of the noise, in grey levels of 255.
        shift_probability: Fraction of steps whose batch is shifted by up to one pixel.
        seed: Seed of weights and draws.
        on_step: Called with the number of steps done and the loss.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = DigitsCNN().train()

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        shift = torch.rand((), generator=generator) < shift_probability
        dx, dy = torch.randint(3, (2,), generator=generator).tolist() if shift else (1, 1)
        batch = F.pad(images[rows].float(), (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]
        batch = batch + pixel_noise * torch.randn(batch_size, 1, 8, 8, generator=generator)
        logits = model(batch)["logits"]
        return F.cross_entropy(logits, labels[rows], label_smoothing=label_smoothing)

    fit_network(
        model,
        loss_at,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        on_step=on_step,
    )
    return model.eval()
