"""InternLM-XComposer2 in plain torch, written from its published semantics and from nothing of the package.

transformers' CLIPVisionModel and LlamaForCausalLM, a projection between them, and hooks on the decoder's linears that add the
branch of image tokens. InternLM2's decoder is Llama's with query, key and value of each group fused in one matrix.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

TOWER = "vit.vision_tower.vision_model."
# linear of InternLM2 -> linears of Llama that hold its rows
LINEARS = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
}
OTHERS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


class Reference(nn.Module):
    """Loads a folder; parameters keep the checkpoint's names, in ``weights``."""

    def __init__(self, directory, dtype=torch.float32):
        from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = self.config = json.loads((Path(directory) / "config.json").read_text())
        weights: dict[str, Tensor] = {}
        for file in Path(directory).glob("*.safetensors"):
            weights |= load_file(file)
        self.weights = {name: tensor.to(dtype).requires_grad_() for name, tensor in weights.items()}
        self.hd = "img_size" not in config
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        tower = dict(config["vision_config"])
        tower["image_size"] = config.get("img_size", tower["image_size"])
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
        llama = LlamaConfig(
            **{name: config[name] for name in names.split()},
            rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_position_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            self.clip = CLIPVisionModel._from_config(CLIPVisionConfig(**tower), attn_implementation="eager")
        self.clip.to_empty(device="cpu")
        self.clip.embeddings.register_buffer(
            "position_ids", torch.arange(self.clip.embeddings.num_positions)[None], persistent=False
        )
        self.llama = LlamaForCausalLM._from_config(llama, attn_implementation="eager").eval().to(dtype)
        self.mask = None  # [L, 1], 1 on image tokens
        for i, layer in enumerate(self.llama.model.layers):
            for linear, parts in LINEARS.items():
                for part, name in enumerate(parts):
                    module = layer.get_submodule(name)
                    module.register_forward_hook(self._branch(f"model.layers.{i}.{linear}", part, len(parts)))

    def rows(self, name, part, parts):
        """Rows of a fused matrix that belong to one of query, key, value."""
        tensor = self.weights[name]
        if parts == 1:
            return tensor
        by_group = tensor.reshape(self.groups, self.heads // self.groups + 2, -1, tensor.shape[1])
        return [by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]][part].reshape(-1, tensor.shape[1])

    def _branch(self, name, part, parts):
        def add(module, inputs, output):
            if self.mask is None:
                return output
            a, b = self.weights[f"{name}.Plora_A.weight"], self.rows(f"{name}.Plora_B.weight", part, parts)
            return output + (inputs[0] @ a.T @ b.T) * self.mask

        return add

    def llama_weights(self):
        """Weights under Llama's names, tied to ``self.weights`` by autograd."""
        found = {
            "model.embed_tokens.weight": self.weights["model.tok_embeddings.weight"],
            "model.norm.weight": self.weights["model.norm.weight"],
            "lm_head.weight": self.weights["output.weight"],
        }
        for i in range(self.config["num_hidden_layers"]):
            for own, theirs in OTHERS.items():
                found[f"model.layers.{i}.{theirs}.weight"] = self.weights[f"model.layers.{i}.{own}.weight"]
            for own, parts in LINEARS.items():
                for part, theirs in enumerate(parts):
                    rows = self.rows(f"model.layers.{i}.{own}.weight", part, len(parts))
                    found[f"model.layers.{i}.{theirs}.weight"] = rows
        return found

    def decode(self, embeddings, mask):
        """[L, H] embeddings, [L] bool image mask (None: no hook acts) -> logits [L, V]."""
        self.mask = None if mask is None else mask[:, None].to(embeddings.dtype)
        output = torch.func.functional_call(
            self.llama, self.llama_weights(), kwargs={"inputs_embeds": embeddings[None]}
        )
        return output.logits[0]

    def see(self, images):
        """[n, 3, S, S] -> patch states [n, p, p, Hv]."""
        state = {name.removeprefix(TOWER): w for name, w in self.weights.items() if name.startswith(TOWER)}
        output = torch.func.functional_call(self.clip, state, (images,), {"output_hidden_states": True})
        patches = output.hidden_states[-1][:, 1:]
        side = int(patches.shape[1] ** 0.5)
        return patches.reshape(len(images), side, side, -1)

    def lines(self, image):
        """Features of one image before the projection, [F, width]."""
        if not self.hd:
            return self.see(image[None]).flatten(0, 2)
        side = self.config["vision_config"]["image_size"]
        view = F.interpolate(image[None].float(), (side, side), mode="bicubic").to(image.dtype)
        rows, columns = image.shape[1] // side, image.shape[2] // side
        newline, separator = self.weights["plora_sub_GN"].flatten(), self.weights["plora_glb_GN"].flatten()

        def joined(tile):
            """[p, p, Hv] -> [p / 2][p / 2] features."""
            half = tile.shape[0] // 2
            return [
                [torch.cat([tile[2 * r, 2 * c], tile[2 * r, 2 * c + 1], tile[2 * r + 1, 2 * c], tile[2 * r + 1, 2 * c + 1]])
                 for c in range(half)]
                for r in range(half)
            ]  # fmt: skip

        def cut(row, column):
            return image[None, :, row * side : (row + 1) * side, column * side : (column + 1) * side]

        out = []
        for line in joined(self.see(view)[0]):
            out += [*line, newline]
        out.append(separator)
        for row in range(rows):
            tiles = [joined(self.see(cut(row, column))[0]) for column in range(columns)]
            for number in range(len(tiles[0])):
                out += [feature for tile in tiles for feature in tile[number]] + [newline]
        return torch.stack(out)

    def project(self, features):
        first = F.linear(features, self.weights["vision_proj.0.weight"], self.weights["vision_proj.0.bias"])
        return F.linear(F.gelu(first), self.weights["vision_proj.2.weight"], self.weights["vision_proj.2.bias"])

    def logits(self, sample):
        """Logits [L, V] of one sample."""
        x = self.weights["model.tok_embeddings.weight"][sample.input_ids]
        mask = torch.zeros(len(x), dtype=torch.bool)
        if sample.pixels:
            features = torch.cat([self.project(self.lines(image.to(x.dtype))) for image in sample.pixels])
            mask[sample.image_positions] = True
            x = x.index_copy(0, sample.image_positions, features)
        return self.decode(x, mask)

    def run(self, samples, gradients=True):
        """(mean token loss, logits of all samples, gradients by name) of one sample after the other."""
        with torch.set_grad_enabled(gradients):
            logits = [self.logits(sample) for sample in samples]
            losses = [F.cross_entropy(y[:-1], s.labels[1:], reduction="sum") for y, s in zip(logits, samples)]
            loss = torch.stack(losses).sum() / sum(int((s.labels[1:] != -100).sum()) for s in samples)
            if gradients:
                loss.backward()
        grads = {
            name: torch.zeros_like(w) if w.grad is None else w.grad
            for name, w in self.weights.items()
            if gradients and "post_layernorm" not in name
        }
        for weight in self.weights.values():
            weight.grad = None
        return float(loss.detach()), torch.cat([y.detach() for y in logits]), grads
