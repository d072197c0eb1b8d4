"""What the site needs beyond docs/: the results, and links that hold on GitHub and here."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: Of ``[text](target)`` and ``![text](target)``, the target without its anchor.
_LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)")
#: ``:class:`Name``` in a docstring.
_ROLE = re.compile(r":(?:class|func|meth|attr|mod):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the committed results along, under results/."""
    for path in sorted((ROOT / "results").rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in (".md", ".png", ".csv") and not name.startswith("results/runs/"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    of_results = page.file.src_uri.startswith("results/")
    here = page.file.src_uri if of_results else f"docs/{page.file.src_uri}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif not target.startswith("results/"):
            return match[0]
        away = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return match[1] + away

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show what docstrings refer to: a link where it is on the site, else its name."""

    def shown(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2]
        if not match[1].startswith(("fedleak.", "strategies.")):
            return f"<code>{match[1]}</code>"
        return f'<autoref optional identifier="{match[1]}"><code>{name}</code></autoref>'

    return _ROLE.sub(shown, html)
