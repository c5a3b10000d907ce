# The gateway: the web page and the HTTP interfaces. It holds no model, no weights and no torch.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=
FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
WORKDIR /opt/hunyuan3d
# Each package in the version and with the hashes that `make lock` wrote down. A file that differs is refused.
COPY docker/requirements/gateway.txt docker/requirements/gateway.txt
RUN pip install --no-cache-dir --require-hashes --requirement docker/requirements/gateway.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY client/ client/
COPY gateway/ gateway/
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && install -d -o 1000 -g 1000 /data
ENV HUNYUAN3D_GATEWAY_HOST=0.0.0.0 HUNYUAN3D_GATEWAY_DATA=/data HOME=/tmp
USER 1000:1000
VOLUME /data
EXPOSE 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8081/health', timeout=4)"]
ENTRYPOINT ["hunyuan3d-gateway"]
