"""Labels of histograms say the numbers that they stand at."""

import numpy as np
import pytest

from megatron_vlm.data.view.stats import heights_marked, in_figures


@pytest.mark.parametrize("most, lines", [(1, [1]), (2, [1, 2]), (3, [1, 3]), (5, [2, 5]), (12345, [6172, 12345])])
def test_lines_stand_at_whole_counts(most, lines):
    assert heights_marked(most) == lines  # half of 3 was called 2 at the height of 1.5, half of 1 was called 0


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (12345.0, "12,345"), (1234567.0, "1,234,567"), (10000.5, "10,000.5"), (0.53125, "0.5312"), (99.75, "99.75"),
     (np.float64(16384), "16,384")],
)  # fmt: skip
def test_figures(value, text):
    assert in_figures(value) == text  # 12345 was 1.234e+04
