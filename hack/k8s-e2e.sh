#!/bin/bash
# Runs tests of pods against a Kubernetes of their own (hack/k8s.sh).
# usage: hack/k8s-e2e.sh SUITE [HANDLER [SANDBOXER [PATTERN]]]
#   SUITE      own: the black-box tests of test/e2e/k8s; conformance: Kubernetes' [NodeConformance] tests
#   HANDLER    runtime handler: microvm (the default) or runc, which checks the tests themselves
#   SANDBOXER  podsandbox (the default) or shim
#   PATTERN    only tests whose name has it, a regular expression
# For runc, and where this host's KVM boots the guest kernel, all of it is on this host. Else the node is in the test bed's outer
# machine, a few tests at a time, and control plane and tests are beside it on this host at full speed.
# Logs are kept in bin/k8s/SUITE-HANDLER-SANDBOXER. The exit code is 1 if a test failed, or if more than a quarter of the groups
# could not be run.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
# shellcheck source=testbed/groups.sh
. "$(dirname "$0")/testbed/groups.sh"
cd "$REPO"
PATH=$REPO/bin:$MICROVM_CACHE/tools/bin:$PATH

LIMIT=2400 # seconds for one group
# Kubernetes' tests that are left out: those that take long, need a node to themselves, or something that is not there, like DNS.
LEFT_OUT='\[Slow\]|\[Serial\]|\[Disruptive\]|\[Flaky\]|\[Feature:|\[FeatureGate:|Alpha|DNS|SELinux|Windows'
# By name: it makes a link of the type dummy, which a guest's kernel has, but not every host's.
LEFT_OUT_OF_HOST=PrivilegedPod
# Also by name: pods on the host's network, which a virtual machine refuses.
LEFT_OUT_OF_GUESTS='node-pod communication|hostAliases and hostNetwork|if pod uses host network|KubeletManagedEtcHosts'
# Also by name, in the test bed, where a program takes half a minute to begin and a command seconds: these give it less (a probe's
# second, a hook's 15, three probes in half a minute).
LEFT_OUT_OF_BED='execute prestop (exec|https) hook|ignore terminated container|not. be restarted with a tcp:8080 liveness|disable liveness probes while pod is in progress'

# names: of the tests that the suite has and PATTERN names, one a line.
names() {
	case $SUITE in
	own)
		bin/e2e-k8s.test -test.list "$1" | grep '^Test'
		;;
	conformance)
		scratch
		e2e.test --ginkgo.dry-run --ginkgo.focus '\[NodeConformance\]' --ginkgo.skip "$LEFT_OUT" --ginkgo.junit-report "$SCRATCH/all.xml" >/dev/null
		# What was left out is in the report too, as skipped, and behind each name is a list of labels.
		grep '<testcase name="\[It\]' "$SCRATCH/all.xml" | grep 'status="passed"' | sed 's/.*<testcase name="\[It\] \([^"]*\)".*/\1/' |
			sed "s/&#39;/'/g; s/&#34;/\"/g; s/&lt;/</g; s/&gt;/>/g; s/&amp;/\\&/g; s/ \[[^]]*, [^]]*\]\$//" | grep -E -- "$1"
		;;
	esac
}

# run_tests: those in OUT/tests, against the cluster in STATE.
run_tests() {
	local focus=() name class=$HANDLER rc=0
	export KUBECONFIG=$STATE/admin.conf
	case $SUITE in
	own)
		[ "$HANDLER" != runc ] || class=none
		cd test/e2e/k8s
		E2E_RUNTIME_CLASS=$class e2e-k8s.test -test.v -test.timeout "${LIMIT}s" -test.run "^($(paste -sd '|' "$OUT/tests"))\$"
		;;
	conformance)
		while read -r name; do focus+=("--focus=${name//[^A-Za-z0-9 ]/.}"); done <"$OUT/tests"
		cd "$STATE"
		ginkgo run --no-color --procs="$([ "$HANDLER" = runc ] && echo 4 || echo 2)" --timeout="${LIMIT}s" --junit-report="$OUT/junit.xml" \
			"${focus[@]}" "$(command -v e2e.test)" -- --provider=local --disable-log-dump >"$OUT/e2e.log" 2>&1 || rc=1
		grep -E '^(Ran|FAIL!|SUCCESS!)|\[FAIL\]' "$OUT/e2e.log" | sort -u
		return $rc
		;;
	esac
}

# node_of COMMAND...: runs it where the node is, with what the suite needs there.
node_of() {
	export IMAGES="pause box web"
	# A large one, whose import takes minutes in the emulated machine.
	if grep -qE 'Nginx|Postgres|Redis|ServiceAccount' "$OUT/tests"; then IMAGES+=" programs"; fi
	if [ "$SUITE" = own ]; then
		"$@"
	else
		export CRI_DEFAULT=$HANDLER # the suite names no RuntimeClass
		ip link set lo up
		registry -layers "$MICROVM_CACHE/images/layers" -catalog conformance -- "$@"
	fi
}

