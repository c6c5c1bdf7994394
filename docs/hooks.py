"""What mkdocs does not do by itself: docstrings' roles become plain names, and no page may load from another host."""

import re

from mkdocs.exceptions import PluginError

_ROLE = re.compile(r":?\b(?:func|class|meth|mod|attr|data):(<code>)~?")
_FOREIGN = re.compile(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//[^>]*>|<link[^>]*href=\"?(?:https?:)?//[^>]*>")


def on_page_content(html: str, **_: object) -> str:
    return _ROLE.sub(r"\1", html)


def on_post_page(output: str, page: object, **_: object) -> str:
    foreign = _FOREIGN.search(output)
    if foreign:
        raise PluginError(f"{page}: a reader's browser would ask another host: {foreign.group()}")
    return output
