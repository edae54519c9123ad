# shellcheck shell=bash
# Runs a suite in groups that fit one machine of the test bed; sourced after tools/lib.sh, never run.
# A group whose machine ended without an exit code is run once more, and said so; no other failure is.

groups=0 failed=() again=()

# run_group NAME COMMAND...: COMMAND ends with 125 when its machine ended without an exit code.
run_group() {
	local name=$1 rc try
	shift
	groups=$((groups + 1))
	for try in 1 2; do
		rc=0
		"$@" || rc=$?
		[ $rc = 125 ] || break
		say "INFRASTRUCTURE FAILURE (try $try): $name"
		again+=("$name")
	done
	[ $rc = 0 ] || failed+=("$name")
}

# summary: says how it went, and fails if a group did.
summary() {
	local g
	say "$groups groups: $((groups - ${#failed[@]})) passed, ${#failed[@]} failed"
	for g in "${again[@]}"; do say "infrastructure failure in: $g"; done
	for g in "${failed[@]}"; do say "FAILED: $g"; done
	[ ${#failed[@]} = 0 ]
}
