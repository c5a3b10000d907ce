# The official Triton image with this project's models. No compiler, no export code: plans are mounted, never built here.
ARG TRITON_TAG=26.07-py3
ARG TRITON_DIGEST=
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}${TRITON_DIGEST}
ARG TENSORRT_VERSION=11.1.0
# The entrypoint refuses plans of another TensorRT than TENSORRT_VERSION, so this must be the image's version.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN find / -xdev -name "libnvinfer.so.${TENSORRT_VERSION}*" | grep -q . \
    || { echo "TENSORRT_VERSION must be the image's version, got ${TENSORRT_VERSION}; found $(find / -xdev -name 'libnvinfer.so.*')" >&2; exit 1; }
ENV TENSORRT_VERSION=${TENSORRT_VERSION}
# CuPy makes this folder when it is imported. User 1000 may write nowhere but in /tmp, which compose and Kubernetes mount there.
ENV CUPY_CACHE_DIR=/tmp/cupy
# CuPy can hold the sampler's arrays on the GPU, Pillow decodes pictures, the others make meshes. Each has the version and the hashes
# that `make lock` wrote down. The import shows that these versions fit together.
COPY docker/requirements/server.txt /opt/hunyuan3d/requirements.txt
RUN pip install --no-cache-dir --require-hashes --requirement /opt/hunyuan3d/requirements.txt \
    && python3 -c "import cupy, fast_simplification, scipy.sparse, skimage.measure, trimesh" && rm -r "${CUPY_CACHE_DIR}"
COPY docker/entrypoint.sh docker/json_log.py docker/health.py docker/guard.py export/hunyuan3d_export/server/loadable.py \
    export/hunyuan3d_export/engines/server_image.py /opt/hunyuan3d/
COPY model_repository /models
USER 1000:1000
EXPOSE 8000 8001 8002 8003
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python3", "/opt/hunyuan3d/health.py"]
ENTRYPOINT ["/opt/hunyuan3d/entrypoint.sh"]
