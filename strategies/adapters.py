"""Adapters: which are disabled, how many entries of `lora_ids` are visited, and their order."""

import functools

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies.batches import Batch
from kernelfuzz.strategies.sizes import sizes


@functools.cache
def disabled_adapters(num_adapters: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the ids of adapters that are switched off; the simplest draw disables none."""
    return st.lists(st.integers(0, num_adapters - 1), max_size=2, unique=True).map(lambda ids: tuple(sorted(ids)))


def enabled_mask(num_adapters: int, batch: Batch, disabled: tuple[int, ...]) -> torch.Tensor:
    """Return `adapter_enabled`, int32: 1 for every id but the disabled ones.

    One entry more than there are adapters, as vLLM allocates it, and long enough to be indexed by every id of the
    batch.
    """
    length = max(num_adapters, *batch.active(), 0) + 1
    mask = torch.ones(length, dtype=torch.int32)
    mask[list(disabled)] = 0
    return mask


def lora_ids(num_adapters: int, batch: Batch, descending: bool = False) -> torch.Tensor:
    """Return `lora_ids`, int32: the ids active in the batch, then -1.

    At least num_adapters + 1 entries, as vLLM allocates it; longer only where ids out of range are active too. vLLM
    sorts them ascending; the contract asks for no order.
    """
    active = sorted(batch.active(), reverse=descending)
    ids = torch.full((max(num_adapters + 1, len(active)),), -1, dtype=torch.int32)
    ids[: len(active)] = torch.tensor(active, dtype=torch.int32)
    return ids


@functools.cache
def ranks(*, maximum: int = 144) -> st.SearchStrategy[int]:
    """Draw a LoRA rank from 1: small ones, and both sides of 16, 64 and 128, where kernels change path or block."""
    return sizes(1, maximum, around=(16, 64, 128))
