"""A Fréchet distance between the states in the teacher that two sets of tokens lead to.

The gradient of a Fréchet distance (FD-loss, Yang et al., arXiv 2604.28190) needs the mean and
covariance of many images, and a step has few: they are running moments, and the gradient of an
image is that of its own part in them, which is linear in its features. So it depends on the image
and on what came before the step alone, not on how a step is cut into batches or shared by ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dimo.engine.distributed import Ranks

IMAGES_PER_DIMENSION = 16  # before the covariance is good enough to divide by
_REFRESH = 10  # steps between two eigendecompositions
_SMALLEST = 1e-8  # eigenvalue, of features of unit variance


class RunningFrechet(nn.Module):
    """The distance of running moments to those of a reference, and its gradient.

    FD = |m - m_r|^2 + Tr(S + S_r - 2 (R S R)^(1/2)) with R = S_r^(1/2), of features that are scaled
    to unit variance in the reference. Its derivatives are 2 (m - m_r) in the mean and
    G = I - R (R S R)^(-1/2) R in the covariance, so that the gradient of an image with features f
    is 2 (m - m_r) + 2 G (f - m), apart from a factor. Everything is float64.

    Args:
        dimensions: D of the features.
        window: Images that the running moments remember; older ones fade.
    """

    def __init__(self, dimensions: int, window: int) -> None:
        super().__init__()
        self.window = window
        shapes: dict[str, tuple[int, ...]] = {
            **{"scale": (dimensions,), "reference_mean": (dimensions,)},
            **{"reference_root": (dimensions, dimensions)},  # R; all zero until there is one
            **{"mean": (dimensions,), "second": (dimensions, dimensions)},  # of f, of f f^T
            **{"linear": (dimensions,), "quadratic": (dimensions, dimensions)},  # m - m_r, G
            **{"images": (), "updates": (), "distance": ()},
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.scale: Tensor
        self.reference_mean: Tensor
        self.reference_root: Tensor
        self.mean: Tensor
        self.second: Tensor
        self.linear: Tensor
        self.quadratic: Tensor
        self.images: Tensor
        self.updates: Tensor
        self.distance: Tensor

    @property
    def has_reference(self) -> bool:
        return bool(self.scale.any())

    @property
    def is_ready(self) -> bool:
        """Whether it has seen enough images to have a gradient."""
        return bool(self.images >= IMAGES_PER_DIMENSION * len(self.mean))

    def set_reference(self, features: Iterable[Tensor], ranks: Ranks) -> None:
        """Takes the moments of this rank's features [B, D] and those of the others."""
        totals = self._sums(features, ranks)
        count, first, second = totals[0, 0], totals[0, 1:], totals[1:, 1:]
        mean = first / count
        covariance = (second - count * torch.outer(mean, mean)) / (count - 1)
        self.scale.copy_(covariance.diagonal().sqrt().clamp_min(_SMALLEST))
        self.reference_mean.copy_(mean / self.scale)
        values, vectors = torch.linalg.eigh(covariance / torch.outer(self.scale, self.scale))
        self.reference_root.copy_((vectors * values.clamp_min(0).sqrt()) @ vectors.T)

    def gradient(self, features: Tensor) -> Tensor:
        """The derivative of the distance in features [B, D], up to a factor: [B, D]."""
        centred = features.detach().double() / self.scale - self.mean
        return (2 * (self.linear + centred @ self.quadratic) / self.scale).to(features.dtype)

    def update(self, features: Iterable[Tensor], ranks: Ranks) -> None:
        """Adds a step's features, [B, D] of each micro-batch, to the moments."""
        totals = self._sums((f / self.scale for f in features), ranks)
        count = float(totals[0, 0])
        kept = float(self.images) / (float(self.images) + count)
        kept = min(kept, 1 - count / max(count, self.window))
        self.mean.lerp_(totals[0, 1:] / count, 1 - kept)
        self.second.lerp_(totals[1:, 1:] / count, 1 - kept)
        self.images += count
        if self.is_ready and self.updates.remainder(_REFRESH) == 0:
            self._derive()
        self.updates += self.is_ready

    def _derive(self) -> None:
        root, covariance = self.reference_root, self.second - torch.outer(self.mean, self.mean)
        values, vectors = torch.linalg.eigh(root @ covariance @ root)
        spread = values.clamp_min(_SMALLEST).sqrt()
        self.linear.copy_(self.mean - self.reference_mean)
        self.quadratic.copy_(-root @ ((vectors / spread) @ vectors.T) @ root)
        self.quadratic.diagonal().add_(1)
        traces = covariance.trace() + root.square().sum() - 2 * values.clamp_min(0).sqrt().sum()
        self.distance.copy_(self.linear.square().sum() + traces)

    def _sums(self, features: Iterable[Tensor], ranks: Ranks) -> Tensor:
        """Of all ranks: the sum of [1, f] [1, f]^T, [1 + D, 1 + D]."""
        size = 1 + len(self.mean)
        totals = torch.zeros(size, size, dtype=torch.float64, device=self.mean.device)
        for part in features:
            rows = torch.cat([torch.ones_like(part[:, :1]), part], 1).double()
            totals += rows.T @ rows
        return ranks.sum_(totals)
