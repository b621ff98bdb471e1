"""The trainings that the loop (`dimo.train`) can drive: a file each, on the parts of `base`."""

__all__ = ["Di4CTask", "DistillTask", "SDTTTask", "TeacherTask"]

from dimo.tasks.di4c import Di4CTask
from dimo.tasks.dimo import DistillTask
from dimo.tasks.sdtt import SDTTTask
from dimo.tasks.teacher import TeacherTask
