"""Batches: the simplest draws, what arguments narrow, and the regimes."""

import pytest
from hypothesis import given

from kernelfuzz.strategies.batches import BASE, BATCH_REGIMES, Batch, Segment, batch_regimes, batches


def adapters_of(batch: Batch) -> set[int]:
    return set(batch.active()) - {BASE}


def one_token(*adapters: int) -> Batch:
    """A batch of one token for each of these adapters."""
    return Batch(tuple(Segment(adapter, 1) for adapter in adapters))


def test_minimal(minimal):
    assert minimal(batches(3)) == one_token(0)
    assert minimal(batches(3), lambda batch: batch.num_tokens == 0) == Batch(())
    assert minimal(batches(3), lambda batch: BASE in batch.active()) == one_token(BASE)


def test_minimal_with_two_adapters_and_a_base_token(minimal):
    batch = minimal(batches(4), lambda batch: len(adapters_of(batch)) >= 2 and BASE in batch.active())
    assert sorted(segment.adapter for segment in batch.segments) == [BASE, 0, 1]
    assert batch.num_tokens == 3


@given(batches(2, max_segments=3, max_length=4, empty=False, base=False))
def test_narrowed(batch):
    assert 1 <= len(batch.segments) <= 3
    assert all(1 <= segment.length <= 4 for segment in batch.segments)
    assert set(batch.active()) <= {0, 1}


def test_beyond_reaches_ids_out_of_range_and_no_further(minimal, drawn):
    assert minimal(batches(2, beyond=2), lambda batch: 3 in batch.active()) == one_token(3)
    assert all(max(batch.active(), default=0) <= 3 for batch in drawn(batches(2, beyond=2), 100))


@given(batches(3, beyond=1))
def test_tokens_follow_the_segments(batch):
    expected = [segment.adapter for segment in batch.segments for _ in range(segment.length)]
    assert batch.token_adapters().tolist() == expected
    assert batch.num_tokens == len(expected)
    assert batch.active() == tuple(sorted(set(expected)))


@pytest.mark.parametrize(
    ("batch", "regimes"),
    [
        (Batch(()), {"no_tokens"}),
        (one_token(BASE), {"one_token", "all_base"}),
        (one_token(0), {"one_token", "no_base"}),
        (one_token(0, 1), {"no_base", "every_adapter"}),
        (one_token(0, BASE), {"base_and_adapters"}),
        (one_token(0, 1, BASE), {"base_and_adapters", "every_adapter_and_base"}),
        (one_token(0, BASE, 0), {"base_and_adapters", "interleaved"}),
        (one_token(0, 0, 0), {"no_base"}),
    ],
)
def test_regimes(batch, regimes):
    assert batch_regimes(batch, 2) == regimes
    assert regimes <= set(BATCH_REGIMES)
