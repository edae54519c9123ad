# The targets are described by the text behind "##": make help shows them.
# What is built goes to bin/; what is expensive to build is kept in $(MICROVM_CACHE), outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

export MICROVM_CACHE ?= $(HOME)/.cache/microvm

# guest-agent is part of the guest image and built with it.
PROGRAMS := $(filter-out guest-agent,$(notdir $(wildcard cmd/*)))
GO_BUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false
# The shim speaks ttrpc only. The packages of containerd's API would bring gRPC in for everybody, HTTP/2 with it; there is one shim a sandbox.
PROGRAM_TAGS := no_grpc
TESTBED  := $(CURDIR)/hack/testbed/run

E2E_RUNTIME ?= io.containerd.microvm.v2
# A test's name or pattern, for go test -run.
RUN ?= .
FUZZTIME ?= 10s

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## build the programs of cmd/ that run on the host, into bin/
	@mkdir -p bin
	$(GO_BUILD) -tags $(PROGRAM_TAGS) -o bin/ $(PROGRAMS:%=./cmd/%)

.PHONY: kernel
kernel: ## build the guest kernel, bin/vmlinux (about 15 minutes, once)
	hack/kernel/build.sh

.PHONY: image
image: ## build the guest image, bin/guest.erofs, with the agent in it
	hack/image/build.sh

.PHONY: tools
tools: ## build containerd, ctr and runc for the tests (about 3 minutes, once)
	hack/tools/build.sh

.PHONY: images
images: ## make the container images of the tests from Debian packages
	hack/images/build.sh

# What a node for pods needs besides. nft is what the portmap plugin calls, iptables the firewall plugin, and the others snapshotters.
.PHONY: pod-tools
pod-tools: tools
	hack/tools/build.sh cri-tools cni
	hack/images/build.sh pods
	. hack/tools/lib.sh && packages nftables iptables dmsetup erofs-utils

.PHONY: testbed
testbed: ## make the emulated machine for hosts whose KVM cannot boot the guest kernel
	hack/testbed/build.sh

.PHONY: proto
proto: ## generate the Go code of the protocols
	hack/proto.sh

.PHONY: guest
guest: build kernel image # what a virtual machine consists of

.PHONY: test
test: lint unit test-agent e2e-ci e2e-cri-ci soak-ci ## what CI runs: form, unit tests, the agent as first process, and black-box tests of what matters most; stops at the first failure

.PHONY: test-all
test-all: lint unit privileged test-agent test-guest e2e-all ## every test there is: hours in the test bed

.PHONY: e2e-all
e2e-all: e2e ## all black-box tests, those of pods under both sandboxers: hours in the test bed
	for sandboxer in podsandbox shim; do \
		for suite in e2e-cri critest e2e-k8s; do $(MAKE) $$suite SANDBOXER=$$sandboxer; done; \
	done
	$(MAKE) k8s-conformance chaos

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, gosec, known vulnerabilities, shellcheck
	hack/lint.sh

.PHONY: unit
unit: ## tests that run anywhere, tiny guests on /dev/kvm among them, under the race detector
	CGO_ENABLED=1 go test -race -timeout 6m ./...

# Landlock's restriction goes to all threads, which Go cannot do in a program with cgo, and so not under the race detector.
WITHOUT_CGO := ^TestConformanceInJail$$

.PHONY: privileged
privileged: ## tests that mount and make cgroups and network namespaces on this host, under the race detector: they need root
	. hack/tools/lib.sh && packages e2fsprogs erofs-utils
	CGO_ENABLED=1 go test -race -count=1 -tags privileged -skip '$(WITHOUT_CGO)' ./pkg/shim/... ./pkg/agent ./pkg/vmm/virtio/fs/passthrough ./pkg/vmm/virtio/blk
	CGO_ENABLED=0 go test -count=1 -tags privileged -run '$(WITHOUT_CGO)' ./pkg/vmm/virtio/fs/passthrough

.PHONY: test-agent
test-agent: kernel ## the agent's tests, as the first process of a machine under QEMU's emulation
	hack/agent-test.sh

.PHONY: test-guest
test-guest: guest fsconformance ## tests of the VMM that boot the guest kernel, where KVM can
	CGO_ENABLED=0 go test -v -count=1 -p 1 -tags guestkernel -run '$(RUN)' -timeout 20m -exec '$(TESTBED) --timeout 1200 --' ./pkg/vmm ./pkg/vmm/virtio/{fs,net,vsock}

.PHONY: e2e
e2e: guest tools images fsconformance ## black-box tests with containerd and ctr, where KVM can boot the guest kernel
	. hack/tools/lib.sh && packages dmsetup erofs-utils
	E2E_RUNTIME=$(E2E_RUNTIME) hack/e2e.sh '$(RUN)'

# What "make e2e-cri", "make critest" and "make e2e-k8s" test: HANDLER=runc checks the tests themselves, without a virtual machine.
HANDLER ?= microvm
SANDBOXER ?= podsandbox
GUEST_OF_HANDLER := $(if $(filter runc,$(HANDLER)),,guest)

.PHONY: e2e-cri
e2e-cri: $(GUEST_OF_HANDLER) pod-tools ## black-box tests of pods with crictl and the CRI API: HANDLER (microvm), SANDBOXER (podsandbox)
	E2E_RUNTIME_HANDLER=$(HANDLER) E2E_SANDBOXER=$(SANDBOXER) hack/e2e.sh '$(RUN)' cri $(if $(GUEST_OF_HANDLER),crivm)

# One test a machine: each takes its time. The lines that say what was seen come last.
CYCLES ?= 30
SIDE_BY_SIDE ?= 1
CHAOS = mkdir -p report; rc=0; \
	E2E_GROUP=1 E2E_REPORT=$(CURDIR)/report E2E_CYCLES=$(CYCLES) E2E_SIDE_BY_SIDE=$(SIDE_BY_SIDE) E2E_RUNTIME_HANDLER=$(HANDLER) E2E_SANDBOXER=$(SANDBOXER) \
	hack/e2e.sh '$(RUN)' chaos 2>&1 | tee report/$@.log || rc=$$?; \
	grep -a '^promise: ' report/$@.log; exit $$rc

.PHONY: chaos
chaos: $(GUEST_OF_HANDLER) $(if $(GUEST_OF_HANDLER),hostile) pod-tools ## kill, starve and attack what pods consist of, one line a promise: HANDLER, SANDBOXER, RUN picks tests
	@$(CHAOS)

.PHONY: soak
soak: CYCLES = 1000
soak: SIDE_BY_SIDE = 4
soak: RUN = ^TestSoak$$
soak: export E2E_LIMIT = 100000
soak: $(GUEST_OF_HANDLER) pod-tools ## start and remove 1000 pods (CYCLES), 4 at a time (SIDE_BY_SIDE), with a table and a plot of what that costs in report/: HANDLER, SANDBOXER
	@$(CHAOS)

.PHONY: soak-ci
soak-ci: guest pod-tools
	E2E_CYCLES=30 E2E_REPORT=$(CURDIR)/report hack/e2e.sh '^TestSoak$$' chaos

.PHONY: critest
critest: $(GUEST_OF_HANDLER) pod-tools ## CRI's conformance tests: HANDLER (microvm), SANDBOXER (podsandbox), RUN picks specs
	hack/critest.sh $(HANDLER) $(SANDBOXER) '$(RUN)'

.PHONY: k8s-tools
k8s-tools: pod-tools
	hack/tools/build.sh etcd kubernetes
	hack/images/build.sh programs

.PHONY: e2e-k8s
e2e-k8s: $(GUEST_OF_HANDLER) k8s-tools ## black-box tests of pods in Kubernetes: HANDLER (microvm), SANDBOXER (podsandbox), RUN picks tests
	hack/k8s-e2e.sh own $(HANDLER) $(SANDBOXER) '$(RUN)'

.PHONY: e2e-kind
e2e-kind: guest k8s-tools ## the tests of e2e-k8s in a cluster of kind's, where there are Docker and a registry: SANDBOXER, RUN picks tests
	hack/kind/run.sh $(SANDBOXER) '$(RUN)'

.PHONY: k8s-conformance
k8s-conformance: $(GUEST_OF_HANDLER) k8s-tools ## Kubernetes' own tests of a node: HANDLER (microvm), SANDBOXER (podsandbox), RUN picks specs
	hack/tools/build.sh kubernetes-e2e
	hack/images/build.sh conformance
	hack/k8s-e2e.sh conformance $(HANDLER) $(SANDBOXER) '$(RUN)'

.PHONY: fsconformance
fsconformance: # the program that tests a share from inside a guest
	$(GO_BUILD) -o bin/ ./test/fsconformance

.PHONY: hostile
hostile: # the attacker of the tests: a program for containers, and a guest image that has it for its agent
	$(GO_BUILD) -o bin/ ./test/hostile
	hack/image/build.sh --init bin/hostile bin/hostile.erofs

# What CI runs of e2e; docs/limits.md names what it leaves out.
E2E_CI := ^Test(OwnKernel|ExitCodes|KillExec|ExecOfNoContainer|Events|OutOfMemoryEvent|SmallMemoryLimit|KillVMM|KillVMMOfDetached|GuestEnds|EachContainerHasItsMachine|ContainersOfOneSandboxShareAMachine)$$

.PHONY: e2e-ci
e2e-ci: guest tools images
	E2E_RUNTIME=$(E2E_RUNTIME) hack/e2e.sh '$(E2E_CI)'

.PHONY: e2e-cri-ci
e2e-cri-ci: guest pod-tools
	hack/e2e.sh '^Test(PodLifecycle|SeveralContainers|PortForward|PodToPod|SocketOnVolume)$$' cri

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (10s), or those that RUN matches, a line for each
	hack/fuzz.sh $(FUZZTIME) '$(RUN)'

.PHONY: test-security
test-security: guest hostile tools images pod-tools ## a line for each promise of docs/threat-model.md, with the tests that show it
	hack/security.sh

.PHONY: bench
bench: guest images pod-tools ## measure beside QEMU, runc and gVisor, print tables and keep them below bench/: RUN picks of machine,container,pod, or pod/nginx and the like
	@mkdir -p bench
	. hack/tools/lib.sh && packages qemu-system-x86 iperf3 wrk
	hack/tools/build.sh gvisor
	CGO_ENABLED=0 go test -run '^$$' -bench . -benchmem ./pkg/vmm/virtio ./pkg/vmm/virtio/blk ./pkg/vmm/virtio/vsock | tee bench/devices.txt
	$(GO_BUILD) -o bin/bench ./test/bench
	$(TESTBED) --out $(CURDIR)/bench --timeout 7200 -- bin/bench -out $(CURDIR)/bench/results.json $(if $(filter-out .,$(RUN)),-only $(RUN))

.PHONY: demo
demo: ## run a container in a virtual machine, from nothing
	hack/demo.sh

.PHONY: clean
clean: ## remove what was built in the checkout; the cache stays
	rm -rf bin
