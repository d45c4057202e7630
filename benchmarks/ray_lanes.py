"""What further nodes of a Ray cluster bring: a night of one kernel on 1, 2 and 4 of them, and the cases for each
second.

The nodes are processes of this machine, with one CPU each, and the kernel sleeps for most of its time, so that it is
the cluster that is measured and not the cores. Counted is what was run between START_SECONDS and the end of a night,
when all lanes have loaded their kernel.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from kernelfuzz.fuzz.store import queries

NODES = (1, 2, 4)
SLEEP_SECONDS = 0.2
START_SECONDS = 30.0
MEMORY = 80_000_000
"""Of a node's object store, in bytes, which is hardly used."""

COMMAND = "from kernelfuzz.fuzz.cli import main; main()"
CONFIG = 'targets = ["bgmv"]\nkernels = ["sleeping_kernel:run"]\nregressions = false\n'
KERNEL = f"""
import time

import torch


def run(inputs, outputs):
    case, output = inputs.case, outputs["output"]
    time.sleep({SLEEP_SECONDS})
    if case.refusal is not None:
        raise RuntimeError(case.refusal)
    tokens = (inputs.indices >= 0).nonzero().flatten()
    weights = inputs.weights.flatten(0, -3)[inputs.indices[tokens], : case.written_size].float()
    product = case.scale * torch.einsum("tnk,tk->tn", weights, inputs.x[tokens].float())
    columns = slice(case.slice_offset, case.slice_offset + case.written_size)
    output[tokens, columns] = (product + output[tokens, columns] * case.accumulate).to(output.dtype)
"""


def night(nodes: int, seconds: float) -> float:
    """Run a night on a cluster of so many nodes; return the cases per second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sleeping_kernel.py").write_text(KERNEL)
        (folder / "kernelfuzz.toml").write_text(CONFIG)
        os.environ["PYTHONPATH"] = str(folder)  # which the nodes and all that runs there inherit
        os.environ["KERNELFUZZ_HOME"] = str(folder / "home")
        head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
            done = subprocess.run(
                [
                    *(sys.executable, "-c", COMMAND, "nightly", "--seed", "0", "--json", "--ray", cluster.address),
                    *("--time", f"{seconds:.0f}s", "--store", str(folder / "store")),
                ],
                cwd=folder,
                capture_output=True,
                text=True,
            )
        finally:
            cluster.shutdown()
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        connection = queries.connect(folder / "store")
        (job,) = queries.statistics(connection, 1)
        connection.close()
    points = [(at, cases) for at, cases, _, _ in job.document["growth"]]
    first = next(point for point in points if point[0] >= START_SECONDS)
    return float((points[-1][1] - first[1]) / (points[-1][0] - first[0]))


def main() -> None:
    """Run the nights and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75.0, help=f"of each night, above {START_SECONDS:.0f}")
    options = parser.parse_args()
    if options.seconds < START_SECONDS + 5:
        raise SystemExit(f"error: --seconds {options.seconds:.0f}: expected {START_SECONDS + 5:.0f} at least")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("nodes", "cases per s", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    rates: list[float] = []
    for nodes in NODES:
        rates.append(night(nodes, options.seconds))
        table.add_row(str(nodes), f"{rates[-1]:.2f}", f"{rates[-1] / rates[0]:.2f}")
    Console().print(
        f"a kernel that sleeps for {SLEEP_SECONDS} s, on local nodes of one CPU each, {os.cpu_count()} cores"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
