"""What is added for sharded parameters; the whole against real steps: test_estimate.py."""

import torch

from megatron_vlm.training.memory.sharded import Sharding, cut_bytes


def test_rows_of_rank_0():
    sharding = Sharding(ranks=4, keeps=False, frees=True, adds=False, reduced=4)
    assert [sharding.numel(torch.empty(rows, 3, device="meta")) for rows in (8, 5, 1)] == [6, 6, 3]
    codes, table = torch.empty(9, 32, dtype=torch.uint8), torch.empty(10)
    assert cut_bytes(iter((codes, table)), sharding) == 3 * 32 + 40
    assert cut_bytes(iter((codes, table)), None) == 9 * 32 + 40
