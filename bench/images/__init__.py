"""Reads sets of images, checks them, and names them by content."""

__all__ = [
    "Findings",
    "ImageInfo",
    "ImageSet",
    "class_folders",
    "classes_of",
    "content_sha256",
    "find_problems",
    "npz_keys",
    "open_images",
]

from bench.images.checks import Findings, content_sha256, find_problems
from bench.images.codec import ImageInfo
from bench.images.dataset import ImageSet, open_images
from bench.images.labels import class_folders, classes_of
from bench.images.readers import npz_keys
