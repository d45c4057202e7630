"""Top-k routing and expert maps, as a style plus the content seed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies.contents import hash_bits

RoutingStyle = Literal["first_expert", "distinct", "uniform", "skewed", "last_expert"]
"""Where tokens go, simplest first: all to expert 0; k different experts each, as a router's top-k; anywhere,
repeats allowed; mostly to the low experts; all to the last expert, whose weights lie farthest away."""

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
        self, num_tokens: int, top_k: int, num_experts: int, seed: int | Sequence[int], device: torch.device | str
    ) -> torch.Tensor:
        """Return the expert of each of a token's choices, int64 [tokens, top_k]; for S seeds [S, tokens, top_k]."""
        shape = (num_tokens, top_k) if isinstance(seed, int) else (len(seed), num_tokens, top_k)

        def bits(name: str) -> torch.Tensor:
            return hash_bits(seed, name, num_tokens * top_k, device).view(shape)

        if self.style == "first_expert":
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
        elif self.style == "last_expert":
            ids = torch.full(shape, num_experts - 1, dtype=torch.int64, device=device)
        elif self.style == "distinct":
            first = hash_bits(seed, "routing/first", num_tokens, device)
            ids = (first[..., None] + torch.arange(top_k, device=device)) % num_experts
        elif self.style == "uniform":
            ids = bits("routing") % num_experts
        else:
            drawn = bits("routing")
            ids = (drawn % num_experts) * ((drawn >> 16) % 4 == 0)
        return ids if self.invalid == "none" else self._with_invalid(ids, bits("routing/invalid"), num_experts)

    def _with_invalid(self, ids: torch.Tensor, bits: torch.Tensor, num_experts: int) -> torch.Tensor:
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
    """Draw a routing; the simplest sends everything to expert 0. `invalid` narrows the invalid ids.

    None sends everything to the last expert: that is for huge cases.
    """
    style = st.sampled_from(("first_expert", "distinct", "uniform", "skewed"))
    return st.builds(Routing, style=style, invalid=st.sampled_from(invalid))


def expert_map(
    style: ExpertMapStyle, num_experts: int, seed: int | Sequence[int], device: torch.device | str
) -> torch.Tensor | None:
    """Return the map, int32 [num_experts], for S seeds [S, num_experts]; or None.

    Which experts live elsewhere depends on the seed: maps of one structure differ, and saved cases keep theirs.
    """
    if style == "none":
        return None
    bits = hash_bits(seed, "expert_map", num_experts, device)
    local = bits % 2 == 0 if style != "identity" else torch.ones_like(bits, dtype=torch.bool)
    count = local.cumsum(-1, dtype=torch.int32)
    places = count[..., -1:] - count if style == "reversed_holes" else count - 1
    return torch.where(local, places, -1)
