# A deployed repository in an image, for clusters without a shared volume: docker build --file docker/repository.Dockerfile
# --build-arg SERVER=IMAGE --tag hunyuan3d-triton/repository:v2-0 build/repository (the folder that deploy --repository filled).
ARG SERVER=hunyuan3d-triton/server:0.1.0-26.07-py3
FROM ${SERVER}
COPY . /repository
USER 1000:1000
ENTRYPOINT ["cp", "--recursive", "/repository/.", "/models"]
