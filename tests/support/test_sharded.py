"""Sharded support sets, as far as one process can test them; tests/training/in_ranks.py tests the rest."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.support.queue import Queue
from src.support.ring_buffer import RingBuffer
from src.support.search import TorchSearch
from src.support.sharded import Shard, in_shards, own_rows

COUNT = 3
SHARDS = [Shard(rank, COUNT) for rank in range(COUNT)]
CPU = torch.device("cpu")


@settings(max_examples=30)
@given(size=st.integers(1, 6), batches=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_rings_in_shards_hold_together_what_one_ring_holds(size, batches):
    """Also after writes that are longer than the ring."""
    whole = RingBuffer(size * COUNT, 1)
    parts = [RingBuffer(size * COUNT, 1, shard=shard) for shard in SHARDS]
    for number, batch in enumerate(batches):
        rows = torch.arange(float(batch * COUNT))[:, None] + 100 * number
        places, kept = whole.write(rows)
        assert whole.rows_ND[places].equal(rows[kept])
        for part in parts:
            places, kept = part.write(rows)
            assert part.rows_ND[places].equal(rows[kept])
            assert part.rows_ND.equal(part.shard.local(whole.rows_ND))
            assert part.filled_ND.equal(part.shard.local(whole.filled_ND))
            assert part.full == whole.full


@given(start=st.integers(0, 20), length=st.integers(0, 20))
def test_every_number_is_one_shards(start, length):
    owned = [shard.own(start, start + length, CPU) for shard in SHARDS]
    assert torch.cat(owned).sort().values.tolist() == list(range(start, start + length))
    for shard, numbers in zip(SHARDS, owned, strict=True):
        rows, mine = shard.rows(numbers)
        assert mine.all()
        assert shard.slots(rows).equal(numbers)


def test_a_saved_set_is_cut_into_shards():
    whole = Queue(2 * COUNT, 4, TorchSearch())
    whole.update(torch.randn(2 * COUNT, 4), torch.arange(2 * COUNT), torch.arange(2 * COUNT))
    parts = [Queue(2 * COUNT, 4, TorchSearch(), shard=shard) for shard in SHARDS]
    for part in parts:
        part.load_state_dict(own_rows(part, whole.state_dict()))
        assert part.images_N.tolist() == [part.shard.rank, part.shard.rank + COUNT]
        assert part.ready
        assert in_shards(part).keys() == {"hits_N", "images_N", "labels_N", "written_N", "ring.rows_ND"}
    assert in_shards(whole) == {}
    assert own_rows(whole, whole.state_dict()).keys() == whole.state_dict().keys()
