"""The process that runs one rank: its loop, its model, its sampler."""
