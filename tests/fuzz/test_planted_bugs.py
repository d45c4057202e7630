"""Bugs planted in a copy of a released Triton file, run by path: each is found and shrunk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.errors import KernelfuzzError

OPS = Path("vllm/lora/ops/triton_ops")


@dataclass(frozen=True)
class Plant:
    """A replacement of `anchor` after `after` in a file of the release, and the failure kinds it may show as."""

    name: str
    after: str
    anchor: str
    replacement: str
    kinds: tuple[str, ...]
    times: int = 1
    file: str = "fused_moe_lora_op.py"
    target: str = "fused_moe_lora"


PLANTS = (
    Plant(
        "dropped_column_mask",
        "def _fused_moe_lora_one_shot_kernel",
        "out_mask = token_mask[:, None] & n_mask[None, :]",
        "out_mask = token_mask[:, None] & (offs_n[None, :] >= 0)",
        ("out_of_bounds", "overwritten", "wrong_value"),
    ),
    Plant(
        "dropped_max_loras_guard",
        "def _fused_moe_lora_one_shot_kernel",
        "    if lora_id >= max_loras:\n        return\n",
        "",
        ("out_of_bounds", "overwritten"),
    ),
    Plant(
        "ignored_adapter_enabled",
        "def _fused_moe_lora_one_shot_kernel",
        "    if enabled == 0:\n        return\n",
        "",
        ("overwritten", "out_of_bounds"),
    ),
    Plant(
        "swapped_expert_index",
        "def _fused_moe_lora_small_batch_kernel",
        "B_base = cur_B_ptr + lora_id * stride_B_lora + expert_id * stride_B_expert",
        "B_base = cur_B_ptr + expert_id * stride_B_lora + lora_id * stride_B_expert",
        ("wrong_value", "out_of_bounds", "unwritten"),
    ),
    Plant(
        "lost_k_tail",
        "k_mask = cur_k < K",
        "mask=k_mask, other=0.0",
        "mask=cur_k < (K // BLOCK_K) * BLOCK_K, other=0.0",
        ("wrong_value", "unwritten"),
    ),
    Plant(
        "missing_routed_weight",
        "def _fused_moe_lora_small_batch_kernel",
        "out_tile = out_tile * moe_w",
        "out_tile = out_tile * 1.0",
        ("wrong_value",),
    ),
    Plant(
        "accumulator_in_the_wrong_dtype",
        "def _fused_moe_lora_one_shot_kernel",
        "tmp += tl.dot(x, a)",
        "tmp = (tmp + tl.dot(x, a)).to(out_ptr.dtype.element_ty).to(tl.float32)",
        ("wrong_value",),
        times=2,
    ),
    Plant(
        "lost_last_slice_offset",
        "def _lora_expand_kernel",
        "curr_N = N if SAME_STRIDE else tl.load(output_hs_ptr + slice_id)",
        "curr_N = N",
        ("out_of_bounds", "wrong_value", "overwritten"),
        file="lora_expand_op.py",
        target="lora_shrink_expand",
    ),
)


class StopAtFirstShrunk:
    """Ends the campaign as Ctrl-C does, once a failure has been shrunk."""

    def __init__(self) -> None:
        self.found: events.FailureFound | None = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.FailureFound) and event.shrunk:
            self.found = event
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def release() -> Path:
    """The files of the newest pinned vLLM."""
    try:
        return releases.locate("vllm", releases.PINNED["vllm"])
    except KernelfuzzError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug_is_found_and_shrunk(plant: Plant, release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "release")
    file = tmp_path / "release" / OPS / plant.file
    head, after, tail = file.read_text().partition(plant.after)
    assert plant.anchor in tail
    file.write_text(head + after + tail.replace(plant.anchor, plant.replacement, plant.times))

    jobs = named_jobs([plant.target], [f"vllm@{tmp_path / 'release'}"], None)
    stop = StopAtFirstShrunk()
    run_campaign(jobs, [], Budget(examples=2000), 7, tmp_path, events.Bus([stop]))

    assert stop.found is not None, "not found in 2,000 examples"
    print(stop.found.examples, stop.found.failure.kind, stop.found.case)
    assert stop.found.failure.kind in plant.kinds
    assert stop.found.case.batch.num_tokens <= 4
