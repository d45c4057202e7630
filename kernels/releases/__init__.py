"""Released kernels as plain importable folders under ``$KERNELFUZZ_HOME``: what there is, and how to get more.

`store` keeps the folders, `wheels` gets and unpacks a wheel, `published` says which versions there are to get. A
release is ``releases/<package>/<version>/``, a folder that holds the package's own top folder, its metadata and a
``release.json`` manifest.
"""

from kernelfuzz.kernels.releases.published import published_versions
from kernelfuzz.kernels.releases.store import (
    PINNED,
    Release,
    fetch,
    home,
    installed_releases,
    locate,
    parse_requirement,
    remove,
    version_of,
)

__all__ = [
    "PINNED",
    "Release",
    "fetch",
    "home",
    "installed_releases",
    "locate",
    "parse_requirement",
    "published_versions",
    "remove",
    "version_of",
]
