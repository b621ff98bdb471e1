"""PickScore, ImageReward and HPSv3 against the published code, on tiny random networks."""

import gzip
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch.overrides import TorchFunctionMode

from bench.features.clip import load_pickscore, make_pickscore
from bench.features.resize import pil_central_square
from dimo.errors import DimoError


def golden_case(golden, case):
    with np.load(golden / f"{case}.data.npz") as arrays:
        data = {key: arrays[key] for key in arrays.files}
    state = load(gzip.decompress((golden / f"{case}.weights.safetensors.gz").read_bytes()))
    return data, state, [data[f"image_{number}"] for number in range(3)]


@pytest.fixture(scope="module")
def clip_config(golden):
    return json.loads((golden / "hpsv2_tiny_clip.config.json").read_text())


def every_pair(score, pictures, texts):
    return np.stack([score([picture] * len(texts), texts) for picture in pictures])


def test_pickscore_equals_the_published_recipe(golden, clip_config):
    data, state, pictures = golden_case(golden, "pickscore_tiny")
    scorer = make_pickscore(state, clip_config["model_cfg"], name="tiny")
    texts = clip_config["prompts"]
    prepared = torch.stack([scorer.preprocess(picture) for picture in pictures])
    np.testing.assert_array_equal(prepared, data["pixels"])
    for ours, theirs in zip(scorer.tokenizer(texts).numpy(), data["input_ids"], strict=True):
        end = int((ours == 49407).argmax()) + 1  # behind it, padding of two kinds, never seen
        np.testing.assert_array_equal(ours[:end], theirs[:end])
    found = every_pair(scorer.score, pictures, texts)
    scale = float(state["logit_scale"].exp())
    np.testing.assert_allclose(found / scale, data["scores"] / scale, atol=1e-6)
    assert np.abs(data["scores"]).max() > 10  # cosines would not fit


def test_an_odd_margin_is_cut_as_by_transformers():
    pixels = np.arange(32 * 37 * 3, dtype=np.int64).reshape(32, 37, 3).astype(np.uint8)
    np.testing.assert_array_equal(pil_central_square(pixels, 32, floor=True), pixels[:, 2:34])
    pixels = np.ones((35, 32, 3), np.uint8) * np.arange(35, dtype=np.uint8)[:, None, None]
    assert pil_central_square(pixels, 32, floor=True)[0, 0, 0] == 1
    assert pil_central_square(pixels, 32)[0, 0, 0] == 2


def test_what_is_no_pickscore_is_refused(golden, clip_config, tmp_path):
    _, state, _ = golden_case(golden, "pickscore_tiny")
    config = clip_config["model_cfg"]
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(DimoError, match="not in the layout of transformers' CLIPModel"):
        load_pickscore(tmp_path / "model.safetensors")
    with pytest.raises(DimoError, match=r"1 unexpected \(more\)"):
        make_pickscore({**state, "more": torch.zeros(1)}, config, name="tiny")
    lacking = {k: v for k, v in state.items() if not k.endswith("layers.0.self_attn.k_proj.bias")}
    with pytest.raises(DimoError, match=r"missing \(transformer\.resblocks\.0\.attn\.in_proj_bias"):
        make_pickscore(lacking, config, name="tiny")


@pytest.fixture(scope="module")
def reward(golden):
    pytest.importorskip("transformers", reason="needs the extra t2i")
    from bench.features.image_reward import Sizes, make_image_reward

    words = (golden / "image_reward_tiny.vocab.txt").read_text().split("\n")[:-1]
    sizes = Sizes(side=32, image=(16, 2, 2), text=(24, 2, 2), text_hidden=48, positions=40)
    data, state, pictures = golden_case(golden, "image_reward_tiny")

    def make(state=state, words=words):
        return make_image_reward(state, words, sizes, name="tiny")

    return make, data, state, pictures


def test_image_reward_equals_the_published_code(reward):
    make, data, _, pictures = reward
    network, texts = make(), data["texts"].tolist()
    prepared = torch.stack([network.preprocess(picture) for picture in pictures])
    np.testing.assert_array_equal(prepared, data["pixels"])
    tokens = network.tokenizer(texts, padding="max_length", truncation=True, max_length=35)
    np.testing.assert_array_equal(tokens.input_ids, data["input_ids"])
    np.testing.assert_allclose(network.image(prepared), data["image_embeds"], atol=5e-6)
    np.testing.assert_allclose(
        every_pair(network.score, pictures, texts), data["scores"], atol=2e-6
    )
    network.double()
    exact = [network(p.double().expand(len(texts), -1, -1, -1), texts).numpy() for p in prepared]
    np.testing.assert_allclose(exact, data["scores_float64"], atol=1e-12)


def test_batches_and_neighbours_change_no_reward(reward, monkeypatch):
    make, data, _, pictures = reward
    network, texts = make(), data["texts"].tolist()[:3]
    whole = network.score(pictures, texts)
    monkeypatch.setattr("bench.features.extraction.FORWARD_BATCH", 2)
    np.testing.assert_allclose(network.score(pictures, texts), whole, atol=2e-6)


