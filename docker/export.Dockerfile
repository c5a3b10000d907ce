# Exports a checkpoint to ONNX and builds the plans. The base image is the server's, because a plan needs the server's TensorRT.
ARG TRITON_TAG=26.07-py3
ARG TRITON_DIGEST=
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}${TRITON_DIGEST}
ARG TENSORRT_VERSION=11.1.0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A plan runs only on the TensorRT version that built it, so TENSORRT_VERSION must be the version in the server's image.
RUN find / -xdev -name "libnvinfer.so.${TENSORRT_VERSION}*" | grep -q . \
    || { echo "TENSORRT_VERSION must be the image's version, got ${TENSORRT_VERSION}; found $(find / -xdev -name 'libnvinfer.so.*')" >&2; exit 1; }
WORKDIR /opt/hunyuan3d
COPY pyproject.toml README.md LICENSE NOTICE constraints.txt ./
COPY client client
COPY export export
COPY model_repository model_repository
COPY docker/versions.env docker/versions.env
COPY docker/requirements/export.txt docker/requirements/export.txt
# Everything comes with its hash but TensorRT, which its package fetches from the vendor, and the project itself.
# hadolint ignore=DL3013,DL3059
RUN pip install --no-cache-dir --require-hashes --requirement docker/requirements/export.txt
# hadolint ignore=DL3013,DL3059
RUN pip install --no-cache-dir "tensorrt==${TENSORRT_VERSION}.*" && pip install --no-cache-dir --no-deps --no-build-isolation .
COPY docker/export_entrypoint.sh /opt/hunyuan3d/
ENV TENSORRT_VERSION=${TENSORRT_VERSION} XDG_CACHE_HOME=/cache HOME=/tmp
WORKDIR /work
ENTRYPOINT ["/opt/hunyuan3d/export_entrypoint.sh"]
CMD ["--help"]
