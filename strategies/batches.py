"""Mixed base/LoRA batches, drawn as real batches are made: sequences of tokens that share an adapter."""

import functools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

BASE = -1
"""The adapter id of tokens that use the base model alone."""


@dataclass(frozen=True)
class Segment:
    """`length` consecutive tokens of one adapter; adapter -1 is the base model."""

    adapter: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Segments in token order. Adapter ids at or above the number of adapters are out of range."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return sum(segment.length for segment in self.segments)

    def active(self) -> tuple[int, ...]:
        """Return the distinct adapter ids in the batch, ascending, the base model's -1 among them."""
        return tuple(sorted({segment.adapter for segment in self.segments}))

    def token_adapters(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the adapter id of each token, int64 [tokens]."""
        adapters = torch.tensor([segment.adapter for segment in self.segments], dtype=torch.int64, device=device)
        lengths = torch.tensor([segment.length for segment in self.segments], dtype=torch.int64, device=device)
        return adapters.repeat_interleave(lengths)


@functools.cache  # a strategy that is made anew in every draw takes longer to make than to draw from
def _segments(lowest: int, highest: int, max_length: int, max_segments: int) -> st.SearchStrategy[list[Segment]]:
    segment = st.builds(Segment, adapter=st.integers(lowest, highest), length=st.integers(1, max_length))
    return st.lists(segment, min_size=1, max_size=max_segments)


@st.composite
def batches(
    draw: st.DrawFn,
    num_adapters: int,
    *,
    max_segments: int = 6,
    max_length: int = 12,
    empty: bool = True,
    base: bool = True,
    beyond: int = 0,
) -> Batch:
    """Draw a batch for `num_adapters` adapters; the simplest is one token of adapter 0.

    `empty` allows a batch without tokens. `base` allows tokens of the base model. `beyond` allows adapter ids up to
    num_adapters - 1 + beyond, which are out of range.
    """
    segments = draw(_segments(BASE if base else 0, num_adapters - 1 + beyond, max_length, max_segments))
    # Drawn last and rarely, so that a failure which needs no token still shrinks to one: that is what a person would
    # write.
    if empty and draw(st.integers(0, 11)) == 11:
        return Batch(())
    return Batch(tuple(segments))


def batch_regimes(batch: Batch, num_adapters: int) -> set[str]:
    """Return the names of the batch regimes that `batch` is in."""
    active = set(batch.active())
    adapters = set(range(num_adapters))
    runs = [segment.adapter for segment in batch.segments]
    found = {
        "no_tokens": batch.num_tokens == 0,
        "one_token": batch.num_tokens == 1,
        "all_base": active == {BASE},
        "no_base": bool(active) and BASE not in active,
        "base_and_adapters": BASE in active and len(active) > 1,
        "every_adapter": adapters <= active and BASE not in active,
        "every_adapter_and_base": adapters | {BASE} <= active,
        "interleaved": any(a != b and a in runs[i + 2 :] for i, (a, b) in enumerate(zip(runs, runs[1:]))),
    }
    return {name for name, holds in found.items() if holds}


SMALL_BATCHES = {"max_segments": 2, "max_length": 2}
"""Arguments with which `cases` of a target that takes batches draws small cases."""

BATCH_REGIMES = (
    "no_tokens",
    "one_token",
    "all_base",
    "no_base",
    "base_and_adapters",
    "every_adapter",
    "every_adapter_and_base",
    "interleaved",
)
"""Every regime that `batch_regimes` names."""
