"""A verification card: what is claimed of a family, measured on its tiny twins without a GPU, as one page.

claims (claims.py) --Bench--> outcomes --page.py--> docs/cards/FAMILY.md
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.files import writing
from megatron_vlm.testing.cards.claims import Bench
from megatron_vlm.testing.cards.page import CLAIMS, SLOW, Outcome, digest_of, page


def make_card(family: str, only: Sequence[str] = (), quick: bool = False, output: str | None = None) -> bool:
    """Measures, prints or writes the card of a family; returns whether every claim that was measured holds.

    Args:
        family: of the registry.
        only: claims to measure; none: all.
        quick: leave out those that take long.
        output: file that takes the card.

    Raises:
        ConfigError: no such family or claim, or the file cannot be written.
    """
    for name in only:
        if name not in CLAIMS:
            raise ConfigError(f"unknown claim {name!r}{nearest(name, CLAIMS)}; known: {', '.join(CLAIMS)}")
    start, code = time.monotonic(), digest_of(family)  # now: files may change while it runs
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(family, Path(folder))
        for name in only or CLAIMS:
            if only or not (quick and name in SLOW):
                outcomes[name] = bench.measure(name)
                print(f"{name}: {outcomes[name].verdict}, {outcomes[name].measured}", flush=True)
    text = page(family, code, outcomes, time.monotonic() - start)
    if output:
        with writing(output):
            Path(output).write_text(text, encoding="utf-8")
    else:
        print(f"\n{text}", end="")
    return all(outcome.passed is not False for outcome in outcomes.values())
