from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa.errors import CheckpointError
from pipelines import promote
from pipelines.config import Config, PromoteSection
from pipelines.errors import PromotionRefused, StageError, TrackingUnreachable
from pipelines.evaluate import Comparison
from pipelines.listing import list_entries
from pipelines.promote import PromoteResult, judge
from pipelines.registry import CHALLENGER, CHAMPION, VERSION_FOLDER, Registry, Version, folder_digest, open_registry
from pipelines.registry_lock import Lease
from pipelines.report import (
    Case,
    Details,
    Difference,
    Evaluation,
    Fidelity,
    Figures,
    Quality,
    read_evaluation,
    write_report,
)
from pipelines.version_tags import TAG_BACKBONE, TAG_EVALUATION, stored_evaluation
from tests.registered import champion_of

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

SAME = Fidelity(num_tokens=100, original_perplexity=10.0, tuned_perplexity=10.05, mean_kl=0.001)
KEPT = Quality(answers=SAME, text=SAME)

rates = st.floats(1.0, 5.0)
speeds = st.floats(10.0, 500.0)


def figures(rate: float = 2.0, speed: float = 75.0) -> Figures:
    return Figures(
        num_answers=4,
        num_tokens=4 + round(1000 * rate),
        num_steps=1000,
        plain_step_s=0.02,
        tree_step_s=0.03,
        plain_tokens_per_s=50.0,
        tree_tokens_per_s=speed,
    )


def compared(ours: Figures, theirs: Figures, **changes: Any) -> Comparison:
    made = Comparison(challenger=ours, champion=theirs, num_differing=0, dtype="bfloat16", prompts_digest="p")
    return replace(made, **changes)


def by_stored_figures(challenger: Version, champion: Version) -> Comparison:
    """A stand-in for the measurement: what the versions' own evaluations say."""
    ours, theirs = stored_evaluation(challenger), stored_evaluation(champion)
    assert ours is not None
    assert theirs is not None
    return compared(*(figures(one.acceleration_rate, one.tree_tokens_per_s) for one in (ours, theirs)))


@given(rates, rates, speeds, speeds)
def test_the_gate_opens_exactly_where_both_figures_reach_the_least_and_the_champions_less_the_margins(
    ours: float, theirs: float, our_speed: float, their_speed: float
) -> None:
    challenger, champion = figures(ours, our_speed), figures(theirs, their_speed)
    passes = (
        challenger.acceleration_rate >= champion.acceleration_rate * 0.98
        and our_speed / 50 >= their_speed / 50 * 0.9
        and our_speed / 50 >= GATE.min_speedup
    )
    assert (judge(GOOD, compared(challenger, champion), GATE) == ()) is passes


@given(rates, speeds)
def test_an_equal_challenger_passes_where_it_is_faster_than_plain_decoding(rate: float, speed: float) -> None:
    reasons = judge(GOOD, compared(figures(rate, speed), figures(rate, speed)), GATE)
    assert (reasons == ()) is (speed >= 50)


def test_a_gain_that_was_stored_but_not_measured_just_now_is_none() -> None:
    slow = figures(0.9, 49.0)
    assert judge(GOOD, compared(slow, slow), GATE) == (
        "acceleration rate 0.90 is below promote.min_acceleration 1",
        "speedup 0.98 is below promote.min_speedup 1",
    )


def test_a_figure_that_is_no_number_passes_nothing() -> None:
    broken = replace(figures(), tree_tokens_per_s=float("nan"))
    assert len(judge(GOOD, compared(broken, figures()), GATE)) == 2  # neither the least speedup nor the champion's


