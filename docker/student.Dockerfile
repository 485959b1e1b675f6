# syntax=docker/dockerfile:1
# The student, on a PyTorch CUDA image: cache to checkpoint, by torchrun. It holds neither Ray nor vLLM.
#
#   docker build --file docker/student.Dockerfile --tag logitcache-student:0.1.0 .
#
# For machines without a GPU: --build-arg DEVICE=cpu.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
ARG DEVICE=gpu

# The same in every Dockerfile here, so that it is built once. --build-context wheel=FOLDER puts a wheel in its place;
# FOLDER then holds wheel/logitcache-*.whl.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTORCH_IMAGE} AS base-gpu

FROM ${PYTHON_IMAGE} AS base-cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"

# hadolint ignore=DL3006
FROM base-${DEVICE} AS student
RUN groupadd --gid 10001 logitcache \
    && useradd --uid 10001 --gid 10001 --create-home logitcache \
    && install --directory --owner=logitcache --group=logitcache /models /output /shards /home/logitcache/.cache
ARG EXTRAS=train,s3,gcs,azure
ARG LEFT_OUT=logitcache_pipeline
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1
RUN --mount=type=bind,from=wheel,source=/wheel,target=/install/wheel \
    --mount=type=bind,source=docker,target=/install/docker \
    --mount=type=bind,source=.ci/constraints.txt,target=/install/tested.txt \
    /install/docker/install.sh /install/wheel "${EXTRAS}" "${LEFT_OUT}" /install/tested.txt

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="logitcache-student" \
      org.opencontainers.image.description="Trains a student from a cache of its teacher's log-probs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV HOME=/home/logitcache \
    HF_HOME=/home/logitcache/.cache/huggingface \
    TRITON_CACHE_DIR=/home/logitcache/.cache/triton \
    PYTHONUNBUFFERED=1
WORKDIR /home/logitcache
USER 10001:10001
# A job that ends: its exit status says how it went.
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["logitcache", "train", "--help"]
