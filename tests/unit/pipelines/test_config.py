from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import CONFIGS, Config, dump_config, load_config
from pipelines.errors import ConfigError


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_shipped_files_load_by_name_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(Path(name))
    file = tmp_path / "again.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_no_file_means_the_defaults() -> None:
    assert load_config(None) == Config()


@given(st.integers(1, 10**6), st.floats(1e-6, 1), st.booleans())
def test_an_override_equals_the_same_value_in_a_file(steps: int, rate: float, force: bool) -> None:
    by_override = load_config(None, [f"train.steps={steps}", f"train.lr_heads={rate!r}", f"promote.force={force}"])
    expected = Config.model_validate({"train": {"steps": steps, "lr_heads": rate}, "promote": {"force": force}})
    assert by_override == expected


def test_overrides_win_over_the_file_and_leave_its_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 10, seed: 3}\n")
    config = load_config(file, ["train.steps=20"])
    assert (config.train.steps, config.train.seed) == (20, 3)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.stepz=3"], "'train.steps'"),
        (["trian.steps=3"], "'train'"),
        (["lr_heads=3"], "'train.lr_heads'"),
        (["train.steps"], "section.key=value"),
        (["=3"], "section.key=value"),
        (["train=3"], "section"),
        (["workdir.x=3"], "workdir: "),
        (["train.steps=0"], "train.steps: input should be greater than 0, got 0"),
        (["train.steps=many"], "train.steps"),
        (["train.zero_stage=4"], "train.zero_stage"),
        (["distill.temperature=-1"], "distill.temperature"),
        (
            ["calibrate.tokens_per_size=1"],
            "calibrate.tokens_per_size: input should be greater than or equal to 2, got 1",
        ),
        (["evaluate.max_tokens=1"], "evaluate.max_tokens: input should be greater than or equal to 2, got 1"),
        (["serve.port=70000"], "serve.port"),
        (
            ["serve.tree=bushy"],
            """serve.tree: must be a number of nodes from 1 (plain), "dynamic" or "dynamic:N", got 'bushy'""",
        ),
        (["serve.tree=dynamic:0"], "got 'dynamic:0'"),
        (["serve.tree=0"], '"dynamic:N", got 0'),
        (["serve.tree=true"], '"dynamic:N", got True'),
        (["serve.tree=1.5"], '"dynamic:N", got 1.5'),
        (["serve.api_keys=[abc]"], "as `medusa key new` prints it"),
    ],
)
def test_a_bad_override_is_one_line_that_names_key_and_fix(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "serve.api_keys=[sk-SECRET]",
        "serve.api_keys=sk-SECRET",
        "serve.api_keys.0=sk-SECRET",
        "registry.tracking_uri=[http://me:SECRET@host]",
        "registry=http://me:SECRET@host",
        "serve.api_keys sk-SECRET",
        "registry.tracking_uri:http://me:SECRET@host",
        "serve.api_keys",
        "serve=sk-SECRET",
    ],
)
def test_what_a_message_refuses_it_tells_without_keys_and_passwords(override: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("serve: {api_keys: []}\n")
    with pytest.raises(ConfigError, match=r"serve|registry") as caught:
        load_config(file, [override])
    assert "SECRET" not in str(caught.value)


def test_a_dump_leaves_passwords_out_and_all_else_as_it_is() -> None:
    def dumped(where: str) -> str:
        return dump_config(
            load_config(
                None, [f"registry.tracking_uri=http://{where}:5000", f"prompts.path=[s3://{where}/a, s3://b/c@d]"]
            )
        )

    assert dumped("me:SE/CR@ET@host") == dumped("***@host")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "train: 3\n", "nosuch: {}\n"])
def test_a_bad_file_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("experiment: SECRET: x", "line 2 column 21: mapping values are not allowed here"),
        ('experiment: "SECRET', "line 3 column 1: found unexpected end of stream"),
        ("experiment: *SECRET", "line 2 column 15: found undefined alias"),
        ("experiment: !SECRET x", "line 2 column 15: could not determine a constructor for the tag"),
        ("experiment: [SECRET, b c: d: e]", "line 2 column"),
        ("experiment: 2026-99-99", "month must be in 1..12"),
    ],
)
def test_a_file_that_does_not_parse_is_told_by_place_and_not_quoted(line: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"registry:\n  {line}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML") as caught:
        load_config(file)
    assert told in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_value_that_looks_like_a_date_and_is_none_is_text() -> None:
    assert load_config(None, ["registry.experiment=2026-99-99"]).registry.experiment == "2026-99-99"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_folders_are_absolute_whatever_the_caller_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = load_config(None, ["workdir=here", "backbone.name=model", "train.init_from=default"])
    assert config.layout.root == tmp_path / "here"
    assert config.backbone.name == str(tmp_path / "model")
    assert config.train.init_from == "default"
    assert Config().layout.root == tmp_path / "medusa-work"


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3  # type: ignore[misc]


def _keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
    leaves = {f"{prefix}{key}" for key, value in tree.items() if not isinstance(value, dict) or key == "measure_on"}
    parts = (_keys(v, f"{prefix}{k}.") for k, v in tree.items() if isinstance(v, dict) and k != "measure_on")
    return leaves.union(*parts)


def test_laptop_and_cluster_differ_in_values_only() -> None:
    laptop, cluster = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("laptop", "cluster"))
    assert _keys(laptop) == _keys(cluster)
    assert laptop != cluster


def test_what_a_cluster_is_told_is_reached_from_every_node() -> None:
    config = load_config(Path("cluster"))
    assert config.ray.address == "auto"
    assert config.registry.tracking_uri is not None
    assert config.registry.tracking_uri.startswith("http")
    assert config.prompts.path
    for path in (config.workdir, *config.prompts.path):
        assert re.match(r"/mnt/|s3://|gs://", str(path)), path


@pytest.mark.parametrize("key", ["workdir", "evaluate.text", "serve.api_keys_file"])
def test_what_is_opened_as_a_file_is_a_path_and_no_uri(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key}: must be a path, on a cluster one that every node mounts, not a URI"
    ):
        load_config(None, [f"{key}=s3://bucket/medusa"])


@pytest.mark.parametrize("tree", [None, 16, "dynamic", "dynamic:16"])
def test_served_trees_are_static_or_dynamic(tree: int | str | None) -> None:
    assert load_config(None, [f"serve.tree={'null' if tree is None else tree}"]).serve.tree == tree
    assert load_config(None, ["serve.tree='16'"]).serve.tree == 16  # as a template may write it


def test_a_section_given_as_a_value_is_told_a_key_of_it() -> None:
    with pytest.raises(
        ConfigError,
        match=r"prompts.self_prompt is a section, .* such as prompts\.self_prompt\.num; got a value of type int",
    ):
        load_config(None, ["prompts.self_prompt=8"])
