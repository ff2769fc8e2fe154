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
    loss, logits, grads = reference
    rows = [row_from_samples(samples), *(row_from_samples([sample]) for sample in samples)]
    (ours,) = run_distributed(layout_logits, directory, rows, {}, {})
    packed, alone = ours["logits"][0], cat(ours["logits"][1:])
    off, apart = float((packed - logits).abs().max()), float((packed - alone).abs().max())
    noise, largest = float((logits.double() - exact).abs().max()), float(logits.abs().max())
    print(f"{name}: logits {off:.2e}, reference fp32-fp64 {noise:.2e}, largest {largest:.2f}")
    if off > bars.logits * largest or off > bars.over_noise * noise:
        raise AssertionError(
            f"{name}: logits off {off:.2e}, of the largest {off / largest:.1e}, {off / noise:.2f} x noise"
        )
    if apart > bars.logits * largest:
        raise AssertionError(f"{name}: a packed row differs from its samples one at a time by {apart:.2e}")

    source = open_source(directory)
    mapping = source.spec.mapping(source.config, tp=1).padded(8)
    results = run_distributed(layout_run, directory, rows[:1], {}, {})
    our_loss, our_grads = merge_gradients(results, mapping, source.config.text.vocab_size)
    errors = gradient_errors(our_grads, grads)
    worst = max((error, n) for n, error in errors.items() if not no_true_gradient(n))
    print(f"{name}: loss {abs(our_loss - loss) / loss:.1e}, worst gradient {worst[0]:.2e} {worst[1]}")
    if abs(our_loss - loss) > bars.loss * loss or worst[0] > bars.gradient:
        raise AssertionError(f"{name}: loss {our_loss} for {loss}, worst gradient {worst}")
    return our_grads, errors
