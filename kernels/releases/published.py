"""Which versions of a package are published, as the user's own pip sees them."""

import json
import re
import subprocess
from importlib import metadata

from packaging.version import Version

from kernelfuzz.kernels.releases.wheels import OFFLINE, in_order, pip_command
from kernelfuzz.strategies.errors import KernelfuzzError

_FIRST_WITH_JSON = Version("25.1")


def published_versions(package: str) -> list[str]:
    """Return the published versions of `package`, the oldest first, without pre-releases and yanked ones.

    Raises `KernelfuzzError` if pip is not there, reaches no package index or finds nothing of that name.
    """
    command = pip_command("index", "versions", package)
    has_json = Version(metadata.version("pip")) >= _FIRST_WITH_JSON
    done = subprocess.run([*command, *["--json"] * has_json], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        if OFFLINE.search(done.stderr):
            raise KernelfuzzError(f"cannot list the releases of {package}: pip reaches no package index")
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["it printed nothing"]
        reason = errors[-1].removeprefix("ERROR:").strip()
        raise KernelfuzzError(f"cannot list the releases of {package}, pip says: {reason}")
    if has_json:
        listed = json.loads(done.stdout)["versions"]
    else:
        line = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
        listed = line[1].split(",") if line else []
    return [str(version) for version in in_order(listed)]
