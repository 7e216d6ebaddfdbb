#!/usr/bin/env bash
# Runs every test. What they need and is missing is installed where this user may, and named otherwise.
#
#   tests/run.sh [arguments of cargo test]
set -euo pipefail
cd "$(dirname "$0")/.."

# A program, and Debian's package that has it.
needs=(redis-server:redis-server curl:curl openssl:openssl python3:python3)
missing=()
for need in "${needs[@]}"; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
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

# The backend's side of the tests, in a folder of its own.
python=target/python
if ! "$python/bin/python" -c 'import redis' 2>/dev/null; then
  mkdir -p target
  python3 -m venv --clear "$python" || { echo "apt-get install python3-venv" >&2; exit 1; }
  "$python/bin/pip" install --quiet --disable-pip-version-check -r tests/it/requirements.txt
fi

exec cargo test --locked "$@"
