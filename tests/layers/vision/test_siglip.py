"""SigLIP's parts against Hugging Face's Idefics2 tower."""

import pytest
import torch
from torch import nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from megatron_vlm.errors import DataError
from megatron_vlm.layers.vision.siglip import SiglipVisionModel, patchify, position_ids


class Recorder(nn.Module):
    """Stands where the position table is, and keeps the ids it is asked for."""

    def forward(self, ids):
        self.ids = ids
        return torch.zeros(*ids.shape, 4)


@pytest.fixture(scope="module")
def hf_position_ids():
    config = Idefics2VisionConfig(hidden_size=4, image_size=70 * 2, patch_size=2, num_attention_heads=1)
    embeddings = Idefics2VisionEmbeddings(config)
    embeddings.position_embedding = Recorder()

    def ids(rows, columns, canvas_rows, canvas_columns):
        mask = torch.zeros(1, canvas_rows, canvas_columns, dtype=torch.bool)
        mask[:, :rows, :columns] = True
        embeddings(torch.zeros(1, 3, canvas_rows * 2, canvas_columns * 2), mask)
        return embeddings.position_embedding.ids.view(canvas_rows, canvas_columns)[:rows, :columns].reshape(-1)

    return ids


def test_position_ids_equal_hf_for_1_to_70_patches_a_side(hf_position_ids):
    for count in range(1, 71):
        other = 71 - count
        assert torch.equal(position_ids(count, other, 70), hf_position_ids(count, other, count, other)), count
        assert torch.equal(position_ids(count, 3, 70), hf_position_ids(count, 3, 70, 70)), count  # on a padded canvas


def test_exact_arithmetic_would_give_other_buckets():
    """The float32 ops are repeated literally because they differ from floor(i * side / n) at some sizes."""
    exact = {n: (torch.arange(n) * 70 // n).tolist() for n in range(1, 71)}
    differs = [n for n in range(1, 71) if (position_ids(n, 1, 70) // 70).tolist() != exact[n]]
    assert differs == [25, 49, 50, 55]


def test_patches_equal_a_convolution():
    image = torch.randn(3, 23, 30)
    conv = nn.Conv2d(3, 5, 7, stride=7)
    expected = conv(image[None])[0].flatten(1).T
    ours = patchify(image, 7) @ conv.weight.flatten(1).T + conv.bias
    assert ours.shape == (3 * 4, 5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_image_smaller_than_a_patch_is_an_error():
    tower = SiglipVisionModel(
        nn.Identity(),
        hidden_size=4,
        patch_size=8,
        num_channels=3,
        side=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with pytest.raises(DataError, match="30x7 pixels"):
        tower([torch.zeros(3, 7, 30)])
