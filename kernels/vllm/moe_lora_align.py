"""vLLM's compiled CUDA `moe_lora_align_block_size`."""

from pathlib import Path

import torch

from kernelfuzz.kernels.base import Kernel
from kernelfuzz.kernels.vllm import binary, package
from kernelfuzz.kernels.xpu.moe_lora_align import launch
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.moe_lora_align import Case, make_inputs
from kernelfuzz.strategies.routing import Routing

_SMALLEST = Case(
    seed=0,
    batch=Batch((Segment(adapter=0, length=1),)),
    num_adapters=1,
    disabled=(),
    descending_ids=False,
    num_experts=1,
    top_k=1,
    routing=Routing(),
    expert_map="none",
    block_size=1,
    rounded_capacity=True,
    ids_dtype="int32",
)


def load(root: Path | None, device: torch.device) -> Kernel:
    """Return the operator of the vLLM under `root`, or of the installed one where it is None.

    Raises KernelfuzzError if its library is not there, or was built for another torch, CUDA, driver or GPU.
    """
    library = binary.load_operator(root, "_moe_C", "moe_lora_align_block_size")
    binary.probe(library, device, lambda: _smallest_call(device))
    return Kernel(launch, package.version(root))


def _smallest_call(device: torch.device) -> None:
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")  # one element each
    outputs = {name: torch.empty(1, dtype=torch.int32, device=device) for name in names}
    launch(make_inputs(_SMALLEST, device), outputs)
