"""The command line: one module per command."""

import os
import sys

from kernelfuzz.kernels.releases import home
from kernelfuzz.strategies.errors import KernelfuzzError


def main() -> None:
    """Run the command line. What takes long to import is imported here, so that Ctrl-C ends it quietly too."""
    try:
        # Hypothesis would make a folder .hypothesis where the user stands.
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(home() / "hypothesis"))
        from kernelfuzz.fuzz.cli.app import run_app
    except KernelfuzzError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    run_app()
