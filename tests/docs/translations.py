"""Whether the Korean pages keep pace with the English ones, paragraph by paragraph.

Each translated page ends with a comment that holds a short hash of each paragraph of its original, in order. When the
original is changed, `docs_test.py` names the paragraphs that have to be translated again. When that is done:

    python -m tests.docs.translations docs/guides/pool.ko.md   # or without a name: all that are out of date

Code is not hashed: it is compared with the original's, but for comments, docstrings and other words for people.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"\n*<!-- english: ([0-9a-f ]*)-->\n*\Z")


def pages() -> list[Path]:
    """All translated pages."""
    return [ROOT / "README.ko.md", *sorted((ROOT / "docs").rglob("*.ko.md"))]


def original(page: Path) -> Path:
    return page.with_name(page.name.replace(".ko.md", ".md"))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a page without its code, white space folded: a new line break is no change."""
    text = re.sub(r"^(?P<indent> *)```.*?^(?P=indent)``` *$", "", MARK.sub("", text), flags=re.M | re.S)
    return [folded for each in re.split(r"\n\s*\n", text) if (folded := " ".join(each.split()))]


def hashes(page: Path) -> list[str]:
    """The short hashes of an original's paragraphs."""
    return [hashlib.sha256(each.encode()).hexdigest()[:5] for each in paragraphs(page.read_text("utf-8"))]


def changed(page: Path) -> list[str]:
    """The original's paragraphs that the translation does not know yet."""
    match = MARK.search(page.read_text("utf-8"))
    known = match[1].split() if match else []
    source = original(page)
    now = hashes(source)
    if known == now:
        return []
    found = [each for each, short in zip(paragraphs(source.read_text("utf-8")), now, strict=True) if short not in known]
    return found or ["paragraphs were taken out, or stand in another order"]


def confirm(page: Path) -> None:
    """Notes that the translation is up to date."""
    text = MARK.sub("", page.read_text("utf-8")).rstrip("\n")
    page.write_text(f"{text}\n\n<!-- english: {' '.join(hashes(original(page)))} -->\n", "utf-8")


def skeleton(language: str, code: str) -> object:
    """What must be the same in both languages: the code without comments, docstrings and words for people."""
    if language in ("python", "py"):
        tokens = [
            (each.type, each.string)
            for each in tokenize.generate_tokens(io.StringIO(code).readline)
            if each.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        ]
        docstrings = {ast.unparse(each) for each in _docstrings(code)}
        return [
            string
            for kind, string in tokens
            if not (kind == tokenize.STRING and ast.unparse(ast.parse(string.strip(), mode="eval")) in docstrings)
        ]
    if language == "mermaid":
        return re.findall(
            r"^\s*(?:sequenceDiagram|flowchart \w+|participant \w+|subgraph \w+|\w+-?->>?\w+)", code, re.M
        )
    if language in ("yaml", "toml", "sh", "console"):
        code = re.sub(r"(^|\s)#.*$", "", code, flags=re.M)
    if language == "sql":
        code = re.sub(r"--(?! (?:name|record_class):).*$", "", code, flags=re.M)
    return [line.split() for line in code.splitlines() if line.strip()]


def _docstrings(code: str) -> list[ast.expr]:
    found = []
    for node in ast.walk(compile(code, "block", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append(value)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or [str(page) for page in pages() if page.is_file() and changed(page)]:
        confirm(Path(name).resolve())
        print(name)
