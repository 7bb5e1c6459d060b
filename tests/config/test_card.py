"""The GPU a run finds, against the one it was planned for."""

from __future__ import annotations

import pytest

from megarubric.config.card import compare
from megarubric.config.schema import CARDS

# Names, bytes and architectures as the driver gives them.
H100 = ("NVIDIA H100 80GB HBM3", 85_014_413_312, 90)
H200 = ("NVIDIA H200", 150_109_880_320, 90)
A100 = ("NVIDIA A100-SXM4-80GB", 84_987_740_160, 80)
A100_40 = ("NVIDIA A100-PCIE-40GB", 42_298_834_944, 80)
B200 = ("NVIDIA B200", 191_510_937_600, 100)


@pytest.mark.parametrize(("card", "found"), [("h100", H100), ("h200", H200), ("a100", A100), ("b200", B200)])
def test_the_card_itself_is_taken_in_silence(card: str, found: tuple[str, int, int]) -> None:
    assert compare(card, *found) == (None, None)


@pytest.mark.parametrize(
    ("card", "found", "words"),
    [
        ("b200", H100, "is b200, sm_100, and this GPU is older: NVIDIA H100 80GB HBM3 (sm_90, 85 GB)"),
        ("h100", A100, "is h100, sm_90, and this GPU is older: NVIDIA A100-SXM4-80GB (sm_80, 85 GB)"),
        ("h200", H100, "is h200 with 141 GB, and this GPU has less: NVIDIA H100 80GB HBM3 (sm_90, 85 GB)"),
        ("a100", A100_40, "is a100 with 80 GB, and this GPU has less: NVIDIA A100-PCIE-40GB (sm_80, 42 GB)"),
    ],
)
def test_less_is_refused(card: str, found: tuple[str, int, int], words: str) -> None:
    assert compare(card, *found) == (words, None)


@pytest.mark.parametrize(
    ("card", "found"), [("h100", H200), ("a100", H100), ("h200", B200), ("h100", ("GH200", *H200[1:]))]
)
def test_more_is_taken_and_said(card: str, found: tuple[str, int, int]) -> None:
    refused, warned = compare(card, *found)
    assert refused is None and warned is not None
    assert found[0] in warned and f"is {card}, and this GPU is another one" in warned


def test_every_card_is_known() -> None:
    for card, (gb, sm) in CARDS.items():
        assert compare(card, f"NVIDIA {card.upper()}", int(gb * 1e9), sm) == (None, None)
