"""Writers that fail, and end no run."""

from megatron_vlm.training.metrics import writers


def test_a_writer_that_failed_is_made_again(monkeypatch):
    """And what failed meanwhile is counted."""
    made, points = [], []

    class Fickle:
        def __init__(self):
            made.append(self)

        def add_scalar(self, name, value, step):
            if step in (2, 3):
                raise ConnectionError("gone")
            points.append(step)

        def close(self):
            raise RuntimeError("nothing works")

    writer = writers.SafeWriter("A service", Fickle)
    for step in range(1, 6):
        if step == 4:
            monkeypatch.setattr(writers.time, "monotonic", lambda: 1e12)
        writer.add_scalar("loss", 1.0, step)
    writer.close()
    assert points == [1, 4, 5] and len(made) == 2
