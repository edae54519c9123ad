#!/bin/bash
# Runs the fuzz targets of the module, one after the other, and prints a line for each: executions, inputs that reached new
# code, crashes, and the time of processors that it took. usage: hack/fuzz.sh TIME [PATTERN]
# TIME is as go test -fuzztime; PATTERN is a regular expression for "package target". FUZZ_PARALLEL is the number of workers.
# Inputs that reach new code are not made much shorter: by default that takes most of the time.
# What a target finds is below its package's testdata/fuzz, as a seed to commit with the fix.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
# shellcheck source=tools/fuzz.sh
. "$(dirname "$0")/tools/fuzz.sh"
time=${1:?usage: hack/fuzz.sh TIME [PATTERN]} pattern=${2:-.}
cd "$REPO"
scratch
failed=0
line() { printf '%-66s %12s %6s %8s %8s\n' "$@"; }

mapfile -t targets < <(fuzz_targets "$pattern")
line target executions new crashes CPU
TIMEFORMAT='%U %S'
for target in "${targets[@]}"; do
	read -r package name <<<"$target"
	# Built first, so that the time is the target's.
	go test -c -o "$SCRATCH/test" -fuzz "^$name\$" "./$package"
	crashes=0 executions='' new=''
	{ time (cd "$package" && "$SCRATCH/test" -test.run '^$' -test.fuzz "^$name\$" -test.fuzztime "$time" -test.fuzzminimizetime 20x \
		-test.fuzzcachedir "$(go env GOCACHE)/fuzz/$(go list .)" \
		-test.parallel "${FUZZ_PARALLEL:-$(nproc)}" </dev/null >"$SCRATCH/output" 2>&1); } 2>"$SCRATCH/time" || crashes=1
	# When the time is over in the middle of an execution go test may call that a failure.
	if [ $crashes = 1 ] && grep -q 'context deadline exceeded' "$SCRATCH/output" && ! grep -q 'Failing input' "$SCRATCH/output"; then
		crashes=0
	fi
	read -r executions new < <(sed -nE 's/^fuzz: elapsed: .*, execs: ([0-9]+) .*new interesting: ([0-9]+).*/\1 \2/p' "$SCRATCH/output" | tail -1) || true
	line "$target" "${executions:-0}" "${new:-0}" "$crashes" "$(awk '{ printf "%.0fs", $1 + $2 }' "$SCRATCH/time")"
	if [ $crashes != 0 ]; then
		failed=1
		cut -c 1-300 "$SCRATCH/output" | sed 's/^/    /'
	fi
done
exit $failed
