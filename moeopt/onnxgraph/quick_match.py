"""onnxscript's rewrite rules, tried only at nodes that they can end in.

For a rule with two outputs, ``SimplePatternMatcher.match`` lists all nodes of the graph before it looks at the
one it was given: at every node, for every such rule, so a graph of twice the layers takes four times as long. The
look at the given node comes first here; what is matched stays the same, since that look is also the matcher's own
first. (onnxscript 0.7.2: 48 layers of 128 experts export in 3 minutes instead of more than 10.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def rules_by_their_last_op() -> Iterator[None]:
    """While open, rules of onnxscript are matched quickly; does nothing if its matcher is built otherwise."""
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:  # private names of another version: slower, with the same result
        yield
        return
    slow = SimplePatternMatcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        last = self.pattern.output_nodes[0]
        if options.get("tracer") is None and not (last.op.matches(node.op_type) and last.domain.matches(node.domain)):
            return MatchResult().fail(f"no {last.op}")
        return slow(self, model, graph, node, **options)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = slow
