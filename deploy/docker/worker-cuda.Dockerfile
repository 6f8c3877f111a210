# The image of a worker group on NVIDIA GPUs (compute capability 8.0 and later). It has NCCL; the
# driver's libraries come from the node. From the repository's root:
#   docker build -f deploy/docker/worker-cuda.Dockerfile -t nibble/worker-cuda .
FROM debian:12-slim AS build
WORKDIR /src
COPY . .
RUN tools/setup build \
    && tools/cuda_toolkit.sh \
    && cmake --preset cuda-all \
    && cmake --build --preset cuda-all --target nibble-worker
# hadolint ignore=DL3059
RUN third_party/cuda/venv/bin/pip install --no-cache-dir nvidia-nccl-cu13==2.28.9 \
    && mkdir /libraries /licences \
    && cp third_party/cuda/venv/lib/python3*/site-packages/nvidia_nccl_cu13-*.dist-info/licenses/License.txt \
        /licences/nccl \
    && cp -L third_party/cuda/venv/lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2 /libraries/

# Programs, libraries and nothing else: no shell, no package manager, no interpreter.
FROM debian:12-slim AS root
COPY deploy/docker/runtime-packages.txt deploy/docker/make_root.sh /setup/
RUN apt-get update \
    && xargs -a /setup/runtime-packages.txt apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /libraries /libraries
COPY --from=build /src/build/cuda-all/bin/nibble-worker /usr/bin/
RUN /setup/make_root.sh /image /libraries/libnccl.so.2 /usr/bin/nibble-worker

FROM scratch
COPY --from=root /image /
COPY --from=build /licences /usr/share/doc/nvidia/
# What NVIDIA's container runtime is to put in, and where it may put it.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/lib64:/usr/local/nvidia/lib64
USER 65532:65532
EXPOSE 50052 9100
ENTRYPOINT ["/usr/bin/nibble-worker"]
