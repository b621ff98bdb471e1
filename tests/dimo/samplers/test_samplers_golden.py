"""Samplers against recorded runs of the official ones, fed with the recorded draws."""

import gzip
import json
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from dimo.masking import tokens_per_step
from dimo.methods.di4c.network import Di4CStudent
from dimo.models.halton import HaltonMaskGIT
from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise
from dimo.samplers.base import Predictor, temperature_between
from dimo.samplers.confidence import sample_by_confidence, sample_confidence, sample_meissonic
from dimo.samplers.ordered import halton_order, sample_halton

# name in the manifest -> our decoding schedule; di4c changed the rule, not the name
RULE = {"dimo": "-v1", "di4c": ""}
LATENT = "maskgit_v1_sampler.di4c_latent_weights.safetensors.gz"


@dataclass(frozen=True)
class Recorded(ImageNoise):
    """Draws of a recorded run: proposed tokens, choice noise, start of the order, latents."""

    proposals: Tensor  # [steps, B, L]
    choice: Tensor | None = None  # [steps, B, L]
    start: Tensor | None = None  # [B]
    latents: Tensor | None = None  # [steps, B, 1]

    def gumbel(self, stream, shape):
        _, kind, step = stream.split("/")
        if kind == "choice":
            return self.choice[int(step)]
        return F.one_hot(self.proposals[int(step)], shape[-1]) * 1e9  # argmax takes the recorded

    def gumbel_at(self, stream, positions, width):
        draws = self.gumbel(stream, (self.proposals.shape[-1], width))
        return draws.gather(1, positions[..., None].expand(-1, -1, width))

    def uniform(self, stream, shape):
        _, kind, step = stream.split("/")
        assert kind == "latent"
        return self.latents[int(step), :, 0]

    def integers(self, stream, shape, high):
        assert stream == "sample/start"
        return self.start[:, None]


def _runs(golden, case):
    manifest = json.loads((golden / "manifest.json").read_text())
    (found,) = [entry for entry in manifest["cases"] if entry["case"] == case]
    return found["runs"]


def _confidence_run(golden, golden_arrays, prefix):
    data = golden_arrays("maskgit_v1_sampler")
    (run,) = [r for r in _runs(golden, "maskgit_v1_sampler") if r["prefix"] == prefix]
    arrays = {
        key.split("/")[1]: value for key, value in data.items() if key.startswith(f"{prefix}/")
    }
    return run, arrays, data["labels"]


def _network(golden, tiny_network, tmp_path, *, student):
    path = golden / "maskgit_v1_sampler.weights.safetensors"
    if not student:
        return MaskGIT.from_official(path, **tiny_network)
    latent = gzip.decompress((golden / LATENT).read_bytes())
    both = tmp_path / "student.safetensors"
    both.write_bytes(save({**load(path.read_bytes()), **load(latent)}))
    return Di4CStudent.from_official(both, **tiny_network)


@pytest.mark.parametrize(
    "prefix",
    [
        "dimo_arccos_4",
        "dimo_arccos_8",
        "dimo_cosine_4",
        "di4c_teacher_4",
        "di4c_teacher_8",
        "di4c_student_4",
        "di4c_student_w0_4",
    ],
)
def test_confidence_runs_are_reproduced(golden, golden_arrays, tiny_network, tmp_path, prefix):
    run, arrays, labels = _confidence_run(golden, golden_arrays, prefix)
    model = _network(golden, tiny_network, tmp_path, student=run.get("is_student", False))
    noise = Recorded(
        0, torch.arange(3), arrays["pred_codes"], arrays["gumbel"], latents=arrays.get("z")
    )
    history = []
    with torch.inference_mode():
        found = sample_confidence(
            model,
            labels,
            noise,
            num_steps=run["steps"],
            mask_schedule=run["sched_mode"] + RULE[prefix.split("_")[0]],
            guidance_scale=1 + run["w"],
            temperature=1 / run["sm_temp"],
            choice_temperature=run["r_temp"],
            callback=lambda step, tokens: history.append(tokens),
        )
    assert found.token_counts == arrays["schedule"].tolist() == arrays["n_revealed"].tolist()
    history = torch.stack(history)
    assert torch.equal(history == model.mask_token_id, arrays["mask_after"])
    assert torch.equal(history, arrays["codes_after"])
    assert torch.equal(found.tokens, arrays["codes_after"][-1])

    # and the predictions on the way
    predict = Predictor(model, labels, noise)
    before = torch.cat([predict.all_masked()[None], history[:-1]])
    for step in range(run["steps"]):
        with torch.inference_mode():
            log_p = predict(
                before[step],
                step,
                guidance_scale=1 + run["w"] * step / (run["steps"] - 1),
                temperature=1 / run["sm_temp"],
            )
        expected = arrays["logits_guided"][step, ..., : model.codebook_size].double()
        expected = (expected * run["sm_temp"]).log_softmax(-1)
        torch.testing.assert_close(log_p, expected, atol=1e-4, rtol=1e-4)


def test_recorded_noise_decides(golden, golden_arrays, tiny_network):
    """Other choice noise gives other tokens, so the runs above could have failed."""
    _, arrays, labels = _confidence_run(golden, golden_arrays, "dimo_arccos_8")
    model = MaskGIT.from_official(golden / "maskgit_v1_sampler.weights.safetensors", **tiny_network)
    noise = Recorded(0, torch.arange(3), arrays["pred_codes"], arrays["gumbel"].roll(1, dims=0))
    with torch.inference_mode():
        found = sample_confidence(
            model, labels, noise, num_steps=8, mask_schedule="arccos-v1", guidance_scale=4.0
        )
    assert not torch.equal(found.tokens, arrays["codes_after"][-1])


