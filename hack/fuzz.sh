#!/bin/bash
# Runs every fuzz target of the module, one after the other. usage: hack/fuzz.sh TIME   (as go test -fuzztime)
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: hack/fuzz.sh TIME}

grep -rnoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' pkg cmd | sort | while IFS=: read -r file _ target; do
	name=${target#func }
	echo "== ${file%/*} $name"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "./${file%/*}" </dev/null
done
