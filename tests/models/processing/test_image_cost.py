"""Operations of towers and connectors, counted by hand."""

from types import SimpleNamespace

from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops, tower_flops


def test_operations_are_those_of_the_matrix_products():
    assert projector_flops(5, 3, 7) == 2 * 5 * (3 * 7 + 7 * 7)
    vision = SimpleNamespace(
        hidden_size=4, num_layers=9, num_run_layers=2, num_channels=3, patch_size=2, ffn_hidden_size=6
    )
    cost = ImageCost(patches=10, segments=(5, 6), features=1, connector=0.0)
    embedding = 2 * 10 * (3 * 2 * 2) * 4
    linears = 2 * 11 * (4 * 4 * 4 + 2 * 4 * 6)  # query, key, value and output; two of the MLP
    attention = 2 * 2 * (5 * 5 + 6 * 6) * 4  # scores, and what they weigh
    assert tower_flops(vision, [cost]) == embedding + 2 * (linears + attention)
    assert tower_flops(vision, [cost, cost]) == 2 * tower_flops(vision, [cost])
