"""Operations of towers and connectors, counted by hand."""

from types import SimpleNamespace

from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops, tower_flops


def test_operations_are_those_of_the_matrix_products():
    assert projector_flops(5, 3, 7) == 2 * 5 * (3 * 7 + 7 * 7)
    vision = SimpleNamespace(
        hidden_size=4,
        num_layers=9,
        num_run_layers=2,
        patch_numbers=12,
        ffn_hidden_size=6,
        gated_mlp=False,
        num_window_layers=0,
    )
    cost = ImageCost(patches=10, segments=(5, 6), features=1, connector=0.0)
    embedding = 2 * 10 * (3 * 2 * 2) * 4
    linears = 2 * 11 * (4 * 4 * 4 + 2 * 4 * 6)  # query, key, value and output; two of the MLP
    attention = 2 * 2 * (5 * 5 + 6 * 6) * 4  # scores, and what they weigh
    assert tower_flops(vision, [cost]) == embedding + 2 * (linears + attention)
    assert tower_flops(vision, [cost, cost]) == 2 * tower_flops(vision, [cost])


def test_windows_and_gated_mlps():
    vision = SimpleNamespace(
        hidden_size=4, num_layers=4, patch_numbers=24, ffn_hidden_size=6, gated_mlp=True, num_window_layers=3
    )
    cost = ImageCost(patches=12, segments=(12,), windows=(8, 4), features=1, connector=0.0)
    linears = 2 * 12 * (4 * 4 * 4 + 3 * 4 * 6)
    attention = 2 * 2 * (12 * 12 + 3 * (8 * 8 + 4 * 4)) * 4
    assert tower_flops(vision, [cost]) == 2 * 12 * 24 * 4 + 4 * linears + attention
