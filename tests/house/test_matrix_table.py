"""The table of the whole matrix: the worst of each twin, of what the checks really print."""

from megatron_vlm.testing.layouts import Case, LayoutCheck, LayoutDistances
from tests.matrix_table import HEAD, table


class Check(LayoutCheck):
    """Runs nothing: what it would measure is told."""

    def __init__(self, gradient: float):
        self.gradient = gradient

    def alone(self, freeze):
        return 6.0, {}, [(6.0, 1.0), (5.0, 1.0), (4.0, 1.0)]

    def measure(self, case):
        return LayoutDistances(loss=1e-8, gradient=self.gradient, where="a.weight", step_loss=2e-7, step_norm=3e-6)


def test_the_worst_of_each_twin(capsys):
    outputs = []
    for gradient, case in ((4e-6, Case(tp=2, twin="tied")), (5e-6, Case(cp=2, twin="tied")), (1e-6, Case(pp=2))):
        Check(gradient).check(case)
        outputs.append(("idefics2", capsys.readouterr().out))
    assert table([("other", "no table here\n"), *outputs]) == [
        HEAD,
        "| --- | --- | --- | --- | --- | --- |",
        "| idefics2 | 1 | 1.0e-08 | 1.0e-06 | 2.0e-07 | 3.0e-06 |",
        "| idefics2, tied | 2 | 1.0e-08 | 5.0e-06 | 2.0e-07 | 3.0e-06 |",
    ]
    assert table([("other", "")]) == []
    first = "tp2pp1dp1: loss 1e-07, worst gradient 9.0e-01 of a.weight"  # and it failed
    assert table([*outputs, ("idefics2", first), ("llava", first)])[2::2] == [
        "| idefics2 | 2 (1 cut short) | 1.0e-07 | 9.0e-01 | 2.0e-07 | 3.0e-06 |",
        "| llava | 1 (1 cut short) | 1.0e-07 | 9.0e-01 | - | - |",
    ]
