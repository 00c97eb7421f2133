"""What papers say of freezing, tried at a size that a laptop's processor can do: claim against result, as it comes out.

    python scripts/papers.py [--only NAME ...] [--folder build/papers]

Every run is an ordinary Frostline recipe. What was expected was written down before anything ran; a claim that doesn't
show here may well hold at its own size, and the other way round. What has been trained is kept, so that the same
command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import _paper_digits
import _paper_texts
from _lab import Finding, Lab


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what tries it."""

    paper: str
    says: str
    tried: Callable[[Lab], Finding]


CLAIMS = {
    "lp-ft": Claim(
        "Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features",
        "fine-tuning costs 7 points out of distribution against a linear probe; a probe first gives them back",
        _paper_digits.lp_ft,
    ),
    "surgical-input": Claim(
        "Lee et al. 2023, Surgical Fine-Tuning",
        "where the inputs have shifted, the first block alone beats all of them by 3 points",
        _paper_digits.inputs,
    ),
    "surgical-output": Claim(
        "Lee et al. 2023, Surgical Fine-Tuning",
        "where the labels have shifted, the last layer alone is best",
        _paper_digits.outputs,
    ),
    "top-quarter": Claim(
        "Lee, Tang & Lin 2019, What Would Elsa Do?",
        "the top quarter of the layers reaches 90% of the quality; all are not always best",
        _paper_texts.quarter,
    ),
    "reinit": Claim(
        "Zhang et al. 2021, Revisiting Few-sample BERT Fine-tuning",
        "with few rows, top blocks that start afresh do better than pretrained ones",
        _paper_texts.reinitialised,
    ),
    "ulmfit": Claim(
        "Howard & Ruder 2018, ULMFiT; errors on TREC-6 there: last 16.1, full 6.9, freez 6.9, all three 5.7",
        "gradual unfreezing, discriminative and slanted rates together beat plain fine-tuning",
        _paper_texts.ulmfit,
    ),
}


def show(name: str, claim: Claim, finding: Finding, seconds: float) -> None:
    print(f"\n{name}: {claim.paper}\n  says      {claim.says}")
    for number, line in enumerate(finding.lines):
        print(f"  {'' if number else 'here':10}{line}")
    for number, (sentence, holds) in enumerate(finding.verdicts):
        print(f"  {'' if number else 'expected':10}{'yes' if holds else 'NO ':4} {sentence}")
    print(f"  {'':10}{seconds:.0f} s of CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", choices=CLAIMS, default=list(CLAIMS), metavar="NAME", help=", ".join(CLAIMS)
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "build/papers")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for name in asked.only:
        began = time.process_time()
        finding = CLAIMS[name].tried(Lab(asked.folder))
        show(name, CLAIMS[name], finding, time.process_time() - began)


if __name__ == "__main__":
    main()
