"""What a trace computes, read by values: rows, expert functions, routing, the combine. No class names, no patterns."""
