#!/bin/bash
# Runs critest, the conformance tests of CRI, against a containerd of its own: for runc on this host, else where the guest
# kernel boots, a few specs at a time. usage: hack/critest.sh [HANDLER [SANDBOXER [PATTERN]]]
#   HANDLER    runtime handler: microvm (the default) or runc
#   SANDBOXER  podsandbox (the default) or shim
#   PATTERN    only specs whose name has it, a regular expression
# JUnit reports are kept in bin/critest/HANDLER-SANDBOXER; what was skipped is listed at the end with critest's reason.
# The exit code is 1 if a spec failed, or if more than a quarter of the groups could not be run.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
# shellcheck source=testbed/groups.sh
. "$(dirname "$0")/testbed/groups.sh"
cd "$REPO"
PATH=$REPO/bin:$MICROVM_CACHE/tools/bin:$PATH

GROUP=10     # specs in one machine of the test bed
LIMIT=1500   # seconds for one group

# Specs that are left out, by name.
# - The digest is one of an image in a registry of Kubernetes: no image made here can have it.
# - AppArmor, in virtual machines: the guest's kernel has none. critest asks the host's kernel, and skips them by itself if
#   that has none either.
# - What is mounted in a virtual machine cannot appear on the host: rshared is refused.
# - A virtual machine cannot share the host's namespaces: hostNetwork, hostPID and hostIPC are refused.
LEFT_OUT='public image with digest'
LEFT_OUT_OF_GUESTS="AppArmor|mount with 'rshared'|HostNetwork is true|HostPID|HostIpc is true|portforward in host network"

# The part that runs beside the runtime. usage: inside HANDLER SANDBOXER REPORTS GROUP; reads REPORTS/GROUP.specs
inside() {
	local handler=$1 sandboxer=$2 reports=$3 group=$4 state rc=0 spec focus=()
	state=$(mktemp -d /var/tmp/critest.XXXX)
	# shellcheck disable=SC2064 # the folder is known now
	trap "hack/containerd.sh wipe $state" EXIT
	export CRI=$sandboxer
	hack/containerd.sh start "$state"
	ctr -a "$state/containerd.sock" -n k8s.io images import "$MICROVM_CACHE/images/pause.tar" >/dev/null
	# "[Serial]" may come from the report instead of the name.
	while read -r spec; do
		spec=${spec% \[Serial\]}
		focus+=(-ginkgo.focus "${spec//[^A-Za-z0-9 ]/.}( .Serial.)?\$")
	done <"$reports/$group.specs"
	# It writes files into its working directory.
	mkdir "$state/work"
	(
		cd "$state/work"
		registry -layers "$MICROVM_CACHE/images/layers" -- critest -ginkgo.no-color -ginkgo.v \
			-runtime-endpoint "unix://$state/containerd.sock" -image-endpoint "unix://$state/containerd.sock" \
			-runtime-handler "$handler" -ginkgo.junit-report "$reports/$group.xml" "${focus[@]}"
	) >"$reports/$group.log" 2>&1 || rc=$?
	grep -E '^(Ran|FAIL!|SUCCESS!)|\[FAIL\]' "$reports/$group.log" | sort -u || tail -n 20 "$reports/$group.log"
	cp "$state/containerd.log" "$reports/$group.containerd.log"
	return $rc
}

if [ "${1:-}" = inside ]; then
	shift
	inside "$@"
	exit
fi

handler=${1:-microvm} sandboxer=${2:-podsandbox} pattern=${3:-.}
[ "$handler" = runc ] || LEFT_OUT+="|$LEFT_OUT_OF_GUESTS"
case $sandboxer in podsandbox | shim) ;; *) die "unknown sandboxer $sandboxer" ;; esac
reports=$REPO/bin/critest/$handler-$sandboxer
rm -rf "$reports"
mkdir -p "$reports"
(cd hack/images && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$REPO/bin/" ./registry)

# names REPORT: of the specs in a JUnit report.
names() { sed -n 's/.*<testcase name="\[It\] \([^"]*\)".*/\1/p' "$1" | sed "s/&#39;/'/g; s/&#34;/\"/g; s/&lt;/</g; s/&gt;/>/g; s/&amp;/\\&/g"; }

scratch
critest -ginkgo.dry-run -ginkgo.junit-report "$SCRATCH/all.xml" >/dev/null
names "$SCRATCH/all.xml" >"$SCRATCH/all"
grep -vE "benchmark|$LEFT_OUT" "$SCRATCH/all" | grep -E -- "$pattern" >"$SCRATCH/specs" || die "no spec is called $pattern"

if [ "$handler" = runc ]; then
	split -d -a 2 -l 1000 --additional-suffix=.specs "$SCRATCH/specs" "$reports/"
else
	split -d -a 2 -l $GROUP --additional-suffix=.specs "$SCRATCH/specs" "$reports/"
fi

# specs GROUP
specs() {
	local run=(hack/testbed/run --timeout "$LIMIT" --out "$reports" --)
	[ "$handler" != runc ] || run=()
	# The bridge and its addresses are in a network namespace that goes away with the run.
	"${run[@]}" unshare --net -- "$SCRIPT" inside "$handler" "$sandboxer" "$reports" "$1"
}
for file in "$reports"/*.specs; do
	group=$(basename "$file" .specs)
	say "group $group: $(wc -l <"$file") specs"
	run_group "$group" specs "$group"
done

say "left out by name: $(grep -cE "$LEFT_OUT" "$SCRATCH/all") ($LEFT_OUT)"
# A skipped spec of a group has a reason; those of other groups have none.
say "skipped by critest:"
cat "$reports"/*.xml 2>/dev/null | awk '
	/<testcase name="\[It\]/ { match($0, /\[It\] [^"]*/); name = substr($0, RSTART + 5, RLENGTH - 5) }
	/<skipped message="skipped - / { match($0, /skipped - [^"]*/); print "  " name ": " substr($0, RSTART + 10, RLENGTH - 10) }' | sort -u >&2
say "passed: $(cat "$reports"/*.xml 2>/dev/null | grep -c '<testcase name="\[It\].*status="passed"' || :)"
summary
