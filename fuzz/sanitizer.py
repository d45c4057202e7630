"""NVIDIA's compute-sanitizer: the command line that watches a worker, and what the tool reports as failures.

Sections named here are those of NVIDIA's Compute Sanitizer manual.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernelfuzz.fuzz.verdict import Failure, FailureKind
from kernelfuzz.strategies.errors import KernelfuzzError

Tool = Literal["memcheck", "racecheck", "initcheck"]
"""What to look for: accesses out of bounds or misaligned, races in shared memory, reads of uninitialised memory."""

DEFAULT_CUDA = Path("/usr/local/cuda")
UNKNOWN_KERNEL = "unknown_kernel"

_NAME = "compute-sanitizer"
_PREFIX = "========="


@dataclass(frozen=True)
class Report:
    """One report about a kernel.

    - kind: the failure that it stands for
    - kernel: name of the __global__ function without return type, template arguments and parameters, so that it is the
      same in every release; UNKNOWN_KERNEL if the tool does not say
    - function: the same as the tool printed it
    - access: read, write or atomic, with misaligned_ before it if that is what is wrong; shared_memory for a race
    - address: of the access, in bytes; None if the tool does not say
    - detail: what is wrong in the tool's words, one line
    - where: thread, block and source line, as far as the tool says
    """

    kind: FailureKind
    kernel: str
    function: str
    access: str
    address: int | None
    detail: str
    where: str


def find() -> Path:
    """Return the tool's path. Raises KernelfuzzError if it is not installed."""
    on_path = shutil.which(_NAME)
    if on_path is not None:
        return Path(on_path)
    toolkits = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    for toolkit in [*toolkits, DEFAULT_CUDA]:
        for folder in ("bin", _NAME):
            path = toolkit / folder / _NAME
            if path.is_file() and os.access(path, os.X_OK):
                return path
    raise KernelfuzzError(
        f"{_NAME} is not installed: it is part of NVIDIA's CUDA toolkit; put its bin folder on PATH or set CUDA_HOME"
    )


def command(tool: Tool, log: Path) -> list[str]:
    """Return what goes before a worker's command line, so that the tool watches it and writes its reports to `log`.

    Every option is listed in "Command Line Options" and known to the tool of CUDA 13.0 (2025.3). Raises
    KernelfuzzError if the tool is not installed.
    """
    options = {
        "tool": tool,
        "log-file": str(log).replace("%", "%%"),  # "Escape Sequences"
        "target-processes": "all",
        # "Error Actions": the kernel ends, the context lives on, so one worker reports many cases.
        "destroy-on-device-error": "kernel",
        "print-limit": "0",  # unlimited
        # "Stack Backtraces": a host backtrace of Python and torch costs more than the rest of a report.
        "show-backtrace": "device",
        "launch-timeout": "0",  # none: a worker may wait long before it first uses the device
        "require-cuda-init": "no",  # a worker that never did still ends with its own exit status
    }
    if tool == "memcheck":
        options["report-api-errors"] = "no"  # torch probes with calls that fail
        # "Padding": the driver lays allocations side by side, and a step into the neighbour would look legal.
        options["padding"] = "4096"
    elif tool == "racecheck":
        options["racecheck-report"] = "analysis"  # one report for each place, not for each byte
    else:
        options["check-api-memory-access"] = "no"  # a copy of padding bytes is not the kernel's doing
    return [str(find()), *(word for name, value in options.items() for word in (f"--{name}", value))]


def environment() -> dict[str, str]:
    """Return what a watched worker needs in its environment.

    Without torch's caching allocator each tensor's storage is an allocation of its own, so that its bounds are the
    ones that are checked.
    """
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def parse(text: str) -> list[Report]:
    """Return the reports in a log, as the tool wrote them from 2021 to 2025. What it does not know it passes over.

    A report is complete when the next line of the tool that does not belong to it is. One that was cut off is left out.
    """
    return _reports(_whole_lines(text), {})


class Log:
    """The log of one run of the tool, read while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._open: dict[str, list[str]] = {}

    def new_reports(self) -> list[Report]:
        """Return the reports that were completed since the last call; none if there is no log yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                unread = file.read()
        except FileNotFoundError:
            return []
        whole = unread[: unread.rfind(b"\n") + 1]
        self._offset += len(whole)
        return _reports(whole.decode(errors="replace").split("\n"), self._open)


