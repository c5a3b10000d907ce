# The same server, taken from a Python wheel instead of the vendor's image. It needs no GPU and serves ONNX graphs.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG PYTHON_DIGEST=
FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
# Each package in the version and with the hashes that `make lock` wrote down. A file that differs is refused.
COPY docker/requirements/cpu.txt /opt/hunyuan3d/requirements.txt
RUN pip install --no-cache-dir --require-hashes --requirement /opt/hunyuan3d/requirements.txt
COPY export/hunyuan3d_export/server/wheel.py export/hunyuan3d_export/server/loadable.py \
    export/hunyuan3d_export/engines/server_image.py /opt/hunyuan3d/
RUN python /opt/hunyuan3d/wheel.py /opt/tritonserver
COPY docker/entrypoint.sh docker/json_log.py docker/health.py docker/guard.py /opt/hunyuan3d/
COPY model_repository /models
ENV CONFIG=cpu
USER 1000:1000
EXPOSE 8000 8001 8002 8003
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/opt/hunyuan3d/health.py"]
ENTRYPOINT ["/opt/hunyuan3d/entrypoint.sh"]
