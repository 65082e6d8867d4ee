from __future__ import annotations

import numpy as np

from phalanx.engine.request import Request, Running
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import NO_TOKEN


def test_a_row_without_a_token_is_no_end_of_a_request_with_fewer_end_tokens() -> None:
    running = Running(max_num_seqs=2, max_model_len=8, block_size=4)
    for i, end_token_ids in enumerate(((), (5, 6, 7))):
        prompt = np.array([1], dtype=np.int32)
        request = Request(i, i, prompt, 1, 4, SamplingParams(), 0, end_token_ids)
        running.add(request, np.array([i], dtype=np.int32), 0)
    assert running.end_token_ids_SE.shape == (2, 3)
    assert NO_TOKEN not in running.end_token_ids_SE
    assert (running.end_token_ids_SE >= 0).sum() == 3
