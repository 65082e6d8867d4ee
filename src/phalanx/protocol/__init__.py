"""Every message between processes: typed structs, encoded by msgspec, never pickled.

    client  → brain     Submit, Cancel, Resize, Reload, Shutdown, ...      (`client`: server process to engine process)
    brain   → client    EngineReady, TokenBatch, EngineStats, ...
    brain   → workers   Call(Step | AllocateCache | ...)                   (`worker`: one frame for all workers)
    worker  → brain     Reply(StepResult | ...), StepIssued, Failure, Progress, Publish

What grows with the number of requests travels as columns: the bytes of an int32 or float32 array, in the machine's own
order (every supported machine is little-endian). See `columns.ints` and `columns.as_ints`.
"""
