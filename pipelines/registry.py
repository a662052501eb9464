"""Runs, versions and aliases in MLflow. The only file that speaks to MLflow; knows folders, not what is in them.

A version is a folder of artifacts (heads, tree, card, report) with tags. Two aliases move: `challenger`, the newest,
and `champion`, what is served. MLflow's aliases are last-write-wins, so whoever moves one holds `Registry.lock`.
The champions that were, in order, stand in a tag of the registered model: what a rollback goes back along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.config import Config
from pipelines.credentials import one_line, without_credentials
from pipelines.errors import StageError, TrackingUnreachable
from pipelines.inputs import files_digest
from pipelines.registry_lock import Lease, RegistryLock
from pipelines.tracking import AWAY
from pipelines.version_tags import TAG_DIGEST

logger = logging.getLogger(__name__)

CHALLENGER, CHAMPION = "challenger", "champion"
VERSION_FOLDER = "checkpoint"  # where a run's artifacts hold the version
_KEY, _CHAMPIONS = "medusa.key", "medusa.champions"
_REMEMBERED = 200  # champions

# Told apart by callers. All else that MLflow says no to is one line for the user.
_EXPECTED = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_BUSY = "TEMPORARILY_UNAVAILABLE"  # a database that rolled back: SQLite under another writer
_PATIENCE_S = 6.0
_DATABASES = ("postgresql", "mysql", "mssql")  # that MLflow keeps its tables in, besides SQLite
_KEPT, _UNUSED_S = 4, 24 * 3600.0  # fetched versions; a replica has loaded what it fetched long before a day is over


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version and, once fetched, its folder on this machine. `aliases` where it was listed."""

    number: int
    source: str
    run_id: str
    created: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    folder: Path | None = None


def folder_digest(folder: Path) -> str:
    """Hash of the names and bytes of all files below `folder`: equal folders, equal digests."""
    return files_digest(folder, folder.rglob("*"))[:16]


def tracking_uri(config: Config) -> str:
    """The configured URI, or SQLite in the working directory; always absolute, since Ray's workers live elsewhere."""
    if config.registry.tracking_uri is None:
        return f"sqlite:///{config.layout.tracking_db}"
    scheme, _, path = config.registry.tracking_uri.partition(":///")
    if scheme == "sqlite" and not path.startswith("/"):
        return f"sqlite:///{Path(path).absolute()}"
    return config.registry.tracking_uri


def has_registry(config: Config) -> bool:
    """False where opening would make an empty one: the working directory should hold it, and does not."""
    return config.registry.tracking_uri is not None or config.layout.tracking_db.is_file()


def existing_registry(config: Config) -> Registry:
    """`open_registry` for those who have nothing to put into it. StageError, and nothing made, where there is none yet."""
    if not has_registry(config):
        raise StageError(
            f"no registry in {config.workdir}: nothing was registered there; run `register` first, or set workdir to where "
            "that was done"
        )
    return open_registry(config)


def open_registry(config: Config) -> Registry:
    """The registry of a configuration; its SQLite file, and the working directory for it, is made on first use.

    TrackingUnreachable, after a few seconds of trying, where no server answers; StageError where its driver is missing.
    """
    uri, artifacts = tracking_uri(config), config.registry.artifact_uri
    local = uri.startswith("sqlite:")
    if local:
        config.layout.root.mkdir(parents=True, exist_ok=True)
    if uri.startswith(("http://", "https://")):
        await_server(uri, patience_s=_PATIENCE_S)
    elif uri.startswith(_DATABASES):
        await_database(uri, patience_s=_PATIENCE_S)
    # MLflow sets a new SQLite database up without a lock of its own; two at once would spoil it.
    with FileLock(config.layout.root / ".registry.lock") if local else contextlib.nullcontext():
        return Registry(
            tracking_uri=uri,
            artifact_uri=artifacts or (config.layout.artifacts.as_uri() if local else None),
            experiment=config.registry.experiment,
            model_name=config.registry.model_name,
            cache=config.layout.versions,
            lock_lease_s=config.registry.lock_lease_s,
        )


def await_server(uri: str, *, patience_s: float) -> None:
    """Return as soon as a server answers at `uri`; TrackingUnreachable where none has within `patience_s`.

    5xx is a gateway's word for a server that is away; 401 or 404 for this path says that something is there.
    """
    import requests

    began = time.monotonic()
    while True:
        try:
            status = requests.get(f"{uri.rstrip('/')}/health", timeout=3).status_code
        except requests.RequestException as error:
            reason = type(error).__name__
        else:
            if status < 500:
                return
            reason = f"HTTP {status}"
        if time.monotonic() - began > patience_s:
            raise TrackingUnreachable(
                f"no MLflow server answers at {without_credentials(uri)} ({reason}); start it, or set registry.tracking_uri"
            )
        time.sleep(0.5)