@pytest.mark.parametrize(
    ("challenger", "told"),
    [
        (None, "never evaluated"),
        (replace(GOOD, identity_checked=0), "not checked"),
        (replace(GOOD, identity_differing=1), "1 of 4"),
        (replace(GOOD, acceleration_rate=0.9), "min_acceleration"),
        (replace(GOOD, tree_tokens_per_s=49.0), "speedup 0.98 is below promote.min_speedup 1"),
        (replace(GOOD, tree_tokens_per_s=float("nan")), "min_speedup"),
        (replace(GOOD, tuned=True), "quality guard"),
        (
            replace(GOOD, tuned=True, quality=replace(KEPT, text=replace(SAME, tuned_perplexity=10.2))),
            "human text rose by 2",
        ),
        (
            replace(GOOD, tuned=True, quality=replace(KEPT, answers=replace(SAME, tuned_perplexity=float("nan")))),
            "answers",
        ),
    ],
)
def test_without_a_champion_identity_quality_and_a_real_gain_are_still_asked(
    challenger: Evaluation | None, told: str
) -> None:
    (reason,) = judge(challenger, None, GATE)
    assert told in reason


def test_a_tuned_backbone_that_kept_its_perplexity_passes() -> None:
    assert judge(replace(GOOD, tuned=True, quality=KEPT), compared(figures(), figures()), GATE) == ()


def test_answers_that_differ_count_where_the_arithmetic_is_exact_enough() -> None:
    differing = compared(figures(), figures(), num_differing=1)
    assert judge(GOOD, differing, GATE) == ()  # bfloat16: near-ties flip; the float32 check of the evaluation holds
    (reason,) = judge(GOOD, replace(differing, dtype="float32"), GATE)
    assert "1 float32" in reason


def test_an_evaluation_survives_its_report(tmp_path: Path) -> None:
    case = Case(
        scheme="typical@0.7", num_nodes=8, overall=figures(), by_category={"maths": figures(), "prose": figures(3.0)},
        depth_reached=(0.7, 0.3), num_differing=None,
    )  # fmt: skip
    greedy = replace(case, scheme="greedy", num_differing=2, depth_reached=(0.6, 0.2, 0.1))
    parted = Difference(prompt="p/2", dtype="bfloat16", position=7, plain_token=3, tree_token=None, margin=0.0625)
    tuned = replace(GOOD, tuned=True, quality=KEPT)
    page, plot = write_report(tmp_path, tuned, [[1, 2, 3], [2]], Details(cases=(greedy, case), differences=(parted,)))
    assert read_evaluation(tmp_path) == tuned
    assert Evaluation.from_json(tuned.to_json()) == tuned
    text = page.read_text()
    for told in (
        "speedup",
        "| maths | 4 | 2.00 |",
        "| prose | 4 | 3.00 |",
        "0.700 | 0.300 | – |",
        "| p/2 | bfloat16 | 7 | 3 |",
    ):
        assert told in text
    assert "perplexity" in text
    assert plot.stat().st_size > 1000
    assert (tmp_path / "cases.png").stat().st_size > 1000