def test_halton_order_equals_the_official_one(golden_arrays):
    data = golden_arrays("halton_order")
    assert len(data) == 3
    for order in data.values():
        side = math.isqrt(len(order))
        assert torch.equal(halton_order(side), order[:, 0] * side + order[:, 1])


@pytest.mark.parametrize("side", [1, 2, 3, 27, 32, 56, 64])
def test_halton_order_reaches_every_cell(side):
    assert torch.equal(halton_order(side).sort().values, torch.arange(side * side))


def _halton_network(golden):
    manifest = json.loads((golden / "manifest.json").read_text())
    (case,) = [c for c in manifest["cases"] if c["case"] == "halton_transformer"]
    path = golden / "halton_transformer.weights.safetensors"
    return HaltonMaskGIT.from_official(path, **case["constructor"]), case["runs"]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_halton_runs_are_reproduced(golden, golden_arrays, number):
    model, runs = _halton_network(golden)
    run, data = runs[number], golden_arrays("halton_transformer")
    arrays = {
        key.split("/")[1]: value
        for key, value in data.items()
        if key.startswith(f"sampler_{number}/")
    }
    noise = Recorded(0, torch.arange(3), arrays["pred_codes"], start=arrays.get("roll"))
    history = []
    with torch.inference_mode():
        found = sample_halton(
            model,
            data["labels"],
            noise,
            num_steps=run["step"],
            guidance_scale=1 + run["w"],
            random_start=run.get("randomize", False),
            callback=lambda step, tokens: history.append(tokens),
        )
    assert found.token_counts == run["counts"]
    history = torch.stack(history)
    assert torch.equal(history, arrays["codes_after"])
    newly = history != torch.cat([torch.full_like(history[:1], 20), history[:-1]])
    assert torch.equal(newly, arrays["revealed"])

    if "probs" in arrays and "sm_temp_min" not in run:  # at the default temperature, 1
        predict = Predictor(model, data["labels"], noise)
        before = torch.cat([predict.all_masked()[None], history[:-1]])
        for step, probabilities in enumerate(arrays["probs"].double()):
            with torch.inference_mode():
                log_p = predict(before[step], step, guidance_scale=1 + run["w"])
            expected = probabilities[..., :20] / probabilities[..., :20].sum(-1, keepdim=True)
            torch.testing.assert_close(log_p.exp(), expected, atol=1e-5, rtol=1e-4)


def test_inverse_temperature_is_linear_between_first_and_last():
    """Halton-MaskGIT multiplies logits by linspace(1, 1.2, steps)."""
    found = [temperature_between(1.0, 1 / 1.2, i / 4) for i in range(5)]
    assert found == pytest.approx([1 / (1 + 0.05 * i) for i in range(5)])


class Replay:
    """A model that gives the recorded logits of one step after the other, as it is asked."""

    num_tokens, num_classes, codebook_size, mask_token_id, hidden_dim = 16, 2, 12, 99, 1
    takes_latent = takes_positions = False

    def __init__(self, logits):
        self.logits = iter(logits.flatten(3).transpose(2, 3))  # [steps, B, L, V]

    def __call__(self, tokens, labels):
        assert labels.tolist() == [0, 1]
        return next(self.logits)


def _meissonic_run(golden_arrays, prefix):
    data = golden_arrays("meissonic_scheduler")
    return {k.split("/")[1]: v for k, v in data.items() if k.startswith(f"{prefix}/")}


@pytest.mark.parametrize("prefix", ["cosine_6", "linear_4"])
def test_meissonic_runs_are_reproduced(golden_arrays, prefix):
    arrays = _meissonic_run(golden_arrays, prefix)
    steps = len(arrays["sample_in"])
    history = []
    noise = Recorded(0, torch.arange(2), arrays["multinomial"], arrays["confidence_noise"].double())
    noise.choice[-1] = 0  # none is drawn at the last step
    settings = {"choice_temperature": 2.0, "callback": lambda step, x: history.append(x)}
    if prefix == "cosine_6":
        run = partial(sample_meissonic, num_steps=steps, **settings)
    else:
        fixed = {"counts": [4] * 4, "guidance": lambda progress: 1.0, "temperature": 1.0}
        run = partial(sample_by_confidence, **fixed, **settings)
    labels = torch.tensor([0, 1])
    found = run(Replay(arrays["model_output"]), labels, noise)
    assert torch.equal(torch.stack(history), arrays["prev_sample"].flatten(2))
    masked = (torch.stack(history) == 99).sum(-1)
    assert torch.equal(masked, arrays["mask_len"].long())
    assert torch.equal(found.tokens, history[-1])
    # the noise decides
    history.clear()
    noise = Recorded(0, torch.arange(2), arrays["multinomial"], noise.choice.roll(1, dims=0))
    run(Replay(arrays["model_output"]), labels, noise)
    assert not torch.equal(torch.stack(history), arrays["prev_sample"].flatten(2))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 12, 16, 32, 48, 64])
def test_meissonic_counts_are_floored_in_float32(golden, steps):
    content = json.loads((golden / "meissonic_scheduler.data.json").read_text())
    left = content["schedules"]["cosine"][str(steps)]["masked_after_step"]
    counts = tokens_per_step("cosine-amused", steps, 4096)
    assert [4096 - sum(counts[: step + 1]) for step in range(steps)] == left
    if steps == 3:
        assert left[1] == 2047  # exactly, cos(pi / 3) is a half: 2048
