"""Releases are fetched by the real pip, from tiny wheels in a local folder; nothing here touches the network."""

import errno
import importlib.util
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kernelfuzz.kernels import releases
from kernelfuzz.kernels.releases import store, wheels
from kernelfuzz.strategies.errors import KernelfuzzError

WHEEL_TAG = "cp38-abi3-manylinux_2_28_x86_64"
LORA_OP = "vllm/lora/ops/triton_ops/fused_moe_lora_op.py"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a pip that knows one local folder and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "releases"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return tmp_path / "wheels"


def publish(
    folder: Path,
    version: str,
    *,
    package: str = "vllm",
    tag: str = WHEEL_TAG,
    members: dict[str | zipfile.ZipInfo, str] | None = None,
) -> Path:
    """Write a wheel that has the members every release has, and `members`."""
    top = package.replace("-", "_")
    info = f"{top}-{version}.dist-info"
    path = folder / f"{top}-{version}-{tag}.whl"
    content: dict[str | zipfile.ZipInfo, str] = {
        f"{top}/__init__.py": "",
        f"{top}/_version.py": f"__version__ = version = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n",
        f"{info}/licenses/LICENSE": "the licence",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**content, **(members or {})}.items():
            archive.writestr(name, text)
    return path


def left_in(cache: Path) -> set[str]:
    """What lies in the cache beside its lock: packages, or what a dead fetch has left."""
    return {path.name for path in cache.iterdir()} - {".lock"}


def child(code: str, **kwargs) -> subprocess.Popen[str]:
    source = f"from kernelfuzz.kernels import releases\n{code}"
    return subprocess.Popen([sys.executable, "-c", source], text=True, stdout=subprocess.PIPE, **kwargs)


def test_fetch_keeps_only_the_members_that_targets_need(cache: Path, published: Path):
    publish(
        published,
        "0.33.0",
        members={
            LORA_OP: "op = 1\n",
            "vllm/triton_utils/__init__.py": "",
            "vllm/utils/math_utils.py": "",
            "vllm/platforms/__init__.py": "",
            "vllm/envs.py": "",
            "vllm/entrypoints/llm.py": "much",
            "vllm/lora/notes.txt": "much",
            "vllm/_C.abi3.so": "much",
            "vllm/_C_stable_libtorch.abi3.so": "much",
            "vllm/_moe_C_stable_libtorch.abi3.so": "binary",
        },
    )
    release = releases.fetch("vllm", "0.33.0")
    files = {path.relative_to(release.path).as_posix() for path in release.path.rglob("*") if path.is_file()}
    assert files == {
        "release.json",
        "vllm/__init__.py",
        "vllm/_moe_C_stable_libtorch.abi3.so",
        "vllm/_version.py",
        "vllm/envs.py",
        "vllm/platforms/__init__.py",
        "vllm/triton_utils/__init__.py",
        "vllm/utils/math_utils.py",
        LORA_OP,
        "vllm-0.33.0.dist-info/METADATA",
        "vllm-0.33.0.dist-info/licenses/LICENSE",
    }
    assert (release.path / LORA_OP).read_text() == "op = 1\n"
    assert release.path == cache / "vllm" / "0.33.0"
    assert release.size == sum((release.path / name).stat().st_size for name in files)
    assert left_in(cache) == {"vllm"}


@pytest.mark.parametrize("library", ["_moe_C.abi3.so", "_moe_C_stable_libtorch.abi3.so"])
def test_fetch_keeps_the_compiled_moe_operators_under_either_name(published: Path, library: str):
    publish(published, "0.23.0", members={f"vllm/{library}": "binary", "vllm/_flashmla_C.abi3.so": "much"})
    assert [path.name for path in releases.fetch("vllm", "0.23.0").path.rglob("*.so")] == [library]


def test_fetch_of_the_xpu_kernels_keeps_the_two_libraries(published: Path):
    members = {f"vllm_xpu_kernels/{name}.abi3.so": name for name in ("_C", "_moe_C", "_xpu_C")}
    publish(published, "0.1.16.2", package="vllm-xpu-kernels", members=members)
    release = releases.fetch("vllm_xpu_kernels", "0.1.16.2")
    assert release.package == "vllm-xpu-kernels"
    assert {path.name for path in release.path.rglob("*.so")} == {"_moe_C.abi3.so", "_xpu_C.abi3.so"}


def test_the_manifest_says_where_a_release_came_from(published: Path):
    wheel = publish(published, "0.33.0")
    manifest = json.loads((releases.fetch("vllm", "0.33.0").path / "release.json").read_text())
    assert manifest["schema"] == 1
    assert (manifest["package"], manifest["version"], manifest["wheel"]) == ("vllm", "0.33.0", wheel.name)
    assert {"fetched", "members"} < manifest.keys()


