# shellcheck shell=bash
# Sourced after lib.sh, never run.

# fuzz_targets PATTERN: the fuzz targets whose "package target" matches, a line each.
fuzz_targets() {
	grep -rnoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' pkg cmd |
		sed -E 's,^(.*)/[^/]*:[0-9]+:func (.*),\1 \2,' | sort | grep -E -- "$1"
}
