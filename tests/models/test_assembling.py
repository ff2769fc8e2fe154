"""Vocabularies with new rows: which tokens are new, and what their rows become."""

import pytest
import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.models.assembling import check_names, drawn, extend_vocabulary, new_ids
from megatron_vlm.weights.mapping import TensorInfo


class Tokenizer:
    """Ten words, then ``<img>`` and ``<video>``."""

    def convert_tokens_to_ids(self, token):
        return {"<a>": 3, "<img>": 10, "<video>": 11}[token]


def test_rows_that_a_model_has_to_spare_were_never_trained():
    """Qwen's embedding has more rows than its tokenizer has tokens: an added token falls on one of them."""
    assert new_ids(["<a>", "<img>", "<video>"], Tokenizer(), {"<a>"}, rows=16) == [10, 11]
    assert new_ids(["<a>", "<img>", "<video>"], Tokenizer(), {"<a>", "<img>", "<video>"}, rows=11) == [11]


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_trained_ones_or_drawn(tied):
    old = torch.arange(32.0).reshape(16, 2)
    for new_rows in ("mean", "normal"):
        readers = dict.fromkeys(("embedding", "head"), old.clone)
        infos = {name: TensorInfo(dtype=old.dtype, shape=(16, 2)) for name in readers}
        extend_vocabulary((readers, infos), ("embedding", "head"), 18, [10, 11], new_rows, 0, tied=tied)
        embedding, head = readers["embedding"](), readers["head"]()
        kept = [*range(10), *range(12, 16)]
        assert infos["head"].shape == embedding.shape == (18, 2) and torch.equal(embedding[kept], old[kept])
        if new_rows == "mean":
            assert torch.equal(embedding[[10, 11, 16, 17]], old[:10].mean(0).expand(4, 2))
        else:
            assert embedding[[10, 11, 16, 17]].abs().max() < 0.2 and torch.equal(embedding, head) == tied


def test_what_is_drawn():
    info = TensorInfo(dtype=torch.float32, shape=(64,))
    assert not drawn("a.bias", info, 0).any() and bool((drawn("layer_norm.weight", info, 0) == 1).all())
    one, again, other = (drawn("a.weight", info, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and 0.01 < float(one.std()) < 0.04


def test_names():
    check_names({"a"}, {"a"}, "x")
    with pytest.raises(ConversionError, match=r"x is no y: 1 tensors missing \(a\), 1 unknown \(b\)"):
        check_names({"a"}, {"b"}, "x is no y")
