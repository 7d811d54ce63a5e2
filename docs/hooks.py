"""What the site needs and neither MkDocs nor its plugins can be configured to do.

MkDocs builds the site once for each language, with one search index for both: the last build's, from disk, and a mixture
over HTTP. So each language gets an index of its own, `search/` and `ko/search/`, and its pages look there.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import CombinedEvent, event_priority

from database.driver.pool import DRAIN_SECONDS

DEFAULT = "en"
NOT_TRANSLATED = {
    "ko": "이 페이지는 아직 한국어로 옮기지 않아서 영어로 나옵니다.",
}
"""What a page says at its head that stands in a language's site in English."""
OUTPUT = {"en": "Output", "ko": "출력"}
"""What stands above the output of an example; in the sources it is the same in all languages."""

DEFAULTS = {"DRAIN_SECONDS": repr(DRAIN_SECONDS)}
"""Constants that stand for defaults in signatures."""

entries: dict[str, list[dict[str, Any]]] = {}
"""What can be found, by language; filled by one build after the other."""


def language(config: Any) -> str:
    """The language whose pages are being built."""
    return str(config.plugins["i18n"].current_language or DEFAULT)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Says so where a page is not translated."""
    here = language(config)
    if here == DEFAULT or page.file.src_uri.endswith(f".{here}.md"):
        return markdown
    head = re.match(r"(?s)(?:---\n.*?\n---\n)?\s*(?:# [^\n]*\n)?", markdown)
    place = head.end() if head else 0
    return f'{markdown[:place]}\n!!! note ""\n    {NOT_TRANSLATED[here]}\n\n{markdown[place:]}'


def on_page_content(content: str, *, config: Any, **_: Any) -> str:
    """Keeps the sources of diagrams out of the search, shows defaults as values, and translates what stands above outputs."""
    content = content.replace(
        '<span class="filename">Output</span>', f'<span class="filename">{OUTPUT[language(config)]}</span>'
    )
    content = re.sub(r'<div class="(language-text [^"]*)">(.*?)</div>', aligned, content, flags=re.S)
    for name, value in DEFAULTS.items():
        content = re.sub(rf'<span class="n">{name}</span>', f'<span class="mf">{value}</span>', content)
        content = re.sub(rf'<code><span title="[^"]*">{name}</span></code>', f"<code>{value}</code>", content)
    return content.replace('<pre class="diagram">', '<pre class="diagram" data-search-exclude>')


def aligned(block: re.Match[str]) -> str:
    """Marks a block whose lines make columns or a tree: a phone shows them unbroken, and scrolls."""
    columns = len(re.findall(r"^(?:<[^>]*>)*\s*[^\s<].*?\S {2,}\S|[├└]", block[2], re.M)) > 3
    return f'<div class="{block[1]}{" aligned" if columns else ""}">{block[2]}</div>'


def breakable(code: re.Match[str]) -> str:
    """Lets a long identifier in a table break between its words, so that a phone shows the cells beside it."""
    word = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[_.:/(])(?=[\w\"'])", "<wbr>", code[1])
    return f"<code>{word}</code>"


def on_post_page(output: str, *, config: Any, **_: Any) -> str:
    """Sends the search to the language's own index, and takes `<link rel=alternate>` out.

    For each of those links, the theme's script would ask for a sitemap, which fails from disk. The language switch does
    not need them: its links lead to the same page already.
    """
    here = language(config)
    output = re.sub(
        r"<td[ >].*?</td>", lambda cell: re.sub(r"<code>([^<]{9,})</code>", breakable, cell[0]), output, flags=re.S
    )
    if here != DEFAULT:  # "base" is what the search takes its index and the places of its results from
        output = re.sub(
            r'(<script id="?__config"?[^>]*>\{.*?"base": ")([./]+)"',
            lambda match: f'{match[1]}{match[2].rstrip("/")}/{here}/"',
            output,
            count=1,
        )
    return re.sub(r"\s*<link rel=\"?alternate\"?[^>]*>", "", output)


def collect(config: Any, **_: Any) -> None:
    """Keeps what this build's pages have; identifiers are found by their parts as well (`timeout`: `pool_timeout`)."""
    here, found = language(config), []
    for entry in config.plugins["material/search"].search_index.entries:
        text = html.unescape(re.sub(r"<[^>]*>", " ", f"{entry['title']} {entry['text']}"))
        parts = {part for word in re.findall(r"\w+_\w+", text) for part in word.strip("_").split("_")}
        location = entry["location"].removeprefix(f"{here}/") if here != DEFAULT else entry["location"]
        found.append({**entry, "location": location, "parts": " ".join(sorted(parts))})
    entries[here] = found


@event_priority(-200)  # behind the plugins that write the common index
def write(config: Any, **_: Any) -> None:
    """Writes an index for each language: JSON for the web, the same as a script for a site on disk."""
    search = config.plugins["material/search"].config
    fields = {name: dict(field) for name, field in search["fields"].items()}
    for here, found in entries.items():
        data = {
            "config": {
                "lang": ["en"] if here == DEFAULT else [DEFAULT, here],
                "separator": search["separator"],
                "pipeline": search["pipeline"],
                "fields": {**fields, "parts": {"boost": 0.5}},
            },
            "docs": found,
        }
        folder = Path(config.site_dir, "" if here == DEFAULT else here, "search")
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        (folder / "search_index.json").write_text(text, "utf-8")
        (folder / "search_index.js").write_text(f"var __index = {text}", "utf-8")


on_post_build = CombinedEvent(collect, write)
