"""LLaVA out of its parts, XTuner's folders and native files, through every layout, and back into both forms."""

import fractions
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf, open_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.models.families.llava_internlm2.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.internlm2 import fuse, make_samples
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_clip, write_tiny_llava, write_tiny_parts

FAMILY = "llava_internlm2"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """llm, vision, projector -> folder; max_position_embeddings is small."""
    return write_tiny_parts(tmp_path_factory.mktemp("parts"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def native(parts, tmp_path_factory):
    """The folder that transformers loads, exported from the parts."""
    root = tmp_path_factory.mktemp("native")
    hf2mg(None, root / "mg", family=FAMILY, **parts)
    mg2hf(root / "mg", root / "hf")
    return root / "hf"


def tensors(directory):
    return load_file(directory / "model.safetensors")


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


def loaded(directory, caplog):
    """transformers' model, loaded without a word of warning."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model, info = LlavaForConditionalGeneration.from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
    hf_logging.disable_propagation()
    assert not any(info.values()), info
    assert not caplog.records, caplog.text
    return model.eval()


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trips(parts, native, tmp_path, tp, pp):
    """From the parts, through tp x pp, to the native form and to XTuner's folders: every tensor, and the LLM's own files."""
    hf2mg(None, tmp_path / "mg", family=FAMILY, **parts, tp=tp, pp=pp)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_equal(tensors(native), tensors(tmp_path / "hf"))
    mg2hf(tmp_path / "mg", tmp_path / "xtuner", naming="xtuner")
    for part, folder in (("llm", "."), ("vision", "visual_encoder"), ("projector", "projector")):
        assert_equal(tensors(parts[part]), tensors(tmp_path / "xtuner" / folder))
    for path in parts["llm"].iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "xtuner" / path.name).read_bytes() == path.read_bytes(), path.name


def test_xtuners_folders_are_read(native, tmp_path):
    mg2hf(native, tmp_path / "xtuner", naming="xtuner")
    assert main(["hf2mg", "--hf", str(tmp_path / "xtuner"), "--out", str(tmp_path / "mg"), "--tp", "2"]) == 0
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_equal(tensors(native), tensors(tmp_path / "hf"))
    assert (tmp_path / "hf" / "config.json").read_text() == (native / "config.json").read_text()
    from transformers import CLIPVisionModel

    CLIPVisionModel.from_pretrained(tmp_path / "xtuner" / "visual_encoder")
    projector = json.loads((tmp_path / "xtuner" / "projector" / "config.json").read_text())
    assert (projector["visual_hidden_size"], projector["llm_hidden_size"], projector["depth"]) == (48, 64, 2)


def test_a_folder_of_parts_is_not_mistaken_for_its_language_model(native, tmp_path):
    mg2hf(native, tmp_path / "xtuner", naming="xtuner")
    with pytest.raises(ConversionError, match=r"holds a llava_internlm2 in parts: .*hf2mg --hf"):
        open_source(tmp_path / "xtuner")
    with open_source(tmp_path / "xtuner", "internlm2") as source:
        assert source.spec.name == "internlm2"


def test_what_xtuner_did_not_train_is_asked_for(native, tmp_path):
    mg2hf(native, tmp_path / "xtuner", naming="xtuner")
    shutil.rmtree(tmp_path / "xtuner" / "visual_encoder")
    with pytest.raises(ConversionError, match=r"--llm DIR --vision DIR --projector .*\(absent here: --vision\)"):
        hf2mg(tmp_path / "xtuner", tmp_path / "mg")
    (tmp_path / "xtuner" / "llm_adapter").mkdir()
    with pytest.raises(ConversionError, match=r"holds adapters \(llm_adapter\): make one model"):
        hf2mg(tmp_path / "xtuner", tmp_path / "mg")


def test_the_native_form_is_the_parts(parts, native, caplog):
    """Its text logits are InternLM2's (the Llama that the twin was fused from); tower and projector are the given ones."""
    model = loaded(native, caplog)
    state = dict(model.named_parameters())
    text = {name.replace("model.language_model.", "model."): p for name, p in state.items() if "language_model" in name}
    fused = fuse(text | {"lm_head.weight": state["lm_head.weight"]}, 4)
    for name, tensor in tensors(parts["llm"]).items():
        assert torch.equal(fused[name][: len(tensor)], tensor), name
    for name, tensor in tensors(parts["vision"]).items():
        assert torch.equal(state["model.vision_tower." + name.removeprefix("vision_model.")], tensor), name
    for name, tensor in tensors(parts["projector"]).items():
        linear = name.replace("model.0", "linear_1").replace("model.2", "linear_2")
        assert torch.equal(state[f"model.multi_modal_projector.{linear}"], tensor), name
    rows = state["lm_head.weight"]
    assert len(rows) == model.config.image_token_id + 1  # <image> is the one new row: the mean of the others
    assert torch.allclose(rows[-1], rows[:-1].mean(0), atol=1e-6)
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"


def test_native_files_of_any_spelling(tmp_path, caplog):
    """As transformers 5 saves them; exported under the published names, which it loads in silence, computing the same."""
    hf = write_tiny_llava(tmp_path / "a")
    hf2mg(tmp_path / "a", tmp_path / "mg", tp=2, pp=2)
    mg2hf(tmp_path / "mg", tmp_path / "b")
    saved, exported = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert any("vision_tower.embeddings" in name for name in saved)
    assert_equal({NAMES.file_name(name): tensor for name, tensor in saved.items()}, exported)
    model = loaded(tmp_path / "b", caplog)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), hf.parameters(), strict=True))


