"""Places in a model where experts or dense FFNs may be. A place is a hint and decides nothing."""
