"""The folders of fetched releases: what is there, put one in, take one out, find one."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import platformdirs
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from kernelfuzz.kernels.releases.wheels import Progress, bytes_below, download, extract, wheel_version
from kernelfuzz.strategies.errors import KernelfuzzError

PINNED: dict[str, str] = {"vllm": "0.33.0", "vllm-xpu-kernels": "0.1.16.2"}
"""The newest releases, whose contracts the targets state and which a campaign runs unless told otherwise."""

_DIST_INFO = ("*.dist-info/METADATA", "*.dist-info/LICENSE*", "*.dist-info/licenses/*")

_MEMBERS: dict[str, tuple[str, ...]] = {
    "vllm": (
        "vllm/__init__.py",
        "vllm/_version.py",
        "vllm/version.py",
        "vllm/envs.py",
        "vllm/lora/*.py",
        "vllm/model_executor/layers/fused_moe/*.py",
        "vllm/model_executor/layers/quantization/*.py",
        "vllm/model_executor/utils.py",
        "vllm/platforms/*.py",
        "vllm/scalar_type.py",
        "vllm/triton_utils/*.py",
        "vllm/utils/*.py",
        # Up to 0.23 _moe_C.abi3.so, from 0.24 _moe_C_stable_libtorch.abi3.so.
        "vllm/_moe_C*.abi3.so",
        *_DIST_INFO,
    ),
    "vllm-xpu-kernels": (
        "vllm_xpu_kernels/__init__.py",
        "vllm_xpu_kernels/_moe_C.abi3.so",
        "vllm_xpu_kernels/_xpu_C.abi3.so",
        *_DIST_INFO,
    ),
}
"""What is kept of each package's wheel (``*`` matches ``/`` too). A cached release that an older table chose is noticed
by the digest in its manifest and fetched again."""

_SCHEMA = 1
_MANIFEST = "release.json"
_STAGING = ".staging-"


@dataclass(frozen=True)
class Release:
    """One release in the cache: `path` is the importable tree's root (it holds ``vllm/``), `size` its files' bytes."""

    package: str
    version: str
    path: Path
    size: int


def home() -> Path:
    """``$KERNELFUZZ_HOME``, else the platform's cache folder for kernelfuzz; absolute, and perhaps not there yet."""
    chosen = os.environ.get("KERNELFUZZ_HOME")
    return _expanded(chosen) if chosen else platformdirs.user_cache_path("kernelfuzz")


def _expanded(text: str) -> Path:
    """The absolute path that a user means. Raises `KernelfuzzError` for a ~user that is not there."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise KernelfuzzError(f"path {text!r}: there is no such user's home folder") from error


def parse_requirement(text: str) -> tuple[str, str]:
    """``"vllm==0.33.0"`` as (package, version), the package's name normalised.

    Raises `KernelfuzzError` if the text is no ``NAME==VERSION`` or the package is none that kernelfuzz knows.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*==\s*([^\s,;*]+)\s*", text)
    if match is None:
        raise KernelfuzzError(f"{text!r} names no release: write NAME==VERSION, such as vllm=={PINNED['vllm']}")
    return _known(match[1]), _valid(match[2])


def installed_releases() -> list[Release]:
    """Every release in the cache, by package and then version; an empty list if there is no cache yet."""
    found = []
    for folder in _releases().glob("[!.]*/[!.]*"):
        if _read_manifest(folder):
            found.append(Release(folder.parent.name, folder.name, folder, bytes_below(folder)))
    return sorted(found, key=lambda release: (release.package, Version(release.version)))


def fetch(package: str, version: str, progress: Progress | None = None) -> Release:
    """Put a release into the cache, from the wheel that pip gets, and return it; at once if it is there already.

    The release appears whole or not at all, whenever the fetch is stopped and however many run at a time: they take
    turns. Raises `KernelfuzzError` if there is no such release, or it cannot be had, read or stored.
    """
    package, version = _known(package), _valid(version)
    report = progress or _silent
    if (release := _current(package, version)) is not None:
        return release
    with _storage_errors():
        _releases().mkdir(parents=True, exist_ok=True)
        with _turn(report):
            if (release := _current(package, version)) is not None:
                return release
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=_releases()))
            try:
                return _fetch_into(staging, package, version, report)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def remove(package: str, version: str) -> None:
    """Delete a release from the cache; raises `KernelfuzzError`, naming what there is, if it does not hold it."""
    package = _known(package)
    release = _find(package, version)
    if release is None:
        held = ", ".join(f"{r.package}=={r.version}" for r in installed_releases()) or "no release"
        raise KernelfuzzError(f"{package}=={version} is not in the cache, which holds {held}")
    with _storage_errors():
        # Renamed first, so that a deletion which is cut short leaves no half a release; the next fetch sweeps it up.
        doomed = Path(tempfile.mkdtemp(prefix=_STAGING, dir=_releases()))
        release.path.rename(doomed / release.version)
        shutil.rmtree(doomed)


