# The image of the gateway, and the nibble command for `helm test`. From the repository's root:
#   docker build -f deploy/docker/gateway.Dockerfile -t nibble/gateway .
FROM debian:12-slim AS build
WORKDIR /src
COPY . .
RUN tools/setup build \
    && cmake --preset release \
    && cmake --build --preset release --target nibble-gateway nibble

# Programs, libraries and nothing else: no shell, no package manager, no interpreter.
FROM debian:12-slim AS root
COPY deploy/docker/runtime-packages.txt deploy/docker/make_root.sh /setup/
RUN apt-get update \
    && xargs -a /setup/runtime-packages.txt apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/build/release/bin/nibble-gateway /src/build/release/bin/nibble /usr/bin/
RUN /setup/make_root.sh /image /usr/bin/nibble-gateway /usr/bin/nibble

FROM scratch
COPY --from=root /image /
USER 65532:65532
EXPOSE 50051 9100
ENTRYPOINT ["/usr/bin/nibble-gateway"]
