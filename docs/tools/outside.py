"""A hook of MkDocs: pages that lie outside docs/ are pages of the site as well, and links to them hold in both places.

CONTRIBUTING.md is read on the repository's own pages, where its links are relative to the root; on the site it lies
beside the pages of docs/. So each relative link is looked up as a file of the repository, and written anew.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
BEGINNINGS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
STANDS_FOR = {"README.md": "docs/index.md", "README_zh.md": "docs/zh/index.md"}
LINK = re.compile(r"(?<!`)\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add every file outside docs/ that a page links to, directly or through another such page."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting = [DOCS + uri for uri in waiting] + list(BEGINNINGS)
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith(DOCS):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [target for target, _ in map(target_in(path), LINK.finditer(text)) if (ROOT / target).is_file()]
    return files


def on_page_markdown(markdown, page, config, files):
    """The page with its links as they are on the site."""
    uri = page.file.src_uri
    path = DOCS + uri if (ROOT / DOCS / uri).is_file() else uri

    def rewritten(match: re.Match) -> str:
        target, anchor = target_in(path)(match)
        return f"]({posixpath.relpath(target.removeprefix(DOCS), posixpath.dirname(uri) or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)


def target_in(path: str):
    """A function that says where a link in the file `path` leads: a file of the repository, and the anchor in it."""

    def target_of(match: re.Match) -> tuple[str, str]:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(match[1])))
        anchor = match[2] or ""
        if target in STANDS_FOR:
            return STANDS_FOR[target], ""
        return target, anchor

    return target_of
