"""From a masked model to tokens: one function a method, all with the signature `types.Sampler`.

A student is sampled by `one_step` and `few_step`, which also take its token initialization.
"""

__all__ = ["SAMPLERS"]

from dimo.samplers.base import Sampler
from dimo.samplers.confidence import sample_confidence, sample_meissonic
from dimo.samplers.leaping import sample_tau_leaping, sample_theta_trapezoidal
from dimo.samplers.ordered import sample_halton, sample_random

# what a multi-step sampler is called on the command line
SAMPLERS: dict[str, Sampler] = {
    "confidence": sample_confidence,
    "random": sample_random,
    "halton": sample_halton,
    "meissonic": sample_meissonic,
    "tau_leaping": sample_tau_leaping,
    "theta_trapezoidal": sample_theta_trapezoidal,
}
