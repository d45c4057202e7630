"""The regime huge: a kernel whose flattened offsets wrap is found, and devices that are too small are refused.

What wraps at 2^31 on a device is shown around 2^16.
"""

import os
from functools import partial

import pytest
import torch

from kernelfuzz.fuzz import buffers, regimes
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.regimes import free_memory, in_regime, require_regime
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.strategies import huge
from kernelfuzz.strategies.batches import BASE
from kernelfuzz.strategies.errors import KernelfuzzError

BEYOND = 2**16
CPU = torch.device("cpu")


def flat(tensor):
    """All elements from the tensor's first to its last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((last + 1,), (1,))


def offsets(tensor, *indices, wraps):
    """The flattened offsets of elements, from indices that broadcast. Where it `wraps` they stay in the tensor: one
    that is taken for a negative number is easier to find."""
    found = sum(index * stride for index, stride in zip(indices, tensor.stride(), strict=True))
    return found % BEYOND if wraps else found


def read(tensor, *indices, wraps):
    return flat(tensor)[offsets(tensor, *indices, wraps=wraps)].double()


def fused_moe_lora(inputs, outputs, wraps=None):
    """Right, but for the offsets into the tensor that `wraps` names."""
    case, output = inputs.case, outputs["output"].flatten(0, 1)
    pairs = inputs.served_pairs().flatten().nonzero()
    tokens = pairs // case.top_k
    adapters, experts = inputs.token_adapters[tokens].long(), inputs.topk_ids.flatten()[pairs]
    ks, rs, ns = torch.arange(case.hidden), torch.arange(case.rank), torch.arange(case.columns)
    x = read(inputs.x, pairs if case.mul_routed_weight else tokens, ks, wraps=wraps == "input")
    for s in range(case.slices):
        where = (adapters[..., None], experts[..., None])
        a = read(inputs.lora_a[s], *where, rs[:, None], ks, wraps=wraps == "lora_a")
        b = read(inputs.lora_b[s], *where, ns[:, None], rs, wraps=wraps == "lora_b")
        delta = torch.einsum("pk,prk,pnr->pn", x, a, b)
        if case.mul_routed_weight:
            delta *= inputs.topk_weights.flatten()[pairs]
        columns = case.column_offset + s * case.columns + ns
        places = offsets(output, pairs, columns, wraps=wraps == "output")
        old = flat(output)[places].double() if case.add_inputs else 0.0
        flat(output)[places] = (old + delta).to(output.dtype)


def lora_shrink_expand(inputs, outputs, wraps=None):
    """Right, but for the offsets into the tensor that `wraps` names."""
    case, output = inputs.case, outputs["output"]
    tokens = (inputs.token_adapters != BASE).nonzero()
    adapters = inputs.token_adapters[tokens][..., None]
    start = case.column_offset
    if case.op == "shrink":
        output.zero_()
    for s, width in enumerate(case.widths):
        weight = inputs.weights[s].squeeze(1) if case.weights_4d else inputs.weights[s]
        outer, inner = torch.arange(weight.shape[1]), torch.arange(weight.shape[2])
        rows = (tokens,) if case.op == "shrink" else (torch.tensor(s), tokens)
        x = read(inputs.x, *rows, inner, wraps=wraps == "input")
        weight = read(weight, adapters, outer[:, None], inner, wraps=wraps == "weights")
        product = torch.einsum("mk,mnk->mn", x, weight)
        if case.op == "shrink":
            output[s, tokens[:, 0]] = (case.scale * product).float()
            continue
        written = output[:, start : start + width]
        old = written[tokens[:, 0]].double() if case.add_inputs else 0.0
        written[tokens[:, 0]] = (old + product).to(output.dtype)
        start += width


KERNELS = {"fused_moe_lora": fused_moe_lora, "lora_shrink_expand": lora_shrink_expand}


def verdicts(name, wraps, count=50):
    target = get_target(name)
    kernel = Kernel(partial(KERNELS[name], wraps=wraps), "plain torch")
    cases = draw(target.huge_cases(beyond=BEYOND), 7, count)
    return [judge_alone(target, kernel, case, Conditions(CPU)) for case in cases]


@pytest.fixture(params=["copies", "digests"])
def watched_by(request, monkeypatch):
    """Large storages are watched as they are at the true size, or not."""
    if request.param == "digests":
        monkeypatch.setattr(buffers.buffers, "CHUNK_BYTES", BEYOND)
        monkeypatch.setattr(buffers.buffers, "DIGEST_BYTES", BEYOND)


@pytest.mark.usefixtures("watched_by")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_counts_far_enough_passes(name):
    found = verdicts(name, None)
    assert [verdict.failures for verdict in found if verdict.failures or verdict.rejected] == []
    assert 0 < max(verdict.ratio for verdict in found) <= 1


@pytest.mark.usefixtures("watched_by")
@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("fused_moe_lora", "lora_a", "wrong_value"),
        ("fused_moe_lora", "lora_b", "wrong_value"),
        ("fused_moe_lora", "input", "wrong_value"),
        ("fused_moe_lora", "output", "out_of_bounds"),
        ("lora_shrink_expand", "weights", "wrong_value"),
        ("lora_shrink_expand", "input", "wrong_value"),
    ],
)
def test_offsets_that_wrap_are_found(name, tensor, kind):
    kinds = [failure.kind for verdict in verdicts(name, tensor) for failure in verdict.failures]
    assert kinds.count(kind) >= 3


def jobs(target, kernel):
    return named_jobs([target], [kernel], CPU)


FUSED, BGMV = jobs("fused_moe_lora", "some:kernel"), jobs("bgmv", "example")


def test_the_regime_is_granted_where_memory_suffices(monkeypatch):
    monkeypatch.setattr(regimes, "free_memory", lambda device: huge.MOST_BYTES)
    assert require_regime("huge", FUSED) == "huge"
    assert require_regime("huge", [*BGMV, *FUSED]) == "huge"


def test_a_device_with_too_little_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(regimes, "free_memory", lambda device: 4_000_000_000)
    with pytest.raises(KernelfuzzError) as error:
        require_regime("huge", FUSED)
    assert str(error.value) == (
        "--regime huge: fused_moe_lora needs 10 GB free on cpu, which has 4.0 GB: "
        "free some there or name another --device"
    )


def test_targets_without_huge_cases_are_refused():
    with pytest.raises(KernelfuzzError, match="--regime huge is for fused_moe_lora and lora_shrink_expand: name one"):
        require_regime("huge", BGMV)


def test_jobs_without_huge_cases_are_left_out_beside_others():
    kept, skipped = in_regime("huge", [*BGMV, *FUSED])
    assert kept == FUSED
    assert [(each.target, str(each.kernel), each.reason) for each in skipped] == [
        ("bgmv", "example", "the target has no huge cases")
    ]
    assert in_regime(None, [*BGMV, *FUSED]) == ([*BGMV, *FUSED], [])
    assert in_regime("robustness", [*BGMV, *FUSED]) == ([*BGMV, *FUSED], [])


def test_the_free_memory_of_this_machine_is_part_of_what_it_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(CPU) <= total
