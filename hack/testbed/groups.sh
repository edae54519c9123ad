# shellcheck shell=bash
# Runs a suite in groups that fit one machine of the test bed; sourced after tools/lib.sh, never run.
# The emulated machine freezes once in a while, and its emulated SVM resets a guest once in a hundred starts or so (see README.md in
# this directory). A group that had either is run once more, and said so; if that happens again the group is listed as not run.
# A guest that has stopped to answer, which is more rare and may be the same, has its group run once more too, and said so; but if it
# happens again the group has failed. What is known of all three is in docs/limits.md.

groups=0 failed=() not_run=() again=()

# What a log says of the two. No test has a guest shut down by a triple fault on purpose.
RESET='triple-fault' SILENT='the guest does not answer'

# run_group NAME COMMAND...: runs it, twice at most. It ends with 125 when its machine ended without an exit code.
run_group() {
	local name=$1 rc try output
	shift
	output=$(mktemp)
	groups=$((groups + 1))
	for try in 1 2; do
		rc=0
		"$@" 2>&1 | tee "$output" || rc=${PIPESTATUS[0]}
		if [ "$rc" != 0 ] && in_machine "$output" "$RESET"; then rc=125; fi
		if [ "$rc" = 125 ]; then
			say "INFRASTRUCTURE FAILURE (try $try): $name"
			again+=("infrastructure failure in: $name")
		elif [ "$rc" != 0 ] && [ "$try" = 1 ] && in_machine "$output" "$SILENT"; then
			say "A GUEST THAT DOES NOT ANSWER: $name"
			again+=("a guest that does not answer in: $name")
		else
			break
		fi
	done
	rm -f "$output"
	case $rc in
	0) ;;
	125) not_run+=("$name") ;;
	*) failed+=("$name") ;;
	esac
}

# in_machine OUTPUT TEXT: does the output of a group in the emulated machine say so?
in_machine() {
	grep -qa '^testbed: running in the outer machine' "$1" && grep -qa "$2" "$1"
}

# summary: says how it went. It fails if a group failed, or if more than a quarter of them could not be run.
summary() {
	local g
	say "$groups groups: $((groups - ${#failed[@]} - ${#not_run[@]})) passed, ${#failed[@]} failed, ${#not_run[@]} not run"
	for g in "${again[@]}"; do say "$g"; done
	for g in "${not_run[@]}"; do say "NOT RUN: $g"; done
	for g in "${failed[@]}"; do say "FAILED: $g"; done
	[ ${#failed[@]} = 0 ] && [ $((4 * ${#not_run[@]})) -le $groups ]
}
