# The router, and the client commands. From the root of the repository:
#   docker build -f deploy/images/router.Dockerfile -t REPOSITORY/router:TAG .
FROM rust:1.95.0-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN cargo build --locked --release -p perigee --features etcd

FROM debian:12.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/target/release/perigee /usr/local/bin/perigee
USER 65532:65532
ENTRYPOINT ["perigee"]
CMD ["--help"]
