"""The API page reads docstrings that name things as :class:`Report`: show the name, not the role."""

import re

_ROLE = re.compile(r":?\b(?:func|class|meth|mod|attr|data):(<code>)~?")


def on_page_content(html: str, **_: object) -> str:
    return _ROLE.sub(r"\1", html)
