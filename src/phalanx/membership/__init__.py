"""Lines of ranks, one after the other: how an engine goes on after a fault."""
