"""The examples, run as a person runs them: right kernels of another project pass, and planted bugs are found."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIGER = importlib.util.find_spec("liger_kernel")
EXAMPLE = Path(__file__).parents[1] / "examples" / "test_liger_norm.py"

pytestmark = pytest.mark.skipif(
    LIGER is None, reason="liger-kernel is not installed: pip install liger-kernel --no-deps"
)


@pytest.fixture
def example(tmp_path):
    """Runs the example in an empty folder, the same cases each time; a liger_kernel there is what it imports."""

    def run(*arguments):
        path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HYPOTHESIS_PROFILE": "kernelfuzz-ci"}
        command = [sys.executable, "-m", "pytest", str(EXAMPLE), "--kernel-device", "cpu", "-p", "no:cacheprovider"]
        return subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def edited(tmp_path):
    """Puts a copy of liger_kernel in place with one edit of rms_norm's forward kernel, the first in its file."""

    def copy(right, wrong):
        package = tmp_path / "liger_kernel"
        shutil.copytree(Path(LIGER.origin).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        file = package / "ops" / "rms_norm.py"
        text = file.read_text("utf-8")
        assert right in text, f"rms_norm.py has no {right!r}: this test is for another version"
        file.write_text(text.replace(right, wrong, 1), "utf-8")

    return copy


def test_the_kernels_of_liger_kernel_pass_close_to_their_bounds(example):
    done = example()
    assert done.returncode == 0, done.stdout + done.stderr
    ratios = dict(re.findall(r"::(\w+)\[cpu\] +200 +200 +([\d.]+)", done.stdout))
    assert ratios.keys() == {"test_rms_norm", "test_rope"}
    assert all(0.85 < float(ratio) <= 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("right", "wrong", "kind", "case"),
    [
        ("rsqrt(mean_square + eps)", "rsqrt(mean_square)", "wrong_value", r"x=float32\[1, 1\]"),
        ("mask = col_offsets < n_cols\n", "mask = col_offsets < n_cols - 1\n", "wrong_value", r"x=float32\[1, 1\]"),
        ("mask = col_offsets < n_cols\n", "mask = col_offsets <= n_cols\n", "out_of_bounds", r"x=float32\[1, 3\]"),
    ],
    ids=["eps left out", "last column left out", "one column too many"],
)
def test_a_bug_planted_in_rms_norm_is_found_and_shrunk(example, edited, right, wrong, kind, case):
    edited(right, wrong)
    done = example("-k", "rms_norm")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{kind}  own.test_rms_norm.{kind}." in done.stdout
    assert re.search(rf"smallest case found:\n +{case} ones w=float32\[\d\] ones offset=0.0", done.stdout), done.stdout
