#!/usr/bin/env bash
# Searches for an order of events in which something replaced is served: of the real index and connections, and of a model of the
# rules for a cluster. Prints a line for each kind of search, and fails with the steps of the first violation.
#
#   tests/prove.sh
#
# AFTERIMAGE_TEST_SEEDS is the number of simulated runs (2000); AFTERIMAGE_TEST_SEED runs one of them.
set -euo pipefail
cd "$(dirname "$0")/.."

export AFTERIMAGE_TEST_PROOF=wide AFTERIMAGE_TEST_SEEDS=${AFTERIMAGE_TEST_SEEDS:-2000}
cargo test --locked --lib --no-run
out=$(mktemp)
trap 'rm -f "$out"' EXIT
cargo test --locked --lib -- --nocapture index::explore:: store::simulation:: >"$out" 2>&1 || {
  cat "$out" >&2
  exit 1
}
grep -Eo '(explorer|simulation): .*violations' "$out"
# If nothing breaks without a rule, the test of that rule fails, and the script has ended above.
echo "mutations: $(grep -c 'without [A-Z]' "$out") caught, none missed"
cargo run --quiet --locked --release --manifest-path proof/cluster/Cargo.toml --target-dir target/cluster-model
