"""Who did what, in which step: journals of every rank that outlive it, and verdicts drawn from them."""
