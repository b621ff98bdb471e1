"""The chain on the shipped weights: reference rows, invariance, and the claims of the README."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from bench.features import extract
from bench.features.references import reference_images
from bench.metrics.scores import score
from bench.protocol import Metric, load_protocol
from bench.rows.rows import load_planned, plan_jobs
from bench.rows.settings import Choice
from bench.suites.base import load_suite
from bench.tuning import check_grid, parse_grid, tune
from dimo.engine.distributed import Runtime
from dimo.errors import DimoError

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU)
METRICS = ("fid", "mind", "inception_score", "precision", "recall", "density", "coverage")
METRICS += ("class_accuracy",)  # and KID, whose subsets have more images than `small`


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("digits")


@pytest.fixture(scope="module")
def small(protocol):
    """The same with few images."""
    images = dataclasses.replace(protocol.images, num_images=500)
    seeds = dataclasses.replace(protocol.seeds, n_select=200)
    return dataclasses.replace(protocol, images=images, seeds=seeds)


@pytest.fixture(scope="module")
def suite(small):
    return load_suite(small, RUNTIME)


def rows_of(suite, steps):
    """Records by (name, steps): reference rows, the teacher unguided, the student."""
    jobs = load_planned(plan_jobs("digits", ["digits-dimo"], steps), device=CPU)
    jobs = suite.reference_rows(jobs[0].loaded) + jobs
    found = [suite.measure(job).record for job in jobs]
    return {(r.method.name, r.method.num_steps): r for r in found}


@pytest.fixture(scope="module")
def records(suite):
    return rows_of(suite, [4])


@pytest.fixture(scope="module")
def published(protocol):
    """As the README has them: 5,000 images a row."""
    return rows_of(load_suite(protocol, RUNTIME), [1, 4, 16])


def _value(record, metric):
    return record.metrics[metric].value


def test_real_data_is_its_own_perfect_score(records):
    real = records["Real data", None]
    assert abs(_value(real, "fid")) < 1e-9
    assert [_value(real, m) for m in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert _value(real, "class_accuracy") == 1
    assert real.metrics["fid"].n == 1797
    assert real.speed.images_per_second is None


def test_the_tokenizer_is_the_floor(records):
    floor = _value(records["Tokenizer reconstruction", None], "fid")
    others = [_value(r, "fid") for key, r in records.items() if key[1] is not None]
    assert 0 < floor < min(others)


def test_the_row_of_the_tokenizer_alone_says_what_it_loses(suite, tmp_path):
    """Equal to the row's own arrays, and a gap in the other rows."""
    names = ("psnr", "codebook_usage", "codebook_perplexity")
    listed = tuple(Metric(name, True, {}, supplementary=True) for name in names)
    asking = copy.copy(suite)
    asking.protocol = dataclasses.replace(
        suite.protocol, metrics=(suite.protocol.metrics[0], *listed)
    )
    asking.assets = dataclasses.replace(suite.assets, weights=tmp_path)
    loaded = load_planned(plan_jobs("digits", [], [1]), device=CPU)[0].loaded
    rows = asking.reference_rows(loaded)
    real, found = (asking.measure(row).record.metrics for row in rows)
    assert (list(real), list(found)) == (["fid"], ["fid", *names])
    real = rows[0].images.read(range(1797))[0]
    counts = np.bincount(loaded.tokenizer.encode(real).numpy().ravel(), minlength=256)
    p = counts[counts > 0] / counts.sum()
    assert found["codebook_usage"].value == pytest.approx((counts > 0).mean())
    assert found["codebook_perplexity"].value == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert 20 < found["psnr"].value < 40
    for name in names:
        assert found[name].n == 1797
        assert found[name].low <= found[name].value <= found[name].high
    lpips = Metric("lpips", False, {}, supplementary=True)
    asking.protocol = dataclasses.replace(asking.protocol, metrics=(lpips,))
    with pytest.raises(DimoError, match=rf"no alex\.pth .* in {tmp_path}.* fetch lpips"):
        asking.reference_rows(loaded)


@pytest.mark.slow
def test_the_shape_of_the_papers_table(published):
    one, four, sixteen = (_value(published["MaskGIT", n], "fid") for n in (1, 4, 16))
    student = _value(published["Di[M]O (digits-dimo)", 1], "fid")
    assert sixteen < four < one
    assert sixteen <= 0.3
    assert one >= 10 * sixteen
    assert student <= 1.05 * sixteen


@pytest.mark.slow
def test_the_shipped_student_is_accurate_and_diverse(published):
    student = published["Di[M]O (digits-dimo)", 1]
    assert _value(student, "class_accuracy") >= 0.97
    assert _value(student, "coverage") >= 0.96
    assert _value(student, "recall") >= 0.8


def test_costs_are_recorded(records):
    student, teacher = records["Di[M]O (digits-dimo)", 1], records["MaskGIT", 4]
    assert (student.method.nfe, student.method.token_counts) == (1, (16,))
    assert teacher.method.token_counts == (3, 2, 4, 7)
    assert teacher.method.nfe in (4, 7)  # unguided, or guided from the second step on
    assert student.speed.images_per_second > teacher.speed.images_per_second > 0
    assert student.method.training["images_seen"] > 0


