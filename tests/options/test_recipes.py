"""The recipes with adapters at the published sizes: what they adapt, counted by hand, and their dry runs; a family's defaults."""

import pytest

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.internlm2.config import InternLM2ModelConfig
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.rope_scaling import scaled_config
from megatron_vlm.options import recipes
from megatron_vlm.options.resolve import resolve
from megatron_vlm.testing.shapes import published, text, tower
from megatron_vlm.training.memory.estimate import estimate


def pairs(r: int, *shapes: tuple[int, int]) -> int:
    """Numbers of A and B over linears of these (in, out)."""
    return sum(r * (inputs + outputs) for inputs, outputs in shapes)


def decoder(r: int, hidden: int, kv: int, ffn: int, *, fused: bool = False) -> int:
    """A layer: q, k, v and o (or one pair for all of q, k and v), gate, up and down."""
    qkv = [(hidden, hidden + 2 * kv)] if fused else [(hidden, hidden), (hidden, kv), (hidden, kv)]
    return pairs(r, *qkv, (hidden, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden))


INTERNVL3 = 28 * decoder(32, 3584, 512, 18944)
QWEN2_5_VL = 28 * decoder(16, 3584, 512, 18944)
QWEN3_VL = 36 * decoder(16, 4096, 1024, 12288)
IDEFICS2 = (
    32 * decoder(8, 4096, 1024, 14336)
    + pairs(8, (1152, 14336), (1152, 14336), (14336, 4096))
    + 3 * pairs(8, (4096, 1536), (4096, 384), (4096, 384), (1536, 4096), (4096, 16384), (4096, 16384), (16384, 4096))
)
GEMMA3 = 34 * pairs(
    16, (2560, 2048), (2560, 1024), (2560, 1024), (2048, 2560), (2560, 10240), (2560, 10240), (10240, 2560)
)
SMOLVLM = 24 * decoder(8, 2048, 2048, 8192)
LLAVA_NEXT = 32 * decoder(128, 4096, 1024, 14336)
XCOMPOSER2 = 32 * decoder(64, 4096, 1024, 14336, fused=True)
INTERNLM2 = 24 * decoder(64, 2048, 1024, 8192, fused=True) + pairs(64, (2048, 92544))
LLAVA_LLM = 24 * decoder(512, 2048, 1024, 8192, fused=True) + pairs(
    512, (2048, 92672)
)  # its head is padded to 128 rows
LLAVA_TOWER = 23 * pairs(64, *4 * [(1024, 1024)], (1024, 4096), (4096, 1024))
PROJECTOR = 1024 * 2048 + 2048 + 2048 * 2048 + 2048


def xcomposer2(size: int, hd: bool) -> XComposer2Config:
    vision = tower(ClipConfig, 1024, 4096, 24, 16, size, hidden_act="quick_gelu", select_layer=-1)
    decoder = text(4096, 14336, 32, 32, 8, 92544)
    return XComposer2Config(text=decoder, vision=vision, hd=hd, plora_rank=256, plora_dropout=0.05)


INTERNVL3_8B, IDEFICS2_8B, LLAVA, LLAVA_NEXT_7B, SMOLVLM_2B = (
    published()[name]
    for name in ("InternVL3-8B", "Idefics2-8B", "LLaVA-InternLM2-1.8B", "LLaVA-NeXT-Mistral-7B", "SmolVLM-2.2B")
)
QWEN_7B, QWEN3_VL_8B, GEMMA_4B = (published()[name] for name in ("Qwen2.5-VL-7B", "Qwen3-VL-8B", "Gemma3-4B"))
# recipe -> ((family, published model), numbers of its pairs, numbers trained in full, in 4 bits)
CASES = {
    "internvl3/lora_internvl3": (INTERNVL3_8B, INTERNVL3, 0, False),
    "internvl3/qlora_internvl3": (INTERNVL3_8B, INTERNVL3, 0, True),
    "qwen2_5_vl/lora_qwen2_5_vl": (QWEN_7B, QWEN2_5_VL, 0, False),
    "qwen2_5_vl/qlora_qwen2_5_vl": (QWEN_7B, QWEN2_5_VL, 0, True),
    "qwen3_vl/lora_qwen3_vl": (QWEN3_VL_8B, QWEN3_VL, 0, False),
    "qwen3_vl/qlora_qwen3_vl": (QWEN3_VL_8B, QWEN3_VL, 0, True),
    "gemma3/lora_gemma3": (GEMMA_4B, GEMMA3, 0, False),
    "gemma3/qlora_gemma3": (GEMMA_4B, GEMMA3, 0, True),
    "lora_idefics2": (IDEFICS2_8B, IDEFICS2, 0, False),
    "qlora_idefics2": (IDEFICS2_8B, IDEFICS2, 0, True),
    "smolvlm/lora_smolvlm": (SMOLVLM_2B, SMOLVLM, 0, False),
    "smolvlm/qlora_smolvlm": (SMOLVLM_2B, SMOLVLM, 0, True),
    "llava_next/lora_llava_next": (LLAVA_NEXT_7B, LLAVA_NEXT, 0, False),
    "llava_next/qlora_llava_next": (LLAVA_NEXT_7B, LLAVA_NEXT, 0, True),
    "xcomposer2/lora_xcomposer2": (("xcomposer2", xcomposer2(490, False)), XCOMPOSER2, 0, False),
    "xcomposer2/lora_xcomposer2_4khd": (("xcomposer2", xcomposer2(336, True)), XCOMPOSER2, 0, False),
    "internlm2/qlora_internlm2": (
        ("internlm2", InternLM2ModelConfig(text=text(2048, 8192, 24, 16, 8, 92544))), INTERNLM2, 0, True,
    ),
    "llava_internlm2/qlora_llava_internlm2": (LLAVA, LLAVA_LLM + LLAVA_TOWER, PROJECTOR, True),
}  # fmt: skip


