"""From a whole model to rewritten blocks: find the places, probe each, rewrite it, verify it."""
