"""`SAMPLERS` has one row per sampler, with its label in tables and its knobs.

A new sampler is one file in this folder and one row here: the commands take its knobs, records
store them and the report shows them. This module does not import torch, because `dimo --help` and
`dimo report` read it; the functions are imported when they are called.
"""

__all__ = ["SAMPLERS", "Knob", "Sampler", "all_knobs", "get_sampler", "teacher_samplers"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any, Self

from dimo.errors import DimoError, unknown_name


@dataclass(frozen=True)
class Knob:
    """A setting of a sampler beside its number of steps."""

    name: str  # keyword argument of the sampler
    label: str  # in names of rows
    heading: str  # in the table of settings
    default: Any  # None lets the sampler do without
    help: str = ""
    rule: str = ""  # which values are allowed, in words
    is_allowed: Callable[[Any], bool] = lambda value: True
    kind: type = float  # or int, bool, str
    show: Callable[[Any], str] = "{:g}".format  # in tables
    option: str = ""  # empty: it is given by `--set-sampler NAME=VALUE`
    choices: tuple[str, ...] = ()  # allowed values of a str

    def at(self, default: Any, choices: tuple[str, ...] = ()) -> Self:
        """The same knob with another default."""
        return replace(self, default=default, choices=choices)

    def given(self, value: Any) -> str:
        """The option with a value, as the command line has it."""
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return f"{self.option} {text}" if self.option else f"--set-sampler {self.name}={text}"

    def check(self, value: Any) -> None:
        """Refuses a value that is not allowed."""
        if not self.is_allowed(value):
            raise DimoError(f"{self.given(value)} must be {self.rule}")

    def parse(self, text: str) -> Any:
        """The value that a text stands for; a `DimoError` if it is not of this knob's type."""
        values = {"true": True, "false": False}
        try:
            return values[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError) as error:
            kinds = {float: "a number", int: "a whole number", bool: "true or false"}
            raise DimoError(
                f"{self.given(text)} is not allowed; give {kinds.get(self.kind, 'a text')}"
            ) from error


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`; calling it calls the function.

    The function is a `dimo.samplers.base.SamplerFunction`, or "module:function", where it is.
    """

    label: str  # name of its rows in tables
    function: str | Callable[..., Any]
    knobs: tuple[Knob, ...] = ()  # their defaults are those of the function
    of_student: bool = False  # samples students that start from x_init, not from masked tokens
    any_steps: bool = False  # takes any number of steps, not just 1 to L
    takes_unconditional: bool = False  # takes a model for the unconditional half of guidance

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Knob name -> default."""
        return {knob.name: knob.default for knob in self.knobs}

    @property
    def schedules(self) -> tuple[str, ...]:
        """Mask schedules or rates that it accepts."""
        return next((knob.choices for knob in self.knobs if knob.name == "mask_schedule"), ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.function
        if isinstance(function, str):
            function = resolve_name(function)
        return function(*args, **kwargs)


# `dimo.masking.DECODING_SCHEDULES` and `UNMASKING_RATES`, and what a few-step student accepts
_DECODING = ("arccos", "cosine", "arccos-halton", "arccos-v1", "cosine-v1", "cosine-amused")
_RATES = ("log-linear", "cosine", "arccos")
_FALLING = ("arccos", "cosine")

LARGEST = 1e6  # of a scale or temperature: beyond it numbers overflow, and images are noise

_SCHEDULE = Knob(
    "mask_schedule", "schedule", "Schedule", None, kind=str, show=str, option="--schedule"
)
_GUIDANCE = Knob(
    "guidance_scale",
    "guidance",
    "Guidance",
    1.0,
    "Guidance scale s = 1 + w of multi-step sampling; 1 is off.",
    "above 0 and at most 1e6; 1 is off",
    lambda x: 0 < x <= LARGEST,
    option="--guidance-scale",
)
_GUIDANCE_RULE = Knob(
    "guidance_rule",
    "guidance rule",
    "Guidance rule",
    None,
    "Guidance of random order in place of one that rises from off: constant, or adaptive to the "
    "masked fraction, as `teacher_guidance` of a recipe.",
    "constant or adaptive",
    lambda x: x in ("constant", "adaptive"),  # `dimo.guidance.GUIDANCE_RULES`
    kind=str,
    show=str,
)
_TEMPERATURE = Knob(
    "temperature",
    "temperature",
    "Temp.",
    1.0,
    "Divides the logits, at every step of every row; 1 is as trained.",
    "above 0 and at most 1e6; 1 is as trained",
    lambda x: 0 < x <= LARGEST,
    option="--temperature",
)
_FINAL_TEMPERATURE = Knob(
    "final_temperature",
    "final temperature",
    "Final temp.",
    None,
    "Temperature of the last step; its inverse changes linearly up to it.",
    "above 0 and at most 1e6; 1 is as trained",
    lambda x: 0 < x <= LARGEST,
)
_CHOICE_TEMPERATURE = Knob(
    "choice_temperature",
    "choice temperature",
    "Choice temp.",
    4.5,
    "Scale of the Gumbel noise on token confidences; 0 disables it.",
    "at least 0 and at most 1e6; 0 is no noise",
    lambda x: 0 <= x <= LARGEST,
    option="--choice-temperature",
)
_THETA = Knob(
    "theta",
    "theta",
    "Theta",
    0.5,
    "Position of the intermediate stage of a theta-trapezoidal step, in (0, 1).",
    "strictly between 0 and 1; e.g. 0.5",
    lambda x: 0 < x < 1,
    option="--theta",
)
_REMASK = Knob(
    "remask",
    "remasking",
    "Remasking",
    "capped",
    "Strategy of remdm: capped, rescaled, confidence or loop.",
    "capped, rescaled, confidence or loop",
    lambda x: x in ("capped", "rescaled", "confidence", "loop"),  # `dimo.samplers.remdm.STRATEGIES`
    kind=str,
    show=str,
)
_ETA = Knob(
    "eta",
    "eta",
    "Eta",
    0.02,
    "Strength of remdm's remasking, 0 to 1; 0 is ancestral sampling.",
    "0 to 1; 0 is no remasking",
    lambda x: 0 <= x <= 1,
)
_LOOP = tuple(
    Knob(name, label, heading, None, text, "strictly between 0 and 1", lambda x: 0 < x < 1)
    for name, label, heading, text in (
        ("t_on", "t on", "t on", "Time, from 1 to 0, at which remdm's loop begins; default 0.55."),
        ("t_off", "t off", "t off", "Time at which remdm's loop ends; default 0.05."),
        ("alpha_on", "alpha on", "Alpha on", "Fraction revealed in remdm's loop; default 0.9."),
    )
)
_RANDOM_START = Knob(
    "random_start",
    "random start",
    "Random start",
    False,
    "Start each image at a random place of the Halton order.",
    kind=bool,
    show=lambda value: "yes",
)
_TOP_K = Knob(
    "top_k",
    "top-k",
    "Top-k",
    None,
    "Draw among the k likeliest tokens only.",
    "at least 1; all tokens without this option",
    lambda x: x >= 1,
    kind=int,
    show="{:.0f}".format,
    option="--top-k",
)
_TOP_P = Knob(
    "top_p",
    "top-p",
    "Top-p",
    None,
    "Draw among the likeliest tokens that together reach probability p.",
    "above 0 and at most 1; all tokens without this option",
    lambda x: 0 < x <= 1,
    option="--top-p",
)

_GUIDED = (_GUIDANCE, _TEMPERATURE)
_DECODED = (_SCHEDULE.at("arccos", _DECODING), *_GUIDED)
_LEAPING = (_SCHEDULE.at("log-linear", _RATES), *_GUIDED)
_RESTRICTED = (_TEMPERATURE, _TOP_K, _TOP_P)

SAMPLERS: dict[str, Sampler] = {
    "confidence": Sampler(
        "Confidence order",
        "dimo.samplers.confidence:sample_confidence",
        (*_DECODED, _CHOICE_TEMPERATURE),
        takes_unconditional=True,
    ),
    "random": Sampler(
        "Random order",
        "dimo.samplers.ordered:sample_random",
        (*_DECODED, _FINAL_TEMPERATURE, _GUIDANCE_RULE),
    ),
    "halton": Sampler(
        "Halton order",
        "dimo.samplers.ordered:sample_halton",
        (_SCHEDULE.at("arccos-halton", _DECODING), *_GUIDED, _FINAL_TEMPERATURE, _RANDOM_START),
    ),
    "meissonic": Sampler(
        "Meissonic's order",
        "dimo.samplers.confidence:sample_meissonic",
        (_SCHEDULE.at("cosine-amused", _DECODING), *_GUIDED, _CHOICE_TEMPERATURE.at(2.0)),
    ),
    "tau_leaping": Sampler(
        "τ-leaping", "dimo.samplers.leaping:sample_tau_leaping", _LEAPING, any_steps=True
    ),
    "theta_trapezoidal": Sampler(
        "θ-trapezoidal",
        "dimo.samplers.leaping:sample_theta_trapezoidal",
        (*_LEAPING, _THETA),
        any_steps=True,
    ),
    "remdm": Sampler(
        "ReMDM",
        "dimo.samplers.remdm:sample_remdm",
        (*_LEAPING, _REMASK, _ETA, *_LOOP),
        any_steps=True,
    ),
    "one_step": Sampler(
        "One step", "dimo.samplers.student:sample_one_step", _RESTRICTED, of_student=True
    ),
    "few_step": Sampler(
        "Few steps",
        "dimo.samplers.student:sample_few_step",
        (_SCHEDULE.at("arccos", _FALLING), *_RESTRICTED),
        of_student=True,
    ),
}


def get_sampler(name: str) -> Sampler:
    """The row of that name; a `DimoError` if there is none."""
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def teacher_samplers() -> list[str]:
    """Names of the multi-step samplers."""
    return [name for name, sampler in SAMPLERS.items() if not sampler.of_student]


def all_knobs() -> dict[str, Knob]:
    """The knobs of all samplers by name; where defaults differ, with that of the first sampler."""
    knobs: dict[str, Knob] = {}
    for sampler in SAMPLERS.values():
        for knob in sampler.knobs:
            knobs.setdefault(knob.name, knob)
    return knobs
