#!/usr/bin/env bash
# Fetches the pictures that other projects are tested with, from the packages that hold them.
#
#   tests/corpora/fetch.sh FOLDER
#
# Each project gets a folder in FOLDER. They are Debian's source packages, of the archive that this machine installs from; apt's own
# lists aren't changed. The packages of image-rs, image-png, image-webp (crates), sharp (npm) and libjxl (Debian) hold no pictures: clones
# of their repositories, and of others, can be given to tests/corpora/run.py as well. Pillow's pictures are fetched by tests/run.sh, for
# other tests too.
#
# A package that can't be fetched is named. The next run tries it again.
set -euo pipefail

PACKAGES=(gdk-pixbuf libavif libheif libjpeg-turbo libpng1.6 libwebp skimage)

folder=$1
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
command -v apt-get >/dev/null || { echo "apt-get is needed, to fetch Debian's source packages" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/parts"
for sources in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
  [ -f "$sources" ] || continue
  sed 's/^Types:.*/Types: deb-src/; s/^deb /deb-src /' "$sources" >"$work/parts/debian.${sources##*.}"
done
apt() {
  apt-get -q -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Dir::Etc::sourcelist=/dev/null \
    -o Dir::Etc::sourceparts="$work/parts" -o Debug::NoLocking=1 -o APT::Sandbox::User=root "$@" >"$work/log" 2>&1
}

for package in "${PACKAGES[@]}"; do
  [ -d "$folder/$package" ] && continue
  [ -n "$(ls "$work/lists" | grep -v partial)" ] || apt update || { cat "$work/log" >&2; exit 1; }
  mkdir -p "$work/$package/files"
  if ! (cd "$work/$package" && apt source --download-only --tar-only "$package"); then
    echo "$package can't be fetched: $(grep '^E:' "$work/log" | head -1)" >&2
    continue
  fi
  for archive in "$work/$package/"*.orig.tar.*; do
    case "$archive" in
      *.asc) ;;
      *) tar -xf "$archive" -C "$work/$package/files" --strip-components=1 ;;
    esac
  done
  mv "$work/$package/files" "$folder/$package"
done
