# SPDX-License-Identifier: Apache-2.0
"""The site's view of the repository: benchmarks/results stands in it as results/, and examples/ too, without a copy.

A page links to a file of the repository as GitHub shows it, `../benchmarks/results/probe/RESULTS.md`. The site's own
link is made from that.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples"
_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files, config):
    """Adds every report and picture of benchmarks/results, where notes.md is part of a report, and every example."""
    for path in sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".md", ".png") and path.name != "notes.md":
            uri = f"results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links into benchmarks/results and examples become links into the site's results/ and examples/."""
    folder = posixpath.dirname(page.file.src_uri)

    def site_link(match):
        target = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        if not target.startswith(("benchmarks/results/", "examples/")):
            return match[0]
        return match[1] + posixpath.relpath(target.removeprefix("benchmarks/"), folder or ".")

    return _LINK.sub(site_link, markdown)
