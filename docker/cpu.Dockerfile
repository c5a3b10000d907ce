# The same server, taken from a Python wheel instead of the vendor's image. It needs no GPU and serves ONNX graphs.
ARG PYTHON_TAG=3.11-slim-bookworm
FROM python:${PYTHON_TAG}
ARG PYTRITON_VERSION=0.7.0
ARG ONNXRUNTIME_VERSION=1.32.0
ARG NUMPY_VERSION=1.26.4
ARG PILLOW_VERSION=13.0.0
ARG SCIKIT_IMAGE_VERSION=0.26.0
ARG SCIPY_VERSION=1.17.1
ARG TRIMESH_VERSION=5.2.0
ARG FAST_SIMPLIFICATION_VERSION=0.2.0
RUN pip install --no-cache-dir "nvidia-pytriton==${PYTRITON_VERSION}" "onnxruntime==${ONNXRUNTIME_VERSION}" \
    "numpy==${NUMPY_VERSION}" "pillow==${PILLOW_VERSION}" "scikit-image==${SCIKIT_IMAGE_VERSION}" "scipy==${SCIPY_VERSION}" \
    "trimesh==${TRIMESH_VERSION}" "fast-simplification==${FAST_SIMPLIFICATION_VERSION}"
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
