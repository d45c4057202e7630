"""Everything that a machine with an NVIDIA GPU is needed for: `python benchmarks/on_gpu.py FOLDER [--only PATTERN,…]`.

Each step is a command. What it prints, its summary and its failures go to FOLDER/STEP; one table at the end says what
came out. Needs no installation, only the packages that kernelfuzz needs and releases in $KERNELFUZZ_HOME.
Exit status: 1 if a step could not be run.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from kernelfuzz.fuzz.files import read_case  # noqa: E402

ALIGN, FUSED, SHRINK_EXPAND = "moe_lora_align", "fused_moe_lora", "lora_shrink_expand"
PERMUTE = "moe_permute"
NEWEST = "vllm@0.33.0"
PATHS = ("small_batch", "one_shot", "two_kernel", "shrink", "expand")
"""Regimes that say which of its kernels a package chooses."""

GRACE_SECONDS = 60.0
"""How long a command that was interrupted may take to write its summary."""


@dataclass(frozen=True)
class Campaign:
    """`kernelfuzz run` on one kernel."""

    name: str
    targets: tuple[str, ...]
    kernel: str
    budget: tuple[str, str]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """A script in this folder."""

    name: str
    file: str
    arguments: tuple[str, ...]


STEPS = (
    Campaign("align-bad", (ALIGN,), "vllm@0.21.0", ("--time", "60s")),
    Campaign("align-fixed", (ALIGN,), "vllm@0.22.0", ("--time", "60s")),
    # 100,000 and 20,000 cases at 32 and 8 seeds an example, and some more: what is drawn again is not run again.
    Campaign("align-newest", (ALIGN,), NEWEST, ("--examples", "3400")),
    Campaign("fused", (FUSED,), NEWEST, ("--examples", "2700")),
    Campaign("shrink-expand", (SHRINK_EXPAND,), NEWEST, ("--examples", "2700")),
    Campaign("permute", (PERMUTE,), NEWEST, ("--time", "60s")),
    Script("crash", "crash_campaign.py", ("--examples", "1000")),
    Script("bench", "speed.py", ("--target", ALIGN, "--target", FUSED, "--target", SHRINK_EXPAND, "--kernel", NEWEST)),
    # The newest release of one target, cold, for five minutes.
    Script("bench-5min", "speed.py", ("--target", FUSED, "--seconds", "300", "--naive-seconds", "20", "--cold-only")),
    Campaign("huge", (FUSED, SHRINK_EXPAND), NEWEST, ("--examples", "20"), ("--regime", "huge")),
    Campaign("robustness", (ALIGN, FUSED, SHRINK_EXPAND), NEWEST, ("--time", "90s"), ("--regime", "robustness")),
    Campaign("memcheck-bad", (ALIGN,), "vllm@0.21.0", ("--examples", "20"), ("--sanitizer", "memcheck")),
    Campaign("memcheck", (ALIGN,), NEWEST, ("--examples", "20"), ("--sanitizer", "memcheck")),
    Campaign("racecheck", (ALIGN,), NEWEST, ("--examples", "10"), ("--sanitizer", "racecheck")),
    Campaign("initcheck", (ALIGN,), NEWEST, ("--examples", "10"), ("--sanitizer", "initcheck")),
)


def command(step: Campaign | Script, out: Path, device: str, kernel: str | None, examples: str | None) -> list[str]:
    """Return the step's command line; `kernel` and `examples` take the place of a campaign's own."""
    if isinstance(step, Script):
        script = str(ROOT / "benchmarks" / step.file)
        return [sys.executable, script, *step.arguments, "--device", device, "--json", str(out / "numbers.json")]
    entry = [sys.executable, "-c", "from kernelfuzz.fuzz.cli import main; main()", "run"]
    budget = step.budget if examples is None else ("--examples", examples)
    where = ["--kernel", kernel or step.kernel, "--device", device, "--out", str(out), "--seed", "0"]
    return [*entry, *step.targets, *where, *budget, *step.arguments]


def run(line: list[str], folder: Path, limit: float) -> tuple[int, float]:
    """Run a command line, interrupted like with Ctrl-C after `limit` seconds; return its exit status and wall seconds.

    What it prints goes to output.txt and errors.txt in `folder`.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with (folder / "output.txt").open("w") as output, (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=errors)
        for seconds, number in ((limit, signal.SIGINT), (GRACE_SECONDS, signal.SIGKILL)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
            process.send_signal(number)
        status = process.wait()
    return status, time.monotonic() - started


def last_words(folder: Path) -> str:
    """Return the last line with a word in it that a command printed, without the box that may be around it."""
    text = "".join((folder / name).read_text() for name in ("output.txt", "errors.txt"))
    lines = [line.strip("│ ") for line in text.splitlines() if any(map(str.isalnum, line))]
    return lines[-1] if lines else "it said nothing"


def script_lines(folder: Path, status: int) -> tuple[list[str], bool]:
    """Return what a script printed, which is its own table, and whether it could be run."""
    lines = [f"  {line.rstrip()}" for line in (folder / "output.txt").read_text().splitlines()]
    return lines + ([f"  failed: {last_words(folder)}"] if status else []), status == 0


def campaign_lines(folder: Path) -> tuple[list[str], bool]:
    """Return a campaign's lines of the table, some for each target, and whether it could be run."""
    path = folder / "summary.json"
    if not path.exists():
        return [f"  did not run: {last_words(folder)}"], False
    summary = json.loads(path.read_text())
    lines = ["  stopped before its budget was spent"] if summary["interrupted"] else []
    for result in summary["results"]:
        rate = result["cases"] / result["seconds"] if result["seconds"] else 0.0
        ratios = [f"{result['worst_ratios'][name]:.3f} {name}" for name in PATHS if name in result["worst_ratios"]]
        counts = f"{result['examples']:>10,}{result['cases']:>10,}{rate:>10,.1f}"
        lines.append(f"  {result['target'] + ' ' + result['kernel']:<34}{counts}  {', '.join(ratios)}")
        if result["workers_replaced"]:
            waits = result["waits_for_workers"]
            lines.append(f"    {result['workers_replaced']:,} workers replaced, {waits:,} times without a spare")
        lines += [f"    error: {error}" for error in (result["error"], *result["errors"]) if error]
        lines += [f"    {failure_line(folder / 'failures' / name, hits)}" for name, hits in result["hits"].items()]
    return lines, not any(result["error"] or result["errors"] for result in summary["results"])


def failure_line(folder: Path, hits: int) -> str:
    """Return a line on a failure: its fingerprint, in how many examples it was seen, and the size of its case."""
    case = read_case(folder / "case.json")
    shrunk = "shrunk to" if json.loads((folder / "failure.json").read_text())["shrunk"] else "not shrunk:"
    adapters = getattr(case, "num_adapters", None)
    return f"{folder.name}: {hits:,} hits, {shrunk} {case.size} token(s), {adapters} adapter(s)"


def main() -> None:
    """Run the chosen steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for what the steps leave")
    parser.add_argument("--only", default="*", help="steps, or patterns of them, with commas: align-*,crash")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=540.0, help="most seconds for each step (540)")
    parser.add_argument("--kernel", help="for each step in place of its own, to try this script")
    parser.add_argument("--examples", help="likewise, in place of its own budget")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = parser.parse_args()
    patterns = options.only.split(",")
    steps = [step for step in STEPS if any(fnmatch(step.name, pattern) for pattern in patterns)]
    if not steps:
        parser.error(f"--only {options.only}: expected some of {', '.join(step.name for step in STEPS)}")

    lines = {
        step: command(step, options.folder / step.name, options.device, options.kernel, options.examples)
        for step in steps
    }
    if options.dry_run:
        print(*map(shlex.join, lines.values()), sep="\n")
        return
    for step in steps:
        try:
            (options.folder / step.name).mkdir(parents=True)
        except OSError as error:
            parser.error(f"{options.folder / step.name}: {error.strerror}; name a new folder")

    table, complete = [f"{'step':<36}{'examples':>10}{'cases':>10}{'cases/s':>10}  worst err/bound"], True
    for step, line in lines.items():
        folder = options.folder / step.name
        print(shlex.join(line), flush=True)
        status, seconds = run(line, folder, options.limit)
        shown, ran = campaign_lines(folder) if isinstance(step, Campaign) else script_lines(folder, status)
        table += [f"{step.name}: {seconds:.0f} s, exit status {status}", *shown]
        complete &= ran
    print("", *table, sep="\n")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
