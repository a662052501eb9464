#!/usr/bin/env bash
# llama.cpp through llama-cpp-python into an environment of its own: bash benchmarks/peers/install_llama.sh FOLDER
# Then: python -m benchmarks.bench --llama FOLDER/bin/python
# Compiles for this processor, which takes a C++ compiler and many minutes. Without AMX: where there is one, llama-cpp-python
# 0.3.36 ends with an illegal instruction at its first prompt (a `tilezero` before any tile configuration).
set -euo pipefail
folder=${1:?usage: install_llama.sh FOLDER}
python3 -m venv "$folder"
no_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
[ "$(uname -m)" != x86_64 ] || export CFLAGS="$no_amx" CXXFLAGS="$no_amx"
"$folder/bin/python" -m pip --disable-pip-version-check install --no-cache-dir llama-cpp-python
"$folder/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