def config_of(name: str, *more: str):
    argv = ["--config", name, "--load", "x", "--save", "z", "--dry-run", "--device", "cpu", "--world-size", "8"]
    return resolve([*argv, "--global-batch-size", "128", *more])[0]


def model_of(name: str):
    family, config = CASES[name][0]
    return registry.get(family), config


def test_these_are_all():
    assert set(CASES) == {
        name for name in recipes.names() if "lora" in name.rpartition("/")[2] and "quickstart" not in name
    }
    assert round(INTERNVL3 / 1e6, 1) == 80.7 and round(XCOMPOSER2 / 1e6) == 151 and round(LLAVA_LLM / 1e6) == 552


@pytest.mark.parametrize("name", CASES)
def test_the_dry_run_at_the_published_size(name):
    """One of 8 replicas, as the scripts start them: the real stage with its pairs and codes, counted, on 80 GB."""
    config, (spec, model) = config_of(name), model_of(name)
    config.check_model(model)
    (stage,) = estimate(config, spec, model, 8, "cuda", trace=False)
    _, expected, in_full, quantised = CASES[name]
    assert sum(stage.trainable.values()) == expected + in_full
    assert (config.peft.quantize == "nf4") == quantised and config.training.precision == "bf16"
    parameters = sum(stage.parameters.values())
    assert 2 * parameters * (0.25 if quantised else 1) < stage.total < 30 * 2**30


def test_a_familys_defaults():
    for variant, kind, name in (
        ({"img_size": 490, "max_length": 4096}, "full", "finetune_xcomposer2"),
        ({"img_size": 490, "max_length": 4096}, "lora", "lora_xcomposer2"),
        ({"max_length": 16384}, "full", "finetune_xcomposer2_4khd"),
        ({"img_size": 490, "max_length": 16384}, "lora", "lora_xcomposer2_4khd"),
    ):
        assert recipes.defaults_of(registry.get("xcomposer2"), variant, kind).name == f"xcomposer2/{name}"
    for family in registry.FAMILIES:
        for kind, bits in (("full", None), ("lora", None), ("qlora", "nf4")):
            recipe = recipes.defaults_of(registry.get(family), {"max_length": 4096, "img_size": 1}, kind)
            assert (recipe.settings.get("peft") or {}).get("quantize") == bits
            assert recipes.path_of(recipe.name).is_file() and recipe.batch


def test_the_recipe_names_what_the_flag_names():
    for family in ("gemma3", "internvl3", "qwen2_5_vl", "qwen3_vl", "xcomposer2", "smolvlm", "llava_next"):
        name = f"{family}/lora_{family}"
        assert config_of(name).peft.target_modules == registry.get(family).adapters.language


@pytest.mark.parametrize("name, factor", [("documents_idefics2", 4.0), ("video_idefics2", 2.0)])
def test_long_rows_reach_beyond_the_positions(name, factor):
    config, model = config_of(name), IDEFICS2_8B[1]
    with pytest.raises(ConfigError, match="above the model's max_position_embeddings 32768"):
        config.check_model(model)
    scaled = scaled_config({}, model.text, config.model.rope_scaling, config.data.seq_length)["text_config"]
    assert scaled["rope_scaling"]["factor"] == factor and scaled["max_position_embeddings"] == config.data.seq_length


def test_files_for_schedulers_are_no_recipes():
    """They end in .yml: every .yaml of examples/ is a recipe, which `recipe` lists and `--config` takes."""
    assert not [name for name in recipes.names() if not recipes.load_config(name).get("data")]
    assert list((recipes.root() / "k8s").glob("*.yml"))
