"""How well fingerprints tell bugs apart: `make corpus`, or `python benchmarks/corpus.py`.

Every planted bug is looked for by a normal campaign with each of several seeds. A bug should be reported under one
fingerprint, whatever the seed, and a fingerprint should stand for one bug.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from planted_bugs import PLANTS, Plant, plant_bug
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernelfuzz.fuzz import events
from kernelfuzz.fuzz.campaign import Budget, run_campaign
from kernelfuzz.fuzz.job import named_jobs
from kernelfuzz.fuzz.summary import Summary
from kernelfuzz.kernels import releases
from kernelfuzz.strategies.errors import KernelfuzzError

WITHIN_MINUTES = tuple(plant for plant in PLANTS if plant.target not in ("fused_moe_lora", "lora_shrink_expand"))
"""Bugs in host code. The others need Triton's interpreter, which is slow."""


@dataclass
class Corpus:
    """What campaigns with several seeds reported of each bug: for each seed the fingerprints, with their symptoms."""

    reported: dict[str, list[list[str]]] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, set[str]]:
        """The fingerprints of each bug, of all seeds together."""
        return {bug: set().union(*campaigns) for bug, campaigns in self.reported.items()}

    @property
    def bugs(self) -> dict[str, set[str]]:
        """The bugs of each fingerprint."""
        every = set().union(*self.fingerprints.values())
        return {name: {bug for bug, names in self.fingerprints.items() if name in names} for name in every}

    @property
    def fingerprints_per_bug(self) -> float:
        """The mean over the bugs that were found; 1 is what it should be."""
        return mean(len(names) for names in self.fingerprints.values() if names)

    @property
    def bugs_per_fingerprint(self) -> float:
        """The mean over the fingerprints; 1 is what it should be."""
        return mean(map(len, self.bugs.values()))

    def table(self) -> Table:
        """Return a row for each bug."""
        table = Table("bug", "found", "fingerprints", "most in one campaign", "reported as", box=None, pad_edge=False)
        for bug, campaigns in self.reported.items():
            names = sorted(self.fingerprints[bug], key=lambda name: -sum(name in each for each in campaigns))
            shown = [f"{sum(name in each for each in campaigns)}× {name.partition('.vllm.')[2]}" for name in names]
            found = f"{sum(map(bool, campaigns))}/{len(campaigns)}"
            table.add_row(bug, found, str(len(names)), str(max(map(len, campaigns))), "\n".join(shown))
        return table


def measure(
    plants: Sequence[Plant], seeds: Sequence[int], examples: int, progress: Callable[[str], None] = lambda _: None
) -> Corpus:
    """Run a campaign of so many examples for every bug and seed. Raises KernelfuzzError without the newest vLLM."""
    release = releases.locate("vllm", releases.PINNED["vllm"])
    corpus = Corpus()
    for plant in plants:
        corpus.reported[plant.name] = []
        with tempfile.TemporaryDirectory(prefix="kernelfuzz-corpus-") as folder:
            tree = plant_bug(plant, release, Path(folder))
            for seed in seeds:
                summary = Summary()
                job = named_jobs([plant.target], [f"vllm@{tree}"], None)[0]
                out = Path(folder) / str(seed)
                run_campaign([job], [], Budget(examples=examples), seed, out, events.Bus([summary]))
                if summary.interrupted:
                    raise KeyboardInterrupt
                corpus.reported[plant.name].append(list(summary.entry(job).failures))
                progress(f"{plant.name}, seed {seed}")
    return corpus


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="campaigns for each bug (default 20)")
    parser.add_argument("--examples", type=int, default=200, help="examples of a campaign (default 200)")
    parser.add_argument("--triton", action="store_true", help="also the bugs in Triton kernels, interpreted: hours")
    arguments = parser.parse_args()
    plants = PLANTS if arguments.triton else WITHIN_MINUTES
    console = Console(width=140)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(plants) * arguments.seeds)
        corpus = measure(
            plants,
            range(arguments.seeds),
            arguments.examples,
            lambda what: bar.update(task, description=what, advance=1),
        )
    console.print(corpus.table())
    console.print(
        f"{len(plants)} bugs, {arguments.seeds} seeds: {corpus.fingerprints_per_bug:.2f} fingerprints per bug, "
        f"{corpus.bugs_per_fingerprint:.2f} bugs per fingerprint"
    )
    for name, bugs in sorted(corpus.bugs.items()):
        if len(bugs) > 1:
            console.print(f"  {name}: {', '.join(sorted(bugs))}")


if __name__ == "__main__":
    try:
        main()
    except KernelfuzzError as error:
        raise SystemExit(f"error: {error}") from None
