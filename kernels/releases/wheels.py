"""Gets a wheel with the user's own pip, whatever this machine's Python and platform, and unpacks what targets need."""

import importlib.util
import os
import platform
import re
import stat
import subprocess
import sys
import threading
import zipfile
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from shutil import copyfileobj

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from kernelfuzz.strategies.errors import KernelfuzzError

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(stage, done_bytes, total_bytes)``; the total is None while it is not known."""

_POLL_SECONDS = 0.1
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6}
OFFLINE = re.compile(r"Retrying \(|ConnectionError|Max retries exceeded|name resolution|timed out", re.IGNORECASE)
"""What pip prints when it reaches no package index."""


def download(package: str, version: str, folder: Path, progress: Progress) -> Path:
    """Let pip put the wheel of one release into `folder` (empty, and nobody else's); returns the wheel's path.

    Raises `KernelfuzzError` with pip's reason when there is none, and OSError (ENOSPC) when the disk is full.
    """
    command = pip_command("download", f"{package}=={version}", "--dest", str(folder), "--no-deps", "--progress-bar=off")
    temporary = folder / "pip"
    temporary.mkdir()
    lines: list[str] = []
    with _running(command, temporary) as pip:
        assert pip.stdout is not None
        reader = threading.Thread(target=_collect, args=(pip.stdout, lines), daemon=True)
        reader.start()
        done = 0
        while reader.is_alive():
            reader.join(_POLL_SECONDS)
            done = max(done, bytes_below(temporary))  # in the end pip moves the wheel and empties its folder
            progress("downloading", done, _announced_size(lines))
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        raise _failure(package, version, lines)
    return wheel


def pip_command(*arguments: str) -> list[str]:
    """Return the command that runs pip with these arguments, looking for released wheels whatever this machine's Python
    and platform. Raises `KernelfuzzError` where there is no pip."""
    if importlib.util.find_spec("pip") is None:
        raise KernelfuzzError(
            f"fetching a release needs pip, which {sys.executable} lacks: run '{sys.executable} -m ensurepip'"
        )
    command = [sys.executable, "-m", "pip", *arguments, "--only-binary=:all:", "--ignore-requires-python"]
    # pip's own cache would keep the whole wheel, of which a release needs a fraction.
    command += ["--no-cache-dir", "--no-input", "--no-color", "--disable-pip-version-check"]
    command += ["--implementation=cp", "--python-version=3.12"]
    return command + [f"--platform={tag}" for tag in _platform_tags()]


def _platform_tags() -> list[str]:
    """Every Linux tag a released wheel may carry, best first: pip matches them literally, 2_28 is not part of 2_31."""
    machines = ["aarch64", "x86_64"] if platform.machine() in ("aarch64", "arm64") else ["x86_64"]
    tags = [f"manylinux_2_{minor}" for minor in range(50, 4, -1)]
    tags += ["manylinux2014", "manylinux2010", "manylinux1", "linux"]
    return [f"{tag}_{machine}" for machine in machines for tag in tags]


@contextmanager
def _running(command: list[str], temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """Run pip with its temporary files in `temporary`: progress is measured there, and they go when the fetch goes."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        try:
            yield pip
        except BaseException:
            pip.kill()
            raise


def _collect(stream: Iterator[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.strip())


def bytes_below(folder: Path) -> int:
    """The size of the files in `folder` and below, while others may move and delete them."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _announced_size(lines: list[str]) -> int | None:
    """The wheel's size as pip announces it, rounded by pip to a tenth of a megabyte; every pip version prints this."""
    for line in lines:
        if match := re.search(r"\.whl \(([\d.]+) (bytes|kB|MB)\)", line):
            return int(float(match[1]) * _UNITS[match[2]])
    return None


def _failure(package: str, version: str, lines: list[str]) -> KernelfuzzError | OSError:
    """What went wrong, from what pip printed."""
    text = "\n".join(lines)
    wanted = f"{package}=={version}"
    if match := re.search(r"\[Errno (28|122)\]", text):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    if match := re.search(r"from versions: ([^)\n]*)\)", text):
        if nearest := _nearest(version, match[1].split(",")):
            return KernelfuzzError(f"there is no {wanted} for this pip to get; the nearest are {', '.join(nearest)}")
        if OFFLINE.search(text):
            return KernelfuzzError(f"cannot fetch {wanted}: pip reaches no package index; check the network")
        return KernelfuzzError(
            f"cannot fetch {wanted}: pip finds no release of {package}; check the network and 'pip config list'"
        )
    if re.search(r"has an invalid wheel|is invalid|BadZipFile|do not match the hashes", text, re.IGNORECASE):
        return KernelfuzzError(f"the wheel that pip got for {wanted} is corrupt: fetch it again")
    if OFFLINE.search(text):
        return KernelfuzzError(f"cannot fetch {wanted}: the connection to the package index failed; try again")
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it printed nothing"]
    return KernelfuzzError(f"cannot fetch {wanted}, pip says: {errors[-1].removeprefix('ERROR:').strip()}")


def _nearest(version: str, published: list[str], each_side: int = 2) -> list[str]:
    versions = in_order(published)
    place = bisect(versions, Version(version))
    return [str(near) for near in versions[max(0, place - each_side) : place + each_side]]


def in_order(texts: list[str]) -> list[Version]:
    """Return the versions among what pip listed, the oldest first."""
    versions = []
    for text in texts:
        try:
            versions.append(Version(text.strip()))
        except InvalidVersion:  # "none", and names from before versions were standardised
            continue
    return sorted(versions)


def wheel_version(wheel: Path, package: str) -> str:
    """The version in the wheel's file name; raises `KernelfuzzError` if the wheel is another package's."""
    name, version, _, _ = parse_wheel_filename(wheel.name)
    if name != canonicalize_name(package):
        raise KernelfuzzError(f"pip got {wheel.name} instead of {package}: check 'pip config list'")
    return str(version)


def extract(wheel: Path, patterns: tuple[str, ...], folder: Path, progress: Progress) -> None:
    """Write the members of `wheel` that match `patterns` under `folder`, with their paths.

    In a pattern, ``*`` matches any run of characters, ``/`` too. Raises `KernelfuzzError`, before anything is written,
    if any member of the wheel, matching or not, would land outside `folder` or is a link; or if the wheel is damaged.
    """
    with _damage_reported(wheel):
        archive = zipfile.ZipFile(wheel)
    with archive:
        for member in archive.infolist():
            _refuse_escape(wheel, member)
        chosen = [m for m in archive.infolist() if not m.is_dir() and _wanted(m.filename, patterns)]
        total, done = sum(member.file_size for member in chosen), 0
        for member in chosen:
            progress("extracting", done, total)
            path = folder / member.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with _damage_reported(wheel), archive.open(member) as source, path.open("wb") as sink:
                copyfileobj(source, sink, 1 << 20)
            done += member.file_size
        progress("extracting", done, total)


@contextmanager
def _damage_reported(wheel: Path) -> Iterator[None]:
    try:
        yield
    # RuntimeError is zipfile's for an encrypted member and, as NotImplementedError, for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise KernelfuzzError(f"the wheel {wheel.name} is corrupt ({error}): fetch it again") from error


def _wanted(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_escape(wheel: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise KernelfuzzError(
            f"refused {wheel.name}: its member {name!r} would be written outside the release's folder"
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise KernelfuzzError(f"refused {wheel.name}: its member {name!r} is a symbolic link")
