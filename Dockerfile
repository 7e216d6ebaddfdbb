# docker build -t afterimage .
# docker run -p 8000:8000 -e REDIS_URL=redis://host.docker.internal:6379 afterimage
# docker run -p 8000:8000 -v afterimage:/data afterimage        (without Redis)

FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
# Dependencies first, alone: their layer stays valid until Cargo.lock changes.
RUN mkdir -p src benches/serving && echo 'fn main() {}' > src/main.rs && touch src/lib.rs \
    && echo 'fn main() {}' | tee benches/cache.rs benches/cold.rs benches/coherence.rs benches/pictures.rs > benches/serving/main.rs \
    && cargo build --profile dist --locked && rm -r src benches
COPY config/afterimage.toml config/
COPY assets assets
COPY src src
COPY benches benches
RUN touch src/main.rs src/lib.rs && cargo build --profile dist --locked --bin afterimage \
    && mkdir /data

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /build/target/dist/afterimage /usr/local/bin/afterimage
COPY --from=build --chown=nonroot:nonroot /data /data
COPY LICENSE-MIT LICENSE-APACHE assets/placeholder.otf.LICENSE /usr/share/doc/afterimage/
COPY config/container.toml /etc/afterimage.toml
# The token that the server makes with Redis is in /data/afterimage, also where everything else is read-only.
ENV AFTERIMAGE_CONFIG=/etc/afterimage.toml XDG_RUNTIME_DIR=/data
# Memory goes back to the system after a flood: docs/operation.md has the figures.
ENV GLIBC_TUNABLES=glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072:glibc.malloc.arena_max=4
VOLUME /data
# Images; /healthz, /readyz and /metrics, which are better not published.
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/afterimage", "health"]
ENTRYPOINT ["/usr/local/bin/afterimage"]