def await_database(uri: str, *, patience_s: float) -> None:
    """The same for a database server, which MLflow would go on asking for minutes. StageError without its driver."""
    import sqlalchemy

    shown = without_credentials(uri)
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    except ImportError as error:
        raise StageError(
            f"the registry at {shown} needs the Python package {error.name!r}: install it, or name another driver in "
            "registry.tracking_uri, as in postgresql+psycopg2://"
        ) from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise _failure(uri, error) from None
    began = time.monotonic()
    while True:
        try:
            engine.connect().close()
        except sqlalchemy.exc.OperationalError as error:
            if time.monotonic() - began > patience_s:
                raise TrackingUnreachable(
                    f"no database answers at {shown} ({one_line(error.orig or error)}); start it, or set registry.tracking_uri"
                ) from None
            time.sleep(0.5)
        else:
            return


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
        lock_lease_s: float = 20.0,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.model_name = model_name
        self._client = _opened(tracking_uri)
        self._experiment_id = self._experiment(experiment, artifact_uri)
        self._cache = cache
        self._lock = RegistryLock(self._client, model_name, lease_s=lock_lease_s)

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

    def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(run_id, name, value)

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        self._client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")

    def has_run(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException:
            return False
        return bool(run.info.lifecycle_stage == "active")  # one that was deleted takes nothing more

    def run_of(self, card: Mapping[str, Any], digest: str) -> str:
        """The training run that a checkpoint's card names, if this registry has it; else a run of the checkpoint's own."""
        named = card.get("Run", {}).get("mlflow")
        if named and self.has_run(named):
            return str(named)
        run_id = self.run_for(f"checkpoint-{digest}", {})
        self.end_run(run_id)
        return run_id

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
        """All versions with their aliases, the oldest first."""
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f"name = '{self.model_name}'", page_token=token)
            found += [_version(item) for item in page]
            token = page.token
            if not token:
                break
        bearers = self._aliases()
        named = [replace(v, aliases=tuple(sorted(a for a, n in bearers.items() if n == v.number))) for v in found]
        return sorted(named, key=lambda version: version.number)

    def version(self, number: int) -> Version:
        """One version by its number. StageError where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._client.get_model_version(self.model_name, str(number)))
        except MlflowException:
            raise StageError(f"{self.model_name} has no version {number}; see `medusa registry list`") from None

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
        """The version with its folder on this machine: downloaded once, whole or not at all; again where it was damaged here.

        StageError where it cannot be had, or what comes is not what was registered.
        """
        target = self._cache / f"{self.model_name}-{version.number}-{version.run_id[:8]}"
        source = without_credentials(version.source)
        if not _holds(target, version):
            with self._downloaded(version) as got:
                if not _holds(got, version):
                    raise StageError(
                        f"version {version.number} came damaged from {source}: its digest is {folder_digest(got)}, "
                        f"registered was {version.tags[TAG_DIGEST]}; try again, and register it again if it stays so"
                    )
                os.utime(got)  # a copy may be as old as what it is of: see `_tidy`
                with FileLock(self._cache / f".{target.name}.lock"):
                    if not _holds(target, version):  # else another process was first, and its copy is as good
                        shutil.rmtree(target, ignore_errors=True)
                        try:
                            os.replace(got, target)
                        except OSError as error:
                            raise StageError(
                                f"version {version.number} cannot be put at {target}: {one_line(error)}; delete what lies there"
                            ) from error
            with contextlib.suppress(OSError):  # another process tidies too
                self._tidy()
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(target)
        return replace(version, folder=target)

    def is_stored(self, version: Version) -> bool:
        """Do the artifacts, which are downloaded to see, hold what was registered? Where they cannot be had: no."""
        try:
            with self._downloaded(version) as got:
                return _holds(got, version)
        except StageError as error:
            logger.warning("%s", error)
            return False

    @contextlib.contextmanager
    def _downloaded(self, version: Version) -> Iterator[Path]:
        """What the version's source holds now, until the block ends. StageError where it cannot be had."""
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException

        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".fetch-") as work:
            try:
                got = mlflow.artifacts.download_artifacts(
                    artifact_uri=version.source, dst_path=work, tracking_uri=self.tracking_uri
                )
            except (MlflowException, OSError) as error:
                raise StageError(
                    f"version {version.number} cannot be fetched from {without_credentials(version.source)}: {one_line(error)}"
                ) from error
            if not Path(got).is_dir():
                raise StageError(
                    f"version {version.number} is a file, {without_credentials(version.source)}, not a folder of heads; "
                    "`register` makes versions of folders"
                )
            yield Path(got)

    def _tidy(self) -> None:
        """Delete what was fetched, or half fetched by somebody who died, and not asked for in a day; a few are kept."""
        used = {folder: folder.stat().st_mtime for folder in self._cache.iterdir() if folder.is_dir()}
        for folder in sorted(used, key=lambda one: used[one], reverse=True)[_KEPT:]:
            if time.time() - used[folder] > _UNUSED_S:
                logger.info("%s, unused for a day, makes room for newer versions", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def lock(self, timeout_s: float) -> contextlib.AbstractContextManager[Lease]:
        """Hold while aliases move: one writer in the whole registry, across processes and machines."""
        return self._lock.hold(timeout_s)

    # The champions' order

    def champions(self) -> list[int]:
        """Who was champion, oldest first, the present one last; a version that came back stands twice.

        The alias is what counts: where it was moved by other hands, or a promotion died before moving it, the list
        ends with what the alias names.
        """
        champion = self.aliased(CHAMPION)
        if champion is None:
            return []
        try:
            known = [int(number) for number in json.loads(self._model_tags().get(_CHAMPIONS, "[]"))]
        except (ValueError, TypeError):
            logger.warning(
                "the tag %s of %s is not readable; the champions before are forgotten", _CHAMPIONS, self.model_name
            )
            known = []
        while known and known[-1] != champion.number and champion.number in known:
            known.pop()
        return known if champion.number in known else [*known, champion.number]

    def crown(self, champions: Sequence[int], lease: Lease) -> None:
        """Make the last of `champions` champion. The way back is written first, so that it is never lost.

        StageError where the lock is lost, or the alias does not hold after all.
        """
        lease.check()
        self._client.set_registered_model_tag(self.model_name, _CHAMPIONS, json.dumps(list(champions)[-_REMEMBERED:]))
        lease.check()
        self.set_alias(CHAMPION, champions[-1])
        lease.check()

    def _aliases(self) -> dict[str, int]:
        model = self._model()
        return {str(alias): int(number) for alias, number in model.aliases.items()} if model else {}

    def _model_tags(self) -> dict[str, str]:
        model = self._model()
        return dict(model.tags) if model else {}

    def _model(self) -> Any | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _experiment(self, name: str, artifact_uri: str | None) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(name)
        if known is not None and known.lifecycle_stage != "active":
            raise StageError(
                f"experiment {name} was deleted in {without_credentials(self.tracking_uri)}; restore it there, or set "
                "registry.experiment to another name"
            )
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
    """Writes metrics of one run at once. A tracking server out of reach costs metrics, never the work that they tell of."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._client = _client(tracking_uri)
        self._run_id = run_id

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            for name, value in values.items():
                self._client.log_metric(self._run_id, name, value, step=step)
        except (MlflowException, OSError) as error:
            logger.warning("metrics of step %d are not logged: %s", step, without_credentials(str(error)))


def _client(tracking_uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own default keeps trying a dead server for four minutes at every call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    from mlflow import MlflowClient

    # A new database tells of each of its migrations; importing mlflow resets levels.
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for every busy database
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _opened(uri: str) -> _PlainTalk:
    """A client that talks plainly. StageError for a database that cannot be opened."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _PlainTalk(_client(uri), uri)
    except (MlflowException, OSError, SQLAlchemyError) as error:
        raise _failure(uri, error) from error


class _PlainTalk:
    """A client whose failures are retried where that helps, and told in one line where it does not."""

    def __init__(self, client: Any, uri: str) -> None:
        self._client = client
        self._uri = uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            return self._call(method, *args, **options)

        return call

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        began = time.monotonic()
        while True:
            try:
                return method(*args, **options)
            except MlflowException as error:
                if error.error_code in _EXPECTED:
                    raise
                if error.error_code != _BUSY or time.monotonic() - began > _PATIENCE_S:
                    raise _failure(self._uri, error) from error
                time.sleep(random.uniform(0.05, 0.3))
            except (OSError, SQLAlchemyError) as error:  # artifacts: files, requests; a database file that is none
                raise _failure(self._uri, error) from error


def _failure(uri: str, error: Exception) -> StageError:
    """The failure in one line; TrackingUnreachable where it is a server that does not answer."""
    told = f"the registry at {without_credentials(uri)} fails: {one_line(error, limit=300)}"
    away = isinstance(error, OSError) or getattr(error, "error_code", None) in AWAY
    return TrackingUnreachable(told) if away and uri.startswith(("http://", "https://")) else StageError(told)


def _holds(folder: Path, version: Version) -> bool:
    """Is the folder there, and with the bytes that were registered?"""
    try:
        return folder.is_dir() and version.tags.get(TAG_DIGEST) in (None, folder_digest(folder))
    except OSError:  # another process puts a whole one in its place
        return False


def _version(item: Any) -> Version:
    created = datetime.fromtimestamp(item.creation_timestamp / 1000, tz=UTC) if item.creation_timestamp else None
    return Version(
        number=int(item.version),
        source=str(item.source),
        run_id=str(item.run_id),
        created=f"{created:%Y-%m-%d %H:%M}" if created else "",
        tags=dict(item.tags),
    )
