"""Weights and KV cache: where their memory comes from, and how much of it there is."""