def run_verify(*args, **options):
    """On a rank: the report of ``verify``."""
    report = verify(*args, **options)
    return report.passed, report.level, "\n".join(report.lines)


def test_verify_runs_both_models(native, tmp_path):
    hf2mg(native, tmp_path / "mg", tp=2, pp=2)
    ((passed, level, text),) = run_distributed(run_verify, native, tmp_path / "mg")
    assert passed and level == "full", text
    for module in ("vision_model.encoder.layers.1", "connector", "language_model.decoder.layers.3", "logits", "loss"):
        assert f"\n{module}" in text, module


def test_a_llama_in_xtuners_folders(tmp_path):
    write_tiny_llava(tmp_path / "a")
    mg2hf(tmp_path / "a", tmp_path / "xtuner", naming="xtuner")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "xtuner")
    assert torch.equal(model.lm_head.weight, tensors(tmp_path / "a")["language_model.lm_head.weight"])
    hf2mg(tmp_path / "xtuner", tmp_path / "mg")
    mg2hf(tmp_path / "mg", tmp_path / "b")
    theirs = {NAMES.file_name(name): tensor for name, tensor in tensors(tmp_path / "a").items()}
    assert_equal(theirs, tensors(tmp_path / "b"))


def test_a_projector_from_a_pth(parts, native, tmp_path):
    state = {f"projector.{name}": tensor for name, tensor in tensors(parts["projector"]).items()}
    models = {key: parts[key] for key in ("llm", "vision")}

    def convert(content, out):
        torch.save(content, tmp_path / "iter.pth")
        hf2mg(None, tmp_path / out, family=FAMILY, **models, projector=tmp_path / "iter.pth")
        mg2hf(tmp_path / out, tmp_path / f"{out}_hf")
        assert_equal(tensors(native), tensors(tmp_path / f"{out}_hf"))

    convert(state, "flat")
    convert({"state_dict": state, "meta": {"epoch": 1}}, "nested")
    with pytest.raises(ConversionError, match=r"1 tensors missing \(model\.2\.bias"):
        convert({name: tensor for name, tensor in state.items() if name != "projector.model.2.bias"}, "missing")
    with pytest.raises(ConversionError, match=r"holds 1 tensors beside a projector's \(llm\.lora\)"):
        convert(state | {"llm.lora": torch.zeros(1)}, "adapters")
    with pytest.raises(ConversionError, match=r"objects of class fractions\.Fraction.*weights_only=False"):
        convert({"state_dict": state, "meta": fractions.Fraction(1, 2)}, "classes")
    with pytest.raises(
        ConversionError, match=r"model\.0\.weight has shape \[64, 7\], language model and tower need \[64, 48\]"
    ):
        convert(state | {"projector.model.0.weight": torch.zeros(64, 7)}, "wide")


