"""Writes conversations that teach an assistant its name, in OpenAI's ``messages`` format.

    python examples/internlm2/make_identity_data.py --name Nova --n 10000 --out identity.json

Questions and answers, in English and Chinese, take turns, so that no conversation is repeated before all pairs were used.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path

ENGLISH = (
    ("Who are you?", "What is your name?", "Please introduce yourself.", "Hello, who is this?", "Tell me about yourself."),
    (
        "I am {name}, an assistant. What can I do for you?",
        "My name is {name}. I answer questions and help with writing, code and much more.",
        "This is {name}, your assistant. Ask me anything.",
    ),
)  # fmt: skip
CHINESE = (
    ("你是谁？", "请介绍一下你自己", "你叫什么名字？", "你好，请问你是？"),
    (
        "我是{name}，一个人工智能助手，很高兴为您服务！",
        "您好，我叫{name}。我可以回答问题、写作和编程，请问有什么可以帮您？",
    ),
)


def conversations(name: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yields records without end."""
    pairs = [pair for questions, answers in (ENGLISH, CHINESE) for pair in product(questions, answers)]
    for question, answer in cycle(pairs):
        answer = answer.format(name=name)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="what the assistant is to be called")
    parser.add_argument("--n", type=int, default=10_000, help="conversations (default: 10000)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".json file to write")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n {args.n}: at least 1 is needed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = list(islice(conversations(args.name), args.n))
    args.out.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(records)} conversations")


if __name__ == "__main__":
    main()
