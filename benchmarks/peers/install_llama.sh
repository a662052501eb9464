#!/usr/bin/env bash
# llama.cpp through llama-cpp-python into an environment of its own: bash benchmarks/peers/install_llama.sh FOLDER
# Then: python -m benchmarks.bench --llama FOLDER/bin/python
# Compiles for this processor, which takes a C++ compiler and many minutes.
set -euo pipefail
folder=${1:?usage: install_llama.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/python" -m pip --disable-pip-version-check install llama-cpp-python
"$folder/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
