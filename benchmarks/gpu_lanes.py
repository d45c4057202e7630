"""What further GPUs of one machine bring: a night of one target on 1, 2, … of them, and the cases for each second.

Counted is what was run between START_SECONDS and the end of a night, when all lanes have loaded their kernels. Kernels
that have to be compiled are compiled by a night before these, which is not counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kernelfuzz.fuzz.store import queries

TARGETS = ("moe_lora_align", "moe_permute", "fused_moe_lora")
START_SECONDS = 25.0
COMMAND = "from kernelfuzz.fuzz.cli import main; main()"


def night(target: str, gpus: int, seconds: float) -> float:
    """Run a night of the newest vLLM on the first `gpus` GPUs; return the cases per second."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "kernelfuzz.toml"
        config.write_text(f'targets = ["{target}"]\nkernels = ["vllm"]\ndevices = ["cuda"]\nregressions = false\n')
        done = subprocess.run(
            [
                *(sys.executable, "-c", COMMAND, "nightly", "--seed", "0", "--json"),
                *("--time", f"{seconds:.0f}s", "--store", str(folder / "store"), "--config", str(config)),
            ],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:gpus])},
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stderr)
        with queries.connect(folder / "store") as connection:
            (job,) = queries.statistics(connection, 1)
    points = [(at, cases) for at, cases, _, _ in job.document["growth"]]
    first = next(point for point in points if point[0] >= START_SECONDS)
    return float((points[-1][1] - first[1]) / (points[-1][0] - first[0]))


def main() -> None:
    """Run the nights and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each night (default: 90)")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"error: {gpus} GPU(s) here: this compares several")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("target", no_wrap=True)
    for count in range(1, gpus + 1):
        table.add_column(f"{count} GPU(s)", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    for target in options.targets:
        if target not in ("moe_lora_align", "moe_permute"):
            night(target, gpus, 60.0)
        rates = [night(target, count, options.seconds) for count in range(1, gpus + 1)]
        table.add_row(target, *(f"{rate:,.0f}" for rate in rates), f"{rates[-1] / rates[0]:.2f}")
        print(target, [f"{rate:,.1f} cases/s" for rate in rates], file=sys.stderr, flush=True)
    Console().print(f"cases per second, {torch.cuda.get_device_name()}, vLLM's newest release")
    Console().print(table)


if __name__ == "__main__":
    main()
