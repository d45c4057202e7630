"""Adapters: disabled ones, masks and visiting orders."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.strategies.adapters import disabled_adapters, enabled_mask, lora_ids
from kernelfuzz.strategies.batches import batches


def test_minimal(minimal):
    assert minimal(disabled_adapters(4)) == ()
    assert minimal(disabled_adapters(4), lambda ids: len(ids) == 2) == (0, 1)


@given(st.integers(1, 5).flatmap(lambda count: st.tuples(st.just(count), disabled_adapters(count))))
def test_disabled_adapters_are_distinct_ids_in_range_and_sorted(drawn):
    count, disabled = drawn
    assert list(disabled) == sorted(set(disabled))
    assert set(disabled) <= set(range(count))


@given(batches(3, beyond=2), disabled_adapters(3))
def test_enabled_mask(batch, disabled):
    mask = enabled_mask(3, batch, disabled)
    assert mask.dtype == torch.int32
    assert mask.numel() > max(3, *batch.active(), 0)
    assert [i for i, enabled in enumerate(mask.tolist()) if not enabled] == list(disabled)
    assert set(mask.tolist()) <= {0, 1}


@given(batches(3, beyond=2), st.booleans())
def test_lora_ids_are_the_active_ones_then_minus_one(batch, descending):
    ids = lora_ids(3, batch, descending)
    count = len(batch.active())
    assert ids.dtype == torch.int32
    assert ids.numel() == max(4, count)
    assert ids[:count].tolist() == sorted(batch.active(), reverse=descending)
    assert set(ids[count:].tolist()) <= {-1}