@pytest.mark.parametrize("tag", ["cp38-abi3-manylinux_2_31_x86_64", "cp38-abi3-manylinux1_x86_64", "py3-none-any"])
def test_fetch_takes_wheels_of_every_platform_tag(published: Path, tag: str):
    publish(published, "0.21.0", tag=tag)
    assert releases.fetch("vllm", "0.21.0").version == "0.21.0"


def test_fetch_prefers_the_machines_own_architecture(published: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    publish(published, "0.33.0")
    own = publish(published, "0.33.0", tag="cp38-abi3-manylinux_2_28_aarch64")
    assert json.loads((releases.fetch("vllm", "0.33.0").path / "release.json").read_text())["wheel"] == own.name


def test_fetching_again_asks_pip_for_nothing(published: Path, monkeypatch: pytest.MonkeyPatch):
    publish(published, "0.33.0")
    first = releases.fetch("vllm", "0.33.0")
    monkeypatch.setattr(sys, "executable", "no-such-python")
    stages: list[str] = []
    assert releases.fetch("vllm", "0.33", lambda stage, *_: stages.append(stage)) == first
    assert stages == []


def test_progress_goes_up_to_the_total_of_what_is_extracted(published: Path):
    publish(published, "0.33.0", members={LORA_OP: "x" * 5000})
    seen: list[tuple[str, int, int | None]] = []
    releases.fetch("vllm", "0.33.0", lambda *event: seen.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["downloading", "extracting"]
    done, totals = zip(*[(done, total) for stage, done, total in seen if stage == "extracting"], strict=True)
    assert list(done) == sorted(done)
    assert {done[-1]} == set(totals)


def test_a_release_that_another_member_table_chose_is_fetched_again(published: Path, monkeypatch: pytest.MonkeyPatch):
    publish(published, "0.33.0", members={"vllm/_C.abi3.so": "binary"})
    old = releases.fetch("vllm", "0.33.0")
    (old.path / "vllm" / "old.py").touch()
    monkeypatch.setitem(store._MEMBERS, "vllm", (*store._MEMBERS["vllm"], "vllm/_C*.so"))
    with pytest.raises(KernelfuzzError, match=r"'kernelfuzz releases fetch vllm==0\.33\.0'"):
        releases.locate("vllm", "0.33.0")
    new = releases.fetch("vllm", "0.33.0")
    assert (new.path / "vllm" / "_C.abi3.so").read_text() == "binary"
    assert not (new.path / "vllm" / "old.py").exists()
    assert releases.locate("vllm", "0.33.0") == new.path


def test_a_local_version_serves_for_its_public_one(published: Path):
    publish(published, "0.33.0+cu129")
    release = releases.fetch("vllm", "0.33.0")
    assert release.version == "0.33.0+cu129"
    assert releases.locate("vllm", "0.33.0") == release.path


ESCAPES = ["../evil.py", "/evil.py", "vllm/lora/../../../evil.py", "vllm\\lora\\evil.py", "C:/evil.py"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_member_that_would_escape_is_refused_before_anything_is_written(tmp_path: Path, name: str):
    wheel = publish(tmp_path, "0.33.0", members={name: "evil"})
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(KernelfuzzError, match=r"refused vllm-0\.33\.0.*evil\.py' would be written outside"):
        wheels.extract(wheel, ("*",), target, lambda *_: None)
    assert not any(target.iterdir())
    assert not any(tmp_path.rglob("evil.py"))


def test_a_symbolic_link_is_refused_and_leaves_nothing(cache: Path, published: Path):
    link = zipfile.ZipInfo("vllm/lora/link.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    publish(published, "0.33.0", members={link: "/etc/passwd"})
    with pytest.raises(KernelfuzzError, match=r"'vllm/lora/link\.py' is a symbolic link"):
        releases.fetch("vllm", "0.33.0")
    assert left_in(cache) == set()


def test_concurrent_fetches_of_one_release_take_turns(cache: Path, published: Path):
    publish(published, "0.33.0", members={LORA_OP: "x" * 100_000})
    first = child(
        "def wait_half_way(stage, done, total):\n"
        "    if stage == 'extracting' and done == total:\n"
        "        print('half-way', flush=True)\n"
        "        input()\n"
        "print(releases.fetch('vllm', '0.33.0', wait_half_way).size)",
        stdin=subprocess.PIPE,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "half-way\n"
    second = child(
        "report = lambda stage, done, total: print(stage, flush=True)\n"
        "print(releases.fetch('vllm', '0.33.0', report).size)"
    )
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another fetch\n"
    sizes = [first.communicate("go on\n", timeout=60)[0], second.communicate(timeout=60)[0]]
    (release,) = releases.installed_releases()
    assert sizes == [f"{release.size}\n"] * 2
    assert left_in(cache) == {"vllm"}


def test_a_killed_fetch_leaves_no_release_and_the_next_one_sweeps_up(cache: Path, published: Path):
    publish(published, "0.33.0", members={LORA_OP: "x" * 100_000})
    killed = child(
        "import sys, time\n"
        "def stop(stage, done, total):\n"
        "    if stage == 'extracting' and done:\n"
        "        print('half-way', flush=True)\n"
        "        time.sleep(600)\n"
        "releases.fetch('vllm', '0.33.0', stop)"
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half-way\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert releases.installed_releases() == []
    assert len(left_in(cache)) == 1
    release = releases.fetch("vllm", "0.33.0")
    assert (release.path / LORA_OP).stat().st_size == 100_000
    assert left_in(cache) == {"vllm"}


@pytest.mark.parametrize("stage", ["downloading", "extracting"])
def test_an_interrupted_fetch_leaves_nothing(cache: Path, published: Path, stage: str):
    publish(published, "0.33.0")

    def interrupt(now: str, _done: int, _total: int | None) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        releases.fetch("vllm", "0.33.0", interrupt)
    assert left_in(cache) == set()


def test_a_full_disk_is_one_line_and_leaves_nothing(cache: Path, published: Path, monkeypatch: pytest.MonkeyPatch):
    publish(published, "0.33.0")

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheels, "copyfileobj", full)
    with pytest.raises(KernelfuzzError, match=rf"^no space left on the disk that holds {releases.home()}: .*HOME"):
        releases.fetch("vllm", "0.33.0")
    assert left_in(cache) == set()


def test_a_disk_that_is_full_for_pip_is_the_same_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = tmp_path / "python"
    pip.write_text(
        "#!/bin/sh\necho 'ERROR: Could not install packages due to an OSError: [Errno 28] No space'\nexit 1\n"
    )
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(KernelfuzzError, match=r"^no space left on the disk"):
        releases.fetch("vllm", "0.33.0")


def test_a_home_that_is_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERNELFUZZ_HOME", str(tmp_path / "file"))
    assert releases.installed_releases() == []
    with pytest.raises(KernelfuzzError, match=r"cannot keep releases in .*file \(Not a directory\): set"):
        releases.fetch("vllm", "0.33.0")


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)  # as the superuser, whom tests may run as, no folder refuses writing
    with pytest.raises(KernelfuzzError, match=r"cannot keep releases in .*\(Permission denied\): set KERNELFUZZ_HOME"):
        releases.fetch("vllm", "0.33.0")


def test_an_unknown_version_names_the_nearest(published: Path):
    for version in ("0.19.1", "0.20.2", "0.21.0", "0.22.0", "0.33.0"):
        publish(published, version)
    nearest = r"^there is no vllm==0\.21\.5 .*; the nearest are 0\.20\.2, 0\.21\.0, 0\.22\.0, 0\.33\.0$"
    with pytest.raises(KernelfuzzError, match=nearest):
        releases.fetch("vllm", "0.21.5")


def test_no_release_at_all_points_at_the_network_and_pips_configuration():
    with pytest.raises(KernelfuzzError, match=r"^cannot fetch vllm==0\.33\.0: pip finds no release of vllm; check"):
        releases.fetch("vllm", "0.33.0")


def test_an_unreachable_index_is_told_from_an_unknown_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(KernelfuzzError, match=r"^cannot fetch vllm==0\.33\.0: pip reaches no package index; check"):
        releases.fetch("vllm", "0.33.0")


def test_a_file_that_is_no_wheel_is_corrupt(cache: Path, published: Path):
    publish(published, "0.33.0").write_bytes(b"not a zip archive")
    with pytest.raises(KernelfuzzError, match=r"wheel that pip got for vllm==0\.33\.0 is corrupt: fetch it again$"):
        releases.fetch("vllm", "0.33.0")
    assert left_in(cache) == set()


def test_a_damaged_member_is_corrupt(cache: Path, published: Path):
    wheel = publish(published, "0.33.0", members={LORA_OP: "weights"})
    wheel.write_bytes(wheel.read_bytes().replace(b"weights", b"w3ights"))
    with pytest.raises(KernelfuzzError, match=r"^the wheel vllm-0\.33\.0.* is corrupt \(Bad CRC-32"):
        releases.fetch("vllm", "0.33.0")
    assert left_in(cache) == set()


def test_a_wheel_that_holds_nothing_of_use_is_refused(cache: Path, published: Path):
    wheel = publish(published, "0.33.0")
    with zipfile.ZipFile(wheel) as full:
        kept = {name: full.read(name) for name in full.namelist() if not name.startswith("vllm/")}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(KernelfuzzError, match=r"^vllm-0\.33\.0.* holds none of the files that targets need from vllm$"):
        releases.fetch("vllm", "0.33.0")
    assert left_in(cache) == set()


def test_pip_missing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelfuzzError, match=r"needs pip, which .* lacks: run '.* -m ensurepip'"):
        releases.fetch("vllm", "0.33.0")


@pytest.mark.parametrize("text", ["vllm>=0.3", "vllm", "vllm==", "vllm==0.3.*", "vllm==0.3,<1", "==0.3", ""])
def test_a_malformed_requirement_says_what_is_right(text: str):
    with pytest.raises(KernelfuzzError, match=r"names no release: write NAME==VERSION, such as vllm==0\.33\.0"):
        releases.parse_requirement(text)


def test_requirements_are_normalised_and_checked():
    assert releases.parse_requirement(" vLLM_XPU.kernels == 0.1.16.2") == ("vllm-xpu-kernels", "0.1.16.2")
    with pytest.raises(KernelfuzzError, match=r"no target is in the package 'numpy': .* vllm, vllm-xpu-kernels"):
        releases.parse_requirement("numpy==2.0")
    with pytest.raises(KernelfuzzError, match="'abc' is neither a version"):
        releases.parse_requirement("vllm==abc")


def test_installed_releases_are_sorted_by_version_and_skip_what_is_none(cache: Path, published: Path):
    for version in ("0.9.0", "0.10.0"):
        publish(published, version)
        releases.fetch("vllm", version)
    (cache / "vllm" / "0.11.0").mkdir()
    renamed = cache / "vllm" / "mine"
    renamed.mkdir()
    (renamed / "release.json").write_bytes((cache / "vllm" / "0.9.0" / "release.json").read_bytes())
    assert [release.version for release in releases.installed_releases()] == ["0.9.0", "0.10.0"]


def test_remove_deletes_and_says_what_there_is_otherwise(cache: Path, published: Path):
    publish(published, "0.33.0")
    releases.fetch("vllm", "0.33.0")
    with pytest.raises(KernelfuzzError, match=r"^vllm==0\.19\.1 is not in the cache, which holds vllm==0\.33\.0$"):
        releases.remove("vllm", "0.19.1")
    releases.remove("vllm", "0.33.0")
    assert releases.installed_releases() == []
    assert left_in(cache) == {"vllm"}
    with pytest.raises(KernelfuzzError, match=r"which holds no release$"):
        releases.remove("vllm", "0.33.0")


def test_locate_a_version_that_is_not_fetched_says_how_to_fetch_it():
    with pytest.raises(KernelfuzzError, match=r"'kernelfuzz releases fetch vllm==0\.33\.0'$"):
        releases.locate("vllm", "0.33.0")
    with pytest.raises(KernelfuzzError, match=r"'main' is neither a version, such as .*, nor a folder$"):
        releases.locate("vllm", "main")


def test_locate_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkout = tmp_path / "checkout"
    (checkout / "vllm").mkdir(parents=True)
    (checkout / "vllm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = [str(checkout), "checkout", "./checkout", "~/checkout", str(checkout / "vllm"), "checkout/vllm/"]
    assert {releases.locate("vllm", text) for text in spellings} == {checkout}


def test_locate_a_checkout_whose_own_name_is_the_packages(tmp_path: Path):
    package = tmp_path / "vllm" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert releases.locate("vllm", str(tmp_path / "vllm")) == tmp_path / "vllm"


def test_locate_a_path_that_holds_no_such_package_is_one_line(tmp_path: Path):
    with pytest.raises(KernelfuzzError, match=r"holds no vllm_xpu_kernels/ folder: give a checkout of"):
        releases.locate("vllm-xpu-kernels", str(tmp_path))
    with pytest.raises(KernelfuzzError, match=r"^there is no folder \./nowhere to take vllm from$"):
        releases.locate("vllm", "./nowhere")


def test_version_of_a_release_a_checkout_and_a_bare_tree(tmp_path: Path, published: Path):
    publish(published, "0.33.0")
    assert releases.version_of(releases.fetch("vllm", "0.33.0").path, "vllm") == "0.33.0"
    (tmp_path / "vllm").mkdir()
    assert releases.version_of(tmp_path, "vllm") == "unknown"
    (tmp_path / "vllm" / "_version.py").write_text("TYPE_CHECKING = False\n__version__ = version = '0.34.dev1'\n")
    assert releases.version_of(tmp_path, "vllm") == "0.34.dev1"


def test_home_is_the_users_cache_folder_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KERNELFUZZ_HOME", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert releases.home() == tmp_path / "elsewhere"
    monkeypatch.delenv("KERNELFUZZ_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert releases.home().name == "kernelfuzz"
    assert tmp_path in releases.home().parents
