# The image of a worker group on CPUs. From the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t nibble/worker .
FROM debian:12-slim AS build
WORKDIR /src
COPY . .
RUN tools/setup build \
    && cmake --preset release \
    && cmake --build --preset release --target nibble-worker

# Programs, libraries and nothing else: no shell, no package manager, no interpreter.
FROM debian:12-slim AS root
COPY deploy/docker/runtime-packages.txt deploy/docker/make_root.sh /setup/
RUN apt-get update \
    && xargs -a /setup/runtime-packages.txt apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/build/release/bin/nibble-worker /usr/bin/
RUN /setup/make_root.sh /image /usr/bin/nibble-worker

FROM scratch
COPY --from=root /image /
USER 65532:65532
EXPOSE 50052 9100
ENTRYPOINT ["/usr/bin/nibble-worker"]
