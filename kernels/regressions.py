"""The historical bugs that kernelfuzz must find: where each can be run, and what brings it back where no release has
it."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kernelfuzz.strategies.errors import KernelfuzzError


@dataclass(frozen=True)
class Edit:
    """A change to a file of a release: `anchor`, which it must contain exactly once, becomes `replacement`."""

    file: str
    anchor: str
    replacement: str


@dataclass(frozen=True)
class Side:
    """The code that has a bug, or has not: a release, as it is or with edits."""

    version: str
    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return f"{self.version} edited" if self.edits else self.version


@dataclass(frozen=True)
class Symptom:
    """A failure by which a bug is known: its kind, the output concerned or "", and the clause of the contract."""

    kind: str
    output: str
    clause: str


@dataclass(frozen=True)
class Regression:
    """A historical bug of `package`, named by the pull request that mended it.

    - target: whose cases find it; kernel: whose implementation has it, as a user names it before the @
    - bad, good: where it is and where it is not
    - symptoms: what it looks like, each by itself enough
    - devices: the device kinds that can show it, or None for all that the kernel runs on
    """

    pull_request: int
    title: str
    target: str
    kernel: str
    package: str
    bad: Side
    good: Side
    symptoms: tuple[Symptom, ...]
    devices: tuple[str, ...] | None = None


_ALIGN_OUTPUTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")

_COMPUTE_UNITS = "    sm_count = current_platform.num_compute_units(device.index)\n"
_OF_CUDA = "    sm_count = torch.cuda.get_device_properties(device).multi_processor_count\n"
_FUSED = "vllm/lora/ops/triton_ops/fused_moe_lora_op.py"

_SETUP = """\
        self._setup_kernel(
            layer,
            w13,
"""
_TRANSPOSED_ON_XPU = """\
        if current_platform.is_xpu():
            w13, w2 = (weight.transpose(-1, -2).contiguous() for weight in (w13, w2))
"""

REGRESSIONS: tuple[Regression, ...] = (
    Regression(
        39989,
        "bgmv_expand refuses a padded vocabulary",
        target="bgmv",
        kernel="vllm",
        package="vllm",
        bad=Side("0.19.1"),
        good=Side("0.20.0"),
        symptoms=(Symptom("raised", "", "RuntimeError_in_bgmv_expand"),),
    ),
    Regression(
        40109,
        "weights for Triton are transposed on an XPU",
        target="fp8_layout",
        kernel="vllm",
        package="vllm",
        bad=Side(
            "0.20.0",
            (Edit("vllm/model_executor/layers/quantization/fp8.py", _SETUP, _TRANSPOSED_ON_XPU + _SETUP),),
        ),
        good=Side("0.20.0"),
        symptoms=(Symptom("wrong_value", "weights", "kept_layout"),),
    ),
    Regression(
        40131,
        "moe_lora_align leaves the last adapter's row unwritten, touches others'",
        target="moe_lora_align",
        kernel="vllm",
        package="vllm",
        bad=Side("0.21.0"),
        good=Side("0.22.0"),
        symptoms=(
            *(Symptom("unwritten", output, "active_adapter_row") for output in _ALIGN_OUTPUTS),
            *(
                Symptom("overwritten", output, clause)
                for output, clause in product(_ALIGN_OUTPUTS, ("inactive_adapter_row", "disabled_adapter_row"))
            ),
            *(Symptom("out_of_bounds", output, "redzone") for output in _ALIGN_OUTPUTS),
            Symptom("crash", "", "illegal_memory_access"),
        ),
        devices=("cuda",),
    ),
    Regression(
        43646,
        "fused_moe_lora asks torch.cuda on other platforms",
        target="fused_moe_lora",
        kernel="vllm",
        package="vllm",
        bad=Side(
            "0.22.0",
            tuple(
                Edit(_FUSED, _COMPUTE_UNITS + after, _OF_CUDA + after)
                for after in ("    base_programs =", "    n_tiles_per_program =")
            ),
        ),
        good=Side("0.22.0"),
        symptoms=tuple(
            Symptom("raised", "", f"TouchedCudaError_in_{function}")
            for function in ("_run_fused_moe_lora_one_shot", "_run_fused_moe_lora_small_batch")
        ),
        devices=("cpu",),
    ),
    Regression(
        44005,
        "a scratch built for cuda refuses tensors on cuda:0",
        target="moe_permute",
        kernel="vllm",
        package="vllm",
        bad=Side(
            "0.23.0",
            (
                Edit(
                    "vllm/model_executor/layers/fused_moe/moe_permute_unpermute.py",
                    "        self.device = self.token_expert_indices.device\n",
                    "",
                ),
            ),
        ),
        good=Side("0.23.0"),
        symptoms=(Symptom("raised", "", "AssertionError_in_validate"),),
    ),
)
"""Every one of them, by pull request."""


def find(pull_request: str) -> Regression:
    """Return the regression of that pull request. Raises KernelfuzzError naming the ones there are."""
    for regression in REGRESSIONS:
        if str(regression.pull_request) == pull_request.removeprefix("#"):
            return regression
    known = ", ".join(str(regression.pull_request) for regression in REGRESSIONS)
    raise KernelfuzzError(f"no regression {pull_request}: expected one of {known}")


@contextmanager
def edited(root: Path, edits: tuple[Edit, ...]) -> Iterator[Path]:
    """Give a temporary tree like the release at `root` with the edits made; `root` itself without any.

    The tree is links to the release's files but for those that are edited. Raises KernelfuzzError if a file is not
    there or does not contain an anchor exactly once.
    """
    if not edits:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="kernelfuzz-edited-") as folder:
        tree = Path(folder) / root.name
        shutil.copytree(root, tree, copy_function=_link)
        for edit in edits:
            _apply(edit, tree / edit.file, root)
        yield tree


def _link(source: str, place: str) -> str:
    Path(place).symlink_to(source)
    return place


def _apply(edit: Edit, path: Path, root: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelfuzzError(f"cannot edit {edit.file} of {root}: {error.strerror}") from error
    count = text.count(edit.anchor)
    if count != 1:
        first = edit.anchor.strip().partition("\n")[0]
        raise KernelfuzzError(f"cannot edit {edit.file} of {root}: it contains {first!r} {count} times, not once")
    path.unlink()  # a link to the release's own
    path.write_text(text.replace(edit.anchor, edit.replacement), encoding="utf-8")
