#!/bin/bash
# Runs the black-box tests, a few at a time, where the guest kernel boots. usage: hack/e2e.sh [PATTERN]
# The emulated machine of the test bed freezes once in a while (see hack/testbed/README.md). A group of tests whose
# machine ended without an exit code is run once more, and said so; if that happens again the group is listed as not run.
# The exit code is 1 if a test failed, or if more than a quarter of the groups could not be run.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
cd "$REPO"

GROUP=5      # tests in one machine
LIMIT=1500   # seconds for one group
groups=0 failed=() not_run=() again=()

# run_group PACKAGE TEST...: runs the tests, twice at most.
run_group() {
	local package=$1 pattern rc try
	shift
	pattern="^($(IFS='|'; echo "$*"))\$"
	groups=$((groups + 1))
	for try in 1 2; do
		rc=0
		(cd "test/e2e/$package" && "$REPO/hack/testbed/run" --timeout $LIMIT -- \
			"$REPO/bin/e2e-$package.test" -test.v -test.timeout "${LIMIT}s" -test.run "$pattern") || rc=$?
		[ $rc = 125 ] || break
		say "INFRASTRUCTURE FAILURE (try $try): $package: $*"
		again+=("$package: $*")
	done
	case $rc in
	0) ;;
	125) not_run+=("$package: $*") ;;
	*) failed+=("$package: $*") ;;
	esac
}

for package in task vm; do
	CGO_ENABLED=0 go test -c -tags e2e -o "bin/e2e-$package.test" "./test/e2e/$package"
	mapfile -t tests < <(cd "test/e2e/$package" && "$REPO/bin/e2e-$package.test" -test.list "${1:-.}" | grep '^Test')
	for ((i = 0; i < ${#tests[@]}; i += GROUP)); do
		run_group "$package" "${tests[@]:i:GROUP}"
	done
done

say "$groups groups: $((groups - ${#failed[@]} - ${#not_run[@]})) passed, ${#failed[@]} failed, ${#not_run[@]} not run"
for g in "${again[@]}"; do say "infrastructure failure in: $g"; done
for g in "${not_run[@]}"; do say "NOT RUN: $g"; done
for g in "${failed[@]}"; do say "FAILED: $g"; done
[ ${#failed[@]} = 0 ] && [ $((4 * ${#not_run[@]})) -le $groups ]