def test_what_is_no_image_reward_is_refused(reward, tmp_path):
    from bench.features.image_reward import load_image_reward

    make, _, state, _ = reward
    with pytest.raises(DimoError, match=r"vocab\.txt: No such file.*google-bert/bert-base-uncased"):
        load_image_reward(tmp_path / "ImageReward.pt")
    with pytest.raises(DimoError, match=r"vocab\.txt has 2 words; the weights tiny need 51"):
        make(words=["[PAD]", "[UNK]"])
    with pytest.raises(DimoError, match="have no text encoder of BLIP"):
        make(state={"visual.proj": torch.zeros(2, 2)})
    with pytest.raises(DimoError, match=r"1 missing \(reward\.7\.bias\)"):
        make(state={key: value for key, value in state.items() if key != "mlp.layers.7.bias"})


TEXTS = ("\nHow good is this picture of - {text_prompt}\n\n", "\nAs a number: <|Reward|>\n\nEND\n")


@pytest.fixture(scope="module")
def hpsv3(golden):
    pytest.importorskip("transformers", reason="needs the extra t2i")
    from bench.features.hpsv3 import Sizes, make_hpsv3

    sizes = Sizes((32, 2, 2), 1, 48, (32, 2, 2), 2)
    data, state, pictures = golden_case(golden, "hpsv3_tiny")
    tokenizer = golden / "hpsv3_tiny.tokenizer.json"

    def make(state=state, dtype=torch.float32):
        return make_hpsv3(state, tokenizer, TEXTS, sizes, dtype, name="tiny")

    return make, data, state, pictures


class InFloat64(TorchFunctionMode):
    """What is asked for in float32 is computed in float64: transformers' norms and rotations.

    The same mode surrounded the authors' code. Without it both round to float32 on the way, and
    another last bit there, as by another attention kernel, changes scores by up to 1e-5.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        named = {key: widened(value) for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(
            *map(widened, args), **named
        )


def test_hpsv3_equals_the_published_code(hpsv3):
    from bench.features.hpsv3 import patches_of

    make, data, _, pictures = hpsv3
    network, texts = make(), data["texts"].tolist()
    prepared = [patches_of(picture) for picture in pictures]
    assert [(1, *grid) for _, grid in prepared] == list(map(tuple, data["grid"].tolist()))
    patches = torch.cat([patches for patches, _ in prepared])
    np.testing.assert_array_equal(patches[::16, ::49], data["pixels"])
    for (image, _), text, theirs in zip(prepared, texts, data["input_ids"], strict=True):
        ours = network.tokens(text, len(image)).numpy()
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
    found, own = network.score(pictures, texts), range(3)
    assert found.std() > 0.5
    np.testing.assert_allclose(found, data["scores"][own, own, 0], atol=5e-5)  # their batch: 1e-5
    with InFloat64():
        network = make().double()
        exact = [[network(i.double(), g, t).numpy() for t in texts] for i, g in prepared]
    np.testing.assert_allclose(exact, data["scores_float64"], rtol=0, atol=1e-11)
    (coarse,) = make(dtype=torch.bfloat16).score(pictures[:1], texts[:1])
    assert 0 < abs(coarse - found[0]) < 0.5


def test_without_the_extra_the_scorers_say_so(reward, hpsv3, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = "needs the package transformers; install it with: pip install 'dimo[t2i]'"
    for name, (make, *_) in {"ImageReward": reward, "HPSv3": hpsv3}.items():
        with pytest.raises(DimoError, match=re.escape(f"{name} {said}")):
            make()


def test_the_size_of_what_hpsv3_sees():
    from bench.features.hpsv3 import size_of

    assert size_of(1024, 1024) == (448, 448)
    assert size_of(256, 512) == (336, 644)  # made larger: rounded up
    assert size_of(768, 1344) == (336, 588)  # made smaller: rounded down
    with pytest.raises(DimoError, match="image of 2 x 401 pixels; allowed: sides of at most"):
        size_of(2, 401)


def test_what_is_no_hpsv3_is_refused(hpsv3, tmp_path):
    from bench.features.hpsv3 import load_hpsv3

    make, _, state, _ = hpsv3
    weights, template = tmp_path / "HPSv3.safetensors", tmp_path / "data_collator_qwen.py"
    with pytest.raises(DimoError, match=r"data_collator_qwen\.py: No such file.*hpsv3 1\.0\.0"):
        load_hpsv3(weights)
    template.write_text('INSTRUCTION = "How good?"\nprompt_with_special_token = "<|Reward|>"\n')
    with pytest.raises(DimoError, match="has another instruction than HPSv3 was trained with"):
        load_hpsv3(weights)
    with pytest.raises(DimoError, match=r"have no embeddings of words, hpsv3_tiny\.tokenizer"):
        make(state={"rm_head.0.weight": torch.zeros(2, 2)})
    with pytest.raises(DimoError, match=r"1 missing \(5\.bias\)"):
        make(state={key: value for key, value in state.items() if key != "rm_head.5.bias"})
    with pytest.raises(DimoError, match=r"1 unexpected \(visual\.more\)"):
        make(state={**state, "visual.more": torch.zeros(1)})
    with pytest.raises(DimoError, match=r"prompt 'a <\|Reward\|>' has"):
        make().tokens("a <|Reward|>", 4)
