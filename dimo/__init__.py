"""dimo: one-step distillation of masked diffusion models, and the benchmark around it."""

__version__ = "0.2.0"
