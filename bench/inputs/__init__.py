"""Reading sets of images, checking them, and naming them by content."""

__all__ = [
    "Findings",
    "ImageInfo",
    "ImageSet",
    "class_folders",
    "content_sha256",
    "find_problems",
    "npz_keys",
    "open_images",
    "read_features",
]

from bench.images import ImageInfo
from bench.inputs.arrays import npz_keys, read_features
from bench.inputs.checks import Findings, content_sha256, find_problems
from bench.inputs.image_set import ImageSet, open_images
from bench.inputs.labels import class_folders
