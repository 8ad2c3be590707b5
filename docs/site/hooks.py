"""MkDocs hooks: files of the repository that pages link to, and formulas as MathML.

The same pages are read on a repository host, where `../benchmarks/results/x.md` is a
link like any other. A site holds only its docs folder, so the linked files join it
under `repository/`, with the links between all of them rewritten. Formulas become
MathML while the site is built: a page asks for no script and no font.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
PREFIX = "repository"
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.S | re.M)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
_NAMES = {
    r"\Bigl\lVert": r"\left\Vert ",
    r"\Bigr\rVert": r"\right\Vert ",
    r"\lVert": r"\Vert ",
    r"\rVert": r"\Vert ",
    r"\not\le": r"\nleq",
    r"\arg\min": r"\mathrm{arg\,min}",
}
"""What the converter does not know, and what it does."""
_TAG = re.compile(r"\\tag\{([^}]*)\}")


def _place(uri: str) -> str:
    """The path in the repository of a page of the site."""
    inside = uri.removeprefix(f"{PREFIX}/")
    return inside if inside != uri else f"docs/{uri}"


def _uri(path: str) -> str:
    """The page or file of the site of a path in the repository."""
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"{PREFIX}/{path}"


def _target(place: str, link: str) -> str:
    """What a link of a file means, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _prose(text: str) -> str:
    return _CODE.sub("", text)


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's files that pages link to, and those that these link to."""
    todo = [_place(file.src_uri) for file in files.documentation_pages()]
    todo += ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    seen: set[str] = set()
    while todo:
        place = todo.pop()
        if place in seen or not (ROOT / place).is_file():
            continue
        seen.add(place)
        uri = _uri(place)
        if files.get_file_from_path(uri) is None:
            made = File.generated(config, uri, abs_src_path=str(ROOT / place))
            files.append(made)
        if place.endswith(".md"):
            text = _prose((ROOT / place).read_text(encoding="utf-8"))
            todo += [_target(place, found[1]) for found in _LINK.findall(text)]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links to where the files are in the site; folders become plain text."""
    del config
    place = _place(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(found: re.Match[str]) -> str:
        uri = _uri(_target(place, found[2]))
        if files.get_file_from_path(uri) is None:
            return found[0]  # left for the strict build to report
        return (
            f"{found[1]}{posixpath.relpath(uri, here or '.')}{found[3] or ''}{found[4]}"
        )

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(rewritten, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(rewritten, markdown[end:])])


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    r"""Set the formulas, `\tag{n}` as a number beside the formula."""
    del page, config, files

    def mathml(found: re.Match[str]) -> str:
        source = html.unescape(found[2]).strip()
        source = source.removeprefix("\\(").removesuffix("\\)")
        source = source.removeprefix("\\[").removesuffix("\\]")
        number = _TAG.search(source)
        source = _TAG.sub("", source).strip()
        for name, known in _NAMES.items():
            source = source.replace(name, known)
        block = found[1] == "div"
        made = convert(source, display="block" if block else "inline")
        if not block:
            return made
        tag = f'<span class="tag">({number[1]})</span>' if number else ""
        return f'<div class="formula">{made}{tag}</div>'

    return _FORMULA.sub(mathml, content)
