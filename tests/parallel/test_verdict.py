"""Who is judged lost, and in which words."""

from megatron_vlm.parallel.verdict import Record, Seen, judge, missing
from megatron_vlm.processes import Identity


def record(number: int, **fields) -> Record:
    return Record(rank=number, who=Identity.of(), **fields)


def test_judgement():
    settings = dict(timeout=45.0, settled=7.0, grace=15.0, hint="Do this")
    gone = Record(rank=2, who=Identity("elsewhere", "", 7, 0), phase="save", iteration=9)
    seen = {1: Seen(record(1, phase="data"), 100.0), 2: Seen(gone, 100.0)}
    assert judge(seen, 144.9, **settings) is None
    seen[1].since = 140.0
    verdict = judge(seen, 146.0, **settings)
    assert verdict.ranks == (2,) and verdict.doomed == (gone.who,)
    expected = (
        "no sign of life: rank 2 (process 7 on elsewhere; silent for 46 s, last in phase save, iteration 9). Do this"
    )
    assert verdict.text == expected
    assert type(verdict).from_json(verdict.to_json()) == verdict
    ended = {1: Seen(record(1, phase="ended"), 0.0), 3: Seen(record(3, phase="closing"), 0.0)}
    assert judge(ended, 1e6, **settings) is None
    verdict = missing(4, [0, 2], 50, "rank 0 at h:1", {2: Identity.of(), 3: gone.who})
    assert verdict.text.startswith("ranks 1, 3 (process 7 on elsewhere) of 4 did not come to rank 0 at h:1, and nobody")
    assert verdict.ranks == (1, 3) and verdict.doomed == (gone.who,)
