"""Text conditions behind the interface of labels: prompts, their cache, prompt files."""

import copy

import pytest
import torch

from dimo.errors import DimoError
from dimo.models.meissonic import Meissonic
from dimo.models.text import (
    MAX_PROMPT_LENGTH,
    Prompts,
    TextConditioned,
    TextFeatures,
    prompts_from_file,
)

PROMPTS = [f"prompt {number}" for number in range(30)]


class Letters:
    """A text encoder that needs no weights: states are made of the letters, pooled of their sum."""

    def __init__(self, length=5, states_dim=8, pooled_dim=16):
        self.length, self.states_dim, self.pooled_dim = length, states_dim, pooled_dim
        self.seen = []

    def to(self, device):
        return self

    def __call__(self, texts):
        self.seen.append(list(texts))
        codes = torch.tensor([[*text.encode()[-5:].ljust(5)] for text in texts]) / 100
        angle = codes[..., None] * torch.arange(1, self.states_dim + 1)
        pooled = codes.sum(1, keepdim=True) * torch.arange(1, self.pooled_dim + 1)
        return TextFeatures(angle.sin(), pooled.cos())


def text_conditioned(prompts=PROMPTS, **options):
    torch.manual_seed(0)
    network = Meissonic(
        input_size=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        vocab_size=14,
        codebook_size=12,
    )
    return TextConditioned(network, Prompts(Letters(), prompts, **options)).eval()


def test_a_label_is_the_number_of_a_prompt():
    model = text_conditioned()
    assert (model.num_classes, model.num_tokens, model.mask_token_id) == (30, 16, 13)
    tokens, labels = torch.full((3, 16), 13), torch.tensor([4, 29, 4])
    with torch.inference_mode():
        found = model(tokens, labels)
        alone = model.network(tokens, Letters()([PROMPTS[4], PROMPTS[29], PROMPTS[4]]))
    assert torch.equal(found, alone)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_no_condition_is_the_negative_prompt():
    model = text_conditioned([*PROMPTS, "ugly"], negative_prompt="ugly")
    tokens, drop = torch.full((2, 16), 13), torch.tensor([True, False])
    with torch.inference_mode():
        found = model(tokens, torch.tensor([3, 3]), drop=drop)
        assert torch.equal(found[0], model(tokens, torch.tensor([30, 3]))[0])
        empty = text_conditioned()(tokens, torch.tensor([3, 3]), drop=drop)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], empty[0])


def test_a_prompt_is_encoded_once_while_it_is_kept():
    prompts = Prompts(Letters(), PROMPTS, cache_size=4)
    first = prompts(torch.tensor([0, 1, 0]), None)
    assert torch.equal(prompts(torch.tensor([1, 0]), None).states, first.states[:2].flip(0))
    assert len(prompts.encoder.seen) == 1
    many = prompts(torch.arange(20), None)  # more than are kept
    assert torch.equal(many.pooled, Letters()(PROMPTS[:20]).pooled)
    assert len(prompts._cache) == 4
    prompts(torch.arange(16, 20), None)
    before = len(prompts.encoder.seen)
    prompts(torch.tensor([0]), None)  # was dropped
    assert len(prompts.encoder.seen) == before + 1
    assert {len(texts) for texts in prompts.encoder.seen} == {8}  # the same number at once, always


def test_copies_share_the_prompts_and_the_state_is_the_networks():
    model = text_conditioned()
    other = copy.deepcopy(model)
    assert other.conditions is model.conditions
    assert other.network is not model.network
    assert model.state_dict().keys() == model.network.state_dict().keys()
    with torch.no_grad():
        model.network.project_to_hidden.weight.zero_()
    other.load_state_dict(model.state_dict())
    assert not other.network.project_to_hidden.weight.any()
    frozen = model.embedding_parameters()
    assert sum(p.numel() for p in frozen) == 14 * 16 + 16 + 16 * 16 + 16 * 16 + 16 + 12 * 16


def test_lists_of_prompts_are_told_apart():
    def sha256(*args, **kwargs):
        return Prompts(Letters(), *args, **kwargs).sha256

    assert sha256(["a", "b"]) == sha256(["a", "b"])
    others = [sha256(["b", "a"]), sha256(["a"]), sha256(["a", "b"], negative_prompt="c")]
    assert len({sha256(["a", "b"]), *others}) == 4


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    for encoding in ("utf-8", "utf-8-sig"):  # with the byte-order mark of some editors
        path.write_text("a red circle\n\n  d'après / été \n\n", encoding=encoding)
        assert prompts_from_file(path) == ["a red circle", "d'après / été"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read prompts .*No such file.*one prompt a line"),
        (b"", "hold no prompt"),
        (b"\n \n", "hold no prompt"),
        (b"a\nb\n\na\n", "line 4 repeats line 1"),
        (b"a\n" + b"x" * (MAX_PROMPT_LENGTH + 1), "line 2 has 1,001 characters; allowed are 1,000"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_are_no_prompts_are_one_error(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DimoError, match=said) as raised:
        prompts_from_file(path)
    assert "\n" not in str(raised.value)


def test_no_prompt_is_an_error():
    with pytest.raises(DimoError, match="there is no prompt"):
        Prompts(Letters(), [])
