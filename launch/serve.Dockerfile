# The server of a trained reward model, on CPUs:
#   docker build -f launch/serve.Dockerfile -t csrm-serve .
#   docker run -e CSRM_JAX_TOKEN=... -p 8000:8000 -v /tmp/rm:/model:ro \
#     -v $PWD/configs/safety:/policies:ro -v csrm-cache:/cache csrm-serve
# For GPUs add an extra of setup.py (EXTRAS=serve,hf,cuda12) and run with --gpus=1.
FROM python:3.12-slim
ARG EXTRAS=serve,hf
WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE ./
COPY csrm_jax csrm_jax
COPY configs configs
COPY launch launch
# What is installed is this folder, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]" \
  && useradd --uid 10001 --create-home server \
  && mkdir /cache && chown server /cache
USER 10001
# Compiled programs; a volume here makes the next start short.
ENV JAX_COMPILATION_CACHE_DIR=/cache
EXPOSE 8000
# exec form: SIGTERM must reach the server, which answers what it accepted before it ends.
ENTRYPOINT ["python", "-m", "csrm_jax.main", \
  "--config=configs/serve.py:checkpoint=/model,policies=/policies", "--config.host=0.0.0.0"]
