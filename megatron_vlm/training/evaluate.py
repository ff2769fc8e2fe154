"""Loss over held-out rows: every sample once, in the training layout.

source rank of each replica: evaluation_rows --groups of rows--> all its ranks --forward only--> loss sum, token count
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_vlm.data.row import Row, row_from_samples
from megatron_vlm.models.built import Model
from megatron_vlm.parallel.batch import share_rows
from megatron_vlm.training.step import reduce_over_job, run_schedule


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Mean token loss over the held-out samples, and how many there were; equal on every rank."""

    loss: float
    samples: int
    supervised_tokens: int


def evaluate(model: Model, rows: Iterator[Row] | None, *, fill_to: int = 0) -> EvalResult:
    """Runs the model over held-out rows without gradients.

    Args:
        model: wrapped or not.
        rows: this replica's rows on its source rank (equally many on every replica); None elsewhere.
        fill_to: length of every row with virtual stages; rows without loss complete the last group there.

    Raises:
        DataError: on every rank, where a replica's rows cannot be read.
    """
    topology = model.topology
    group = 2 * topology.pp if topology.pp > 1 else 1
    source = topology.is_source
    total = {"loss_sum": 0.0, "samples": 0.0, "supervised_tokens": 0.0}
    with model.evaluating():
        while True:
            batch, error = _take(rows, group) if source else (None, None)
            if batch and topology.vp > 1:
                batch += [row_from_samples([], fill_to=fill_to)] * (-len(batch) % topology.pp)
            shared, _ = share_rows(topology, batch, None, error)
            if not shared:
                break
            part = reduce_over_job(run_schedule(model, shared, forward_only=True), shared, topology, model.config)
            total = {key: value + part[key] for key, value in total.items()}
    supervised = int(total["supervised_tokens"])
    loss = total["loss_sum"] / supervised if supervised else float("nan")
    return EvalResult(loss=loss, samples=int(total["samples"]), supervised_tokens=supervised)


def _take(rows: Iterator[Row] | None, count: int) -> tuple[list[Row] | None, BaseException | None]:
    assert rows is not None
    try:
        return list(islice(rows, count)), None
    except Exception as error:  # raised on every rank by share_rows
        return None, error
