"""The pictures of the documentation: `python benchmarks/writemaps.py docs/writemaps`.

Each shows what became of the outputs of `moe_lora_align` or `fused_moe_lora` in one launch, in which a planted bug
spoils what the oracle says.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernelfuzz.fuzz import picture
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.base import Kernel

ALIGN, FUSED = get_target("moe_lora_align"), get_target("fused_moe_lora")
Outputs = Mapping[str, torch.Tensor]


def answer(inputs: Any, outputs: Outputs) -> None:
    """Write what the oracle expects."""
    before = {name: output.clone() for name, output in outputs.items()}
    for name, expected in get_target(inputs.case.target).expect(inputs, before).outputs.items():
        written = expected.mask("write")
        outputs[name][written] = expected.values[written].to(outputs[name].dtype)


def unwritten(inputs: Any, outputs: Outputs) -> None:
    """Forget the block's experts."""
    kept = outputs["expert_ids"].clone()
    answer(inputs, outputs)
    outputs["expert_ids"].copy_(kept)


def overwritten(inputs: Any, outputs: Outputs) -> None:
    """Write the second block of every adapter's row."""
    answer(inputs, outputs)
    block = inputs.case.block_size
    outputs["sorted_token_ids"].view(inputs.case.num_adapters, -1)[:, block : 2 * block] = 1


def out_of_bounds(inputs: Any, outputs: Outputs) -> None:
    """Run ahead of the first row and beyond the last."""
    answer(inputs, outputs)
    ids = outputs["sorted_token_ids"]
    ids.as_strided((3,), (1,), ids.storage_offset() - 3).fill_(1)
    ids.as_strided((9,), (1,), ids.storage_offset() + ids.numel()).fill_(1)


def input_mutated(inputs: Any, outputs: Outputs) -> None:
    """Sort the router's choices in place."""
    answer(inputs, outputs)
    inputs.topk_ids.copy_(inputs.topk_ids.sort(0, descending=True).values)


def wrong_value(inputs: Any, outputs: Outputs) -> None:
    """Lose more precision from row to row."""
    before = {name: output.clone() for name, output in outputs.items()}
    written = FUSED.expect(inputs, before).outputs["output"].mask("write")
    answer(inputs, outputs)
    rows = torch.arange(written.shape[0] * written.shape[1]).view(*written.shape[:2], 1)
    outputs["output"][written] *= (1 + 0.0003 * 4.0**rows).expand(written.shape)[written]


def choose(target: Any, suits: Callable[[Any], bool]) -> Any:
    """Return a case that shows something."""
    options = {"refusals": False, "max_experts": 6, "max_length": 6, "max_top_k": 2} if target is ALIGN else {}
    return next(case for case in draw(target.cases(**options), 5, 2000) if suits(case))


def main(folder: Path) -> None:
    """Draw the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    align = choose(ALIGN, lambda case: {0, 1} <= set(case.batch.active()) and case.block_size == 7 and case.pairs > 6)
    fused = choose(
        FUSED,
        lambda case: (
            4 < case.pairs < 40
            and case.output_columns < 120
            and (case.add_inputs or not case.fully_sharded)
            and {-1, 0} <= set(case.batch.active()) - set(case.disabled)
            and case.routing.invalid == "none"
        ),
    )
    for bug in (unwritten, overwritten, out_of_bounds, input_mutated, wrong_value):
        target, case = (FUSED, fused) if bug is wrong_value else (ALIGN, align)
        verdict = judge_alone(target, Kernel(bug, "planted"), case, Conditions(torch.device("cpu")), maps=True)
        failure = verdict.failures[0]
        title = f"{target.name} with a planted bug, {failure.kind}: {failure.message}"
        picture.draw(verdict.maps, title, folder / f"{bug.__name__}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
