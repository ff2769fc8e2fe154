"""Tables of ``convert verify``."""

from megatron_vlm.conversion.report import Report, Row, module_of


def test_a_row_that_did_not_pass_fails_the_report(capsys):
    report = Report(level="weights")
    report.table("weights", ("tensors",), [Row("decoder", ("12",), True)])
    assert report.passed
    report.table("gradients", ("ratio",), [Row("decoder.layers.0", ("9.1",), False), Row("connector", ("1.0",), True)])
    report.table("more", ("ratio",), [Row("connector", ("1.0",), True)])
    assert not report.passed
    lines = capsys.readouterr().out.splitlines()
    assert lines == report.lines
    assert "decoder.layers.0    9.1  DIFFERS" in lines and "connector           1.0  ok" in lines


def test_modules():
    assert module_of("language_model.decoder.layers.7.mlp.linear_fc1.weight") == "language_model.decoder.layers.7"
    assert module_of("language_model.embedding.word_embeddings.weight") == "language_model.embedding.word_embeddings"
    assert module_of("connector.newline") == "connector.newline"
