"""Mistakes that other trainers pass over in silence, and canaries of a stranger: which tests plant each of them.

A fault counts as caught, and a canary as silent, where every test that plants it passes in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from _trials import Soak, Tally

ROOT = Path(__file__).parent.parent
PATTERNS = "test_silences::test_patterns_that_do_nothing"
FAULTS = {
    "everything is frozen": (f"{PATTERNS}[all-frozen]",),
    "one of two patterns names nothing": (f"{PATTERNS}[one-of-two-is-none]",),
    "a pattern names nothing": (f"{PATTERNS}[no-such-module]",),
    "a head is to be saved under a wrong name": ("test_adapters::test_fields_that_a_recipe_has_its_own_words_for",),
    "a head that trains is not saved": ("test_silences::test_head_that_would_not_be_saved",),
    "frozen BatchNorms count on": (
        "test_silences::test_batchnorm_below_the_frost_line_counts_no_further",
        "test_silences::test_frozen_tensor_that_moves_at_once",
    ),
    "half of a tied pair is frozen": ("test_silences::test_tied_weights_asked_for_in_two_ways",),
    "every label is -100": ("test_silences::test_every_label_ignored",),
    "the metric that decides is NaN": ("test_silences::test_metric_that_is_no_number",),
    "a layer is opened that the optimizer lacks": (
        "test_silences::test_layer_that_is_opened_behind_the_optimizers_back",
        "test_freezing::test_canary_stops_a_stage_that_could_not_train",
    ),
    "moments come to another layer": (
        "test_optim::test_moments_go_by_name_and_never_by_position",
        "test_endings::test_a_changed_recipe_is_refused_with_what_has_changed",
    ),
    "a weight trains that the loss doesn't reach": ("test_silences::test_weight_that_the_loss_does_not_reach",),
    "a label is out of range": ("test_silences::test_labels_out_of_range",),
    "there is no padding token": ("test_models::test_missing_padding_is_asked_for",),
}
"""Fault -> the tests that plant it: file, function and, where it is one of several cases, its name."""
CANARIES = {
    "code of a recipe": ("test_load::test_no_tag_is_taken", "test_load::test_bombs_are_refused_at_once"),
    "code and pickles of a model": (
        "test_hostile::test_code_and_pickles_of_a_model_are_never_run",
        "test_hostile::test_weights_that_are_pickles_are_not_opened",
        "test_hostile::test_a_model",
    ),
    "pickles in checkpoints and caches": ("test_hostile::test_pickles_in_checkpoints_and_cache_are_never_opened",),
    "templates": (
        "test_hostile::test_a_template_has_little_time_and_little_memory",
        "test_hostile::test_a_template_that_ends_its_process_is_told_of",
    ),
    "secrets": ("test_hostile::test_a_token_is_written_nowhere",),
    "paths": (
        "test_load::test_extends_stays_inside_the_tree",
        "test_hostile::test_paths_of_rows_and_models_stay_inside",
        "test_hostile::test_a_run_lies_in_its_folder",
        "test_hostile::test_a_cache_that_is_a_link_or_another_users",
        "test_hostile::test_a_planted_link_is_not_followed_by_what_is_saved",
    ),
    "scripts in a report": ("test_report::test_whatever_is_in_the_papers_stays_text",),
    "escapes in a terminal": ("test_load::test_nothing_printed_can_drive_a_terminal",),
}
"""Canary -> the tests that plant it."""


def planted_faults(soak: Soak, folder: Path) -> Tally:
    """Each is refused before the first step, or stops the run by the second."""
    tally, found = Tally(), _outcomes(FAULTS, folder)
    for fault, tests in FAULTS.items():
        tally.count(all(all(found[test]) for test in tests), f"{fault}: {', '.join(tests)}")
    return tally


def canaries(soak: Soak, folder: Path) -> Tally:
    """Every case of these tests is one that could sing."""
    tally = Tally()
    for test, passed in _outcomes(CANARIES, folder).items():
        for each in passed:
            tally.count(each, test)
    return tally


def _outcomes(planted: Mapping[str, tuple[str, ...]], folder: Path) -> dict[str, list[bool]]:
    """Whether each case of the tests passes; one that was not run did not."""
    wanted = sorted({test for tests in planted.values() for test in tests})
    places = [f"tests/{file}.py::{function}" for file, function in (test.split("::") for test in wanted)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={folder}/cases.xml", *places]
    subprocess.run(command, cwd=ROOT, capture_output=True)
    found: dict[str, list[bool]] = {test: [] for test in wanted}
    for case in ElementTree.parse(folder / "cases.xml").iter("testcase"):
        name = f"{case.attrib['classname'].removeprefix('tests.')}::{case.attrib['name']}"
        found[name if name in found else name.partition("[")[0]].append(len(case) == 0)
    return {test: passed or [False] for test, passed in found.items()}
