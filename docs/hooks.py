"""What the site needs and neither MkDocs nor its plugins can be configured to do."""

from __future__ import annotations

import re
from typing import Any


def on_post_page(output: str, **_: Any) -> str:
    """Takes `<link rel=alternate>` out: for each, the theme's script would ask for a sitemap, which fails from disk.

    The language switch does not need it: its links lead to the same page already.
    """
    return re.sub(r"\s*<link rel=\"?alternate\"?[^>]*>", "", output)
