"""A walk from a value along the calls that read it, as far as the one who walks follows them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx


class ForwardWalk:
    """Gives ``(node, user)`` for ``start`` and every followed node, with each call that reads it.

    A node is looked at once, and ``most`` nodes at most. ::

        for node, user in (walk := ForwardWalk(gate, 64)):
            if moves_rows(user):
                walk.follow(user)
    """

    def __init__(self, start: fx.Node, most: int) -> None:
        self._stack, self._most = [start], most

    def follow(self, user: fx.Node) -> None:
        """Go on to the calls that read the result of ``user``."""
        self._stack.append(user)

    def __iter__(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        seen = set[fx.Node]()
        while self._stack and len(seen) < self._most:
            node = self._stack.pop()
            if node not in seen:
                seen.add(node)
                yield from ((node, user) for user in node.users)
