"""The weight map of LLaVA-NeXT and LLaVA-OneVision: round trips bit for bit, what is not built is refused by name."""

import json

import pytest
import torch
import transformers

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.llava_next.mapping import NAMES
from megatron_vlm.testing.twins.llava_next import write_tiny_llava_next
from megatron_vlm.testing.twins.model_folders import assert_same_model, tensors_of

SPEC = registry.get("llava_next")
KINDS = {"LlavaNext": {}, "LlavaOnevision": dict(tie=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> (folder, transformers' model)."""
    made = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = folder, write_tiny_llava_next(folder, kind, **options)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_hf_model_is_named_once(folders, kind):
    _, model = folders[kind]
    mapping = SPEC.mapping(SPEC.config(model.config.to_dict()))
    assert mapping.hf_names() == {NAMES.file_name(name) for name, _ in model.named_parameters()}
    assert "image_newline" in mapping.hf_names() and bool(mapping.hf_tied) == (kind == "LlavaOnevision")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(folders, tmp_path, kind):
    folder, model = folders[kind]
    for tp, pp in ((1, 1), (4, 1), (2, 2)):
        hf2mg(folder, tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
    for out in (
        "hf11",
        "hf41",
        "hf22",
    ):  # the names are those of the published files, which transformers writes no more
        theirs, found = {NAMES.file_name(n): t for n, t in tensors_of(folder).items()}, tensors_of(tmp_path / out)
        assert theirs.keys() == found.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in found.items())
    again = type(model).from_pretrained(tmp_path / "hf22").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert_same_model(tmp_path / "hf11", tmp_path / "hf22")


@pytest.mark.parametrize("kind", ["LlavaNext", pytest.param("LlavaOnevision", marks=pytest.mark.full)])
def test_verify_runs_transformers_beside(folders, tmp_path, kind):
    hf2mg(folders[kind][0], tmp_path / "mg", tp=2, pp=2)
    report = verify(folders[kind][0], tmp_path / "mg", level="full")
    assert report.passed, report.lines


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llava"}, "model_type must be llava_next or llava_onevision, this one has 'llava'"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-2, -1]}, "only one layer is"),
        ({"image_grid_pinpoints": [[28, 30]]}, "must be whole tiles of 28 pixels"),
        ({"text_config": {"model_type": "gemma"}}, "the text model must be one of .*'gemma'"),
    ],
)
def test_what_is_not_built_is_refused(folders, change, message):
    content = json.loads((folders["LlavaNext"][0] / "config.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        SPEC.config(content)


def test_sizes_of_published_models():
    """Views and tokens of the largest images, and what fits a shorter row."""
    large = SPEC.config(transformers.LlavaNextConfig(text_config=dict(model_type="mistral")).to_dict())
    image = large.expected_image(DataConfig(seq_length=4096))
    assert image == (3, 5 * 336, 336)
    # 672 x 672 pixels are 576 + 48 * 49; without an image's own shape the lines are taken to be as short as they can be.
    assert large.image_cost(image, (2, 2, 500, 500)).features == 576 + 48 * 49
    assert large.image_cost(image).features == 5 * 576 + 4 * 24
    assert large.image_cost(image).segments == (577,) * 5
    assert large.expected_image(DataConfig(seq_length=2000)) == (3, 3 * 336, 336)
    one = SPEC.config(transformers.LlavaOnevisionConfig().to_dict())
    cost = one.image_cost(one.expected_image(DataConfig(seq_length=32768)))
    assert cost.patches == 37 * 729 and 729 * 9 < cost.features < 729 * 11
