"""Text conditions behind the interface of class labels: a label is the index of a prompt.

`TextConditioned` makes a `MaskedModel` of a `TextNetwork`; prompts are encoded when needed.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dimo.errors import DimoError
from dimo.models import MaskedModel, TextFeatures, TextNetwork
from dimo.util.files import sha256_bytes

MAX_PROMPT_LENGTH = 1000  # characters; more than any text encoder here reads
_ROWS = 8  # prompts encoded at once, always: the last bits depend on their number


class TextEncoder(Protocol):
    """Texts -> features, row by row, on the encoder's device."""

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Texts are truncated or padded to one length."""

    def to(self, device: torch.device) -> "TextEncoder":
        """As `nn.Module.to`."""


class Conditions(Protocol):
    """A numbered list of conditions with their prompts."""

    prompts: Sequence[str]
    sha256: str  # of all prompts

    def __len__(self) -> int: ...

    def __call__(self, labels: Tensor, drop: Tensor | None) -> TextFeatures:
        """Features of conditions `labels` [B]; where drop [B] is True, those of no condition."""


class Prompts:
    """Prompts as conditions, shared by all networks of a run; caches the `cache_size` latest.

    The null condition is `negative_prompt`.

    Raises:
        DimoError: No prompts.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        cache_size: int = 256,
    ) -> None:
        if not prompts:
            raise DimoError("there is no prompt; give one or more")
        self.encoder, self.prompts, self.negative_prompt = encoder, prompts, negative_prompt
        self.cache_size = cache_size
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # -1 = negative prompt
        self.sha256 = sha256_bytes("\n".join([negative_prompt, *prompts]).encode())

    def __len__(self) -> int:
        return len(self.prompts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        """Moves the encoder; returns the prompts."""
        self.encoder = self.encoder.to(device)
        self._cache.clear()
        return self

    def __call__(self, labels: Tensor, drop: Tensor | None) -> TextFeatures:
        numbers: list[int] = (labels if drop is None else labels.masked_fill(drop, -1)).tolist()
        self._fill(list(dict.fromkeys(numbers)))
        states, pooled = zip(*(self._cache[number] for number in numbers), strict=True)
        features = TextFeatures(
            torch.stack(states).to(labels.device), torch.stack(pooled).to(labels.device)
        )
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return features

    def _fill(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._cache:
                self._cache.move_to_end(number)
        new = [number for number in numbers if number not in self._cache]
        for start in range(0, len(new), _ROWS):
            part = new[start : start + _ROWS]
            texts = [self.negative_prompt if n < 0 else self.prompts[n] for n in part]
            # outside autocast and the graph, so that features do not depend on the first caller
            with (
                torch.no_grad(),
                torch.autocast("cuda", enabled=False),
                torch.autocast("cpu", enabled=False),
            ):
                encoded = self.encoder([*texts, *texts[-1:] * (_ROWS - len(texts))])
            for row, number in enumerate(part):
                self._cache[number] = (encoded.states[row].clone(), encoded.pooled[row].clone())


class ZeroText:
    """One all-zero condition in the shape of real ones, for estimates of memory and compute."""

    prompts: Sequence[str] = ("",)
    sha256 = ""

    def __init__(self, length: int, states_dim: int, pooled_dim: int) -> None:
        self.shape, self.pooled_dim = (length, states_dim), pooled_dim

    def __len__(self) -> int:
        return 1

    def __call__(self, labels: Tensor, drop: Tensor | None) -> TextFeatures:
        return TextFeatures(
            torch.zeros(len(labels), *self.shape, device=labels.device),
            torch.zeros(len(labels), self.pooled_dim, device=labels.device),
        )


class TextConditioned(MaskedModel):
    """A text-conditioned network as a `MaskedModel` whose labels are indices of `conditions`.

    Its state dict is that of the network alone.
    """

    def __init__(self, network: TextNetwork, conditions: Conditions) -> None:
        super().__init__()
        self.network, self.conditions = network, conditions
        self.num_classes = len(conditions)
        self.takes_positions, self.gives_states = network.takes_positions, network.gives_states
        self.codebook_size, self.num_tokens = network.codebook_size, network.num_tokens
        self.hidden_dim, self.depth = network.hidden_dim, network.depth

    @property
    def mask_token_id(self) -> int:
        return self.network.mask_token_id

    @property
    def block_tokens(self) -> int:
        return self.network.block_tokens

    @property
    def token_embeddings(self) -> Tensor:
        return self.network.token_embeddings

    def embedding_parameters(self) -> list[Tensor]:
        return self.network.embedding_parameters()

    def block_states(
        self, embedded: Tensor, labels: Tensor, blocks: Collection[int]
    ) -> list[Tensor]:
        return self.network.block_states(embedded, self.conditions(labels, None), blocks)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        embedding_noise: float = 0.0,
        noise: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        inputs: dict[str, Any] = {} if positions is None else {"positions": positions}
        text = self.conditions(labels, drop)
        return self.network(tokens, text, embedding_noise=embedding_noise, noise=noise, **inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)


def prompts_from_file(path: str | PathLike[str]) -> list[str]:
    """Prompts of a UTF-8 text file, one per line, stripped; empty lines are skipped.

    Raises:
        DimoError: No such file, not UTF-8, no prompt, one that is too long or comes twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DimoError(
            f"cannot read prompts {path}: {error.strerror}; give a text file, one prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        raise DimoError(
            f"prompts {path} are not UTF-8: {error.reason}; save them as UTF-8"
        ) from None
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise DimoError(
                f"{path} line {number} has {len(prompt):,} characters; allowed are "
                f"{MAX_PROMPT_LENGTH:,}; shorten or remove it"
            )
        if prompt in first:
            raise DimoError(
                f"{path} line {number} repeats line {first[prompt]}; a prompt may come once; "
                "remove one of them"
            )
        if prompt:
            first[prompt] = number
    if not first:
        raise DimoError(f"prompts {path} hold no prompt; write one or more, one per line")
    return list(first)
