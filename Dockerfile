# syntax=docker/dockerfile:1
#
# docker build -t afterimage .
# docker run -p 8000:8000 -e REDIS_URL=redis://host.docker.internal:6379 afterimage
# docker run -p 8000:8000 -v afterimage:/data afterimage        (without Redis)
#
# For both architectures, each compiled on the machine's own:
#
#   docker buildx build --platform linux/amd64,linux/arm64 \
#     --build-arg COMMIT="$(git log -1 --format='%h %cs')" --build-arg REVISION="$(git rev-parse HEAD)" -t afterimage .

FROM --platform=$BUILDPLATFORM rust:1.95-bookworm AS build
ARG TARGETARCH
WORKDIR /build
# nasm for the AVIF encoder. The compiler for the other architecture, for the C code of libwebp and ring, and for linking. Their
# versions are the release's.
# hadolint ignore=DL3008
RUN <<EOF
set -eu
case "$TARGETARCH" in
  amd64) echo x86_64-unknown-linux-gnu > /target; gcc=x86-64-linux-gnu ;;
  arm64) echo aarch64-unknown-linux-gnu > /target; gcc=aarch64-linux-gnu ;;
  *) echo "TARGETARCH must be amd64 or arm64, not $TARGETARCH" >&2; exit 1 ;;
esac
packages=nasm
if [ "$(dpkg --print-architecture)" != "$TARGETARCH" ]; then
  packages="$packages gcc-$gcc libc6-dev-$TARGETARCH-cross"
fi
apt-get update
# shellcheck disable=SC2086
apt-get install -y --no-install-recommends $packages
rm -rf /var/lib/apt/lists/*
rustup target add "$(cat /target)"
mkdir /data
EOF

COPY Cargo.toml Cargo.lock build.rs ./
# Cargo.toml names the benches, and Cargo wants the files that it names. An image needs none.
RUN sed -i '/^\[\[bench\]\]$/,/^$/d' Cargo.toml
COPY config/afterimage.toml config/
COPY assets assets
COPY src src
# The commit, for `afterimage --version`.
ARG COMMIT=""
ENV CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CC_x86_64_unknown_linux_gnu=x86_64-linux-gnu-gcc \
    CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
# What was compiled stays in the cache of this machine; a change compiles what it touches. The profile strips the program.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/build/target,sharing=locked \
    AFTERIMAGE_COMMIT="$COMMIT" cargo build --profile dist --locked --bin afterimage --features avif-asm --target "$(cat /target)" \
    && cp "target/$(cat /target)/dist/afterimage" /afterimage

FROM gcr.io/distroless/cc-debian12:nonroot
ARG REVISION=""
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Afterimage" \
      org.opencontainers.image.description="Serves images that live in Redis: from memory in microseconds, and never a replaced one" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="gcr.io/distroless/cc-debian12:nonroot"
COPY LICENSE-MIT LICENSE-APACHE assets/placeholder.otf.LICENSE /usr/share/doc/afterimage/
COPY config/container.toml /etc/afterimage.toml
COPY --from=build --chown=65532:65532 /data /data
COPY --from=build /afterimage /usr/local/bin/afterimage
# [admin] listen is a variable as well, so that the health check works with settings of your own, and with TLS.
# The token that the server makes with Redis is in /data/afterimage, also where everything else is read-only.
# Memory goes back to the system after a flood: docs/operation.md has the figures.
ENV AFTERIMAGE_CONFIG=/etc/afterimage.toml \
    AFTERIMAGE_ADMIN_LISTEN=0.0.0.0:8001 \
    XDG_RUNTIME_DIR=/data \
    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072:glibc.malloc.arena_max=4
VOLUME /data
# Images; /healthz, /readyz, /metrics and the gallery, which are better not published.
EXPOSE 8000 8001
# By its number, as Kubernetes' runAsNonRoot wants it: nonroot.
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/afterimage", "health"]
ENTRYPOINT ["/usr/local/bin/afterimage"]