def failures(reports: Iterable[Report]) -> list[Failure]:
    """Return one failure for each kind and clause, with the first report's evidence and how many there were.

    Reports in kernels of torch and of the libraries behind it are left out. They run in the same process for the
    inputs, the oracle and the comparison, some of them are known to race, and a release of the kernel under test does
    not ship them, even where its host code calls them.
    """
    groups: dict[tuple[FailureKind, str], list[Report]] = {}
    for report in reports:
        if not _is_torchs(report):
            groups.setdefault((report.kind, f"{report.access}_in_{report.kernel}"), []).append(report)
    found = []
    for (kind, clause), group in groups.items():
        first = group[0]
        places = ", ".join(filter(None, [f"in {first.kernel}", first.where]))
        found.append(Failure(kind, "", clause, f"{first.detail}; {places}; {len(group)} report(s)"))
    return found


def unusable(text: str) -> str | None:
    """Return the line in which the tool says that it could not check, or None.

    A process that ended before it used the device makes the tool say so too.
    """
    for line in _whole_lines(text):
        _, prefix, said = line.partition(_PREFIX)
        if prefix and _UNUSABLE.match(said.strip()):
            return f"{_NAME}: {said.strip()}"
    return None


# Errors of the tool itself. Races, and how the program ended, begin with "Error:" too.
_UNUSABLE = re.compile(
    r"Error: (?!Race reported|Potential|\(|process didn't|couldn't find exit code|Target application returned)"
    r"|Internal Sanitizer Error|Unable to find|Device not supported|No attachable process"
    r"|Target application (?:terminated before|doesn't exist)"
)

_SEVERITY = re.compile(r"(?:error|warn(?:ing)?|info): *", re.IGNORECASE)
_ACCESS = re.compile(
    r"(?P<fault>invalid|potential invalid|uninitialized) __\w+__ (?:memory )?(?P<access>[a-z /-]+?)(?: of size .*)?",
    re.IGNORECASE,
)
_ACCESS_KINDS: dict[str, FailureKind] = {
    "invalid": "out_of_bounds",
    "potential invalid": "race",  # "Racecheck cluster entry and exit race detection"
    "uninitialized": "uninitialised_read",
}
_ADDRESS = re.compile(r"(?:Address|Access \w+) (?P<address>0x[0-9a-f]+)", re.IGNORECASE)
# Two modes, "Racecheck Report Modes": analysis reports, and hazards of a single byte.
_RACE = re.compile(r"race reported between (?P<first>\w+ access at .+)", re.IGNORECASE)
_HAZARD = re.compile(
    r"(?:\(.*?\) *)?potential \w+ hazard detected at __shared__ (?P<address>0x[0-9a-f]+)", re.IGNORECASE
)
_RACING = re.compile(
    r"(?:and )?(?P<access>read|write|atomic)\w* (?:access|thread \(.*?\)) at (?P<location>.+?)"
    r"(?: (?P<hazards>\[[\d.,]+ hazards?\]))?",
    re.IGNORECASE,
)

# Since 2023.3 a location is "function+0x90 in file.cu:12", before that "0x90 in file.cu:12:function".
_LOCATION = re.compile(r"(?P<function>.+?)[+:]0x[0-9a-f]+(?: in (?P<place>.+))?", re.IGNORECASE)
_OLD_LOCATION = re.compile(r"0x[0-9a-f]+(?: in (?:(?P<place>.+?:\d+)(?::(?!:)|$))?(?P<function>.*))?", re.IGNORECASE)
_OLD_FRAME = re.compile(r"(?:(?P<place>/.+?:\d+):(?!:))?(?P<function>.+?)(?: \[0x[0-9a-f]+\])?", re.IGNORECASE)

# Parts of a name that a compiler or a library's version makes, not a programmer.
_GENERATED = re.compile(r"_GLOBAL__N_|_INTERNAL_|(?:CUB|THRUST)_\w+_NS$|__v?\d+$")
_QUALIFIERS = re.compile(r"(?:\s+(?:const|volatile))+\s*$")

_TORCH = ("at::", "at_cuda_detail::", "c10::", "torch::")
_IN_TORCH = re.compile(r"\b(?:at|at_cuda_detail|c10|torch)::")
# cuBLAS gives its kernels no namespace, but an architecture, a shape and a layout.
_CUBLAS = re.compile(
    r"\bcublas|\bnvjet_|\b(?:volta|turing|ampere|hopper|sm\d\d+|cutlass_\d\d+)_\w*gemm|\b[sdhcz]gemm_\d+x\d+x\d+_[NT]{2}"
)


def _whole_lines(text: str) -> list[str]:
    return text[: text.rfind("\n") + 1].split("\n")


def _reports(lines: list[str], unfinished: dict[str, list[str]]) -> list[Report]:
    return [report for record in _records(lines, unfinished) if (report := _report(record)) is not None]


