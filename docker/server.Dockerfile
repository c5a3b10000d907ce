# The official Triton image with this project's models. No compiler, no export code: plans are mounted, never built here.
ARG TRITON_TAG=26.07-py3
ARG TRITON_DIGEST=
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}${TRITON_DIGEST}
ARG CUPY_VERSION=14.2.0
ARG PILLOW_VERSION=13.0.0
# CuPy holds the sampler's arrays on the GPU, and Pillow decodes pictures.
RUN pip install --no-cache-dir "cupy-cuda13x==${CUPY_VERSION}" "pillow==${PILLOW_VERSION}"
COPY docker/entrypoint.sh docker/json_log.py docker/health.py export/hunyuan3d_export/server/loadable.py /opt/hunyuan3d/
COPY model_repository /models
USER 1000:1000
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python3", "/opt/hunyuan3d/health.py"]
ENTRYPOINT ["/opt/hunyuan3d/entrypoint.sh"]
