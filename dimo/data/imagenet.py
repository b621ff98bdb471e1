"""Names of the 1,000 ImageNet classes, in the order of the labels. The one door to torchvision."""

import functools


@functools.cache
def class_names() -> tuple[str, ...]:
    """One short English name a class, as torchvision's own classifiers carry them."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
