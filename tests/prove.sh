#!/usr/bin/env bash
# Shows, as far as a machine can, that nothing replaced is served. Prints a line for each way, and fails with the first violation.
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
# Each mutation has a test of its own, which fails if it isn't caught.
caught=$(grep -c 'without [A-Z]' "$out")
echo "mutations: $caught of $caught caught"
