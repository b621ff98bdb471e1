"""Samplers against recorded runs of the official ones, fed with the recorded draws."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dimo.models.maskgit import MaskGIT
from dimo.rng import ImageNoise
from dimo.samplers.confidence import sample_confidence
from dimo.samplers.halton import halton_order, sample_halton
from dimo.samplers.predictor import Predictor

# name in the manifest -> our decoding schedule; di4c changed the rule, not the name
RULE = {"dimo": "-v1", "di4c": ""}


@dataclass(frozen=True)
class Recorded(ImageNoise):
    """Draws of a recorded run: the proposed tokens, the choice noise, the start of the order."""

    proposals: Tensor  # [steps, B, L]
    choice: Tensor | None = None  # [steps, B, L]
    start: Tensor | None = None  # [B]

    def gumbel(self, stream, shape):
        _, kind, step = stream.split("/")
        if kind == "choice":
            return self.choice[int(step)]
        return F.one_hot(self.proposals[int(step)], shape[-1]) * 1e9  # argmax takes the recorded

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


@pytest.mark.parametrize(
    "prefix",
    ["dimo_arccos_4", "dimo_arccos_8", "dimo_cosine_4", "di4c_teacher_4", "di4c_teacher_8"],
)
def test_confidence_runs_are_reproduced(golden, golden_arrays, tiny_network, prefix):
    run, arrays, labels = _confidence_run(golden, golden_arrays, prefix)
    model = MaskGIT.from_official(golden / "maskgit_v1_sampler.weights.safetensors", **tiny_network)
    noise = Recorded(0, torch.arange(3), arrays["pred_codes"], arrays["gumbel"])
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


class Replay:
    """A model that predicts what a recorded one did, step by step."""

    codebook_size = mask_token_id = 20
    num_tokens, num_classes, hidden_dim = 16, 5, 1

    def __init__(self, log_p):
        self.log_p = iter(log_p)

    def __call__(self, tokens, labels, *, drop=None):
        return next(self.log_p)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_halton_runs_are_reproduced(golden, golden_arrays, number):
    run = _runs(golden, "halton_transformer")[number]
    data = golden_arrays("halton_transformer")
    arrays = {key: data.get(f"sampler_{number}/{key}") for key in ("pred_codes", "probs", "roll")}
    noise = Recorded(0, torch.arange(3), arrays["pred_codes"], start=arrays["roll"])
    if arrays["probs"] is None:  # not recorded with top-k
        arrays["probs"] = torch.ones(run["step"], 3, 16, 21)
    history = []
    found = sample_halton(
        Replay(arrays["probs"].log()),
        data["labels"],
        noise,
        num_steps=run["step"],
        random_start=run.get("randomize", False),
        callback=lambda step, tokens: history.append(tokens),
    )
    assert found.token_counts == run["counts"]
    assert torch.equal(torch.stack(history), data[f"sampler_{number}/codes_after"])
