"""One call of a module as a trace with values, and what can be asked of the trace."""
