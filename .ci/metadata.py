"""Metadata that depends on where the repository lives: README's links and the project's URLs.

The address comes from the variables that GitHub Actions sets. Elsewhere the links of the README stay relative and
there are no URLs.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code is passed over, where brackets may look like a link.
LINK = re.compile(
    r"(?:^```.*?^```|`[^`\n]*`)|(!?\[[^\]]*\]\(|<img [^>]*src=\")([^)\"\s]+)([)\"])",
    re.MULTILINE | re.DOTALL,
)


class RepositoryMetadata(MetadataHookInterface):
    """The hook of hatchling for `readme` and `urls`."""

    def update(self, metadata):
        """Fill in the dynamic fields."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address, ref = repository(os.environ)
        if address:
            text = with_absolute_links(text, address, ref)
            metadata["urls"] = {
                "Repository": address,
                "Changelog": f"{address}/blob/{ref}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def repository(environment):
    """The address of the repository and what is built of it, or two empty strings."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_SHA")
    server, name, commit = (environment.get(each, "") for each in names)
    if not (server and name and commit):
        return "", ""
    return f"{server}/{name}", commit


def with_absolute_links(text, address, ref):
    """The text with links and images that lead somewhere from any page; those inside the text stay."""

    def absolute(link):
        start, target, end = link.groups()
        if target is None or target.startswith(("http://", "https://", "#")):
            return link[0]
        kind = "raw" if start.startswith(("!", "<")) else "blob"
        return f"{start}{address}/{kind}/{ref}/{target}{end}"

    return LINK.sub(absolute, text)
