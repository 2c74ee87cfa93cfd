"""How it gets fast: work on all cores, and int8 weights."""
