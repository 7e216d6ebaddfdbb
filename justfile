# One recipe for each thing a contributor does. They call the same scripts as CI. `just` alone lists them.
#
#   cargo install just --locked        or: pip install rust-just

_list:
    @just --list --unsorted

# Serve on 127.0.0.1:8000; `just run --redis-url redis://127.0.0.1:6379`
run *arguments:
    cargo run --release -- {{ arguments }}

# Format, lints and rustdoc, without a test
check:
    .ci/run check

# First tier: about a minute after the build; `just test freshness::` for one module
test *filters:
    tests/run.sh quick -- {{ filters }}

# Every test but the soak, as CI runs them
test-all *arguments:
    tests/run.sh {{ arguments }}

# Every order of events of the index, simulated connections, orders of threads, and the model of the rules for a cluster
prove:
    tests/prove.sh

# Faults at random, with a report in target/soak/report.html; then races, outages and kills
soak minutes="60":
    AFTERIMAGE_TEST_SOAK_MINUTES={{ minutes }} tests/run.sh soak

# The pictures of other projects, beside Pillow and Chromium; folders with more of them can be named
corpora *arguments:
    tests/corpora/fetch.sh target/corpora
    target/python/bin/python tests/corpora/run.py {{ arguments }}

# One fuzz target by libFuzzer (`cargo install cargo-fuzz --locked`), until it fails or Ctrl-C; `just fuzz h1_head -max_total_time=60`
fuzz target *arguments:
    cp Cargo.lock fuzz/Cargo.lock
    mkdir -p fuzz/corpus/{{ target }}
    cargo fuzz run --sanitizer none {{ target }} fuzz/corpus/{{ target }} fuzz/seeds/{{ target }} -- -dict=fuzz/dictionary {{ arguments }}

# One bench: cold, coherence, pictures or serving; `just bench serving quick only=hit`
bench name *arguments:
    cargo bench --bench {{ name }} -- {{ arguments }}

# Documentation of the code, private items included
docs *arguments:
    cargo doc --locked --no-deps --document-private-items {{ arguments }}

# Licences, bans, sources and, where their database can be had, advisories
deny:
    .ci/run deny
