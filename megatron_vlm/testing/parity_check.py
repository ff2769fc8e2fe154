"""The check of every family's parity test: logits, loss and each gradient in fp32 against a reference.

samples --reference, one at a time--> logits, loss, gradients; the same logits in fp64
        --ours: one packed row, and one row each--> held to Bars
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, cat

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import EncodedSample, row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import gradient_errors, layout_logits, layout_run, merge_gradients


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What is allowed.

    Attributes:
        logits: of the largest logit.
        over_noise: times the reference's own distance between fp32 and fp64.
        loss: relative.
        gradient: of a gradient's norm.
    """

    logits: float = 1e-5
    over_noise: float = 3.0
    loss: float = 2e-6
    gradient: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Distances:
    """What was measured.

    Attributes:
        logits: largest difference of a packed row's; ``largest``: largest logit; ``noise``: the reference's own fp32-fp64
            distance; ``apart``: a packed row from its samples one at a time.
        loss: relative.
        gradient: the worst, of the gradient's norm, and ``where``: its HF name.
        grads, errors: our gradients, and the relative error of each.
    """

    logits: float
    largest: float
    noise: float
    apart: float
    loss: float
    gradient: float
    where: str
    grads: dict[str, Tensor]
    errors: dict[str, float]

    def beyond(self, bars: Bars) -> list[str]:
        """What is beyond a bar, in words."""
        found = []
        if self.logits > bars.logits * self.largest or self.logits > bars.over_noise * self.noise:
            found.append(
                f"logits off {self.logits:.2e}, of the largest {self.logits / self.largest:.1e}, "
                f"{self.logits / self.noise:.2f} x noise"
            )
        if self.apart > bars.logits * self.largest:
            found.append(f"a packed row differs from its samples one at a time by {self.apart:.2e}")
        if self.loss > bars.loss or self.gradient > bars.gradient:
            found.append(f"loss off {self.loss:.1e}, worst gradient {self.gradient:.2e} {self.where}")
        return found


def measure_parity(
    directory: str,
    samples: Sequence[EncodedSample],
    reference: tuple[float, Tensor, dict[str, Tensor]],
    exact: Tensor,
    no_true_gradient: Callable[[str], bool] = lambda name: False,
) -> Distances:
    """Runs one process of ours beside a reference; arguments as of ``check_parity``."""
    loss, logits, grads = reference
    rows = [row_from_samples(samples), *(row_from_samples([sample]) for sample in samples)]
    (ours,) = run_distributed(layout_logits, directory, rows, {}, {})
    packed, alone = ours["logits"][0], cat(ours["logits"][1:])
    source = open_source(directory)
    mapping = source.spec.mapping(source.config, tp=1).padded(8)
    results = run_distributed(layout_run, directory, rows[:1], {}, {})
    our_loss, our_grads = merge_gradients(results, mapping, source.config.text.vocab_size)
    errors = gradient_errors(our_grads, grads)
    worst, where = max((error, n) for n, error in errors.items() if not no_true_gradient(n))
    return Distances(
        logits=float((packed - logits).abs().max()),
        largest=float(logits.abs().max()),
        noise=float((logits.double() - exact).abs().max()),
        apart=float((packed - alone).abs().max()),
        loss=abs(our_loss - loss) / loss,
        gradient=worst,
        where=where,
        grads=our_grads,
        errors=errors,
    )


def check_parity(
    name: str,
    directory: str,
    samples: Sequence[EncodedSample],
    reference: tuple[float, Tensor, dict[str, Tensor]],
    exact: Tensor,
    bars: Bars,
    no_true_gradient: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Holds one process of ours to a reference; prints the distances.

    Args:
        name: of the twin, for what is printed.
        directory: of the twin.
        samples: what both sides run.
        reference: loss over all supervised tokens, logits [sum of lengths, V], gradients by the names of the files.
        exact: the logits in fp64.
        bars: what is allowed.
        no_true_gradient: ``f(hf name)``: the true gradient is zero, what is computed is round-off.

    Returns:
        our gradients, and the relative error of each.

    Raises:
        AssertionError: beyond a bar.
    """
    found = measure_parity(directory, samples, reference, exact, no_true_gradient)
    print(f"{name}: logits {found.logits:.2e}, reference fp32-fp64 {found.noise:.2e}, largest {found.largest:.2f}")
    print(f"{name}: loss {found.loss:.1e}, worst gradient {found.gradient:.2e} {found.where}")
    if found.beyond(bars):
        raise AssertionError(f"{name}: {'; '.join(found.beyond(bars))}")
    return found.grads, found.errors