def _records(lines: list[str], unfinished: dict[str, list[str]]) -> Iterator[list[str]]:
    """Yield what the tool wrote as lists of lines, each the head line and the indented ones below it.

    Lines of the program itself are passed over. Where something else puts a name before each line, records of several
    processes may interleave; `unfinished` holds those that have begun, by that name.
    """
    for line in lines:
        process, prefix, text = line.partition(_PREFIX)
        if not prefix or text[:1].strip():
            continue
        if text.startswith("  "):
            if process in unfinished:
                unfinished[process].append(text.strip())
            continue
        if process in unfinished:
            yield unfinished.pop(process)
        if text.strip():
            unfinished[process] = [text.strip()]


def _report(record: list[str]) -> Report | None:
    severity = _SEVERITY.match(record[0])
    head = record[0][severity.end() :] if severity else record[0]
    if match := _ACCESS.fullmatch(head):
        return _access_report(_ACCESS_KINDS[match["fault"].lower()], match["access"].lower(), [head, *record[1:]])
    if match := _RACE.fullmatch(head):
        return _race_report(record[0], None, [match["first"], *record[1:]])
    if match := _HAZARD.match(head):
        return _race_report(record[0], int(match["address"], 16), record[1:])
    return None


def _access_report(kind: FailureKind, access: str, lines: list[str]) -> Report:
    """Return the report of one thread's access: the head line, `at`, `by thread`, the address, device frames."""
    function = place = thread = ""
    address = None
    detail = lines[:1]
    for line in lines[1:]:
        if line.startswith("at ") and not function:
            function, place = _location(line.removeprefix("at "))
        elif line.startswith("Device Frame:"):
            # The last frame is the kernel; the others are functions that it calls.
            function = _location(line.removeprefix("Device Frame:").strip())[0] or function
        elif line.startswith("by thread "):
            thread = line.removeprefix("by ")
        elif match := _ADDRESS.match(line):
            address = int(match["address"], 16)
            detail.append(line)
        elif line.startswith("and is "):
            detail.append(line)
    text = ": ".join(filter(None, [detail[0], " ".join(detail[1:])]))
    if kind == "race":
        access = "shared_memory"
    elif "misaligned" in text:
        access = f"misaligned {access}"
    where = ", ".join(filter(None, [thread, place]))
    return Report(kind, _base_name(function), function, re.sub(r"\W+", "_", access), address, text, where)


def _race_report(head: str, address: int | None, lines: list[str]) -> Report:
    """Return the report of accesses that race, one line for each.

    Which accesses the tool names first, and how many reports a missing barrier gives, varies; the kernel does not.
    """
    functions, frames, accesses = [], [], []
    for line in lines:
        if match := _RACING.fullmatch(line):
            function, place = _location(match["location"])
            functions.append(function)
            at = f"{match['access'].lower()} at {place}" if place else match["access"].lower()
            accesses.append(" ".join(filter(None, [at, match["hazards"]])))
        elif line.startswith("Device Frame:"):
            frames.append(_location(line.removeprefix("Device Frame:").strip())[0])
    function = frames[-1] if frames else min(filter(None, functions), default="")
    severity = _SEVERITY.match(head)
    detail = (
        f"{severity.group() if severity else ''}race in shared memory, {' and '.join(accesses) or 'unknown accesses'}"
    )
    return Report("race", _base_name(function), function, "shared_memory", address, detail, "")


def _location(text: str) -> tuple[str, str]:
    """Return the function and the source line of a location, empty where the tool does not say."""
    match = _OLD_LOCATION.fullmatch(text) or _LOCATION.fullmatch(text) or _OLD_FRAME.fullmatch(text)
    return (match["function"] or "", match["place"] or "") if match else (text, "")


def _base_name(function: str) -> str:
    """Return a demangled function's qualified name: void ns::<unnamed>::k<float, (int)4>(int *) is ns::k."""
    depth, plain = 0, ""
    for character in function:
        if character in "<([":
            depth += 1
        elif character in ">)]":
            depth = max(0, depth - 1)
        elif depth == 0:
            plain += character
    words = _QUALIFIERS.sub("", plain).split()
    parts = words[-1].lstrip("*&").split("::") if words else []
    return "::".join(part for part in parts if part and not _GENERATED.match(part)) or UNKNOWN_KERNEL


def _is_torchs(report: Report) -> bool:
    """Whether the kernel belongs to torch, to CUB or Thrust with types of torch, or to cuBLAS."""
    if report.kernel.startswith(_TORCH) or _CUBLAS.search(report.function):
        return True
    return report.kernel.startswith(("cub::", "thrust::")) and _IN_TORCH.search(report.function) is not None