def test_a_missing_or_foreign_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `evaluate`"):
        read_evaluation(tmp_path)
    for text in ('{"a": 1}', '{"evaluation": {"a": 1}}', '{"evaluation": 3}', '{"evalua', "", "[]", "\x00"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(StageError, match="run `evaluate` again") as caught:
            read_evaluation(tmp_path)
        assert "\n" not in str(caught.value)


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


def test_nothing_is_promoted_where_nothing_is_registered(config: Config, registry: Registry) -> None:
    with pytest.raises(StageError, match="run `register`"):
        promote.run(config)
    with pytest.raises(StageError, match="no champion to go back from"):
        promote.rollback(config)


def test_a_runs_key_finds_it_again(registry: Registry) -> None:
    assert registry.run_for("key", {}) == registry.run_for("key", {})
    assert registry.run_for("key", {}) != registry.run_for("other", {})


def _promote(config: Config, **changes: Any) -> PromoteResult:
    return promote.run(config.model_copy(update={"promote": PromoteSection(**changes)}), measure=by_stored_figures)


def test_champions_follow_each_other_and_come_back(config: Config, registry: Registry, tmp_path: Path) -> None:
    first = _register(registry, tmp_path / "f", "first", GOOD)
    assert _promote(config).champion == first.number
    assert _promote(config).previous == first.number  # again: nothing to do

    better = _register(registry, tmp_path / "f", "better", replace(GOOD, acceleration_rate=2.5))
    result = _promote(config)
    assert (result.champion, result.previous) == (better.number, first.number)
    champion = champion_of(config)
    assert champion is not None and champion.folder is not None
    assert (champion.folder / "config.json").read_text() == "better"

    worse = _register(registry, tmp_path / "f", "worse", replace(GOOD, acceleration_rate=1.5))
    with pytest.raises(PromotionRefused, match=r"acceleration rate 1\.50"):
        _promote(config)
    champion = registry.aliased(CHAMPION)
    assert champion is not None
    assert champion.number == better.number
    listed = {entry.version: entry for entry in list_entries(config)}
    assert listed[worse.number].verdict.startswith(f"refused beside version {better.number}: acceleration rate")
    assert (listed[worse.number].aliases, listed[better.number].aliases) == ((CHALLENGER,), (CHAMPION,))
    assert json.loads(json.dumps(listed[better.number].as_dict()))["gate"]["passed"] is True

    forced = _promote(config, force=True)
    assert (forced.champion, len(forced.overruled)) == (worse.number, 1)
    assert _promote(config, version=better.number).champion == better.number
    assert registry.champions() == [first.number, better.number, worse.number, better.number]


def test_every_rollback_goes_one_champion_further_back(config: Config, registry: Registry) -> None:
    first, better, worse = (version.number for version in registry.versions())
    for back in (worse, better, first):
        left = registry.champions()[-1]
        assert _promote(config, rollback=True).champion == back
        marks = {entry.version: entry.rolled_back for entry in list_entries(config)}
        assert marks[left]
        assert marks[back] is None  # also of one that was left before
    with pytest.raises(StageError, match="is its first champion"):
        _promote(config, rollback=True)
    assert registry.champions() == [first]
    with pytest.raises(PromotionRefused, match="rolled back on"):  # what was left is not taken again unasked
        _promote(config, version=better)
    assert _promote(config, version=better, force=True).champion == better
    assert {entry.version: entry for entry in list_entries(config)}[better].verdict.startswith("forced")
    assert _promote(config, rollback=True).champion == first


def test_whom_a_lost_lock_keeps_where_he_is_bears_no_mark_of_having_moved(
    config: Config, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: Lease) -> None:
        raise StageError("the registry's lock was lost")

    first, better, _ = (version.number for version in registry.versions())
    before = list_entries(config)
    assert {entry.version for entry in before if entry.rolled_back} >= {better}
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", lost)
        with pytest.raises(StageError, match="lock was lost"):
            _promote(config, version=better, force=True)
    assert list_entries(config) == before
    assert _promote(config, version=better, force=True).previous == first
    before = list_entries(config)
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", lost)
        with pytest.raises(StageError, match="lock was lost"):
            promote.rollback(config)
    assert list_entries(config) == before
    assert promote.rollback(config).champion == first


def test_an_alias_moved_by_hand_is_believed(config: Config, registry: Registry) -> None:
    first, _, worse = (version.number for version in registry.versions())
    registry.set_alias(CHAMPION, worse)
    assert registry.champions() == [first, worse]
    registry.set_alias(CHAMPION, first)
    assert registry.champions() == [first]


def test_a_champion_that_changed_while_it_was_measured_is_measured_against(
    config: Config, registry: Registry, tmp_path: Path
) -> None:
    first, better, _ = (version.number for version in registry.versions())
    _register(registry, tmp_path / "f", "late", replace(GOOD, acceleration_rate=2.6))
    beside = []

    def measure(challenger: Version, champion: Version) -> Comparison:
        beside.append(champion.number)
        if len(beside) == 1:
            registry.set_alias(CHAMPION, better)
        return by_stored_figures(challenger, champion)

    assert promote.run(config, measure=measure).previous == better
    assert beside == [first, better]
    assert promote.rollback(config).champion == better
    registry.set_alias(CHAMPION, first)


def test_what_cannot_be_measured_is_refused_with_the_reason(config: Config, registry: Registry, tmp_path: Path) -> None:
    def measure(challenger: Version, champion: Version) -> Comparison:
        raise CheckpointError("made for another backbone")

    _register(registry, tmp_path / "f", "foreign", replace(GOOD, acceleration_rate=4))
    with pytest.raises(PromotionRefused, match="made for another backbone"):
        promote.run(config, measure=measure)
    broken = _register(registry, tmp_path / "f", "broken", GOOD)
    registry.tag(broken.number, {TAG_EVALUATION: '{"quality": {}}'})
    with pytest.raises(PromotionRefused, match="never evaluated"):
        promote.run(config, measure=measure)
    with pytest.raises(StageError, match="no version 99"):
        _promote(config, version=99)


def test_beside_a_champion_rate_and_speed_are_those_measured_now_not_those_stored(
    config: Config, registry: Registry, tmp_path: Path
) -> None:
    """An evaluation made on a busy machine refuses nobody; one that differs from plain decoding is not measured at all."""
    slow = replace(GOOD, acceleration_rate=0.9, tree_tokens_per_s=45.0)
    version = _register(registry, tmp_path / "f", "stored slow", slow)
    with pytest.raises(PromotionRefused, match=r"speedup 0\.90 is below promote\.min_speedup 1"):
        promote.run(config, measure=lambda *_: compared(figures(speed=45.0), figures(speed=45.0)))
    assert promote.run(config, measure=lambda *_: compared(figures(), figures())).champion == version.number
    promote.rollback(config)
    _register(registry, tmp_path / "f", "differing", replace(GOOD, identity_differing=1))
    with pytest.raises(PromotionRefused, match="1 of 4 float32 answers differ"):
        promote.run(config, measure=lambda *_: pytest.fail("measured"))


def test_an_outage_while_measuring_says_nothing_of_the_challenger(
    config: Config, registry: Registry, tmp_path: Path
) -> None:
    """It ends the promotion, and the version bears no verdict; `force` goes on without a measurement."""

    def measure(challenger: Version, champion: Version) -> Comparison:
        raise TrackingUnreachable("no MLflow server answers")

    challenger = _register(registry, tmp_path / "f", "unlucky", replace(GOOD, acceleration_rate=4))
    with pytest.raises(TrackingUnreachable, match="no MLflow server answers"):
        promote.run(config, measure=measure)
    assert {entry.version: entry for entry in list_entries(config)}[challenger.number].verdict == "not judged"
    forced = promote.run(config.model_copy(update={"promote": PromoteSection(force=True)}), measure=measure)
    assert (forced.champion, len(forced.overruled)) == (challenger.number, 1)
    promote.rollback(config)


def test_a_backbone_is_the_same_wherever_its_weights_lie(config: Config, registry: Registry, tmp_path: Path) -> None:
    champion = registry.aliased(CHAMPION)
    assert champion is not None
    registry.tag(champion.number, {TAG_BACKBONE: "/there/llama abc"})
    challenger = _register(registry, tmp_path / "f", "elsewhere", replace(GOOD, acceleration_rate=4))
    registry.tag(challenger.number, {TAG_BACKBONE: "/there/llama def"})
    with pytest.raises(PromotionRefused, match="for backbone /there/llama def, the champion for /there/llama abc"):
        _promote(config)
    registry.tag(challenger.number, {TAG_BACKBONE: "/mounted here/llama abc"})
    assert _promote(config).previous == champion.number


def test_an_unreachable_server_is_one_line_after_a_few_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.registry._PATIENCE_S", 0.6)
    nobody = Config.model_validate({"workdir": tmp_path, "registry": {"tracking_uri": "http://127.0.0.1:9"}})
    for ask in (promote.run, list_entries):
        with pytest.raises(StageError, match=r"no MLflow server answers at http://127\.0\.0\.1:9") as caught:
            ask(nobody)
        assert "\n" not in str(caught.value)


def test_a_database_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database " * 100)
    with pytest.raises(StageError, match=r"mlflow\.db fails") as caught:
        promote.run(Config(workdir=tmp_path))
    assert "\n" not in str(caught.value)


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
