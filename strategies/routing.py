"""Top-k routing and expert maps, as a style plus the content seed."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies.contents import hash_bits

RoutingStyle = Literal["first_expert", "distinct", "uniform", "skewed"]
"""Where tokens go, simplest first: all to expert 0; k different experts each, as a router's top-k; anywhere,
repeats allowed; mostly to the low experts."""

InvalidIds = Literal["none", "minus_one", "beyond", "both"]
"""Which expert ids outside [0, E) are strewn in: none; -1, which marks padding; E and above; both."""

ExpertMapStyle = Literal["none", "identity", "holes", "reversed_holes"]
"""Expert parallelism's map from global to local ids, -1 for an expert that lives elsewhere; or no map."""


@dataclass(frozen=True)
class Routing:
    """How the top-k expert ids of a case are made from its seed."""

    style: RoutingStyle = "first_expert"
    invalid: InvalidIds = "none"

    def expert_ids(
        self, num_tokens: int, top_k: int, num_experts: int, seed: int, device: torch.device | str
    ) -> torch.Tensor:
        """Return the expert of each of a token's choices, int64 [tokens, top_k]."""
        count = num_tokens * top_k
        bits = hash_bits(seed, "routing", count, device)
        if self.style == "first_expert":
            ids = torch.zeros(count, dtype=torch.int64, device=device)
        elif self.style == "distinct":
            first = hash_bits(seed, "routing/first", num_tokens, device).repeat_interleave(top_k)
            ids = (first + torch.arange(count, device=device) % max(top_k, 1)) % num_experts
        elif self.style == "uniform":
            ids = bits % num_experts
        else:
            ids = (bits % num_experts) * ((bits >> 16) % 4 == 0)
        return self._with_invalid(ids, num_experts, seed).view(num_tokens, top_k)

    def _with_invalid(self, ids: torch.Tensor, num_experts: int, seed: int) -> torch.Tensor:
        if self.invalid == "none":
            return ids
        bits = hash_bits(seed, "routing/invalid", ids.numel(), ids.device)
        beyond = num_experts + (bits >> 8) % 3
        if self.invalid == "minus_one":
            wrong = torch.full_like(ids, -1)
        elif self.invalid == "beyond":
            wrong = beyond
        else:
            wrong = torch.where((bits >> 4) % 2 == 0, -1, beyond)
        return torch.where(bits % 4 == 0, wrong, ids)


@functools.cache
def routings(
    *, invalid: tuple[InvalidIds, ...] = ("none", "minus_one", "beyond", "both")
) -> st.SearchStrategy[Routing]:
    """Draw a routing; the simplest sends everything to expert 0. `invalid` narrows the invalid ids."""
    style = st.sampled_from(("first_expert", "distinct", "uniform", "skewed"))
    return st.builds(Routing, style=style, invalid=st.sampled_from(invalid))


def expert_map(style: ExpertMapStyle, num_experts: int, seed: int) -> tuple[torch.Tensor | None, int]:
    """Return the map, int32 [num_experts] or None, and the number of local experts (at least 1)."""
    if style == "none":
        return None, num_experts
    local = torch.ones(num_experts, dtype=torch.bool)
    if style != "identity":
        local = hash_bits(seed, "expert_map", num_experts, "cpu") % 2 == 0
    count = int(local.sum())
    places = torch.arange(count, dtype=torch.int32)
    mapping = torch.full((num_experts,), -1, dtype=torch.int32)
    mapping[local] = places.flip(0) if style == "reversed_holes" else places
    return mapping, max(count, 1)
