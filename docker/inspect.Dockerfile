# syntax=docker/dockerfile:1
# Looking at caches: status, stats, verify, copy, and the web view. It holds no torch.
#
#   docker build --file docker/inspect.Dockerfile --tag logitcache-inspect:0.1.0 .
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm

# The same in every Dockerfile here, so that it is built once. --build-context wheel=FOLDER puts a wheel in its place;
# FOLDER then holds wheel/logitcache-*.whl.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTHON_IMAGE} AS environment
ARG EXTRAS=web,s3,gcs,azure
ARG LEFT_OUT="logitcache_pipeline logitcache_train"
ENV PIP_NO_CACHE_DIR=1
RUN --mount=type=bind,from=wheel,source=/wheel,target=/install/wheel \
    --mount=type=bind,source=docker,target=/install/docker \
    --mount=type=bind,source=.ci/constraints.txt,target=/install/tested.txt \
    python -m venv /opt/logitcache \
    && PYTHON=/opt/logitcache/bin/python \
        /install/docker/install.sh /install/wheel "${EXTRAS}" "${LEFT_OUT}" /install/tested.txt

FROM ${PYTHON_IMAGE} AS inspect
RUN groupadd --gid 10001 logitcache && useradd --uid 10001 --gid 10001 --create-home logitcache
COPY --from=environment /opt/logitcache /opt/logitcache

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="logitcache-inspect" \
      org.opencontainers.image.description="Looks at caches, checks and copies them, and serves the web view" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/logitcache/bin:${PATH} \
    HOME=/home/logitcache \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1
WORKDIR /home/logitcache
USER 10001:10001
EXPOSE 8765
# Of the web view; any answer will do, also the one that asks for the token.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=6 \
    CMD ["python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8765), 4).close()"]
ENTRYPOINT []
CMD ["logitcache", "--help"]
