from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import promote
from pipelines.config import Config, PromoteSection
from pipelines.errors import PromotionRefused, StageError
from pipelines.promote import judge
from pipelines.register import TAG_EVALUATION
from pipelines.registry import (
    CHALLENGER,
    CHAMPION,
    VERSION_FOLDER,
    Registry,
    Version,
    folder_digest,
    open_registry,
    resolve,
)
from pipelines.report import Evaluation, read_evaluation, write_report

GATE = PromoteSection(acceleration_margin=0.02, speedup_margin=0.1)
GOOD = Evaluation(
    num_prompts=4,
    num_tokens=400,
    num_nodes=16,
    dtype="bfloat16",
    device="cpu",
    acceleration_rate=2.0,
    plain_step_s=0.02,
    tree_step_s=0.03,
    plain_tokens_per_s=50.0,
    tree_tokens_per_s=75.0,
    num_differing=0,
    identity_checked=4,
    identity_differing=0,
    prompts_digest="p",
    checkpoint_digest="c",
)

rates = st.floats(1.0, 5.0)
speeds = st.floats(10.0, 500.0)


@given(rates, rates, speeds, speeds)
def test_the_gate_opens_exactly_where_both_figures_reach_the_champions_less_the_margins(
    ours: float, theirs: float, our_speed: float, their_speed: float
) -> None:
    challenger = replace(GOOD, acceleration_rate=ours, tree_tokens_per_s=our_speed)
    champion = replace(GOOD, acceleration_rate=theirs, tree_tokens_per_s=their_speed)
    passes = ours >= theirs * 0.98 and our_speed / 50 >= their_speed / 50 * 0.9
    assert (judge(challenger, champion, GATE) == ()) is passes


@given(rates, speeds)
def test_an_equal_challenger_passes(rate: float, speed: float) -> None:
    one = replace(GOOD, acceleration_rate=rate, tree_tokens_per_s=speed)
    assert judge(one, one, GATE) == ()


@pytest.mark.parametrize(
    ("challenger", "told"),
    [
        (None, "never evaluated"),
        (replace(GOOD, identity_checked=0), "not checked"),
        (replace(GOOD, identity_differing=1), "1 of 4"),
        (replace(GOOD, acceleration_rate=0.9), "min_acceleration"),
    ],
)
def test_without_a_champion_identity_and_a_real_gain_are_still_asked(challenger: Evaluation | None, told: str) -> None:
    (reason,) = judge(challenger, None, GATE)
    assert told in reason


def test_figures_of_other_prompts_are_not_compared() -> None:
    (reason,) = judge(replace(GOOD, prompts_digest="q"), GOOD, GATE)
    assert "other prompts" in reason


def test_an_evaluation_survives_its_report(tmp_path: Path) -> None:
    page, plot = write_report(tmp_path, GOOD, [[1, 2, 3], [2]])
    assert read_evaluation(tmp_path) == GOOD
    assert "speedup" in page.read_text()
    assert plot.stat().st_size > 1000


def test_a_missing_or_foreign_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `evaluate`"):
        read_evaluation(tmp_path)
    (tmp_path / "report.json").write_text('{"a": 1}')
    with pytest.raises(StageError, match="run `evaluate` again"):
        read_evaluation(tmp_path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A registry of its own; the tests below move its aliases one after the other."""
    return Config(workdir=tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def registry(config: Config) -> Registry:
    return open_registry(config)


def _register(registry: Registry, folder: Path, text: str, evaluation: Evaluation) -> Version:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    run_id = registry.run_for(text, {"x": 1})
    source = registry.log_folder(run_id, folder, f"{VERSION_FOLDER}-{folder_digest(folder)}")
    version = registry.add_version(run_id, source, {TAG_EVALUATION: evaluation.to_json()})
    registry.set_alias(CHALLENGER, version.number)
    return version


def test_nothing_is_promoted_or_resolved_where_nothing_is_registered(config: Config) -> None:
    with pytest.raises(StageError, match="run `register`"):
        promote.run(config)
    with pytest.raises(StageError, match="champion"):
        resolve(config)
    with pytest.raises(StageError, match="earlier champion"):
        promote.rollback(config)


def test_a_runs_key_finds_it_again(registry: Registry) -> None:
    assert registry.run_for("key", {}) == registry.run_for("key", {})
    assert registry.run_for("key", {}) != registry.run_for("other", {})


def test_champions_follow_each_other_and_come_back(config: Config, registry: Registry, tmp_path: Path) -> None:
    first = _register(registry, tmp_path / "f", "first", GOOD)
    assert promote.run(config).champion == first.number
    assert promote.run(config).previous == first.number  # again: nothing to do

    better = _register(registry, tmp_path / "f", "better", replace(GOOD, acceleration_rate=2.5))
    result = promote.run(config)
    assert (result.champion, result.previous) == (better.number, first.number)
    folder = resolve(config).folder
    assert folder is not None
    assert (folder / "config.json").read_text() == "better"

    worse = _register(registry, tmp_path / "f", "worse", replace(GOOD, acceleration_rate=1.5))
    with pytest.raises(PromotionRefused, match=r"acceleration rate 1\.50"):
        promote.run(config)
    champion = registry.aliased(CHAMPION)
    assert champion is not None
    assert champion.number == better.number

    forced = promote.run(config.model_copy(update={"promote": PromoteSection(force=True)}))
    assert (forced.champion, len(forced.overruled)) == (worse.number, 1)
    assert promote.rollback(config).champion == better.number
    assert promote.rollback(config).champion == first.number
    with pytest.raises(StageError, match="earlier champion"):
        promote.rollback(config)


def test_a_version_is_fetched_as_it_was_stored_and_only_once(
    config: Config, registry: Registry, tmp_path: Path
) -> None:
    version = _register(registry, tmp_path / "g", "content", GOOD)
    fetched = registry.fetch(version)
    assert fetched.folder is not None
    assert folder_digest(fetched.folder) == folder_digest(tmp_path / "g")
    marker = fetched.folder / "marker"
    marker.touch()
    assert registry.fetch(version).folder == fetched.folder
    assert marker.exists()
