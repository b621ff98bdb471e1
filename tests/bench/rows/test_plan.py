"""Which settings make which rows, and that each sampler gets what it has and nothing else."""

import dataclasses
import importlib
import re
from inspect import signature
from typing import Any

import pytest
import torch

from bench.protocol import load_protocol
from bench.records.record import MethodInfo
from bench.rows.rows import jobs_of, load_planned, method_info, plan_jobs
from bench.rows.settings import (
    Choice,
    SamplerSettings,
    check_protocol,
    check_used,
    protocol_for,
    sample_tokens,
    settings_of,
    student_settings,
    teacher_settings,
)
from bench.tuning import parse_grid
from dimo.errors import DimoError
from dimo.masking import DECODING_SCHEDULES, UNMASKING_RATES
from dimo.samplers import SAMPLERS, all_knobs
from dimo.samplers.remdm import looped
from dimo.zoo.loading import load_student, load_teacher
from dimo.zoo.students import PUBLISHED_STUDENTS
from dimo.zoo.teachers import TEACHERS

CPU = torch.device("cpu")
STUDENT = PUBLISHED_STUDENTS["dimo-maskgit"]
OTHER_THAN_DEFAULT: dict[str, Any] = {
    "mask_schedule": "cosine",
    "guidance_scale": 2.0,
    "guidance_rule": "constant",
    "temperature": 0.7,
    "final_temperature": 0.9,
    "choice_temperature": 1.0,
    "theta": 0.3,
    "remask": "loop",
    "eta": 0.1,
    "t_on": 0.7,
    "t_off": 0.3,
    "alpha_on": 0.8,
    "random_start": True,
    "top_k": 3,
    "top_p": 0.5,
}
NEEDS: dict[str, dict[str, Any]] = {  # without which a setting has no effect
    "guidance_rule": {"guidance_scale": 2.0},
    **{name: {"remask": "loop"} for name in ("t_on", "t_off", "alpha_on")},
}


def rows(teacher: str = "digits", steps: tuple[int, ...] = (4,), **choice: Any):
    return teacher_settings(TEACHERS[teacher], steps, Choice(**choice))


def test_every_setting_is_known():
    assert set(all_knobs()) == set(OTHER_THAN_DEFAULT)
    fields = {field.name for field in dataclasses.fields(MethodInfo)}
    others = {"guidance_rule", "remask", "eta", "t_on", "t_off", "alpha_on"}
    assert set(all_knobs()) - fields == others  # which stand among `settings`


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_of_the_table_of_samplers_says_what_its_function_does(name):
    row = SAMPLERS[name]
    module, _, function = row.function.partition(":")
    parameters = signature(getattr(importlib.import_module(module), function)).parameters
    knobs = {key: parameters[key].default for key in all_knobs() if key in parameters}
    unset = {key for key in all_knobs() if name == "remdm" and key in signature(looped).parameters}
    assert dict(row.defaults) == {**knobs, **dict.fromkeys(unset)}
    schedules = UNMASKING_RATES if row.any_steps else DECODING_SCHEDULES
    if row.schedules and not row.of_student:
        assert row.schedules == tuple(schedules)
    assert row.takes_unconditional == ("unconditional" in parameters)


def test_defaults_of_a_teacher_hold_for_its_own_sampler():
    (row,) = rows("halton-small")
    assert (row.sampler, row.mask_schedule, row.guidance_scale) == ("halton", "arccos-halton", 2.0)
    assert (row.temperature, row.final_temperature, row.random_start) == (1.0, 1 / 1.2, True)
    assert row.choice_temperature is None
    (row,) = rows("maskgit")
    assert (row.sampler, row.mask_schedule, row.choice_temperature) == ("confidence", "arccos", 4.5)
    assert row.guidance_scale == 4
    assert "README of Maskgit-pytorch" in row.selected_by


def test_another_sampler_has_the_guidance_of_the_teacher_and_its_own_schedule():
    confidence, theta = rows("halton-tiny", samplers=("confidence", "theta_trapezoidal"))
    assert (confidence.mask_schedule, confidence.choice_temperature) == ("arccos", 4.5)
    assert confidence.guidance_scale == theta.guidance_scale == 2.5
    assert confidence.final_temperature is None
    assert not confidence.random_start
    assert (theta.mask_schedule, theta.theta) == ("log-linear", 0.5)


def test_a_schedule_is_a_row_of_the_samplers_that_know_it():
    found = rows(steps=(2, 4), schedules=("arccos", "arccos-v1"))
    assert [(row.mask_schedule, row.num_steps) for row in found] == [
        ("arccos", 2),
        ("arccos", 4),
        ("arccos-v1", 2),
        ("arccos-v1", 4),
    ]
    both = rows(samplers=("random", "tau_leaping"), schedules=("arccos-v1",))
    assert [row.mask_schedule for row in both] == ["arccos-v1", "log-linear"]
    given = "schedule given on the command line; else "
    assert both[0].selected_by == given + both[1].selected_by
    assert both[1].selected_by.startswith("guidance and temperature as for the teacher (as Maskgit")


