"""Makes one site of docs/ and of the pages that lie elsewhere in the repository: a hook of mkdocs.

Links between pages are written as GitHub follows them, relative to the file. Here, README and some other pages outside
docs/ become pages of the site, and so do Jupyter notebooks and each source file that a page links to; links are
rewritten to them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
# pages outside docs/, and their names in the site
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "diffusers_ctx/assets/quad-context/README.md": "shipped_adapter.md",
    "diffusers_ctx/assets/pictures-base/README.md": "pictures_base.md",
}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[#)])")
_FOOTNOTE = re.compile(r"\[(\d+)\]")  # in the benchmarks' tables; two of them in a row would be a link
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, notebooks, and the source files that pages link to."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
        path = notebook.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _site_name(path), content=_notebook_page(notebook)))
    linked = {path for file in files.documentation_pages() for path in _linked_paths(file)}
    for path in sorted(linked - set(OUTSIDE)):
        if path.startswith("docs/"):
            continue
        if path.endswith(".py"):
            page = File.generated(
                config, _site_name(path), content=_code_page(path), inclusion=InclusionLevel.NOT_IN_NAV
            )
        else:
            page = File.generated(config, _site_name(path), abs_src_path=str(ROOT / path))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links to what lies elsewhere in the site than in the repository; unwraps the names of code blocks."""
    source = _repository_path(page.file.src_uri)
    if source is None:
        return markdown
    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _in_site(link[0], source, page.file.src_uri), part) for part in parts[::2]]
    parts[::2] = [_FOOTNOTE.sub(r"\\[\1\\]", part) for part in parts[::2]]
    return re.sub(r"^```python no-run$", "```python", "".join(parts), flags=re.MULTILINE)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings are written as diffusers' are: names as [`~ComposablePipeline.concepts`], types in backticks."""
    html = re.sub(r"\[<code>~?([^<]+)</code>\]", r"<code>\1</code>", html)
    return re.sub(r"<code>`([^`<]+)`", r"<code>\1", html)


def _repository_path(src_uri: str) -> str | None:
    """Where in the repository a page of the site lies; `None` for a source file's page, which has no links."""
    if src_uri.startswith("source/"):
        return None
    outside = {name: path for path, name in OUTSIDE.items()}
    return outside.get(src_uri, f"docs/{src_uri}")


def _site_name(path: str) -> str:
    """The name in the site of a file of the repository."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return OUTSIDE.get(path) or f"source/{path}" + (".md" if path.endswith(".py") else "")


def _linked_paths(file: File) -> Iterator[str]:
    """The paths in the repository that a page links to."""
    source = _repository_path(file.src_uri)
    if source is not None:
        for part in _FENCED.split(file.content_string)[::2]:
            for address in _LINK.findall(part):
                path = _resolve(address, source)
                if (ROOT / path).is_file():
                    yield path


def _in_site(address: str, source: str, src_uri: str) -> str:
    path = _resolve(address, source)
    if not (ROOT / path).is_file():  # an address on the net; or mkdocs will say that there is no such file
        return address
    return posixpath.relpath(_site_name(path), posixpath.dirname(src_uri))


def _resolve(address: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), address))


def _notebook_page(notebook: Path) -> str:
    """The cells of a notebook, and where to download it."""
    parts = [f'<a href="{notebook.name}" download>Download this notebook</a>']
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    parts[:2] = parts[1::-1]  # the title comes first
    return "\n\n".join(parts) + "\n"


def _code_page(path: str) -> str:
    code = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n`````python\n{code}`````\n"
