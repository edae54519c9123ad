#!/bin/bash
# Shows, promise by promise of docs/threat-model.md, that it holds: a line for each, with the tests that show it.
# usage: hack/security.sh [host] [guest]     (default: both)
# "host" is what this machine shows without a guest's kernel; it needs root. "guest" runs black-box tests where the guest kernel
# boots, which takes long in the test bed. The last line counts the promises and those that hold; the exit code is 1 if one does
# not, or was not shown.
set -euo pipefail
# shellcheck source=tools/lib.sh
. "$(dirname "$0")/tools/lib.sh"
cd "$REPO"
scratch

# A promise, then below it the packages and their tests that show it. A fuzz target runs its seeds; hack/fuzz.sh does more.
host_promises() {
	cat <<-'END'
		= The VMM has a user of its own, eight capabilities, its own namespaces, and no descriptor that leads to the host
		cmd/microvm-vmm TestJail/process
		pkg/shim/state TestChooseID
		= What it was lent it can use, but not change: images, devices, its own program
		pkg/vmm/jail TestJail/lent/with_Landlock TestJail/lent/without_Landlock
		pkg/shim TestOpenDisk TestOpenBlockDevice
		pkg/shim/network TestPod
		= Its root is the shared directory, with what is mounted there nodev, nosuid and noexec
		cmd/microvm-vmm TestJail/mounts
		pkg/shim/share TestTree TestMountsOfTheHost TestHostSeesNothing
		= It opens no device, however that came into its root
		pkg/shim/hostcgroup TestConfine
		cmd/microvm-vmm TestJail/process
		= It is in the pod's cgroup, of the version that has memory and cpu
		pkg/shim/hostcgroup TestInspect TestEnterAndLeave
		= With Landlock a descriptor of a directory outside of it leads nowhere, and nothing is executed
		pkg/vmm/jail TestJail/paths/with_Landlock TestJail/paths/without_Landlock
		= Its memory cannot be read by others of its user, and is in no dump
		cmd/microvm-vmm TestJail/process
		pkg/vmm/virtio/fs/passthrough TestIDsLeaveNoDump
		= Its threads, descriptors and message queues are limited, and user 0 means nothing to it
		cmd/microvm-vmm TestJail/process
		pkg/vmm/jail TestJail/confined
		= A system call outside of its lists kills the VMM, and the log names it
		cmd/microvm-vmm TestJail/socket TestJail/vCPU TestDenied
		pkg/vmm/seccomp TestFilter TestLog
		= Everything that a machine does is in the lists
		cmd/microvm-vmm TestJail/machine TestDevicesOnVCPUThread
		pkg/vmm/virtio/fs/passthrough TestConformanceInJail
		= There is no way around the jail, no silent fallback, and what a kernel lacks is told by name
		cmd/microvm-vmm TestJail/unjailed
		pkg/vmm/jail TestJail/missing
		= A VMM that its guest has taken over fills nothing of the shim's, and cannot hang it
		cmd/microvm-vmm TestSocketsStayNonBlocking
		pkg/vmm/control TestHostileVMM TestOnlyStreams TestVMMThatDoesNotRead TestVMMThatShutsItsEars TestPatience FuzzVMM FuzzReceive TestHowAVMMEnds
		= A guest reaches no host memory but its own
		pkg/vmm/memory TestSlice FuzzSlice TestBlocks FuzzBlocks
		pkg/vmm/virtio TestNextRefuses TestQueueMatchesModel TestRewrittenWhileRead FuzzQueue
		= A guest has no more memory and processors than was asked for
		pkg/vmm TestHotMemory TestHotMemoryFails TestStartVCPUs
		pkg/vmm/virtio/mem TestBadChains TestRequestedSize FuzzRequests
		= No driver crashes, hangs or bloats a device: rings, requests and lengths that change under its hands, resets in the middle
		pkg/vmm/virtio/balloon TestHostileDriver FuzzHostileDriver FuzzInflate
		pkg/vmm/virtio/blk TestHostileDriver FuzzHostileDriver FuzzRequest TestResetInFlight
		pkg/vmm/virtio/console TestHostileDriver FuzzHostileDriver FuzzOutput TestResetInFlight
		pkg/vmm/virtio/fs TestHostileDriver FuzzHostileDriver TestResetEndsLockWaits
		pkg/vmm/virtio/fs/passthrough TestReleaseBecomesLock TestHolderAmongMany
		pkg/vmm/virtio/mem TestHostileDriver FuzzHostileDriver
		pkg/vmm/virtio/net TestHostileDriver FuzzHostileDriver FuzzDevice TestBrokenRings TestResetUnderTraffic
		pkg/vmm/virtio/pmem TestHostileDriver FuzzHostileDriver FuzzRequest TestResetDuringFlush
		pkg/vmm/virtio/rng TestHostileDriver FuzzHostileDriver FuzzChain TestResetInFlight
		pkg/vmm/virtio/vsock TestHostileDriver FuzzHostileDriver FuzzTransmit TestReset
		pkg/vmm TestDetachWaits TestEndWhileDetachWaits
		= No access to a register does: configuration space, BARs, MSI-X, doorbells, ports
		pkg/vmm TestNothingThere FuzzGuestAccess TestHotplugHostile
		pkg/vmm/pci TestOddWrites FuzzBus
		pkg/vmm/virtio/virtiopci TestKicksOfWhatIsNotReady TestComesAndGoes FuzzTransport
		= No kernel file does
		pkg/vmm/boot TestLoadKernelRefuses FuzzLoadKernel
		= A flood costs the host a bounded amount: streams, console output, output that nobody reads, lines of log, changes of a tap
		pkg/vmm/virtio/vsock TestConnectionFlood TestHalfOpenFlood TestSlowReader TestRXStarved TestLinesOfLog
		pkg/vmm/virtio/net TestTapChanges
		pkg/vmm/virtio/console TestFloodWithStuckReader
		pkg/vmm TestRateLimit TestBudget
		pkg/shim TestLineLog FuzzLines TestLogLimit TestLogWithoutReader
		pkg/shim/stdio TestOutputWithoutReader TestOutputWithoutEnd
		= The file server reaches nothing outside of the shared directory
		pkg/vmm/virtio/fs/passthrough TestLinksLeadNowhere TestMagicLinks TestSwappedUnderfoot TestBadNames TestSeedsReachEverything FuzzRequests
		= Nothing that a guest may write to is on the way to what the shim mounts
		pkg/shim/share TestLayersAreOutOfReach TestRootfsOfLayers
		= What a guest makes the file server hold is bounded
		pkg/vmm/virtio/fs/passthrough TestNodeLimit TestHandleLimit TestLockLimit TestDescriptorLimit TestVolumeHangs
		= With rate limits, a guest's devices together get no more through than the limit, whatever they are sent
		pkg/vmm/ratelimit TestTake TestShared TestClose FuzzLimiter
		pkg/vmm/virtio/blk TestLimit TestLimitShared TestLimitReset
		pkg/vmm/virtio/net TestTransmitLimit TestReceiveLimit TestLimitShared TestLimitReset
		= What is read-only is so on the host's side
		pkg/vmm/virtio/fs/passthrough TestReadOnlyShare
		pkg/shim/share TestTree
		pkg/shim/guestspec TestReadOnlyEmptyDir TestMountFlags
		pkg/shim TestOpenBlockDevice
		= A guest gets the block device that its container names, and no other
		pkg/shim TestOpenDisk TestOpenBlockDevice TestBlockVolume
		pkg/shim/guestspec TestBlockDeviceAsMount TestNodeOnAVolume
		= No message of the guest names a host path
		pkg/shim TestGuestTextIsKnown TestGuestNamesNoPath
		= Nothing the agent says makes the shim crash, hang, grow or act on another sandbox
		pkg/shim/agentclient TestHostileReplies TestSilentAgent TestAnswersOutOfOrder TestMultipliedAnswer TestEndlessEvents TestBrokenFrames TestUnaskedFrames TestEndlessUnaskedFrames FuzzReplies FuzzAnswers FuzzStats
		pkg/shim TestHostileAgent TestSilentAgent TestKillIsEnforced TestKillOfTwoIsEnforced TestClockOfHostileAgent
		pkg/internal/printable TestString FuzzString
		= The shim has the capabilities of its list and no other ones, on every thread
		pkg/shim TestSurroundings
		= What starts a shim is checked: arguments, environment, stdin, the bundle's specification
		pkg/shim/bootstrap TestBadInvocation FuzzStdin
		pkg/shim TestLocate TestBadStart FuzzStart FuzzPlan
		pkg/shim/guestspec FuzzRewrite
		= What a guest sends goes out of its pod's links and nowhere else
		pkg/shim/network TestPod TestRefuse
		= A sandbox that has ended is told of once, and nothing stays on the host
		pkg/shim TestDeathOfTheMachine TestFailedStartOfTheSandbox TestDeleteAfterKill TestDeleteKeepsRecord TestDeleteOfASlowContainer
		pkg/shim/network TestRemoveAfterACrash
	END
}