def test_what_is_given_replaces_defaults_where_there_is_such_a_setting():
    given = {"temperature": 0.8, "choice_temperature": 2.0}
    confidence, halton = rows(samplers=("confidence", "halton"), settings=given)
    assert (confidence.temperature, confidence.choice_temperature) == (0.8, 2.0)
    assert (halton.temperature, halton.choice_temperature) == (0.8, None)
    assert confidence.selected_by.startswith("temperature, choice temperature given on the command")
    (constant,) = rows("halton-base", settings={"temperature": 0.8})
    assert (constant.temperature, constant.final_temperature) == (0.8, None)


def test_students_at_one_and_more_steps():
    one, four = student_settings(STUDENT, 256, [1, 4], Choice())
    assert (one.sampler, four.sampler) == ("one_step", "few_step")
    assert one.temperature == four.temperature == 7
    assert (one.mask_schedule, four.mask_schedule) == (None, "arccos")
    assert "fig. 14b" in one.selected_by
    assert four.selected_by == f"temperature as for one step: {one.selected_by}"
    (given,) = student_settings(STUDENT, 256, [1], Choice(settings={"temperature": 2.0}))
    assert (given.temperature, given.selected_by) == (2, "temperature given on the command line")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"samplers": ("confidnce",)}, "did you mean 'confidence'"),
        ({"samplers": ("one_step",)}, "unknown sampler 'one_step'"),
        ({"schedules": ("arcos",)}, "did you mean 'arccos'"),
        ({"precision": "half"}, "unknown precision 'half'"),
        ({"settings": {"temperature": 0}}, "--temperature 0 must be above 0"),
        ({"settings": {"choice_temperature": -1}}, "--choice-temperature -1 must be at least 0"),
        ({"settings": {"thta": 1}}, "did you mean 'theta'"),
        ({"settings": {"theta": 1}}, "--theta 1 must be strictly between 0 and 1"),
        ({"settings": {"top_k": 0}}, "--top-k 0 must be at least 1"),
        ({"settings": {"top_p": 1.5}}, "--top-p 1.5 must be above 0 and at most 1"),
    ],
)
def test_bad_choices_are_refused(choice, said):
    with pytest.raises(DimoError, match=re.escape(said)):
        Choice(**choice)


@pytest.mark.parametrize("steps", [0, 17])
@pytest.mark.parametrize("sampler", ["confidence", "random", "halton"])
def test_steps_that_the_grid_does_not_take(steps, sampler):
    with pytest.raises(DimoError, match="takes 1 to 16 steps"):
        rows(steps=(steps,), samplers=(sampler,))
    with pytest.raises(DimoError, match="takes 1 to 256 steps"):
        student_settings(STUDENT, 256, [257], Choice())


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            {"settings": {"theta": 0.4}},
            "--theta 0.4 has no effect: no selected sampler (conf",
        ),
        ({"settings": {"theta": 0.4}}, "it applies to theta_trapezoidal"),
        ({"settings": {"top_k": 4}}, "it applies to one_step, few_step"),
        ({"schedules": ("log-linear",)}, "it applies to tau_leaping, theta_trapezoidal"),
    ],
)
def test_a_setting_of_no_row_is_refused(choice, said):
    with pytest.raises(DimoError, match=re.escape(said)):
        check_used(rows(**choice), Choice(**choice))
    also = rows(**choice, samplers=("confidence", "theta_trapezoidal"))
    also += student_settings(STUDENT, 256, [1], Choice(**choice))
    check_used(also, Choice(**choice))


def test_a_sampler_refuses_what_it_has_not():
    with pytest.raises(DimoError, match=r"sampler 'random' has no choice_temperature \(4.5\)"):
        SamplerSettings("random", choice_temperature=4.5)
    with pytest.raises(DimoError, match="unknown sampler 'randm'"):
        SamplerSettings("randm")


@torch.inference_mode()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_setting_reaches_its_sampler(sampler):
    """Another value of any setting that a sampler has gives other tokens."""
    is_student = SAMPLERS[sampler].of_student
    load = load_student if is_student else load_teacher
    loaded = load("digits-dimo" if is_student else "digits", device=CPU)
    index = torch.arange(64)
    steps = 1 if sampler == "one_step" else 4
    plain = SamplerSettings(sampler, steps)

    def tokens(settings):
        found = sample_tokens(loaded, settings, labels=index % 10, seed=3, index=index)
        assert found.tokens.shape == (64, 16)
        return found.tokens

    expected = tokens(plain)
    assert torch.equal(tokens(plain.changed(**settings_of(sampler))), expected)
    for name in settings_of(sampler):
        base = plain.changed(**NEEDS.get(name, {}))
        changed = base.changed(**{name: OTHER_THAN_DEFAULT[name]})
        assert not torch.equal(tokens(changed), tokens(base)), name