# logs STATE: what is kept of a cluster, or of a part of it.
logs() { cp "$1"/log/*.log "$1"/c/containerd.log "$OUT/" 2>/dev/null || :; }

# on_this_host: control plane, node and tests, in namespaces of their own.
on_this_host() {
	local rc=0
	hack/k8s.sh start "$STATE" || rc=$?
	[ $rc != 0 ] || (run_tests) || rc=$?
	logs "$STATE"
	hack/k8s.sh wipe "$STATE" || rc=1
	return $rc
}

# beside: control plane and tests, on this host beside the machine that has the node. What the two tell each other is in OUT.
beside() {
	local rc=0
	export E2E_SLOW=10
	{
		hack/k8s.sh control "$STATE" || rc=$?
		if [ $rc = 0 ]; then
			cp -r "$STATE/node" "$OUT/credentials.new"
			mv "$OUT/credentials.new" "$OUT/credentials"
			hack/k8s.sh ready "$STATE" || rc=$?
		fi
		[ $rc != 0 ] || (run_tests) || rc=$?
	} >"$OUT/output" 2>&1
	logs "$STATE"
	hack/k8s.sh stop "$STATE" >>"$OUT/output" 2>&1 || :
	echo $rc >"$OUT/rc.new"
	mv "$OUT/rc.new" "$OUT/rc"
}

# machine: the node, in the machine.
machine() {
	mkdir /var/tmp/k8s
	until [ -e "$OUT/credentials" ] || [ -e "$OUT/rc" ]; do sleep 0.5; done
	hack/k8s.sh node /var/tmp/k8s "$OUT/credentials" || touch "$OUT/rc"
	until [ -e "$OUT/rc" ]; do sleep 1; done
	logs /var/tmp/k8s
	exit "$(grep . "$OUT/rc" || echo 1)"
}

case ${1:-} in
on_this_host | machine)
	node_of "$SCRIPT" "$1-"
	exit
	;;
on_this_host- | machine- | beside)
	"${1%-}"
	exit
	;;
own | conformance) ;;
*)
	sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac

case ${2:-} in runc) LEFT_OUT+="|$LEFT_OUT_OF_HOST" ;; *) LEFT_OUT+="|$LEFT_OUT_OF_GUESTS" ;; esac
export SUITE=$1 HANDLER=${2:-microvm} CRI=${3:-podsandbox} OUT STATE
pattern=${4:-.}
case $CRI in podsandbox | shim) ;; *) die "unknown sandboxer $CRI" ;; esac
packages openssl nftables util-linux
(cd test/e2e/k8s && CGO_ENABLED=0 go test -c -trimpath -tags e2e -o "$REPO/bin/e2e-k8s.test" .)
(cd hack/images && CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$REPO/bin/" ./registry)

where=bed group=6
if [ "$HANDLER" = runc ] || hack/testbed/probe.sh >/dev/null; then where=host group=1000; fi
[ $where = host ] || LEFT_OUT+="|$LEFT_OUT_OF_BED"
kept=$REPO/bin/k8s/$SUITE-$HANDLER-$CRI
rm -rf "$kept"
mkdir -p "$kept"
names "$pattern" >"$kept/all" || die "no test that can be run here is called $pattern"
STATE=$(mktemp -d /var/tmp/k8s.XXXX)
trap 'rm -rf "$STATE" "${SCRATCH:-}"' EXIT
split -d -a 3 -l "${GROUP:-$group}" "$kept/all" "$kept/group-"

# tests GROUP: one try at it.
tests() {
	local rc=0
	OUT=$kept/$1.d
	rm -rf "${STATE:?}"/* "$OUT"
	mkdir -p "$OUT"
	cp "$kept/$1" "$OUT/tests"
	if [ $where = host ]; then
		unshare --net --mount --pid --fork --kill-child --mount-proc -- "$SCRIPT" on_this_host
		return
	fi
	printf '#!/bin/bash\nexec unshare --mount --pid --fork --kill-child --mount-proc -- %q beside\n' "$SCRIPT" >"$OUT/beside"
	chmod 755 "$OUT/beside"
	hack/testbed/run --force-bed --timeout $LIMIT --out "$OUT" --mem "${MEM:-8192}" --beside "$OUT/beside" -- \
		env OUT="$OUT" CRI="$CRI" SUITE="$SUITE" HANDLER="$HANDLER" "$SCRIPT" machine || rc=$?
	cat "$OUT/output"
	return $rc
}

for file in "$kept"/group-???; do
	name="$(basename "$file"), $(wc -l <"$file") tests: $(head -n 1 "$file") …"
	[ "$SUITE" != own ] || name="$(basename "$file"): $(paste -sd ' ' "$file")"
	say "$name"
	run_group "$name" tests "$(basename "$file")"
done
summary