# The same, with packages below test/e2e.
guest_promises() {
	cat <<-'END'
		= A container runs on a kernel of its own, in a machine of its own
		vm TestOwnKernel TestEachContainerHasItsMachine
		= A privileged container has the privileges of its guest, and namespaces of the host are refused
		crivm TestPrivilegedInTheGuestOnly TestHostNamespacesRefused
		= A machine is in its pod's cgroup
		crivm TestMachineIsInThePodsCgroup
		= A link that is swapped in a volume leads nowhere
		cri TestSymlinkSwap
		= A pod that limits its disk and its network gets no more, and all of it in the end
		crivm TestRateLimits
		= When shim, VMM, agent or guest die, containerd hears of it and nothing stays on the host
		vm TestKillVMM TestKillShim TestGuestEnds TestKillEverything
		crivm TestGuestPanics
		= A guest that does not start is ended, with an error that says why
		vm TestGuestDoesNotStart
		= Whatever the guest's root does to devices, vsock, console, files, output and network, the host is bounded and other pods go on
		chaos TestHostileContainer
		= Whatever the agent says or does not say, callers get an answer, the host is bounded and other pods go on
		chaos TestHostileAgent
	END
}

# plan PROMISES [BELOW]: which tests of which packages, in order of their names; wanted[PACKAGE] is a pattern of the tests' first
# names. A test that is named and does not exist is an error, before anything runs.
declare -A wanted result
packages=()
plan() {
	local package tests name missing=()
	wanted=()
	while read -r package tests; do
		[ "$package" != = ] || continue
		for name in $tests; do
			name=${name%%/*}
			[[ ${wanted[$package]:-}\| != *"|$name|"* ]] || continue
			wanted[$package]+="|$name"
			grep -qE "^func $name\(" "${2:-.}/$package"/*_test.go || missing+=("$package $name")
		done
	done < <("$1")
	[ ${#missing[@]} = 0 ] || die "no such test: ${missing[*]}"
	mapfile -t packages < <(printf '%s\n' "${!wanted[@]}" | sort)
}

# judge PACKAGE OUTPUT: takes what go test -v says of each test.
judge() {
	local verdict name
	while read -r verdict name; do
		# What was run twice counts by the second time.
		result[$1 $name]=$verdict
	done < <(sed -nE 's/^ *--- (PASS|FAIL|SKIP): ([^ ]+) .*/\1 \2/p' "$2")
}

# report PROMISES: a line for each promise.
report() {
	local package tests name promise='' how='' verdict=''
	line() {
		[ -n "$promise" ] || return 0
		printf '%-4s  %s <-%s\n' "$verdict" "$promise" "$how"
		promises=$((promises + 1))
		[ "$verdict" != ok ] || held=$((held + 1))
	}
	while read -r package tests; do
		if [ "$package" = = ]; then
			line
			promise=$tests how='' verdict=ok
			continue
		fi
		how+=" $package:"
		for name in $tests; do
			how+=" $name"
			[ "${result[$package $name]:-not run}" = PASS ] && continue
			how+=" (${result[$package $name]:-not run})"
			verdict=FAIL
		done
	done < <("$1")
	line
}

# took: the time since the part has begun.
took() { printf '%dm%02ds' $(((SECONDS - begin) / 60)) $(((SECONDS - begin) % 60)); }

promises=0 held=0
[ $# -gt 0 ] || set -- host guest
for part; do
	begin=$SECONDS
	case $part in
	host)
		packages e2fsprogs erofs-utils
		plan host_promises
		for package in "${packages[@]}"; do
			say "$package"
			go test -count=1 -v -tags privileged -run "^(${wanted[$package]#|})\$" "./$package" >"$SCRATCH/output" 2>&1 ||
				grep -vE '^(=== |\s*--- PASS)' "$SCRATCH/output" | tail -n 50 >&2
			judge "$package" "$SCRATCH/output"
		done
		echo "On this machine, without a guest's kernel ($(took)):"
		report host_promises
		;;
	guest)
		plan guest_promises test/e2e
		for package in "${packages[@]}"; do
			# A test of chaos takes a machine's time.
			E2E_GROUP=$([ "$package" = chaos ] && echo 1 || echo 5) \
				hack/e2e.sh "^(${wanted[$package]#|})\$" "$package" 2>&1 | tee "$SCRATCH/output" >&2 || :
			judge "$package" "$SCRATCH/output"
		done
		echo "With a guest, where its kernel boots ($(took)):"
		report guest_promises
		;;
	*) die "usage: hack/security.sh [host] [guest]" ;;
	esac
done
begin=0
echo "$promises promises, $held ok, in $(took)"
[ "$held" = "$promises" ]
