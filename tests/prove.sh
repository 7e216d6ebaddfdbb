#!/usr/bin/env bash
# Searches for an order of events in which something replaced is served, of the real index and connections and of a model of the
# rules for a cluster, and for an order of threads that breaks `coalesce`, `cache` or `events`. Prints a line for each kind of search,
# and fails with the steps of the first violation.
#
#   tests/prove.sh
#
# AFTERIMAGE_TEST_SEEDS is the number of simulated runs (5000); AFTERIMAGE_TEST_SEED runs one of them.
set -euo pipefail
cd "$(dirname "$0")/.."

export AFTERIMAGE_TEST_PROOF=wide AFTERIMAGE_TEST_SEEDS=${AFTERIMAGE_TEST_SEEDS:-5000}
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

# A build of its own: its locks and channels are models.
cargo test --locked --features shuttle --lib --no-run
cargo test --locked --features shuttle --lib threads:: -- --nocapture >"$out" 2>&1 || {
  cat "$out" >&2
  exit 1
}
tests=$(grep -Eo 'test result: ok\. [0-9]+' "$out" | grep -Eo '[0-9]+$')
grep -Eo 'shuttle: .*violations' "$out" | grep -Eo '[0-9]+ schedules' |
  awk -v tests="$tests" '{ all += $1 } END { print "shuttle: " all " schedules in " tests " tests, 0 violations"; exit all == 0 }'

# A package of its own.
cargo run --quiet --locked --release --manifest-path proof/cluster/Cargo.toml --target-dir target/cluster-model