def test_a_record_has_every_setting_of_its_row():
    choice = Choice(("halton", "theta_trapezoidal"), settings={"top_k": 5, "theta": 0.3})
    planned = plan_jobs("digits", ["digits-dimo"], [4], choice=choice, student_steps=[4])
    jobs = load_planned(planned, device=CPU)
    halton, theta, student = (method_info(job, None) for job in jobs)
    assert (halton.theta, halton.random_start, halton.network_precision) == (None, None, None)
    assert theta.theta == 0.3
    assert (student.sampler, student.top_k, student.mask_schedule) == ("few_step", 5, "arccos")
    assert (student.name, student.num_steps) == ("Di[M]O (digits-dimo)", 4)
    assert student.training["seed"] == 0


def test_precision_is_that_of_the_loaded_network():
    loaded = load_teacher("digits", device=CPU, precision="bfloat16")
    (job,) = jobs_of(loaded, [2])
    assert job.settings is not None
    assert job.settings.precision == "bfloat16"
    assert method_info(job, None).network_precision == "bfloat16"


def test_rows_are_named_after_teacher_or_sampler(small_maskgit):
    loaded = load_teacher("maskgit", device=CPU, weights=small_maskgit)
    own, other = jobs_of(loaded, [2], Choice(("confidence", "halton")))
    assert (own.name, own.section) == ("MaskGIT", "Teacher")
    assert (other.name, other.section) == ("Halton order", "Sampler")


def test_what_is_unknown_of_a_published_student_stays_unknown(small_maskgit):
    (job,) = load_planned(
        plan_jobs("maskgit", ["dimo-maskgit"], [], weights=small_maskgit),
        device=CPU,
        weights=small_maskgit,
    )
    assert method_info(job, None).training == {
        "recipe": "of its authors",
        "method": "dimo",
        "seconds": None,
        "images_seen": None,
        "seed": None,
    }


def test_a_protocol_is_for_images_of_its_size():
    check_protocol(TEACHERS["digits"], load_protocol("digits"))
    check_protocol(TEACHERS["halton-tiny"], load_protocol("imagenet256-adm"))
    check_protocol(TEACHERS["maskgit-512"], load_protocol("imagenet512-adm"))
    with pytest.raises(DimoError, match=r"8 x 8 .* protocols that fit: imagenet256-adm, "):
        check_protocol(TEACHERS["maskgit"], load_protocol("digits"))


def test_each_teacher_names_its_protocol():
    own = {name: row.protocol for name, row in TEACHERS.items()}
    assert own.pop("halton-large") == ""  # 384 pixels
    assert {name: protocol_for(TEACHERS[name]).name for name in own} == own
    assert own["scenes"] == "scenes-geneval"
    assert protocol_for(TEACHERS["maskgit"], "imagenet256-dgm").name == "imagenet256-dgm"


def test_a_tuned_temperature_holds_at_every_step():
    settings = SamplerSettings("halton", 4, temperature=1.0, final_temperature=0.8)
    assert settings.changed(temperature=0.5).final_temperature is None
    assert settings.changed(temperature=0.5, final_temperature=0.6).final_temperature == 0.6
    assert settings.changed(guidance_scale=2.0).final_temperature == 0.8
    with pytest.raises(DimoError, match=r"theta=1.*must be strictly between 0 and 1"):
        parse_grid(["theta=1"])
    assert parse_grid(["choice_temperature=0,4.5"]) == {"choice_temperature": [0.0, 4.5]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["temperature=inf"], "inf must be above 0"),
        (["temperature=1,1.0"], "names a value twice"),
        (["temperature=1", "theta=0.5", "temperature=2"], "names temperature again"),
        (["temperature"], "is not SETTING=VALUE"),
        (["top_k=5"], "settings: guidance_scale, temperature, "),
    ],
)
def test_bad_grids(options, words):
    with pytest.raises(DimoError, match=words):
        parse_grid(options)


def test_a_few_step_student_has_its_teachers_rows_and_its_own_guidance():
    student = PUBLISHED_STUDENTS["di4c-d"]
    one, four = student_settings(student, 256, (1, 4), Choice())
    assert (one.num_steps, four.num_steps) == (1, 4)
    assert (one.sampler, four.sampler) == ("confidence", "confidence")
    assert (four.guidance_scale, four.choice_temperature, four.mask_schedule) == (7, 4.5, "arccos")
    assert four.selected_by.startswith("temperature: README of sony/di4c")
    plain = dataclasses.replace(student, guidance_scale=None, temperature=0.9)
    (row,) = student_settings(plain, 256, (4,), Choice())
    assert (row.guidance_scale, row.temperature) == (4, 0.9)
    given = Choice(settings={"choice_temperature": 2.0}, schedules=("cosine",))
    (row,) = student_settings(plain, 256, (4,), given)
    assert (row.choice_temperature, row.mask_schedule) == (2.0, "cosine")
    beside = dataclasses.replace(plain, teacher_unconditional=True)
    (row,) = student_settings(beside, 256, (4,), Choice())
    assert row.selected_by.endswith("its unconditional branch is the teacher")
    with pytest.raises(DimoError, match="steps 17 is out of range"):
        student_settings(plain, 16, (17,), Choice())
