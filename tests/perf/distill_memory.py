"""Peak memory of distillation steps in a process of its own: measured, beside the estimate.

`python distill_memory.py NETWORK BATCH STEPS PRECISION SAMPLES` prints both in bytes as JSON.
NETWORK is JSON: what of the teacher `maskgit` is changed, e.g. {"hidden_dim": 256}; SAMPLES those
of the auxiliary model. Weights are random.
"""

import dataclasses
import json
import resource
import sys
from pathlib import Path

import torch

from dimo.engine.distributed import Runtime, peak_memory_bytes
from dimo.engine.estimate import estimate_distillation
from dimo.methods.base import TeacherDefaults
from dimo.methods.dimo.method import DiMO
from dimo.methods.dimo.recipe import DiMORecipe
from dimo.zoo.teachers import TEACHERS

TINY = {"img_size": 64, "hidden_dim": 32, "codebook_size": 20, "depth": 1, "heads": 4}


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def train(row, recipe, steps):
    teacher = row.architecture(**row.network)
    student = row.architecture(**{**row.network, "dropout": recipe.dropout})
    student.load_state_dict(teacher.state_dict())
    task = DiMO().task(
        recipe,
        teacher,
        student,
        None,
        TeacherDefaults(row.label_smoothing),
        Runtime(torch.device("cpu")),
    )
    del teacher  # the task has a copy
    for step in range(steps):
        task.step(step)


def main(network, batch_size, steps, precision, samples):
    row = dataclasses.replace(TEACHERS["maskgit"], network=network)
    recipe = DiMORecipe(
        teacher="maskgit",
        steps=1000,
        batch_size=batch_size,
        learning_rate=1e-5,
        auxiliary_learning_rate=1e-5,
        teacher_guidance_scale=2.0,
        precision=precision,
        auxiliary_samples=samples,
    )
    estimate = estimate_distillation(recipe, row)
    train(dataclasses.replace(row, network=TINY), recipe, 2)  # libraries take what they need
    before = resident_bytes()
    train(row, recipe, steps)
    peak = peak_memory_bytes(torch.device("cpu"))
    print(json.dumps({"measured": peak - before, "estimated": estimate.memory.peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
