#!/usr/bin/env bash
# Audit the locked dependencies for known vulnerabilities. Usage: audit.sh UV BIN
# A finding fails; advisory data that cannot be reached is said aloud and does not.
set -u
uv=$1 bin=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$uv" export --quiet --locked --all-packages --no-emit-workspace --format requirements-txt >"$work/requirements.txt" || exit 1
timeout 60 "$bin/pip-audit" --disable-pip --require-hashes -r "$work/requirements.txt" >"$work/out" 2>&1
status=$?
if [ "$status" = 0 ]; then
  echo "audit: no known vulnerability in the locked dependencies"
elif grep -qiE 'found [0-9]+ known vulnerabilit' "$work/out"; then
  cat "$work/out"
  exit 1
else
  echo "audit: NOT DONE, the advisory data could not be reached: $(grep -vE '^\s*$' "$work/out" | tail -n 1 | cut -c1-160)"
fi
