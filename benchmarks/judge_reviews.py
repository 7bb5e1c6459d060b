"""The strict parser and calibration on real judge text: a directory of pairwise GPT-4 reviews (FastChat's
vicuna_reviews).

Every file is JSONL with `text` (a review whose first line should be two scores from 0 to 10) and `score` (what its
authors recorded). Prints how many reviews the parser reads and whether each agrees with the record, every review it
does not read, and how compressed the scores are before and after a monotone calibration to the share of comparisons
won, cross-fitted over the files.

    python benchmarks/judge_reviews.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megarubric.judging.agreement import compression, spearman
from megarubric.judging.calibration import Labelled, calibration_error, fit
from megarubric.judging.parser import parse_pair_scores


def main(directory: Path) -> None:
    files = sorted(directory.glob("review_*.jsonl"))
    read: dict[str, list[tuple[float, float]]] = {}
    total = agree = 0
    print("reviews that are not read, or read otherwise than recorded:")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            total += 1
            pair = parse_pair_scores(row["text"])
            if pair is None or list(pair) != row["score"]:
                said = "unread" if pair is None else f"read as {pair}"
                print(f"  {file.name} {row['question_id']}: {said}, recorded {row['score']}: {row['text'][:60]!r}")
            if pair is not None:
                agree += list(pair) == row["score"]
                read.setdefault(file.name, []).append(pair)
    parsed = sum(map(len, read.values()))
    print(
        f"\n{total} reviews: {parsed} read ({parsed / total:.1%}), {agree} of them as recorded ({agree / parsed:.1%})"
    )

    before, after, labels = [], [], []
    for name in read:
        others = [labelled for other in read if other != name for labelled in _labelled(read[other])]
        calibration = fit("gpt-4", others)
        for item in _labelled(read[name]):
            before.append(item.score)
            after.append(calibration.score("", "", item.score))
            labels.append(item.label)
    for title, scores in (("before", before), ("after", after)):
        c = compression(scores, 0, 1)
        print(
            f"{title:>6} calibration: {np.mean(np.array(scores) >= 0.8):.1%} at 8 or more of 10, most frequent value "
            f"{c['top_value']:.1%}, std {c['std']:.3f}, error {calibration_error(scores, labels):.3f}, "
            f"rank correlation with the outcome {spearman(scores, labels):.3f}"
        )


def _labelled(pairs: list[tuple[float, float]]) -> list[Labelled]:
    """Both sides of every comparison: the normalised score, and 1 for the higher, 0 for the lower, 1/2 for a tie."""
    out = []
    for a, b in pairs:
        won = 0.5 if a == b else float(a > b)
        out += [Labelled("", "", a / 10, won), Labelled("", "", b / 10, 1 - won)]
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]))
