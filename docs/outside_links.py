"""Makes links to files of the repository that are no pages, which work where the repository is read, plain names in the
site."""

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return a page's text without links that lead to existing files outside the pages' folder."""
    pages = Path(config["docs_dir"]).resolve()
    folder = (pages / page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link["target"]).resolve()
        return f"`{link['text']}`" if target.is_file() and not target.is_relative_to(pages) else link[0]

    return re.sub(r"\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)#\s]+)\)", plain, markdown)
