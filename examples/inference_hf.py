"""Runs an exported Idefics2 with plain transformers: an answer to a question, or the loss on LLaVA records.

    python examples/inference_hf.py --model EXPORT --image FILE --question "What is this?"
    python examples/inference_hf.py --model EXPORT --json FILE --image-root DIR -n 16 [--answer-loss-only]

Nothing of megatron_vlm is imported: what is printed here is what others will see. The loss is the mean over supervised
tokens of all records, as `--skip-train` prints it for them.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, Idefics2ForConditionalGeneration

IMAGE, FAKE, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
ROLES = {"human": "user", "gpt": "assistant"}


def message(role: str, text: str) -> dict:
    """One chat message; ``<image>`` in the text marks where an image goes."""
    parts = [part for part in re.split(f"({IMAGE})", text) if part]
    content = [{"type": "image"} if part == IMAGE else {"type": "text", "text": part} for part in parts]
    return {"role": ROLES.get(role, role), "content": content}


def encode(processor, messages: list[dict], images: list[Image.Image], **options) -> dict:
    """Renders the chat and returns the model's inputs."""
    text = processor.apply_chat_template(messages, **options)
    return processor(text=text, images=[images] if images else None, return_tensors="pt")


def labels_of(processor, ids: torch.Tensor, answer_only: bool) -> torch.Tensor:
    """Labels of one sequence [L]: -100 at BOS and image tokens, and with ``answer_only`` at all but the answers."""
    tokenizer = processor.tokenizer
    never = tokenizer.convert_tokens_to_ids([IMAGE, FAKE]) + [tokenizer.bos_token_id]
    labels = torch.where(torch.isin(ids, torch.tensor(never)), -100, ids)
    if not answer_only:
        return labels
    end, start, keep = tokenizer.convert_tokens_to_ids(END), 0, torch.zeros_like(ids, dtype=torch.bool)
    for stop in (ids == end).nonzero()[:, 0].tolist():
        # A message is "Role:" and its text through the end token; the header is given, not learned.
        for first in range(start, stop + 1):
            header = tokenizer.decode(ids[start : first + 1], skip_special_tokens=True).strip()
            if header.endswith(":"):
                keep[first + 1 : stop + 1] = header == "Assistant:"
                break
        start = stop + 1
    return torch.where(keep, labels, -100)


@torch.inference_mode()
def loss_on(model, processor, path: Path, root: Path, limit: int | None, answer_only: bool) -> tuple[float, int]:
    """Returns the mean loss over the supervised tokens of the first ``limit`` records of a file, and their count."""
    text = path.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    total, tokens = 0.0, 0
    for record in records[:limit]:
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        images = [Image.open(root / name).convert("RGB") for name in names]
        messages = [message(turn["from"], turn["value"]) for turn in record["conversations"]]
        inputs = encode(processor, messages, images).to(model.device)
        labels = labels_of(processor, inputs["input_ids"][0].cpu(), answer_only)[1:].to(model.device)
        logits = model(**inputs).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens, tokens


@torch.inference_mode()
def answer(model, processor, image: Path | None, question: str, max_new_tokens: int) -> str:
    """Returns the greedy answer to a question about an image."""
    images = [Image.open(image).convert("RGB")] if image else []
    inputs = encode(processor, [message("user", IMAGE * len(images) + question)], images, add_generation_prompt=True)
    end = processor.tokenizer.convert_tokens_to_ids(END)
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Parses the command line and prints the answer, or the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="HF directory, such as toolkits/convert mg2hf writes")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--question")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="LLaVA json or jsonl: print the loss on its records")
    parser.add_argument("--image-root", type=Path, default=Path("."))
    parser.add_argument("-n", type=int, help="first records only")
    parser.add_argument("--answer-loss-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    if (args.json is None) == (args.question is None):
        parser.error("give --question (and --image), or --json")
    processor = AutoProcessor.from_pretrained(args.model)
    model = Idefics2ForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    if args.question is not None:
        print(answer(model, processor, args.image, args.question, args.max_new_tokens))
        return
    loss, tokens = loss_on(model, processor, args.json, args.image_root, args.n, args.answer_loss_only)
    print(f"loss {loss:.6f} on {tokens} supervised tokens")


if __name__ == "__main__":
    main()
