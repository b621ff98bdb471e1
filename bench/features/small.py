"""What the small bundled networks share: their training loop, and the convolutions for scenes."""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.data.scenes.prompts import SHAPES

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
    """Trains in place by AdamW.

    Args:
        network: In train mode.
        loss_at: Step -> its loss, a scalar.
        steps: Optimizer steps.
        learning_rate: Step -> learning rate.
        weight_decay: AdamW's.
        on_step: Called with the number of steps done and the loss.
    """
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

    Gives `shapes` [B, 7, 16, 16], logits; `boxes` [B, 4, 16, 16], pixels from the middle of a cell
    to the left, top, right and bottom of its object; `foreground` [B, 32, 32], logits;
    and `features` [B, 112], averages over two layers.
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
