"""Model configurations by their sizes alone, without files: small ones of every family, and those of published models.

What is told by shapes (memory, operations, layouts) needs no weights.
"""

from typing import Any

from megatron_vlm.data.images.anyres import AnyRes
from megatron_vlm.models.families.gemma3.config import Gemma3ModelConfig
from megatron_vlm.models.families.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.families.internlm2.config import InternLM2ModelConfig
from megatron_vlm.models.families.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.families.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.families.llava_next.config import LlavaNextModelConfig
from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.models.families.qwen3_vl.config import Qwen3VLConfig
from megatron_vlm.models.families.smolvlm.config import SmolVLMModelConfig
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.internvit import InternVitConfig
from megatron_vlm.models.parts.perceiver import PerceiverConfig
from megatron_vlm.models.parts.qwen_vit import Qwen3VitConfig, Qwen25VitConfig
from megatron_vlm.models.parts.siglip import SiglipConfig

_VIT: dict[str, Any] = dict(norm_type="layer_norm", qkv_bias=True, qk_norm=False)
_CLIP: dict[str, Any] = dict(hidden_act="quick_gelu", select_layer=-2)
_PERCEIVER: dict[str, Any] = dict(num_latents=64, depth=3, norm_epsilon=1e-6)


def text(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> TextConfig:
    """A decoder."""
    return TextConfig(
        model_type="llama", hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers, num_attention_heads=heads,
        num_query_groups=groups, head_dim=more.pop("head_dim", hidden // heads), vocab_size=vocab, max_position_embeddings=32768,
        norm_epsilon=1e-5, rotary_base=10000.0, **more,
    )  # fmt: skip


def tower(kind: Any, hidden: int, ffn: int, layers: int, heads: int, size: int, **more: Any) -> Any:
    """A vision tower of class ``kind``."""
    return kind(
        hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers, num_attention_heads=heads, image_size=size,
        num_channels=3, norm_epsilon=1e-6, **{"patch_size": 14, **more},
    )  # fmt: skip


def idefics2(text: TextConfig, vision: Any, heads: int, groups: int, head_dim: int) -> Idefics2ModelConfig:
    """Idefics2; the numbers are the perceiver's."""
    perceiver = PerceiverConfig(num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim, **_PERCEIVER)
    return Idefics2ModelConfig(text=text, vision=vision, perceiver=perceiver, image_token_id=5)


def internvl3(text: TextConfig, vision: Any) -> InternVL3ModelConfig:
    """InternVL3."""
    return InternVL3ModelConfig(text=text, vision=vision, shuffle=2, image_token_id=None, layout="chat")


def smolvlm(text: TextConfig, vision: Any, shuffle: int) -> SmolVLMModelConfig:
    """SmolVLM."""
    return SmolVLMModelConfig(text=text, vision=vision, shuffle=shuffle, image_token_id=5, kind="SmolVLM")


def llava(text: TextConfig, vision: Any) -> LlavaModelConfig:
    """LLaVA on InternLM2."""
    size = text.vocab_size - 1
    return LlavaModelConfig(
        text=text, vision=vision, image_token_id=size, source_type="internlm2", source_vocab_size=size
    )


def llava_next(text: TextConfig, vision: Any) -> LlavaNextModelConfig:
    """LLaVA-NeXT."""
    size, grids = vision.image_size, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    sizes = tuple((rows * size, columns * size) for rows, columns in grids)
    anyres = AnyRes(sizes=sizes, tile=size, side=vision.side)
    return LlavaNextModelConfig(text=text, vision=vision, anyres=anyres, image_token_id=5, kind="LlavaNext")


def qwen2_5_vl(text: TextConfig, hidden: int, ffn: int, layers: int, heads: int) -> Qwen25VLConfig:
    """Qwen2.5-VL; the numbers are the tower's."""
    full = tuple(range(layers // 4 - 1, layers, layers // 4))
    vision = tower(
        Qwen25VitConfig, hidden, ffn, layers, heads, 112, temporal_patch_size=2, block=2, window=4, full_layers=full,
        rotary_base=10000.0,
    )  # fmt: skip
    return Qwen25VLConfig(text=text, vision=vision, image_token_id=5, video_token_id=6, tokens_per_second=2)


def qwen3_vl(text: TextConfig, hidden: int, ffn: int, layers: int, levels: tuple[int, ...]) -> Qwen3VLConfig:
    """Qwen3-VL; the numbers are the tower's."""
    vision = tower(
        Qwen3VitConfig, hidden, ffn, layers, 16 if hidden > 1000 else 4, 48 * 16, patch_size=16,
        temporal_patch_size=2, block=2, levels=levels, rotary_base=10000.0,
    )  # fmt: skip
    return Qwen3VLConfig(text=text, vision=vision, image_token_id=5)


def gemma3(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    groups: int,
    vocab: int,
    head_dim: int,
    local: tuple[int, int],
    vision: Any,
    pool: int,
) -> Gemma3ModelConfig:
    """Gemma 3; ``local``: window, and every how many layers one has none."""
    decoder = text(
        hidden, ffn, layers, heads, groups, vocab, head_dim=head_dim, sliding_window=local[0], qk_norm=True, gemma=True,
        full_layers=tuple(range(local[1] - 1, layers, local[1])), local_rotary_base=10000.0, embedding_scale=hidden**0.5,
        image_blocks=True, tie_word_embeddings=True,
    )  # fmt: skip
    return Gemma3ModelConfig(text=decoder, vision=vision, pool=pool, image_token_id=5)


def small() -> dict[str, Any]:
    """Family -> a few million parameters of it; 4 decoder layers."""
    decoder = text(256, 640, 4, 8, 4, 2048)
    clip = tower(ClipConfig, 128, 512, 4, 4, 112, **_CLIP)
    return {
        "idefics2": idefics2(decoder, tower(SiglipConfig, 128, 512, 3, 4, 224), 8, 2, 32),
        "internvl3": internvl3(
            text(256, 640, 4, 8, 4, 2048, qkv_bias=True, qk_norm=True, head_dim=48),
            tower(InternVitConfig, 128, 512, 3, 4, 112, **_VIT),
        ),
        "llava_internlm2": llava(decoder, clip),
        "llava_next": llava_next(decoder, clip),
        "xcomposer2": XComposer2Config(text=decoder, vision=clip, hd=True, plora_rank=16, plora_dropout=0.05),
        "smolvlm": smolvlm(
            text(256, 640, 4, 8, 4, 2048, tie_word_embeddings=True), tower(SiglipConfig, 128, 512, 3, 4, 112), 2
        ),
        "internlm2": InternLM2ModelConfig(text=decoder),
        "gemma3": gemma3(256, 640, 4, 8, 4, 2048, 48, (64, 2), tower(SiglipConfig, 128, 512, 3, 4, 112), 2),
        "qwen2_5_vl": qwen2_5_vl(text(256, 640, 4, 8, 4, 2048, qkv_bias=True, mrope_section=(4, 6, 6)), 128, 320, 4, 4),
        "qwen3_vl": qwen3_vl(
            text(256, 640, 4, 8, 4, 2048, qk_norm=True, mrope_section=(6, 5, 5), mrope_interleaved=True, deepstack=2),
            128, 512, 4, (0, 2),
        ),
    }  # fmt: skip


def published() -> dict[str, tuple[str, Any]]:
    """Name -> (family, configuration) of published models, and of the one that benchmarks/gpu_smoke.py trains."""
    siglip, siglip_small = (
        tower(SiglipConfig, 1152, 4304, 27, 16, 980),
        tower(SiglipConfig, 768, 3072, 12, 12, 980),
    )
    vit = tower(InternVitConfig, 1024, 4096, 24, 16, 448, **_VIT)
    clip = tower(ClipConfig, 1024, 4096, 24, 16, 336, **_CLIP)
    qwen: dict[str, Any] = dict(qkv_bias=True)
    mrope: dict[str, Any] = dict(qkv_bias=True, mrope_section=(16, 24, 24))
    stacked: dict[str, Any] = dict(qk_norm=True, mrope_section=(24, 20, 20), mrope_interleaved=True, deepstack=3)
    return {
        "Idefics2-1.2B": ("idefics2", idefics2(text(2048, 5632, 16, 16, 8, 32003), siglip_small, 16, 4, 96)),
        "InternVL3-2B": ("internvl3", internvl3(text(1536, 8960, 28, 12, 2, 151674, **qwen), vit)),
        "LLaVA-InternLM2-1.8B": ("llava_internlm2", llava(text(2048, 8192, 24, 16, 8, 92545), clip)),
        "Idefics2-8B": ("idefics2", idefics2(text(4096, 14336, 32, 32, 8, 32003), siglip, 16, 4, 96)),
        "InternVL3-8B": ("internvl3", internvl3(text(3584, 18944, 28, 28, 4, 151674, **qwen), vit)),
        "SmolVLM-2.2B": (
            "smolvlm",
            smolvlm(text(2048, 8192, 24, 32, 32, 49280), tower(SiglipConfig, 1152, 4304, 27, 16, 384), 3),
        ),
        "Qwen2.5-VL-7B": ("qwen2_5_vl", qwen2_5_vl(text(3584, 18944, 28, 28, 4, 152064, **mrope), 1280, 3420, 32, 16)),
        "Qwen3-VL-8B": (
            "qwen3_vl",
            qwen3_vl(text(4096, 12288, 36, 32, 8, 151936, **stacked), 1152, 4304, 27, (8, 16, 24)),
        ),
        "Gemma3-4B": (
            "gemma3",
            gemma3(2560, 10240, 34, 8, 4, 262208, 256, (1024, 6), tower(SiglipConfig, 1152, 4304, 27, 16, 896), 4),
        ),
        "LLaVA-NeXT-Mistral-7B": ("llava_next", llava_next(text(4096, 14336, 32, 32, 8, 32064), clip)),
        "LLaVA-InternLM2-7B": ("llava_internlm2", llava(text(4096, 14336, 32, 32, 8, 92545), clip)),
    }