def test_every_metric_has_value_interval_and_count(records):
    for record in records.values():
        assert tuple(name for name in record.metrics if name != "kid") == METRICS
        assert ("kid" in record.metrics) == (record.num_images >= 1000)
        for found in record.metrics.values():
            assert found.low <= found.value <= found.high
    ceiling = records["MaskGIT", 4].metrics["coverage"].extra["ceiling"]
    assert ceiling == pytest.approx(1 - (1796 * 1795 * 1794) / (2296 * 2295 * 2294))


def test_batch_size_changes_no_metric(records, small):
    suite = load_suite(small, RUNTIME, batch_size=77)
    job = load_planned(plan_jobs("digits", ["digits-dimo"], []), device=CPU)[0]
    again, before = suite.measure(job).record, records["Di[M]O (digits-dimo)", 1]
    for name in METRICS:
        assert again.metrics[name].value == pytest.approx(_value(before, name), rel=1e-9)


def test_swapping_generated_and_reference_is_caught(suite):
    """Few generated images against many real ones: precision stays, recall cannot."""
    images, labels = reference_images(suite.protocol)
    few = extract(suite.extractor, [(images[:100], labels[:100])])
    scores = score(suite.protocol, few, suite.reference, device=CPU)
    assert scores["precision"].value == 1
    assert scores["recall"].value < 1
    assert scores["coverage"].value < 0.5


def test_another_extractor_or_reference_is_refused(protocol):
    for part, words in (("extractor", "have sha256"), ("reference", "has sha256")):
        changed = dataclasses.replace(getattr(protocol, part), sha256="0" * 64)
        with pytest.raises(DimoError, match=words):
            load_suite(dataclasses.replace(protocol, **{part: changed}), RUNTIME)


def test_every_row_is_tuned_alike_and_keeps_its_sweep(small):
    """A teacher, another sampler, a student: each by what it has of the grid."""
    choice = Choice(samplers=("confidence", "tau_leaping"))
    jobs = load_planned(plan_jobs("digits", ["digits-dimo"], [2], choice=choice), device=CPU)
    told = []
    bench = load_suite(small, Runtime(CPU, progress=lambda *what: told.append(what)))
    grid = parse_grid(["temperature=5,1", "guidance_scale=1,2"])
    check_grid(grid, ("confidence", "tau_leaping", "one_step"), small)
    tuned = [tune(bench, job, grid) for job in jobs]
    for job in tuned:
        sweep = job.tuning
        assert (sweep.seed, sweep.num_images) == (small.seeds.select, 200)
        assert job.settings.temperature == 1
        best = min(sweep.trials, key=lambda trial: trial.fid)
        assert sweep.trials[sweep.chosen] == best
        assert {key: getattr(job.settings, key) for key in best.settings} == best.settings
        again = bench.quality(job, seed=small.seeds.select, num_images=200)
        assert again == best.fid  # to the bit: the sweep is what it says
        kept = set(METRICS) - {"mind"}  # supplementary
        assert all(set(trial.metrics) == kept for trial in sweep.trials)
    teacher, _, student = tuned
    assert [tuple(trial.settings.values()) for trial in teacher.tuning.trials] == [
        (5, 1),
        (5, 2),
        (1, 1),
        (1, 2),
    ]
    assert [trial.settings for trial in student.tuning.trials] == [
        {"temperature": 5},
        {"temperature": 1},
    ]
    assert "guidance" not in student.settings.selected_by  # a one-step student has none
    assert ("tuning MaskGIT, 2 steps", 4, 4, "settings") in told
    record = bench.measure(student).record
    assert record.method.tuning == student.tuning
    assert record.method.student == "digits-dimo"
    assert record.seed == small.seeds.report


def test_at_a_tie_the_first_stays(small):
    """At one step all is revealed at once: no noise on confidences changes an image."""
    job = load_planned(plan_jobs("digits", [], [1]), device=CPU)[0]
    bench = load_suite(small, RUNTIME)
    for noise in ([4.5, 0.0], [0.0, 4.5]):
        tuned = tune(bench, job, {"choice_temperature": noise})
        assert len({trial.fid for trial in tuned.tuning.trials}) == 1
        assert (tuned.tuning.chosen, tuned.settings.choice_temperature) == (0, noise[0])


def test_a_sweep_of_nothing_is_refused(protocol):
    with pytest.raises(DimoError, match=r"--tune guidance_scale has no effect: .*one_step"):
        check_grid(parse_grid(["guidance_scale=2"]), ["one_step"], protocol)
    with pytest.raises(DimoError, match="protocol 'imagenet256-cmmd' has none"):
        check_grid(parse_grid(["temperature=2"]), ["one_step"], load_protocol("imagenet256-cmmd"))
    check_grid({}, ["one_step"], load_protocol("imagenet256-cmmd"))


def test_other_samplers_are_rows_of_their_own(suite):
    names = ("confidence", "random", "halton", "tau_leaping", "theta_trapezoidal")
    jobs = load_planned(plan_jobs("digits", [], [1, 3], choice=Choice(names)), device=CPU)
    found = {
        (job.settings.sampler, job.settings.num_steps): suite.quality(
            job, seed=2000, num_images=500
        )
        for job in jobs
    }
    assert [job.section for job in jobs] == ["Teacher"] * 2 + ["Sampler"] * 8
    for name in names:
        assert found[name, 1] == pytest.approx(found["confidence", 1], rel=1e-6)  # one prediction
        assert found[name, 3] < 0.7 * found[name, 1]
    with pytest.raises(DimoError, match=r"unknown sampler 'randm'.* did you mean 'random'"):
        Choice(("randm",))
