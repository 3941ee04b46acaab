# Two images: `serving` answers, `jobs` trains, monitors and releases. Models come from the registry, not with an image.
#   docker build --target serving --build-arg COMMIT=$(git rev-parse HEAD) --tag closedloop-serving .
# Nothing here needs BuildKit. The base image's tag moves; `--build-arg PYTHON=python:3.11-slim@sha256:...` holds it.
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS tools
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy UV_SYSTEM_CERTS=true
WORKDIR /build
COPY docker/build.lock ./
RUN python -m venv tools \
    && tools/bin/pip install --quiet --require-hashes --requirement build.lock

FROM tools AS package
COPY pyproject.toml README.md LICENSE dvc.yaml params.yaml .gitignore .dvcignore ./
COPY .dvc/config .dvc/config
COPY configs configs
COPY feature_repo feature_repo
COPY pipelines pipelines
COPY src src
RUN tools/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir wheels .

FROM tools AS serving-environment
COPY docker/serving.lock ./
RUN python -m venv --without-pip /opt/closedloop \
    && tools/bin/uv pip install --quiet --python /opt/closedloop/bin/python --compile-bytecode --require-hashes --requirement serving.lock
COPY --from=package /build/wheels wheels
RUN tools/bin/uv pip install --quiet --python /opt/closedloop/bin/python --compile-bytecode --no-index --no-deps wheels/*.whl \
    && rm /opt/closedloop/.lock

FROM ${PYTHON} AS runtime
ARG VERSION=unknown
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="closedloop" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
# GIT_PYTHON_REFRESH: the images have no git, and GitPython, which MLflow imports, would warn of it in every log
ENV PATH=/opt/closedloop/bin:${PATH} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CLOSEDLOOP_GIT_COMMIT="${COMMIT}" \
    GIT_PYTHON_REFRESH=quiet \
    CLOSEDLOOP_SERVING__HOST=0.0.0.0
WORKDIR /app
COPY params.yaml ./
COPY configs configs
COPY feature_repo feature_repo
# the root file system may be read-only: what changes lies in the volume /state and in /tmp
RUN /usr/sbin/groupadd --gid 10001 closedloop \
    && /usr/sbin/useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /app --shell /usr/sbin/nologin closedloop \
    && install --directory --owner 10001 --group 10001 /state \
    && ln -s /state state
USER 10001:10001
ENTRYPOINT ["closedloop"]

FROM runtime AS serving
COPY --from=serving-environment /opt/closedloop /opt/closedloop
EXPOSE 3000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/health', timeout=4)"]
CMD ["serve"]

FROM tools AS jobs-environment
COPY docker/jobs.lock ./
RUN python -m venv --without-pip /opt/closedloop \
    && tools/bin/uv pip install --quiet --python /opt/closedloop/bin/python --compile-bytecode --require-hashes --requirement jobs.lock
COPY --from=package /build/wheels wheels
RUN tools/bin/uv pip install --quiet --python /opt/closedloop/bin/python --compile-bytecode --no-index --no-deps wheels/*.whl \
    && rm /opt/closedloop/.lock

FROM runtime AS jobs
COPY --from=jobs-environment /opt/closedloop /opt/closedloop
COPY pipelines pipelines
HEALTHCHECK NONE
CMD ["--help"]
