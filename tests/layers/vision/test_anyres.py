"""The connector that lays views out as lines: where each feature goes, by hand, on a projector that numbers patches."""

import pytest
import torch
from torch import nn

from megatron_vlm.data.images.anyres import AnyRes, View, column
from megatron_vlm.layers.vision.anyres import AnyResConnector

SETTINGS = AnyRes(sizes=((8, 16), (16, 8)), tile=8, side=2)


class Numbered(AnyResConnector):
    """Without a projector: features are what goes in; the newline is -1."""

    def __init__(self, settings):
        nn.Module.__init__(self)
        self.layernorm, self.mlp, self.anyres = nn.Identity(), nn.Identity(), settings
        self.newline = nn.Parameter(torch.full((1,), -1.0))


def laid_out(views, settings=SETTINGS):
    patches = sum(4 * (1 + view.rows * view.columns) for view in views)
    return Numbered(settings)(torch.arange(float(patches))[:, None], views)[:, 0].tolist()


def test_lines_of_tiles():
    """The whole is 0 to 3; two tiles beside each other are 4 to 7 and 8 to 11."""
    assert laid_out([View(1, 2, 8, 16)]) == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    # Half as wide: a column on either side sees black alone.
    assert laid_out([View(1, 2, 16, 16)]) == [0, 1, 2, 3, 5, 8, -1, 7, 10, -1]
    assert laid_out([View(0, 0, 5, 5), View(0, 0, 9, 9)]) == [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]


def test_shrunk_lines_are_bilinear():
    settings = AnyRes(sizes=((16, 16),), tile=8, side=2, most=1)
    view = View(2, 2, 16, 16)
    assert settings.lines(view)[4:] == (2, 2)
    # Tiles of 4 x 4 features, by rows 4 5 8 9, 6 7 10 11, 12 13 16 17, 14 15 18 19: means of 2 x 2.
    assert laid_out([view], settings) == [0, 1, 2, 3, 5.5, 9.5, -1, 13.5, 17.5, -1]


def test_what_is_known_by_its_patches_alone():
    """Estimates, and filler of one patch: the most that such images may have."""
    connector = Numbered(SETTINGS)
    assert len(connector(torch.zeros(12, 1), [12])) == SETTINGS.tokens(column(3)) == 4 + 4 * 3
    out = connector(torch.zeros(1, 1), [1])
    assert len(out) == 2
    out.sum().backward()
    assert connector.newline.grad.tolist() == [1.0]


def test_another_number_of_patches_is_an_error():
    with pytest.raises(RuntimeError):
        Numbered(SETTINGS)(torch.zeros(11, 1), [View(1, 2, 8, 16)])