def locate(package: str, version_or_path: str) -> Path:
    """Root of an importable tree (the folder that holds ``vllm/``) for a cached version, or for a path.

    A path (it has a separator, starts with ``.`` or ``~``, or is a folder) is a checkout or an unpacked wheel: a folder
    that holds the package's top folder, or that top folder itself. Raises `KernelfuzzError` if there is no such thing.
    """
    package = _known(package)
    if os.sep in version_or_path or version_or_path.startswith((".", "~")) or Path(version_or_path).is_dir():
        return _locate_path(package, version_or_path)
    release = _find(package, version_or_path)
    if release is None:
        raise KernelfuzzError(
            f"{package} {version_or_path} is not fetched: run 'kernelfuzz releases fetch {package}=={version_or_path}'"
        )
    if not _is_current(release.path, package):
        raise KernelfuzzError(
            f"{package} {release.version} was fetched by another kernelfuzz, which kept other files of it: "
            f"run 'kernelfuzz releases fetch {package}=={release.version}'"
        )
    return release.path


def version_of(root: Path, package: str) -> str:
    """The version of the tree at `root`: from the metadata beside it, else its ``_version.py``, else ``"unknown"``."""
    for distribution in importlib.metadata.distributions(name=package, path=[str(root)]):
        return distribution.version
    source = root / _top(package) / "_version.py"
    text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    match = re.search(r"""^(?:__version__\s*=\s*)?(?:__)?version(?:__)?\s*=\s*['"]([^'"]+)""", text, re.MULTILINE)
    return match[1] if match else "unknown"


def _releases() -> Path:
    return home() / "releases"


def _top(package: str) -> str:
    return package.replace("-", "_")


def _known(package: str) -> str:
    name = canonicalize_name(package)
    if name not in _MEMBERS:
        raise KernelfuzzError(f"no target is in the package {package!r}: there are kernels in {', '.join(_MEMBERS)}")
    return name


def _valid(version: str) -> str:
    try:
        return str(Version(version))
    except InvalidVersion:
        raise KernelfuzzError(f"{version!r} is neither a version, such as {PINNED['vllm']}, nor a folder") from None


def _find(package: str, version: str) -> Release | None:
    """The cached release that pip would take ``==version`` for: 0.33 is 0.33.0, and 0.33.0+cu129 will do for it."""
    wanted = Specifier(f"=={_valid(version)}", prereleases=True)
    return next((r for r in installed_releases() if r.package == package and wanted.contains(r.version)), None)


def _current(package: str, version: str) -> Release | None:
    release = _find(package, version)
    return release if release is not None and _is_current(release.path, package) else None


def _is_current(folder: Path, package: str) -> bool:
    return _read_manifest(folder).get("members") == _members_digest(package)


def _members_digest(package: str) -> str:
    return hashlib.sha256("\n".join(sorted(_MEMBERS[package])).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, object]:
    """The folder's manifest; empty if it has none of this schema, or another folder's."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        return {}
    same = (manifest.get("package"), manifest.get("version")) == (folder.parent.name, folder.name)
    return manifest if same else {}


def _fetch_into(staging: Path, package: str, version: str, progress: Progress) -> Release:
    """Make the release in `staging` and move it into place."""
    got, tree = staging / "wheel", staging / "tree"
    got.mkdir()
    tree.mkdir()
    wheel = download(package, version, got, progress)
    version = wheel_version(wheel, package)
    extract(wheel, _MEMBERS[package], tree, progress)
    if not (tree / _top(package)).is_dir():
        raise KernelfuzzError(f"{wheel.name} holds none of the files that targets need from {package}")
    manifest = {
        "schema": _SCHEMA,
        "package": package,
        "version": version,
        "wheel": wheel.name,
        "fetched": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "members": _members_digest(package),
    }
    (tree / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    place = _releases() / package / version
    place.parent.mkdir(exist_ok=True)
    if place.exists():  # what an older table chose, or what is no release at all
        place.rename(staging / "replaced")
    tree.rename(place)
    release = _find(package, version)
    assert release is not None
    return release


def _silent(_stage: str, _done: int, _total: int | None) -> None:
    """Progress that nobody follows."""


@contextmanager
def _turn(progress: Progress) -> Iterator[None]:
    """Hold the cache's lock; whoever holds it knows that every staging folder is a dead fetch's, and deletes it."""
    with (_releases() / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another fetch", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in _releases().glob(f"{_STAGING}*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Turn what the file system refuses into one line with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = "set KERNELFUZZ_HOME to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KernelfuzzError(f"no space left on the disk that holds {home()}: free some, or {remedy}") from error
        raise KernelfuzzError(f"cannot keep releases in {home()} ({error.strerror or error}): {remedy}") from error


def _locate_path(package: str, text: str) -> Path:
    top = _top(package)
    path = _expanded(text)
    if (path / top).is_dir():
        return path
    if path.name == top and (path / "__init__.py").is_file():
        return path.parent
    if not path.is_dir():
        raise KernelfuzzError(f"there is no folder {text} to take {package} from")
    raise KernelfuzzError(f"{text} holds no {top}/ folder: give a checkout of {package} or its unpacked wheel")