def test_a_fresh_projector_follows_its_seed(parts, tmp_path):
    models = {key: str(parts[key]) for key in ("llm", "vision")}
    found = []
    for seed in (0, 0, 1):
        options = dict(family=FAMILY, **models, assemble={"seed": seed})
        with open_model(None, **options) as source:
            found.append(source.read("connector.mlp.linear_fc1.weight"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert 0.018 < float(found[0].std()) < 0.022


def test_parts_that_do_not_fit(parts, tmp_path):
    models = {key: parts[key] for key in ("llm", "vision")}

    def refused(error, message, **options):
        with pytest.raises(error, match=message):
            hf2mg(None, tmp_path / "mg", **{"family": FAMILY, **models, **options})

    refused(ConversionError, "model_type 'internlm2', not a CLIP or SigLIP one", vision=parts["llm"])
    refused(ConfigError, "need --family .*llava_internlm2", family=None)
    refused(ConversionError, "model_type 'clip_vision_model', not a SigLIP one", family="idefics2_llama3")
    refused(ConfigError, "unknown key.*'latents'|latents", assemble={"latents": "ones"})
    refused(ConfigError, "'alpaca' is not one of", assemble={"template": "alpaca"})
    with pytest.raises(ConfigError, match="--projector belongs to --llm and --vision"):
        hf2mg(parts["llm"], tmp_path / "mg", projector="x")
    broken = tmp_path / "llm"
    shutil.copytree(parts["llm"], broken)
    state = tensors(broken)
    state["model.extra"] = state.pop("model.norm.weight")
    save_file(state, broken / "model.safetensors")
    refused(ConversionError, r"1 tensors missing \(model\.norm\.weight\), 1 unknown \(model\.extra\)", llm=broken)


def test_a_whole_clip_gives_its_tower(parts, native, tmp_path):
    """CLIPModel's folder: text tower and projections are left out."""
    from transformers import CLIPConfig, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(parts["vision"])
    config = CLIPConfig(vision_config=tower.config.to_dict(), text_config={"hidden_size": 16}).to_dict()
    whole = tmp_path / "clip"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(config))
    extra = {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(()), "visual_projection.weight": torch.zeros(1)}
    save_file(tensors(parts["vision"]) | extra, whole / "model.safetensors")
    hf2mg(None, tmp_path / "mg", family=FAMILY, **{**parts, "vision": whole})
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_equal(tensors(native), tensors(tmp_path / "hf"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy 'full' is not built"),
        (dict(vision_feature_layer=[-2, -5]), "vision_feature_layer .* only one layer"),
        (dict(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
        (dict(vision_config={"model_type": "siglip_vision_model"}), "strategy 'default' is not built: only 'full'"),
        (
            dict(vision_config={"model_type": "internvl_vision"}),
            "vision_config.model_type 'internvl_vision' is not built",
        ),
    ],
)
def test_configs_that_are_not_built(native, change, message):
    from megatron_vlm import registry

    config = json.loads((native / "config.json").read_text()) | change
    with pytest.raises(ConfigError, match=message):
        registry.get(FAMILY).config(config)


def test_tower_of_another_depth_keeps_its_unused_layers(tmp_path, parts):
    """Through the command line, with a template that is written as the model's chat template."""
    write_tiny_clip(tmp_path / "clip", num_hidden_layers=5)
    models = ["--llm", str(parts["llm"]), "--vision", str(tmp_path / "clip"), "--projector", str(parts["projector"])]
    command = ["hf2mg", "--family", FAMILY, *models, "--template", "default", "--tp", "2"]
    assert main([*command, "--out", str(tmp_path / "mg")]) == 0
    mg2hf(tmp_path / "mg", tmp_path / "xtuner", naming="xtuner")
    assert_equal(tensors(tmp_path / "clip"), tensors(tmp_path / "xtuner" / "visual_encoder"))
    assert_equal(tensors(parts["projector"]), tensors(tmp_path / "xtuner" / "projector"))
    assert "<|User|>:" in (tmp_path / "mg" / "hf" / "chat_template.jinja").read_text()


def test_text_logits_are_internlm2s(parts, native):
    """Equal logits, as LLaVA and as the Llama of its parts, beyond the trained positions too."""
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(native, attn_implementation="eager")
    with open_model(parts["llm"]) as source:
        rows = source.config.text.vocab_size
    mg2hf(parts["llm"], native.parent / "llama", naming="llama")
    llama = LlamaForCausalLM.from_pretrained(native.parent / "llama", attn_implementation="eager")
    for sample in make_samples(rows, [20, 100]):
        with torch.no_grad():
            ours, theirs = (model(input_ids=sample.input_ids[None]).logits for model in (llava, llama))
        assert torch.allclose(ours[..., :rows], theirs, atol=1e-5)
