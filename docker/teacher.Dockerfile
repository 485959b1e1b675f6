# syntax=docker/dockerfile:1
# The teacher, on the vLLM image: corpus to cache, by Ray. It holds no trainer.
#
#   docker build --file docker/teacher.Dockerfile --tag logitcache-teacher:0.1.0 .
#
# For machines without a GPU: --build-arg DEVICE=cpu, with the engine transformers only.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG DEVICE=gpu

# The same in every Dockerfile here, so that it is built once. --build-context wheel=FOLDER puts a wheel in its place;
# FOLDER then holds wheel/logitcache-*.whl.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${VLLM_IMAGE} AS base-gpu

FROM ${PYTHON_IMAGE} AS base-cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"

# hadolint ignore=DL3006
FROM base-${DEVICE} AS teacher
# KubeRay calls wget or python, our hook before the end pgrep; their versions are the base image's affair.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && { command -v python || ln -s "$(command -v python3)" /usr/local/bin/python; } \
    && groupadd --gid 10001 logitcache \
    && useradd --uid 10001 --gid 10001 --create-home logitcache \
    && install --directory --owner=logitcache --group=logitcache /models /home/logitcache/.ray /home/logitcache/.cache
ARG EXTRAS=pipeline,s3,gcs,azure
ARG LEFT_OUT=logitcache_train
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1
RUN --mount=type=bind,from=wheel,source=/wheel,target=/install/wheel \
    --mount=type=bind,source=docker,target=/install/docker \
    --mount=type=bind,source=.ci/constraints.txt,target=/install/tested.txt \
    /install/docker/install.sh /install/wheel "${EXTRAS}" "${LEFT_OUT}" /install/tested.txt

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="logitcache-teacher" \
      org.opencontainers.image.description="Runs a teacher over a corpus and keeps its top-k log-probs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV HOME=/home/logitcache \
    HF_HOME=/home/logitcache/.cache/huggingface \
    TRITON_CACHE_DIR=/home/logitcache/.cache/triton \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /home/logitcache
USER 10001:10001
# Head and workers alike; Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["wget", "--quiet", "--tries=1", "--timeout=4", "--output-document=-", "http://127.0.0.1:52365/api/local_raylet_healthz"]
# The base image would serve a model.
ENTRYPOINT []
CMD ["logitcache", "--help"]
