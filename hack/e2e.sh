#!/bin/bash
# Runs the black-box tests, a few at a time, where the guest kernel boots.
# usage: hack/e2e.sh [PATTERN [PACKAGE...]]      (default: all tests of the packages task and vm)
# PATTERN is that of go test -run: behind a slash, it picks subtests.
# With E2E_RUNTIME_HANDLER=runc the package cri runs on this host, which checks the tests themselves.
# E2E_GROUP and E2E_LIMIT are how many tests run in one machine, and for how many seconds at most; what tests write to the
# directory E2E_REPORT is kept.
# The exit code is 1 if a test failed, or a group could not be run in two tries.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
# shellcheck source=testbed/groups.sh
. "$(dirname "$0")/testbed/groups.sh"
cd "$REPO"

GROUP=${E2E_GROUP:-5}      # tests in one machine
LIMIT=${E2E_LIMIT:-1500}   # seconds for one group
OUT=()
[ -z "${E2E_REPORT:-}" ] || OUT=(--out "$E2E_REPORT")

# machine COMMAND...: runs it where the runtime under test runs.
machine() {
	if [ "${E2E_RUNTIME_HANDLER:-}" = runc ]; then
		"$@"
	else
		"$REPO/hack/testbed/run" --timeout "$LIMIT" "${OUT[@]}" -- "$@"
	fi
}

# tests PACKAGE TEST...
tests() {
	local package=$1 pattern
	shift
	pattern="^($(IFS='|'; echo "$*"))\$$subtests"
	(cd "test/e2e/$package" && machine "$REPO/bin/e2e-$package.test" -test.v -test.timeout "${LIMIT}s" -test.run "$pattern")
}

pattern=${1:-.} subtests=
[[ $pattern != */* ]] || { subtests=/${pattern#*/}; pattern=${pattern%%/*}; }
shift || :
[ $# -gt 0 ] || set -- task vm
for package; do
	CGO_ENABLED=0 go test -c -tags e2e -o "bin/e2e-$package.test" "./test/e2e/$package"
	mapfile -t names < <(cd "test/e2e/$package" && "$REPO/bin/e2e-$package.test" -test.list "$pattern" | grep '^Test')
	group=()
	for name in "${names[@]}"; do
		# It fills a machine by itself.
		[[ $name != *AtOnce ]] || { run_group "$package: $name" tests "$package" "$name"; continue; }
		group+=("$name")
		[ ${#group[@]} -lt "$GROUP" ] || { run_group "$package: ${group[*]}" tests "$package" "${group[@]}"; group=(); }
	done
	[ ${#group[@]} = 0 ] || run_group "$package: ${group[*]}" tests "$package" "${group[@]}"
done
summary
