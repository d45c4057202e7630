"""Bugs to plant in a copy of a released file: what the tests and the corpus look for."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

OPS = "vllm/lora/ops/triton_ops"
XPU_LORA = "vllm/lora/ops/xpu_ops/lora_ops.py"
LAYERS = "vllm/model_executor/layers"
PERMUTE = f"{LAYERS}/fused_moe/moe_permute_unpermute.py"
CONVERSION = f"{LAYERS}/fused_moe/oracle/fp8.py"
XPU_EXPERTS = f"{LAYERS}/fused_moe/experts/xpu_moe.py"
SWAP = f"{LAYERS}/quantization/utils/flashinfer_utils.py"
ONLINE = f"{LAYERS}/quantization/online/fp8.py"


@dataclass(frozen=True)
class Plant:
    """A replacement of `anchor` after `after` in a file of the release, the failure kinds it may show as, how the
    clause begins, in how many examples it is found, and the largest size to which it is shrunk."""

    name: str
    after: str
    anchor: str
    replacement: str
    kinds: tuple[str, ...]
    times: int = 1
    file: str = f"{OPS}/fused_moe_lora_op.py"
    target: str = "fused_moe_lora"
    clause: str = ""
    examples: int = 2000
    largest: int = 4


def planted_in_host_code(
    target: str, file: str, name: str, after: str, anchor: str, replacement: str, *kinds: str, largest: int = 1
) -> Plant:
    """A bug that takes no Triton to see, and less to be found."""
    return Plant(name, after, anchor, replacement, kinds, file=file, target=target, examples=1000, largest=largest)


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
        file=f"{OPS}/lora_expand_op.py",
        target="lora_shrink_expand",
    ),
    Plant(
        "compute_units_from_torch_cuda",
        "import torch\n",
        "current_platform.num_compute_units(device.index)",
        "torch.cuda.get_device_properties(device).multi_processor_count",
        ("raised",),
        times=2,
        clause="TouchedCudaError_in_",
        examples=100,
    ),
    # Vocabularies are handed on whatever their padding.
    planted_in_host_code(
        "bgmv",
        XPU_LORA,
        "weights_of_any_height_are_handed_on",
        "def _bgmv_expand_impl",
        "if weight_out_dim == output_dim:",
        "if weight_out_dim == output_dim or True:",
        "raised",
    ),
    planted_in_host_code(
        "bgmv",
        XPU_LORA,
        "slice_offset_is_forgotten",
        "def _bgmv_expand_slice_impl",
        "        slice_offset,\n        slice_size,\n",
        "        0,\n        slice_size,\n",
        "overwritten",
        "wrong_value",
    ),
    planted_in_host_code(
        "bgmv",
        XPU_LORA,
        "scale_is_forgotten",
        "def _bgmv_shrink_impl",
        "lora_indices_tensor, scaling\n",
        "lora_indices_tensor, 1.0\n",
        "wrong_value",
    ),
    planted_in_host_code(
        "bgmv",
        XPU_LORA,
        "narrow_weights_are_always_added",
        "def _bgmv_expand_impl",
        "            weight_out_dim,\n            add_inputs,\n",
        "            weight_out_dim,\n            True,\n",
        "wrong_value",
    ),
    planted_in_host_code(
        "moe_permute",
        PERMUTE,
        "scratch_keeps_the_device_as_it_was_told",
        "def __post_init__",
        "        self.device = self.expert_first_token_offset.device\n",
        "",
        "raised",
    ),
    planted_in_host_code(
        "moe_permute",
        PERMUTE,
        "scratch_never_grows",
        "def reserve",
        "if expanded_rows <= self.max_expanded_rows:",
        "if self.max_expanded_rows:",
        "raised",
        largest=2,  # a call that is larger than the one before it
    ),
    planted_in_host_code(
        "moe_permute",
        PERMUTE,
        "given_output_is_ignored",
        "def moe_permute(",
        "    if permuted_hidden_states is None:",
        "    if permuted_hidden_states is None or scratch is not None:",
        "wrong_value",
        "given_output_is_used",
    ),
    planted_in_host_code(
        "moe_permute",
        PERMUTE,
        "stale_expert_ids",
        "def prepare_topk_ids",
        "        topk_ids_int32.copy_(topk_ids)\n",
        "",
        "wrong_value",
        "unwritten",
    ),
    planted_in_host_code(
        "moe_permute",
        PERMUTE,
        "scale_of_the_pair_for_that_of_its_token",
        "def moe_permute(",
        "a1q_scale[permuted_idx.clamp(max=n_token * topk - 1) // topk]",
        "a1q_scale[permuted_idx.clamp(max=n_token * topk - 1)]",
        "raised",
    ),
    planted_in_host_code(
        "fp8_layout",
        XPU_EXPERTS,
        "scales_of_an_xpu_are_not_transposed",
        "def prepare_fp8_moe_layer_for_xpu",
        "w13_scale = w13_scale.transpose(-1, -2).contiguous()",
        "pass",
        "wrong_value",
    ),
    planted_in_host_code(
        "fp8_layout",
        SWAP,
        "halves_are_not_swapped",
        "def swap_w13_to_w31",
        "    return (\n",
        "    return x\n    return (\n",
        "wrong_value",
    ),
    planted_in_host_code(
        "fp8_layout",
        CONVERSION,
        "unknown_backends_are_accepted",
        "def convert_to_fp8_moe_kernel_format",
        'raise ValueError(f"Unsupported FP8 MoE backend: {fp8_backend.value}")',
        "pass",
        "not_raised",
    ),
    planted_in_host_code(
        "fp8_layout",
        ONLINE,
        "weights_are_transposed_because_of_the_platform",
        "class Fp8PerTensorOnlineMoEMethod",
        "        # Shuffle weights to runtime format and setup kernel.\n",
        "        if current_platform.is_xpu():\n"
        "            w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()\n",
        "wrong_value",
    ),
    planted_in_host_code(
        "fp8_layout",
        ONLINE,
        "weights_are_quantised_twice",
        "class Fp8PerTensorOnlineMoEMethod",
        '        if getattr(layer, "_already_called_process_weights_after_loading", False):\n            return\n',
        "",
        "wrong_value",
        "raised",
    ),
)


def plant_bug(plant: Plant, release: Path, folder: Path) -> Path:
    """Make a tree of the release below `folder` that has the bug, and return it. All other files are links."""
    tree = folder / "release"
    shutil.copytree(release, tree, copy_function=os.symlink)
    file = tree / plant.file
    head, after, tail = file.read_text().partition(plant.after)
    if tail.count(plant.anchor) < plant.times:
        raise ValueError(f"{plant.name}: {plant.file} has no {plant.anchor!r} after {plant.after!r}")
    file.unlink()
    file.write_text(head + after + tail.replace(plant.anchor, plant.replacement, plant.times))
    return tree
