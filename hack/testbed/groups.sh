# shellcheck shell=bash
# Runs a suite in groups that fit one machine of the test bed; sourced after tools/lib.sh, never run.
# The emulated machine freezes once in a while (see README.md in this directory). A group whose machine ended without an exit
# code is run once more, and said so; if that happens again the group is listed as not run.

groups=0 failed=() not_run=() again=()

# run_group NAME COMMAND...: runs it, twice at most. It ends with 125 when its machine ended without an exit code.
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
	case $rc in
	0) ;;
	125) not_run+=("$name") ;;
	*) failed+=("$name") ;;
	esac
}

# summary: says how it went. It fails if a group failed, or if more than a quarter of them could not be run.
summary() {
	local g
	say "$groups groups: $((groups - ${#failed[@]} - ${#not_run[@]})) passed, ${#failed[@]} failed, ${#not_run[@]} not run"
	for g in "${again[@]}"; do say "infrastructure failure in: $g"; done
	for g in "${not_run[@]}"; do say "NOT RUN: $g"; done
	for g in "${failed[@]}"; do say "FAILED: $g"; done
	[ ${#failed[@]} = 0 ] && [ $((4 * ${#not_run[@]})) -le $groups ]
}
