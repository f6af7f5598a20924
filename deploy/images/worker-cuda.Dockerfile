# Ranks on NVIDIA GPUs (compute capability 9.0). The driver comes with the machine, through NVIDIA's container toolkit; cuBLAS
# and NCCL are loaded at run time and come with the image. From the root of the repository:
#   docker build -f deploy/images/worker-cuda.Dockerfile -t REPOSITORY/worker-cuda:TAG .
FROM rust:1.95.0-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev g++ python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
# The compiler first: it changes less often than the source.
COPY deploy/cuda/install-nvcc.sh deploy/cuda/install-nvcc.sh
RUN deploy/cuda/install-nvcc.sh /opt/cuda
COPY . .
RUN CUDA_HOME=/opt/cuda cargo build --locked --release -p perigee --features etcd,cuda
# The run-time libraries, in one folder.
RUN python3 -m pip install --no-cache-dir --no-deps --no-compile --only-binary=:all: --target /opt/libraries \
        nvidia-cublas==13.0.2.14 nvidia-nccl-cu13==2.28.9 \
    && mkdir /opt/lib \
    && find /opt/libraries -name 'libcublasLt.so.13' -exec cp {} /opt/lib \; \
    && find /opt/libraries -name 'libnccl.so.2' -exec cp {} /opt/lib \; \
    && test -e /opt/lib/libcublasLt.so.13 && test -e /opt/lib/libnccl.so.2

FROM debian:12.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lib /usr/local/lib/perigee
COPY --from=build /source/target/release/perigee /usr/local/bin/perigee
COPY deploy/images/perigee-ranks /usr/local/bin/perigee-ranks
ENV LD_LIBRARY_PATH=/usr/local/lib/perigee \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["perigee-ranks"]
CMD ["1", "0"]
