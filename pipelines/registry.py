"""Runs, versions and aliases in MLflow. The only file that speaks to MLflow; knows folders, not what is in them.

A version is a folder of artifacts (heads, tree, card, report) with tags. Two aliases move: `challenger`, the newest,
and `champion`, what is served. MLflow's aliases are last-write-wins, so whoever moves one holds `Registry.lock`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.config import Config
from pipelines.errors import NoSuchAlias, StageError

logger = logging.getLogger(__name__)

CHALLENGER, CHAMPION = "challenger", "champion"
VERSION_FOLDER = "checkpoint"  # where a run's artifacts hold the version
_KEY = "medusa.key"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version and, once fetched, its folder on this machine."""

    number: int
    source: str
    run_id: str
    tags: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


def folder_digest(folder: Path) -> str:
    """Hash of the names and bytes of all files below `folder`: equal folders, equal digests."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def tracking_uri(config: Config) -> str:
    """The configured URI, or SQLite in the working directory; always absolute, since Ray's workers live elsewhere."""
    if config.registry.tracking_uri is None:
        return f"sqlite:///{config.layout.tracking_db}"
    scheme, _, path = config.registry.tracking_uri.partition(":///")
    if scheme == "sqlite" and not path.startswith("/"):
        return f"sqlite:///{Path(path).absolute()}"
    return config.registry.tracking_uri


def open_registry(config: Config) -> Registry:
    """The registry of a configuration; its SQLite file is made on first use."""
    config.layout.root.mkdir(parents=True, exist_ok=True)
    artifacts = config.registry.artifact_uri
    local = config.registry.tracking_uri is None or tracking_uri(config).startswith("sqlite:")
    return Registry(
        tracking_uri=tracking_uri(config),
        artifact_uri=artifacts or (config.layout.artifacts.as_uri() if local else None),
        experiment=config.registry.experiment,
        model_name=config.registry.model_name,
        cache=config.layout.versions,
        lock_file=config.layout.root / ".registry.lock",
    )


def resolve(config: Config, alias: str | None = None) -> Version:
    """The version that bears `alias` (default: the one that serving asks for), fetched: its `folder` holds a checkpoint.

    Raises NoSuchAlias where nothing bears it, StageError where what does cannot be fetched.
    """
    registry = open_registry(config)
    wanted = alias or config.serve.alias
    version = registry.aliased(wanted)
    if version is None:
        name, uri = config.registry.model_name, registry.tracking_uri
        raise NoSuchAlias(f"no version of {name} is {wanted!r} in {uri}; register and promote one")
    return registry.fetch(version)


class Registry:
    """One registered model and one experiment of an MLflow server or database."""

    def __init__(
        self,
        *,
        tracking_uri: str,
        artifact_uri: str | None,
        experiment: str,
        model_name: str,
        cache: Path,
        lock_file: Path,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.model_name = model_name
        self._client = _client(tracking_uri)
        self._experiment_id = self._experiment(experiment, artifact_uri)
        self._cache = cache
        self._lock_file = lock_file

    # Runs

    def run_for(self, key: str, params: Mapping[str, Any]) -> str:
        """Id of the run that `key` names; made with `params` at the first call and found again by every retry."""
        known = self._client.search_runs([self._experiment_id], filter_string=f"tags.`{_KEY}` = '{key}'", max_results=1)
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        run = self._client.create_run(self._experiment_id, tags={_KEY: key}, run_name=key)
        for name, value in params.items():
            self._client.log_param(run.info.run_id, name, value)
        return str(run.info.run_id)

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        self._client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")

    def has_run(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException:
            return False
        return True

    def log_metrics(self, run_id: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(run_id, name, value)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self._client.log_text(run_id, text, name)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in order of step."""
        return sorted((point.step, point.value) for point in self._client.get_metric_history(run_id, metric))

    def log_folder(self, run_id: str, folder: Path, name: str) -> str:
        """Store a folder's files as artifacts `name` of a run; the URI under which they lie."""
        self._client.log_artifacts(run_id, str(folder), artifact_path=name)
        return f"{self._client.get_run(run_id).info.artifact_uri}/{name}"

    # Versions

    def add_version(self, run_id: str, source: str, tags: Mapping[str, str]) -> Version:
        """A new version over artifacts that are stored already."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(self.model_name, source=source, run_id=run_id, tags=dict(tags))
        return _version(made)

    def versions(self) -> list[Version]:
        """All versions, the oldest first."""
        found = self._client.search_model_versions(f"name = '{self.model_name}'")
        return sorted((_version(item) for item in found), key=lambda version: version.number)

    def aliased(self, alias: str) -> Version | None:
        """The version that bears an alias, if any; a cheap question, fit for polling."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version_by_alias(self.model_name, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def set_alias(self, alias: str, number: int) -> None:
        """Move an alias and read it back. StageError where somebody else moved it at the same moment."""
        self._client.set_registered_model_alias(self.model_name, alias, str(number))
        seen = self.aliased(alias)
        if seen is None or seen.number != number:
            raise StageError(
                f"{alias} was set to version {number} but now names {seen and seen.number}: another promotion runs"
            )

    def tag(self, number: int, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(self.model_name, str(number), key, value)

    def fetch(self, version: Version) -> Version:
        """The version with its folder on this machine: downloaded once, whole or not at all."""
        import mlflow.artifacts

        target = self._cache / f"{self.model_name}-{version.number}-{version.run_id[:8]}"
        if not target.is_dir():
            self._cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._cache, prefix=".fetch-") as work:
                got = mlflow.artifacts.download_artifacts(
                    artifact_uri=version.source, dst_path=work, tracking_uri=self.tracking_uri
                )
                with contextlib.suppress(OSError):  # another process was first, and its copy is as good
                    os.replace(got, target)
        if not target.is_dir():
            raise StageError(f"version {version.number} could not be fetched from {version.source} to {target}")
        return Version(
            number=version.number, source=version.source, run_id=version.run_id, tags=version.tags, folder=target
        )

    @contextlib.contextmanager
    def lock(self, timeout_s: float) -> Iterator[None]:
        """Hold while aliases move. One lock per working directory, beside the database."""
        try:
            with FileLock(self._lock_file, timeout=timeout_s):
                yield
        except Timeout:
            raise StageError(f"another promotion holds {self._lock_file} for more than {timeout_s:g} s") from None

    def _experiment(self, name: str, artifact_uri: str | None) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=artifact_uri))
        except MlflowException:  # another process made it in between
            known = self._client.get_experiment_by_name(name)
            if known is None:
                raise
            return str(known.experiment_id)


class RunLog:
    """Writes metrics of one run from a worker. A tracking server out of reach costs metrics, never the training."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._client = _client(tracking_uri)
        self._run_id = run_id

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            for name, value in values.items():
                self._client.log_metric(self._run_id, name, value, step=step)
        except (MlflowException, OSError) as error:
            logger.warning("metrics of step %d are not logged: %s", step, error)


def _client(tracking_uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for noisy in (
        "alembic",
        "mlflow",
    ):  # a new database tells of each of its migrations; importing mlflow resets levels
        logging.getLogger(noisy).setLevel(logging.WARNING)

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _version(item: Any) -> Version:
    return Version(number=int(item.version), source=str(item.source), run_id=str(item.run_id), tags=dict(item.tags))


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of `source` at `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        made = Path(work) / "made"
        shutil.copytree(source, made)
        if target.exists():
            os.replace(target, Path(work) / "old")
        os.replace(made, target)
