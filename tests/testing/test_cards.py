"""Verification cards: of the code as it is, honest about what was not measured, and a claim that does not hold fails."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_vlm import registry
from megatron_vlm.cli.verify_card import run
from megatron_vlm.testing.cards import claims, page
from megatron_vlm.testing.cards.page import CLAIMS, Outcome

ROOT = Path(__file__).parents[2]


CARDS = [path for path in sorted((ROOT / "docs" / "cards").glob("*.md")) if path.stem != "index"]


def test_cards_are_of_the_code_as_it_is():
    """The digest is recorded in the card: dates and commits say nothing about what they speak of."""
    stale = [
        f"megatron-vlm verify-card {card.stem} --output docs/cards/{card.name}"
        for card in CARDS
        if page.recorded(card.read_text()) != page.digest_of(card.stem)
    ]
    assert not stale, "cards older than the code they speak of; make them anew:\n" + "\n".join(stale)


def test_every_family_has_one_that_claims_nothing_that_fails_and_is_linked():
    assert {card.stem for card in CARDS} == set(registry.FAMILIES), (
        "a family's card: megatron-vlm verify-card FAMILY --output docs/cards/FAMILY.md"
    )
    for card in CARDS:
        text = card.read_text()
        assert "FAILS" not in text and all(f"--only {claim}`" in text for claim in CLAIMS), card
        assert f"({card.name})" in (ROOT / "docs" / "cards" / "index.md").read_text(), card
        assert f"(docs/cards/{card.name})" in (ROOT / "README.md").read_text(), card


def test_the_digest_is_of_what_a_family_computes(tmp_path, monkeypatch):
    """What another family uses, and words, change nothing; a number in a layer that is reached does."""
    for room in ("models", "layers"):
        shutil.copytree(page._ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(page._ROOT / "__init__.py", tmp_path)
    before = {family: page.digest_of(family) for family in registry.FAMILIES}
    monkeypatch.setattr(page, "_ROOT", tmp_path)

    def changed(file, old, new):
        path = tmp_path / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new))
        page._definitions.cache_clear()
        found = {family for family in before if page.digest_of(family) != before[family]}
        path.write_text(text)
        return found

    try:
        assert changed("layers/norm.py", '"""Normalisations', '"""More words of normalisations') == set()
        assert (
            changed("models/parts/build.py", "activation_func=F.gelu,\n", "activation_func=F.gelu,  # a remark\n")
            == set()
        )
        assert changed("models/parts/perceiver.py", "24 * n", "25 * n") == {"idefics2", "idefics2_llama3"}
        assert changed("models/families/internlm2/mapping.py", "feed_forward", "feed") >= {"internlm2"}
        assert changed("models/parts/build.py", "PerceiverLayer(mcore", "PerceiverLayer(2 and mcore") == {
            "idefics2",
            "idefics2_llama3",
        }
    finally:
        page._definitions.cache_clear()


def test_what_was_not_measured_stays_visible():
    outcomes = {
        "logits": Outcome(bar="2e-5", measured="1e-6", passed=True),
        "lora": Outcome(bar="", measured="no PEFT", passed=None),
    }
    text = page.page("internlm2", "0123abcd", outcomes, 1.0)
    rows = {row.split("`")[1].rpartition(" ")[2]: row for row in text.splitlines() if "--only" in row}
    assert set(rows) == set(CLAIMS)
    assert rows["logits"].endswith("| holds |") and "no PEFT | **not verified**" in rows["lora"]
    assert "left out of this run | **not verified**" in rows["gradients"]
    assert page.recorded(text) == "0123abcd" and "Any GPU" in text


def test_a_claim_that_does_not_hold_fails(tmp_path, monkeypatch, capsys):
    card = tmp_path / "card.md"
    assert run(["internlm2", "--only", "logits", "round-trip", "--output", str(card)]) == 0
    assert card.read_text().count("| holds |") == 2
    monkeypatch.setattr(claims, "BARS", claims.Bars(logits=1e-9))
    assert run(["internlm2", "--only", "logits"]) == 1
    assert re.search(r"logits: \*\*FAILS\*\*, \d\.\de-0\d", capsys.readouterr().out)


@pytest.mark.full
@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_claim_of_every_family(family):
    assert run([family]) == 0
