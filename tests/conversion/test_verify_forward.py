"""A model that computes something else fails where it starts to."""

import pytest

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.report import Report
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """name -> HF directory."""
    root = tmp_path_factory.mktemp("twins")
    write_tiny_idefics2(root / "mistral", sliding_window=11)
    write_tiny_idefics2(root / "llama", text="llama", tie=True)
    return root


def compare_with(hf_dir, part, **changes):
    """On a rank: the comparison of a model that computes something else with the right weights."""
    from megatron_vlm.conversion.verify_forward import compare_runs

    with open_source(hf_dir) as source:
        source.config = source.config.replace(**{part: getattr(source.config, part).replace(**changes)})
        report = Report(level="full")
        compare_runs(hf_dir, source, report, gradients=True)
    return report.passed, "\n".join(report.lines)


@pytest.mark.parametrize(
    "part, changes, first",
    [
        ("text", dict(rotary_base=20000.0), "language_model.decoder.layers.0"),
        ("text", dict(sliding_window=12), "language_model.decoder.layers.0"),
        ("text", dict(norm_epsilon=1e-3), "language_model.decoder.layers.0"),
        ("vision", dict(norm_epsilon=1e-3), "vision_model.encoder.layers.0"),
        ("perceiver", dict(norm_epsilon=1e-3), "connector.perceiver_resampler.layers.0"),
    ],
)
def test_a_wrong_computation_fails_where_it_starts(twins, part, changes, first):
    ((passed, text),) = run_distributed(compare_with, twins / "mistral", part, **changes)
    assert not passed
    failed = [line.split()[0] for line in text.splitlines() if line.endswith("DIFFERS")]
    assert failed[0] == first, text
